//! `GalerneCluster` (`galerne.dev/v1alpha1`): what a person asks for. What becomes of it is in [`status`].
//!
//! Every rule that a field must keep stands beside it, as CEL for the API server and in the sentence that a person reads when
//! it is broken. `k8s/crds/` is written from here.

#![allow(unreachable_pub, reason = "KubeSchema derives hidden copies of structs")]
#![allow(clippy::duplicated_attributes, reason = "columns have types, and several the same")]

mod crd;
pub mod parts;
mod status;

pub use crd::crd_yaml;
pub use status::{
    AutoscaleStatus, ClusterStatus, GroupPhase, GroupStatus, Passed, PreloadPhase, PreloadStatus, Rollout,
    Trial,
};

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use parts::{
    DeviceSpec, EtcdSpec, GroupsSpec, ModelSpec, NumericsSpec, PlacementSpec, RouterSpec, SlaSpec, Storage,
    TlsSpec, UpdateSpec,
};

/// API group of all that is ours; also the prefix of labels and annotations.
pub const API_GROUP: &str = "galerne.dev";

/// A model served by tensor-parallel groups, with routers in front.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[kube(
    group = "galerne.dev",
    version = "v1alpha1",
    kind = "GalerneCluster",
    plural = "galerneclusters",
    shortname = "galerne",
    namespaced,
    derive = "PartialEq",
    status = "ClusterStatus",
    scale(
        spec_replicas_path = ".spec.groups.replicas",
        status_replicas_path = ".status.groupsTotal",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.model"),
    printcolumn(
        name = "N",
        type_ = "integer",
        json_path = ".spec.tensorParallel",
        description = "Ranks of a group"
    ),
    printcolumn(
        name = "Ready",
        type_ = "integer",
        json_path = ".status.groupsReady",
        description = "Groups that serve"
    ),
    printcolumn(
        name = "Wanted",
        type_ = "integer",
        json_path = ".status.groupsWanted",
        description = "Groups that shall serve"
    ),
    printcolumn(
        name = "Updated",
        type_ = "integer",
        json_path = ".status.groupsUpdated",
        description = "Groups that serve what the spec says now"
    ),
    printcolumn(name = "Routers", type_ = "integer", json_path = ".status.routersReady"),
    printcolumn(
        name = "Available",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Available")].status"#
    ),
    printcolumn(name = "What", type_ = "string", json_path = ".status.summary"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[kube(validation = (
    "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,44}[a-z0-9])?$')",
    "metadata.name begins with a letter, has small letters, digits and hyphens alone, and 46 of them at most: Services, pods and their labels are called after it"
))]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "!has(self.ranksPerHost) || self.tensorParallel % self.ranksPerHost == 0",
    "spec.ranksPerHost must divide spec.tensorParallel: every host of a group has the same number of its ranks"
))]
#[x_kube(validation = (
    "!has(self.numerics) || !has(self.numerics.virtualShards) || self.numerics.virtualShards % self.tensorParallel == 0",
    "spec.numerics.virtualShards must be a multiple of spec.tensorParallel: each rank hosts as many virtual shards as the others"
))]
#[x_kube(validation = (
    "!has(self.model.hub) || !has(self.storage.claim) || !has(self.storage.readOnly) || !self.storage.readOnly",
    "spec.model.hub is fetched into spec.storage, which must not be readOnly: name what is there already with spec.model.path"
))]
#[x_kube(validation = (
    "!has(self.model.path) || !has(self.storage.ephemeral)",
    "spec.model.path names what is in spec.storage already, and ephemeral storage begins empty: name a spec.model.hub, or a claim"
))]
#[x_kube(validation = (
    "!has(self.numerics.quantize) || (self.numerics.quantize == 'fp8') == (self.device.kind == 'Cuda')",
    "spec.numerics.quantize is fp8 with spec.device.kind Cuda, and q8_0 or q4_0 with Cpu"
))]
#[x_kube(validation = (
    "!has(self.numerics.kvDtype) || self.numerics.kvDtype == 'bf16' || (self.numerics.kvDtype == 'fp8') == (self.device.kind == 'Cuda')",
    "spec.numerics.kvDtype is bf16 or fp8 with spec.device.kind Cuda, and f32, bf16 or int8 with Cpu"
))]
#[x_kube(validation = (
    "!has(self.numerics.compute) || self.numerics.compute == 'auto' || self.device.kind == 'Cpu'",
    "spec.numerics.compute is a choice between ways of a CPU: leave it out with spec.device.kind Cuda"
))]
#[x_kube(validation = (
    "!has(self.numerics.fast) || !self.numerics.fast || self.device.kind == 'Cuda'",
    "spec.numerics.fast is for spec.device.kind Cuda: leave it out with Cpu"
))]
#[x_kube(validation = (
    "has(self.tls) == has(oldSelf.tls) || has(self.update) && has(self.update.strategy) && self.update.strategy == 'Recreate'",
    "spec.tls comes or goes with spec.update.strategy Recreate only: who speaks TLS and who does not cannot serve side by side"
))]
pub struct GalerneClusterSpec {
    /// Image of the galerne binary; by default the operator's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What is served.
    pub model: ModelSpec,
    /// N: ranks of a group, each with a device of its own.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default = "parts::one")]
    pub tensor_parallel: u16,
    /// Ranks of a group on one host (one pod); by default all N, so that a group is one pod.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks_per_host: Option<u16>,
    /// Ranks beyond those of a group that stand by in each of its pods: one takes the place of a rank that is lost.
    #[schemars(range(max = 16))]
    #[serde(default)]
    pub spares: u16,
    /// What an answer's bits depend on. Streams go on only at groups of the same numerics.
    #[serde(default)]
    pub numerics: NumericsSpec,
    /// What each rank runs on.
    #[serde(default)]
    pub device: DeviceSpec,
    /// How many groups.
    #[serde(default)]
    pub groups: GroupsSpec,
    /// What answers must keep: there are as many groups, between spec.groups.min and max, as hold it for the load that is
    /// expected. Without it load does not change their number, and where spec.groups.replicas is set that is their number
    /// whatever this calls for; status.autoscale tells it all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sla: Option<SlaSpec>,
    /// The faces.
    pub router: RouterSpec,
    /// Where ranks and routers meet.
    pub etcd: EtcdSpec,
    /// Mutual TLS between routers, leaders and ranks, and with a managed etcd. Without it they speak in the open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSpec>,
    /// Where pods of groups may run.
    #[serde(default)]
    pub placement: PlacementSpec,
    /// How one version takes another's place.
    #[serde(default)]
    pub update: UpdateSpec,
    /// Where the model's files are.
    pub storage: Storage,
    /// So long running answers may take to finish when their group is to end, in seconds; then other groups take them over.
    #[schemars(range(max = 3600))]
    #[serde(default = "parts::drain_s")]
    pub drain_seconds: u32,
    /// So long a group may take from its pods' start until it serves, in seconds.
    #[schemars(range(min = 10, max = 7200))]
    #[serde(default = "parts::start_s")]
    pub start_seconds: u32,
    /// Further flags of `galerne worker`, e.g. `--kv-blocks=4096`.
    #[schemars(length(max = 64))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worker_args: Vec<String>,
}

impl GalerneClusterSpec {
    /// Load, or its absence, may end the last group.
    pub fn may_sleep(&self) -> bool {
        self.sla.is_some() && self.groups.min == 0
    }
}

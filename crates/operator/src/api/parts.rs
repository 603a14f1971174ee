//! The parts of a `GalerneCluster`'s spec.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An amount, as Kubernetes writes it.
const QUANTITY: &str = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[mkMGTPE]|[eE][+-]?[0-9]+)?$";

/// Which model.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.hub) != has(self.path)",
    "spec.model has either hub (OWNER/NAME, which is fetched) or path (what is in spec.storage already)"
))]
#[x_kube(validation = (
    "!has(self.path) || !self.path.startsWith('/') && !self.path.contains('..')",
    "spec.model.path is relative to spec.storage and stays in it"
))]
pub struct ModelSpec {
    /// The name that clients ask for.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    /// Checkpoint on a model hub, `OWNER/NAME` or `OWNER/NAME@REVISION`: each pod fetches what its storage does not have yet.
    #[schemars(regex(pattern = r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<String>,
    /// Folder or GGUF file in the storage.
    #[schemars(length(min = 1, max = 512))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Hex SHA-256 that the ranks must find the model to have (`galerne model inspect` tells it): another one never serves.
    #[schemars(regex(pattern = r"^[0-9a-f]{64}$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Secret with the hub's token under the key `token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret: Option<String>,
}

/// What an answer's bits depend on.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NumericsSpec {
    /// S; by default the smallest multiple of N that gives every KV head a shard.
    #[schemars(range(min = 1, max = 128))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_shards: Option<u16>,
    /// `f32`, `int8`, `bf16` or `auto`.
    #[schemars(regex(pattern = "^(auto|f32|int8|bf16)$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute: Option<String>,
    /// On GPUs, whether cuBLASLt makes products of many tokens: then tokens depend on what runs beside them, and on N.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fast: Option<bool>,
    /// `f32`, `bf16` or `int8`; on GPUs `bf16` or `fp8`.
    #[schemars(regex(pattern = "^(f32|bf16|int8|fp8)$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_dtype: Option<String>,
    /// `q8_0`, `q4_0`, or on GPUs `fp8`.
    #[schemars(regex(pattern = "^(q8_0|q4_0|fp8)$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
}

/// What each rank runs on.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "self.kind != 'Cuda' || has(self.resource)",
    "spec.device.kind Cuda needs spec.device.resource, such as nvidia.com/gpu: a pod that asks for no GPU gets none"
))]
pub struct DeviceSpec {
    /// CPUs, or NVIDIA's GPUs.
    #[serde(default)]
    pub kind: DeviceKind,
    /// Resource of which each rank needs one, e.g. `nvidia.com/gpu`; none for CPUs.
    #[schemars(regex(pattern = r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// CPU that a pod asks for, for each of its ranks.
    #[schemars(extend("pattern" = QUANTITY))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Quantity>,
    /// Memory that a pod asks for and may use, in all.
    #[schemars(extend("pattern" = QUANTITY))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// Compute threads of each rank; by default the machine's cores divided by its ranks.
    #[schemars(range(min = 1, max = 1024))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum DeviceKind {
    /// Threads of a host.
    #[default]
    Cpu,
    /// A GPU a rank.
    Cuda,
}

/// How many groups.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.min <= self.max", "spec.groups.min must not be above spec.groups.max"))]
#[x_kube(validation = (
    "!has(self.replicas) || self.min <= self.replicas && self.replicas <= self.max",
    "spec.groups.replicas must lie between spec.groups.min and spec.groups.max"
))]
pub struct GroupsSpec {
    /// At least so many; 0 lets a cluster without requests go to sleep.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default = "one")]
    pub min: u16,
    /// At most so many.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "one")]
    pub max: u16,
    /// With spec.sla and a min of 0 the last group goes when nobody has asked for anything for so many seconds. Routers hold
    /// the next request until a group serves.
    #[schemars(range(min = 10, max = 86_400))]
    #[serde(default = "idle_s")]
    pub idle_seconds: u32,
    /// So many, whatever the load and spec.sla: what `kubectl scale` and other autoscalers set. Unset, spec.sla decides
    /// between min and max, and without that there are min.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u16>,
}

impl Default for GroupsSpec {
    fn default() -> Self {
        Self { min: 1, max: 1, idle_seconds: idle_s(), replicas: None }
    }
}

fn idle_s() -> u32 {
    300
}

/// What answers must keep.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.ttft) || has(self.tpot)", "spec.sla names a ttft, a tpot, or both"))]
pub struct SlaSpec {
    /// Time to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft: Option<Target>,
    /// Time per token after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpot: Option<Target>,
}

/// So many of a hundred requests take no longer than this.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Of a hundred requests.
    #[schemars(range(min = 1, max = 99))]
    pub percentile: u8,
    /// Milliseconds.
    #[schemars(range(min = 1, max = 600_000))]
    pub ms: u32,
}

/// The faces.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.apiKeysSecret) != (has(self.noAuth) && self.noAuth)",
    "spec.router names an apiKeysSecret, or says noAuth: true if everybody who reaches it may use it"
))]
pub struct RouterSpec {
    /// Routers.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "one")]
    pub replicas: u16,
    /// Secret with the API keys' file under the key `keys.toml` (see `galerne key new`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_keys_secret: Option<String>,
    /// Ask nobody for a key.
    #[serde(default)]
    pub no_auth: bool,
    /// TLS Secret (`tls.crt`, `tls.key`) of the faces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_secret: Option<String>,
    /// Further flags of `galerne router`.
    #[schemars(length(max = 64))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
}

/// Mutual TLS within the cluster.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.secret) != has(self.issuer)",
    "spec.tls names the secret that holds the certificate, or the issuer of which cert-manager is to get one"
))]
pub struct TlsSpec {
    /// Secret with a certificate for the name `galerne` that servers and clients may show (`tls.crt`, `tls.key`), and with those of
    /// the authorities that are believed (`ca.crt`). When it changes pods read it again; nothing is restarted.
    #[schemars(length(min = 1, max = 253))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// Issuer of cert-manager, one that tells its authority's certificate, as those of kind CA and Vault do: a Certificate of it is
    /// made, and renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<IssuerRef>,
}

/// An issuer of cert-manager.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuerRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// `Issuer`, which is in the cluster's namespace, `ClusterIssuer`, or a kind of others.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default = "issuer_kind")]
    pub kind: String,
    /// API group of that kind.
    #[schemars(length(min = 1, max = 253))]
    #[serde(default = "issuer_group")]
    pub group: String,
}

/// Where ranks and routers meet.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.endpoints) != has(self.managed)",
    "spec.etcd names the endpoints of an etcd, or asks for a managed one for trials"
))]
#[x_kube(validation = (
    "!has(self.endpoints) || self.endpoints.all(endpoint, endpoint.startsWith('https://') == has(self.tls))",
    "endpoints of spec.etcd that begin with https:// need spec.etcd.tls, and with it all of them do"
))]
#[x_kube(validation = (
    "!has(self.tls) || has(self.endpoints)",
    "spec.etcd.tls is for spec.etcd.endpoints: a managed etcd has the certificate of spec.tls"
))]
pub struct EtcdSpec {
    /// Endpoints, e.g. `http://etcd.infra:2379`, or `https://…` with spec.etcd.tls.
    #[schemars(length(min = 1, max = 16), inner(length(max = 300)))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<Vec<String>>,
    /// One member in a pod of its own, for trials: while it is away, no group can form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedEtcd>,
    /// TLS with the endpoints. The operator has files of its own (`--etcd-ca`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<EtcdTlsSpec>,
}

/// TLS with etcd.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EtcdTlsSpec {
    /// Secret with the certificates of etcd's authority (`ca.crt`), and the one to show to etcd (`tls.crt`, `tls.key`).
    #[schemars(length(min = 1, max = 253))]
    pub secret: String,
    /// Show none: this etcd asks for none, and the secret has none.
    #[serde(default)]
    pub anonymous: bool,
}

/// An etcd for trials.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ManagedEtcd {
    /// Its image.
    #[serde(default = "etcd_image")]
    pub image: String,
}

/// Where pods of groups may run.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlacementSpec {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that do not matter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Node label of what a group's hosts should have in common, e.g. `topology.kubernetes.io/zone`: by preference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology_key: Option<String>,
    /// A group whose hosts do not have it in common does not start.
    #[serde(default)]
    pub topology_required: bool,
    /// Priority class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class: Option<String>,
    /// Runtime class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class: Option<String>,
}

/// How one version takes another's place.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "self.strategy != 'Rolling' || self.maxSurge > 0 || self.maxUnavailable > 0",
    "spec.update.maxSurge and maxUnavailable cannot both be 0: no group could ever be replaced"
))]
pub struct UpdateSpec {
    /// Group by group, or all at once.
    #[serde(default)]
    pub strategy: Strategy,
    /// Groups beyond those wanted that may exist while others are replaced.
    #[schemars(range(max = 100))]
    #[serde(default = "one")]
    pub max_surge: u16,
    /// Groups that may be missing while others are replaced; the last one that serves stays in any case.
    #[schemars(range(max = 100))]
    #[serde(default)]
    pub max_unavailable: u16,
    /// Start nothing new and end nothing old of a version until this is taken back.
    #[serde(default)]
    pub paused: bool,
    /// Where an old group has to go before a new one has a place, bring the new version's weights and image to its nodes first.
    #[serde(default = "yes")]
    pub preload: bool,
    /// What the first group of a version must do before it gets requests.
    #[serde(default)]
    pub canary: CanarySpec,
}

impl Default for UpdateSpec {
    fn default() -> Self {
        let (strategy, canary) = (Strategy::default(), CanarySpec::default());
        Self { strategy, max_surge: 1, max_unavailable: 0, paused: false, preload: true, canary }
    }
}

/// In which order groups are replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Strategy {
    /// Group by group: a new one serves before an old one goes.
    #[default]
    Rolling,
    /// All old groups go first: nothing serves meanwhile. For clusters without room for one group more.
    Recreate,
}

/// What the first group of a version must do before it gets requests.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanarySpec {
    /// Give it no requests before it has answered fixed prompts: in time, and, if its numerics are those of a group that serves
    /// already, with that group's tokens.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Milliseconds that an answer to one of them may take.
    #[schemars(range(min = 1, max = 600_000))]
    #[serde(default = "canary_ms")]
    pub answer_ms_max: u32,
    /// What follows when it fails.
    #[serde(default)]
    pub on_failure: OnFailure,
}

impl Default for CanarySpec {
    fn default() -> Self {
        Self { enabled: true, answer_ms_max: canary_ms(), on_failure: OnFailure::default() }
    }
}

/// What follows when a version's first group fails. The old groups serve on in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum OnFailure {
    /// It stays, without requests, to be looked at.
    #[default]
    Pause,
    /// It goes.
    Rollback,
}

/// Where the model's files are.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "(has(self.claim) ? 1 : 0) + (has(self.hostPath) ? 1 : 0) + (has(self.ephemeral) ? 1 : 0) == 1",
    "spec.storage is one of claim, hostPath and ephemeral"
))]
#[x_kube(validation = (
    "!has(self.hostPath) || self.hostPath.startsWith('/') && !self.hostPath.contains('..')",
    "spec.storage.hostPath begins at the root of a node (/models), and goes nowhere but down"
))]
pub struct Storage {
    /// A PersistentVolumeClaim that all pods can mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    /// A folder of every node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<String>,
    /// The pod's own, of this size at most: fetched anew by each pod.
    #[schemars(extend("pattern" = QUANTITY))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<Quantity>,
    /// Mount it so that nothing can be written.
    #[serde(default)]
    pub read_only: bool,
}

pub(super) fn one() -> u16 {
    1
}

pub(super) fn drain_s() -> u32 {
    30
}

pub(super) fn start_s() -> u32 {
    600
}

fn canary_ms() -> u32 {
    30_000
}

fn yes() -> bool {
    true
}

fn issuer_kind() -> String {
    "Issuer".to_owned()
}

fn issuer_group() -> String {
    "cert-manager.io".to_owned()
}

fn etcd_image() -> String {
    "registry.k8s.io/etcd:3.5.16-0".to_owned()
}

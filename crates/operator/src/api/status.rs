//! What has become of a `GalerneCluster`, as `kubectl get` tells it. It is also where the planner keeps what it must remember:
//! since when a group is in its phase, and how the canary of a version went.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::GalerneClusterSpec;

/// The whole.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// Generation of the spec that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// What is happening, in a few words.
    #[serde(default)]
    pub summary: String,
    /// The name that clients ask for.
    #[serde(default)]
    pub model: String,
    /// Groups that there are.
    #[serde(default)]
    pub groups_total: u32,
    /// Groups that shall serve.
    #[serde(default)]
    pub groups_wanted: u32,
    /// Groups that serve.
    #[serde(default)]
    pub groups_ready: u32,
    /// Groups that serve what the spec says now.
    #[serde(default)]
    pub groups_updated: u32,
    /// Routers that are ready.
    #[serde(default)]
    pub routers_ready: u32,
    /// Selects the pods of all groups: for autoscalers.
    #[serde(default)]
    pub selector: String,
    /// `Available`, `Progressing`, `Degraded`; with spec.sla also `HoldsSla`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Each group, by its number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub groups: Vec<GroupStatus>,
    /// What spec.sla calls for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<AutoscaleStatus>,
    /// The version that is to take the others' place, or has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// The version that passed its trial last: groups are made of it while the one that is asked for must not serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed: Option<Passed>,
}

/// How many groups spec.sla calls for. It decides unless spec.groups.replicas is set.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleStatus {
    /// So many, within spec.groups.min and max.
    pub groups: u32,
    /// Why, in a word.
    pub reason: String,
    /// Why, in a sentence: what is expected, and what so many groups would make of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Whether so many would keep what is promised; unset while too little is known to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<bool>,
    /// How long a group takes to start, in seconds, as it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start_seconds: Option<u32>,
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// Its name in etcd and in the StatefulSet's: `g0`.
    pub name: String,
    /// What it is doing.
    pub phase: GroupPhase,
    /// Since when, in Unix seconds.
    pub since: i64,
    /// Its version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub revision: String,
    /// Its incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Ranks that are ready, of N.
    #[serde(default)]
    pub ranks_ready: u16,
    /// It has taken requests since it was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub served: bool,
    /// Why its last incarnation ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reformation: Option<String>,
    /// Why it is not Ready, as far as that is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// What a group is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
pub enum GroupPhase {
    /// Its pods wait for a place, or for their images.
    #[default]
    Pending,
    /// Its pods run; it does not serve yet.
    Starting,
    /// It answers, but gets no requests: its version is on trial.
    Trial,
    /// It serves.
    Ready,
    /// It serves with fewer ranks than it should have.
    Degraded,
    /// It has served, and forms anew.
    Reforming,
    /// A container of it fails again and again.
    Failing,
    /// It takes nothing new, and will end.
    Draining,
    /// Its pods end.
    Ending,
}

/// How the version of the spec came in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Which version.
    pub revision: String,
    /// How its first group did.
    pub trial: Trial,
    /// What was seen, or why it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Nodes to which it is brought before the groups go that are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub preloads: Vec<PreloadStatus>,
}

/// A version that passed its trial, and what it is made from.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Passed {
    /// Which version.
    pub revision: String,
    /// The spec as it was, as JSON, with the image that it meant.
    pub spec: String,
}

impl Passed {
    /// `spec` is what was asked for, of galerne's `image` where it says none.
    pub fn new(revision: String, spec: &GalerneClusterSpec, image: &str) -> Self {
        let image = spec.image.clone().or_else(|| Some(image.to_owned()));
        let spec = GalerneClusterSpec { image, ..spec.clone() };
        Self { revision, spec: serde_json::to_string(&spec).expect("a spec is JSON") }
    }

    /// The spec as it was; `None` if it is another operator's, whose specs are not read here.
    pub fn spec(&self) -> Option<GalerneClusterSpec> {
        serde_json::from_str(&self.spec).ok()
    }
}

/// A version's weights and image, on their way to a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreloadStatus {
    /// The node.
    pub node: String,
    /// How far they are.
    pub phase: PreloadPhase,
    /// What they wait for, or why they cannot be brought there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// How far a version is on its way to a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
pub enum PreloadPhase {
    /// Under way.
    #[default]
    Loading,
    /// There.
    Done,
    /// It could not be brought there, and is tried again.
    Failed,
}

/// How the first group of a version did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Trial {
    /// It has not been tried yet.
    #[default]
    Pending,
    /// It may serve.
    Passed,
    /// It must not.
    Failed,
}

//! One cluster as it was seen at one moment: what Kubernetes and etcd show, in the words that the planner thinks in.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::api::{PreloadPhase, Trial};

/// One cluster, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Seen {
    /// Unix seconds.
    pub now: i64,
    /// Whether etcd's view is known. Without it nothing is ended that runs: nobody can be asked to drain.
    pub fleet_known: bool,
    /// Groups by their numbers: those that have a StatefulSet, pods, or a record in etcd.
    pub groups: BTreeMap<u32, GroupSeen>,
    /// Routers that are ready.
    pub routers_ready: u32,
    /// Routers are not yet those that the Deployment says.
    pub routers_behind: bool,
    /// A router that fails, and why; or what one waits for where none is ready.
    pub router_trouble: Option<String>,
    /// Why a managed etcd is not there, as far as its pod tells.
    pub etcd_trouble: Option<String>,
    /// Whether some node has the resource that ranks need; unknown if nodes cannot be seen.
    pub resource_offered: Option<bool>,
    /// What is being brought to nodes.
    pub preloads: Vec<PreloadSeen>,
    /// What somebody has to do before the operator can speak to etcd.
    pub lacks: Option<String>,
    /// How a trial went that was run since the status was written.
    pub trial: Option<TrialSeen>,
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct GroupSeen {
    /// Version of its StatefulSet; `None` if there is none, or if it is being deleted.
    pub revision: Option<String>,
    /// When that was made, in Unix seconds.
    pub created: i64,
    /// That it is to end.
    pub retired: Option<Retired>,
    /// Its pods.
    pub pods: Vec<PodSeen>,
    /// Why pods of it could not be made: a quota, say. It may be long ago.
    pub refused: String,
    /// Its leader's word is good.
    pub serving: bool,
    /// Its incarnation.
    pub epoch: Option<u64>,
    /// Ranks of that incarnation that are ready.
    pub ranks_ready: u16,
    /// Ranks that are registered and not dead.
    pub ranks_living: u16,
    /// It was asked to drain, and has not formed since.
    pub draining: bool,
    /// It gets no requests.
    pub held: bool,
    /// etcd has a record of it.
    pub remembered: bool,
    /// Digest of the model that it serves.
    pub digest: String,
    /// Why its last incarnation ended.
    pub last_loss: Option<String>,
}

/// A group that is to end.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Retired {
    /// Since when, in Unix seconds.
    pub since: i64,
    /// Why.
    pub why: String,
}

/// One pod: a host's share of a group.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct PodSeen {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub phase: PodPhase,
    /// Why, as far as Kubernetes or its last container tells.
    pub message: String,
    /// Its node, once it has one.
    pub node: String,
    /// Its node takes no more pods: somebody wants it empty.
    pub node_leaving: bool,
    /// Its node is gone, or has not been heard of for long.
    pub node_lost: bool,
    /// Ranks of it that are registered and not dead: whoever cannot reach its node, they can reach etcd.
    pub ranks_living: u16,
}

/// A pod that brings a version to a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct PreloadSeen {
    /// Its name.
    pub pod: String,
    /// The node.
    pub node: String,
    /// The version.
    pub revision: String,
    /// How far it is.
    pub phase: PreloadPhase,
    /// Since when it has been there, or when it failed, in Unix seconds.
    pub since: i64,
    /// What it waits for, or why it failed.
    pub message: String,
}

/// What a pod is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum PodPhase {
    /// It waits for a node, an image, its volumes, or its first container.
    #[default]
    Waiting,
    /// Its containers run.
    Running,
    /// A container of it ends again and again.
    Failing,
    /// It is being deleted.
    Ending,
}

/// How a trial went.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct TrialSeen {
    /// Of which version.
    pub revision: String,
    /// Passed or failed.
    pub trial: Trial,
    /// What was seen.
    pub message: String,
}

impl GroupSeen {
    /// It holds devices, or may: a StatefulSet or pods are there.
    pub fn occupies(&self) -> bool {
        self.revision.is_some() || !self.pods.is_empty()
    }

    /// It gets requests, and will go on to.
    pub fn available(&self) -> bool {
        self.stays() && self.serving && !self.held
    }

    /// Nobody has decided that it is to end.
    pub fn stays(&self) -> bool {
        self.revision.is_some() && self.retired.is_none()
    }

    /// It is where it cannot stay.
    pub fn displaced(&self) -> bool {
        self.pods.iter().any(|pod| pod.node_leaving)
    }

    /// Why some of its `hosts` pods are not there.
    pub fn lacks_pods(&self, hosts: u16) -> Option<&str> {
        let lacks = !self.refused.is_empty() && self.pods.len() < usize::from(hosts);
        lacks.then_some(&*self.refused)
    }

    /// All its `hosts` pods have found places.
    pub fn is_placed(&self, hosts: u16) -> bool {
        self.pods.len() >= usize::from(hosts) && self.pods.iter().all(|pod| !pod.node.is_empty())
    }

    /// All its `hosts` pods run.
    pub fn runs(&self, hosts: u16) -> bool {
        let running = self.pods.iter().filter(|pod| pod.phase == PodPhase::Running);
        running.count() == usize::from(hosts) && self.pods.len() == usize::from(hosts)
    }
}

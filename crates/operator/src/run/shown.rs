//! What is kept of the objects that the watches show.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Event, Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;

use super::index::Key;
use crate::api::PreloadPhase;
use crate::build::{Manifest, is_owned};
use crate::names;
use crate::plan::{PodPhase, Retired};

/// Of what we have made: a StatefulSet, Deployment, Service or PodDisruptionBudget.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Made {
    pub(crate) hash: String,
    /// The group that it is of.
    pub(crate) group: Option<u32>,
    pub(crate) revision: String,
    /// Unix seconds.
    pub(crate) created: i64,
    pub(crate) retired: Option<Retired>,
    pub(crate) deleting: bool,
    /// A Deployment's pods that are ready.
    pub(crate) ready: u32,
    /// Why pods of it cannot be made.
    pub(crate) refused: Option<String>,
    /// They are not yet all there, or not all those that it says.
    pub(crate) behind: bool,
    /// Somebody sets the number of its pods by its scale, and owns it.
    pub(crate) scaled: bool,
    /// How many pods the spec said when that was last heeded.
    pub(crate) replicas: String,
    /// The fields that we own by having applied them, as JSON.
    pub(crate) fields: Arc<str>,
    /// This is what came of our own apply: what is not ours of it now, the server gives to somebody else whenever we apply.
    pub(crate) fresh: bool,
}

/// Of a group's pod.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodShown {
    pub(crate) group: u32,
    pub(crate) node: Option<String>,
    pub(crate) state: PodState,
}

/// What a pod is doing, and why, as far as it tells.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PodState {
    /// Pods of a StatefulSet have the names of those before them.
    uid: String,
    pub(crate) phase: PodPhase,
    pub(crate) message: String,
}

/// Of a pod that brings a version to a node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Preload {
    pub(crate) node: String,
    pub(crate) revision: String,
    pub(crate) phase: PreloadPhase,
    /// When it was made, or failed, in Unix seconds.
    pub(crate) since: i64,
    pub(crate) message: String,
}

/// Of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeShown {
    /// Somebody wants it empty.
    pub(crate) leaving: bool,
    /// It has not been heard of since then, in Unix seconds.
    pub(crate) silent_since: Option<i64>,
    /// Resources of which it has some, other than those that every node has.
    pub(crate) resources: Vec<String>,
}

/// Taints of nodes that are to be emptied: by `kubectl cordon`, and by the two autoscalers that end nodes.
const LEAVING: [&str; 3] =
    ["node.kubernetes.io/unschedulable", "ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"];

/// The cluster that an object says it is of.
pub(crate) fn cluster_of(meta: &ObjectMeta) -> Option<Key> {
    let name = meta.labels.as_ref()?.get(names::CLUSTER)?;
    Some((meta.namespace.clone()?, name.clone()))
}

impl Made {
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name)).map(String::as_str);
        let noted =
            |name: &str| meta.annotations.as_ref().and_then(|noted| noted.get(name)).map(String::as_str);
        Self {
            hash: noted(names::HASH).unwrap_or_default().to_owned(),
            group: label(names::GROUP).and_then(names::group_number),
            revision: label(names::REVISION).unwrap_or_default().to_owned(),
            created: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            retired: noted(names::RETIRED).map(retired),
            deleting: meta.deletion_timestamp.is_some(),
            ready: 0,
            refused: None,
            behind: false,
            scaled: scaled(meta),
            replicas: noted(names::REPLICAS).unwrap_or_default().to_owned(),
            fields: applied(meta).unwrap_or_default().into(),
            fresh: false,
        }
    }

    /// Whether the number of its pods is another's to set: an autoscaler's, or whoever's that scales, until the spec says another
    /// number than it did when it was scaled.
    pub(crate) fn is_rescaled(&self, manifest: &Manifest) -> bool {
        self.scaled && manifest.body["metadata"]["annotations"][names::REPLICAS] == *self.replicas
    }

    /// Whether somebody has changed what `manifest` says, since it was applied.
    pub(crate) fn has_drifted(&self, manifest: &Manifest) -> bool {
        let fields = || serde_json::from_str(&self.fields).unwrap_or_default();
        !self.fresh && !is_owned(&manifest.body, &fields())
    }

    pub(crate) fn of_deployment(deployment: &Deployment) -> Self {
        let status = deployment.status.clone().unwrap_or_default();
        let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let counts = [status.replicas, status.updated_replicas, status.available_replicas];
        let behind = status.observed_generation != deployment.metadata.generation
            || counts.iter().any(|count| count.unwrap_or(0) != wanted);
        let mut conditions = status.conditions.into_iter().flatten();
        let failure = conditions.find(|is| is.type_ == "ReplicaFailure" && is.status == "True");
        Self {
            refused: failure.and_then(|failure| failure.message),
            ready: status.ready_replicas.unwrap_or(0).unsigned_abs(),
            behind,
            ..Self::of(&deployment.metadata)
        }
    }
}

/// What we own by apply, in the API's own form.
fn applied(meta: &ObjectMeta) -> Option<String> {
    let mut entries = meta.managed_fields.iter().flatten();
    let ours = entries.find(|entry| {
        entry.manager.as_deref() == Some(names::MANAGER)
            && entry.operation.as_deref() == Some("Apply")
            && entry.subresource.is_none()
    })?;
    ours.fields_v1.as_ref().map(|fields| fields.0.to_string())
}

/// Whether somebody owns the number of pods by the scale subresource, as autoscalers and `kubectl scale` do.
fn scaled(meta: &ObjectMeta) -> bool {
    let mut entries = meta.managed_fields.iter().flatten();
    entries.any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0["f:spec"]["f:replicas"]);
        entry.subresource.as_deref() == Some("scale") && fields.is_some_and(|owned| !owned.is_null())
    })
}

/// Reads what [`names::RETIRED`] says.
fn retired(noted: &str) -> Retired {
    let (since, why) = noted.split_once(' ').unwrap_or((noted, ""));
    Retired { since: since.parse().unwrap_or(0), why: why.to_owned() }
}

impl PodShown {
    /// `None` for a pod of no group.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let group = pod.labels().get(names::GROUP).and_then(|name| names::group_number(name))?;
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        Some(Self { group, node, state: PodState::of(pod) })
    }
}

impl PodState {
    pub(crate) fn of(pod: &Pod) -> Self {
        let status = pod.status.as_ref();
        let failing = containers(pod).find_map(failure);
        let runs = status.and_then(|status| status.phase.as_deref()) == Some("Running")
            && containers(pod)
                .all(|container| container.state.as_ref().is_some_and(|state| state.waiting.is_none()));
        let (phase, message) = match failing {
            _ if pod.metadata.deletion_timestamp.is_some() => (PodPhase::Ending, String::new()),
            Some(message) => (PodPhase::Failing, message),
            // Between two failures it runs, too.
            None if runs => {
                (PodPhase::Running, containers(pod).find_map(|it| before(pod, it)).unwrap_or_default())
            }
            None => (PodPhase::Waiting, waits_for(pod).unwrap_or_default()),
        };
        Self { uid: pod.uid().unwrap_or_default(), phase, message }
    }

    /// One that waits and does not say for what waits for its volumes, if somebody says so.
    pub(crate) fn explain(&mut self, unmounted: &BTreeMap<String, String>) {
        if self.phase == PodPhase::Waiting && self.message.is_empty() {
            self.message = unmounted.get(&self.uid).cloned().unwrap_or_default();
        }
    }
}

impl Preload {
    /// One that could not even be made.
    pub(crate) fn refused(pod: &Pod, why: &str) -> Self {
        let since = jiff::Timestamp::now().as_second();
        Self { phase: PreloadPhase::Failed, since, message: why.to_owned(), ..Self::of(pod) }
    }

    pub(crate) fn of(pod: &Pod) -> Self {
        let noted = |name: &str| pod.annotations().get(name).cloned().unwrap_or_default();
        let status = pod.status.clone().unwrap_or_default();
        let made = pod.creation_timestamp().map_or(0, |time| time.0.as_second());
        let ended = containers(pod).find_map(|container| {
            let ended = container.state.as_ref()?.terminated.as_ref()?;
            ended.finished_at.as_ref().filter(|_| ended.exit_code != 0)
        });
        let (phase, message) = match status.phase.as_deref() {
            Some("Succeeded") => (PreloadPhase::Done, String::new()),
            // Its last words, or kubelet's: that it took too long, say.
            Some("Failed") => {
                let words = containers(pod).find_map(failure);
                (PreloadPhase::Failed, words.or(status.message).unwrap_or_default())
            }
            _ => (PreloadPhase::Loading, waits_for(pod).unwrap_or_default()),
        };
        let since = ended.map_or(made, |ended| ended.0.as_second());
        let revision = pod.labels().get(names::REVISION).cloned().unwrap_or_default();
        Self { node: noted(names::NODE), revision, phase, since, message }
    }
}

/// A pod's containers as kubelet tells of them, in their order.
fn containers(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    pod.status.iter().flat_map(|status| {
        let (first, then) = (&status.init_container_statuses, &status.container_statuses);
        first.iter().flatten().chain(then.iter().flatten())
    })
}

/// What a pod that does not run yet waits for: a place, or an image.
fn waits_for(pod: &Pod) -> Option<String> {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let unscheduled =
        conditions.find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    let place = unscheduled.and_then(|condition| condition.message.clone());
    let mut waiting = containers(pod).filter_map(|container| container.state.as_ref()?.waiting.as_ref());
    place.or_else(|| waiting.next()?.message.clone())
}

/// Why a container that runs has ended before, unless it has shown since that it is well.
fn before(pod: &Pod, container: &ContainerStatus) -> Option<String> {
    let spec = pod.spec.iter().flat_map(|spec| &spec.containers).find(|spec| spec.name == container.name);
    let proven = container.ready && spec.is_some_and(|spec| spec.readiness_probe.is_some());
    let last = container.last_state.as_ref()?.terminated.as_ref()?;
    (!proven && last.exit_code != 0).then(|| why(last))
}

/// Why a container has ended: what was done to it, or what it has said.
fn why(ended: &ContainerStateTerminated) -> String {
    if ended.reason.as_deref() == Some("OOMKilled") {
        return "OOMKilled: it needed more memory than it may use (spec.device.memory), or than its node has"
            .into();
    }
    let words = ended.message.as_deref().and_then(words);
    words.unwrap_or_else(|| format!("its container ended with {}", ended.exit_code))
}

/// The line that tells why a process has ended: the first that says so, or else the last. Others say how it is used, or how to see
/// more.
fn words(said: &str) -> Option<String> {
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.clone().next_back()?;
    let tells = |line: &&str| {
        line.starts_with("error:") || line.starts_with("galerne:") || line.contains("panicked at ")
    };
    let Some(first) = lines.find(tells) else { return Some(last.to_owned()) };
    // A panic says why in the line after it.
    let reason = lines.next().filter(|_| first.contains("panicked at "));
    Some(reason.map_or_else(|| first.to_owned(), |reason| format!("{first} {reason}")))
}

/// Why a container fails again and again, if it does: in its own words, if it had any.
fn failure(container: &ContainerStatus) -> Option<String> {
    let state = container.state.as_ref();
    let waits = state.and_then(|state| state.waiting.as_ref());
    let reason = waits.and_then(|waits| waits.reason.as_deref()).unwrap_or_default();
    let ended = state.and_then(|state| state.terminated.as_ref()).filter(|ended| ended.exit_code != 0);
    let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    match reason {
        "CrashLoopBackOff" => ended.or(last).map(why).or_else(|| waits?.message.clone()),
        "ErrImagePull"
        | "ImagePullBackOff"
        | "InvalidImageName"
        | "CreateContainerConfigError"
        | "CreateContainerError" => waits?.message.clone(),
        _ => ended.map(why),
    }
}

impl NodeShown {
    pub(crate) fn of(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let tainted = spec.into_iter().flat_map(|spec| spec.taints.iter().flatten());
        let leaving = spec.and_then(|spec| spec.unschedulable) == Some(true)
            || tainted.into_iter().any(|taint| LEAVING.contains(&taint.key.as_str()));
        let status = node.status.as_ref();
        let ready =
            status.and_then(|status| status.conditions.iter().flatten().find(|is| is.type_ == "Ready"));
        let silent = ready.filter(|ready| ready.status != "True");
        let has = status.and_then(|status| status.allocatable.clone()).unwrap_or_default();
        let resources = has.into_iter().filter(|(name, amount)| name.contains('/') && amount.0 != "0");
        Self {
            leaving,
            silent_since: silent
                .map(|ready| ready.last_transition_time.as_ref().map_or(0, |time| time.0.as_second())),
            resources: resources.map(|(name, _)| name).collect(),
        }
    }
}

/// Why a StatefulSet's pods cannot be made, as its controller tells in an event: the cluster that it is of cannot be read from it.
pub(crate) fn refusal(event: &Event) -> Option<(String, String)> {
    let about = &event.involved_object;
    let tells =
        event.reason.as_deref() == Some("FailedCreate") && about.kind.as_deref() == Some("StatefulSet");
    let message = event.message.clone().unwrap_or_default();
    // "create Pod NAME in StatefulSet NAME failed error: …"
    let why = message.split_once("error: ").map_or(message.as_str(), |(_, why)| why).to_owned();
    tells.then(|| about.name.clone()).flatten().map(|name| (name, why))
}

/// Why a volume of a pod cannot be mounted, or attached to its node, as an event tells: the pod's name and uid, and what is amiss with
/// a secret, say.
pub(crate) fn unmounted(event: &Event) -> Option<(String, String, String)> {
    let about = &event.involved_object;
    let tells = matches!(event.reason.as_deref(), Some("FailedMount" | "FailedAttachVolume"));
    let tells = tells && about.kind.as_deref() == Some("Pod");
    let message = event.message.clone().unwrap_or_default();
    let (name, uid) = about.name.clone().zip(about.uid.clone()).filter(|_| tells)?;
    Some((name, uid, message))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: &Value) -> PodShown {
        let meta = json!({ "name": "p", "labels": { "galerne.dev/group": "g3" } });
        PodShown::of(&serde_json::from_value(json!({ "metadata": meta, "status": status })).unwrap()).unwrap()
    }

    #[test]
    fn a_pod_tells_why_it_does_not_run() {
        let unscheduled =
            json!([{ "type": "PodScheduled", "status": "False", "message": "0/3 nodes are available" }]);
        let shown = pod(&json!({ "phase": "Pending", "conditions": unscheduled }));
        assert_eq!(
            (shown.group, shown.state.phase, shown.state.message.as_str()),
            (3, PodPhase::Waiting, "0/3 nodes are available")
        );

        let waits = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } });
        let last =
            json!({ "terminated": { "exitCode": 1, "message": "some log\ngalerne: no such model\n" } });
        let container = |state: &Value, last: &Value| {
            json!({ "phase": "Running", "containerStatuses": [{
                "name": "c", "ready": false, "restartCount": 1, "image": "", "imageID": "", "state": state, "lastState": last,
            }] })
        };
        let shown = pod(&container(&waits, &last));
        assert_eq!(
            (shown.state.phase, shown.state.message.as_str()),
            (PodPhase::Failing, "galerne: no such model")
        );
        let shown = pod(&container(&json!({ "running": {} }), &last));
        assert_eq!(
            (shown.state.phase, shown.state.message.as_str()),
            (PodPhase::Running, "galerne: no such model"),
            "it runs again, and may fail again"
        );
        let last = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled", "message": "some log" } });
        assert!(pod(&container(&waits, &last)).state.message.starts_with("OOMKilled: it needed more memory"));
        let last = json!({ "terminated": { "exitCode": 0 } });
        assert_eq!(pod(&container(&json!({ "running": {} }), &last)).state.message, "");
    }

    #[test]
    fn of_all_that_a_process_has_said_the_reason_is_told() {
        let clap = "error: unexpected argument '--x' found\n\nUsage: galerne worker\n\nFor more information, try '--help'.\n";
        assert_eq!(words(clap).unwrap(), "error: unexpected argument '--x' found");
        let panic = "a log\nthread 'main' (7) panicked at src/a.rs:1:2:\nno such thing\nnote: run with `RUST_BACKTRACE=1`\n";
        assert_eq!(words(panic).unwrap(), "thread 'main' (7) panicked at src/a.rs:1:2: no such thing");
        assert_eq!(words("one\ntwo\n\n").unwrap(), "two");
        assert_eq!(words(" \n"), None);
    }

    #[test]
    fn a_router_that_is_ready_is_well_whatever_was_before() {
        let probed = json!({ "containers": [{ "name": "c", "readinessProbe": {} }] });
        let message = |ready: bool| {
            let last = json!({ "terminated": { "exitCode": 1, "message": "galerne: no" } });
            let container = json!({ "name": "c", "ready": ready, "restartCount": 1, "image": "", "imageID": "",
                "state": { "running": {} }, "lastState": last });
            let status = json!({ "phase": "Running", "containerStatuses": [container] });
            let pod = serde_json::from_value(json!({ "metadata": {}, "spec": probed, "status": status }));
            PodState::of(&pod.unwrap()).message
        };
        assert_eq!((message(false).as_str(), message(true).as_str()), ("galerne: no", ""));
    }

    #[test]
    fn a_deployment_tells_why_its_pods_cannot_be_made() {
        let deployment = |conditions: Value| {
            let status = json!({ "conditions": conditions });
            Made::of_deployment(&serde_json::from_value(json!({ "metadata": {}, "status": status })).unwrap())
                .refused
        };
        assert_eq!(deployment(json!([])), None);
        let failed = json!([{ "type": "ReplicaFailure", "status": "True", "message": "exceeded quota" }]);
        assert_eq!(deployment(failed).unwrap(), "exceeded quota");
    }

    #[test]
    fn a_node_that_somebody_wants_empty_is_leaving() {
        let node = |spec: Value, ready: &str| {
            let status = json!({ "conditions": [{ "type": "Ready", "status": ready, "lastTransitionTime": "1970-01-01T00:01:00Z" }] });
            NodeShown::of(&serde_json::from_value(json!({ "spec": spec, "status": status })).unwrap())
        };
        assert_eq!(node(json!({}), "True"), NodeShown::default());
        assert!(node(json!({ "unschedulable": true }), "True").leaving);
        let taint = json!({ "taints": [{ "key": "karpenter.sh/disrupted", "effect": "NoSchedule" }] });
        assert!(node(taint, "True").leaving);
        assert_eq!(node(json!({}), "Unknown").silent_since, Some(60));
    }

    #[test]
    fn a_quota_tells_why_there_are_no_pods() {
        let event = json!({
            "metadata": {}, "reason": "FailedCreate",
            "involvedObject": { "kind": "StatefulSet", "name": "demo-g0" },
            "message": "create Pod demo-g0-0 in StatefulSet demo-g0 failed error: pods \"demo-g0-0\" is forbidden: exceeded quota",
        });
        let (object, why) = refusal(&serde_json::from_value(event).unwrap()).unwrap();
        assert_eq!(
            (object.as_str(), why.as_str()),
            ("demo-g0", "pods \"demo-g0-0\" is forbidden: exceeded quota")
        );
    }

    #[test]
    fn kubelet_tells_why_a_pod_has_no_volumes() {
        let event = |uid: &str| {
            let event = json!({
                "metadata": {}, "reason": "FailedMount",
                "involvedObject": { "kind": "Pod", "name": "demo-g0-0", "uid": uid },
                "message": "MountVolume.SetUp failed for volume \"cluster-tls\" : secret \"ours\" not found",
            });
            unmounted(&serde_json::from_value(event).unwrap()).unwrap()
        };
        let said = |uid: &str| {
            let (name, uid, why) = event(uid);
            assert_eq!(name, "demo-g0-0");
            let meta = json!({ "name": name, "uid": "1", "labels": { "galerne.dev/group": "g0" } });
            let waits = json!({ "metadata": meta, "status": { "phase": "Pending" } });
            let mut state = PodState::of(&serde_json::from_value(waits).unwrap());
            state.explain(&[(uid, why)].into());
            state.message
        };
        assert!(said("1").ends_with("secret \"ours\" not found"));
        assert_eq!(said("0"), "", "that was another pod of this name");
    }
}

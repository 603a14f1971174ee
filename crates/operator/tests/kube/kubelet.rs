//! A scheduler and a kubelet for the pods of one namespace: they get a node, run, and end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, pin_mut};
use galerne_coord::Coord;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::processes::Processes;
use crate::ranks;

/// An image of which no container ever runs for long.
pub(crate) const BROKEN: &str = "galerne:broken";
/// What its containers say at their end.
pub(crate) const LAST_WORDS: &str = "galerne: /models/bard-1m: no such file or directory";

/// What a container is.
#[derive(Clone)]
pub(crate) enum Containers {
    /// A rank that is played.
    Played,
    /// A process.
    Real(Processes),
}

/// What runs, by the pods' uids: on which node.
type Running = Arc<Mutex<BTreeMap<String, (String, JoinHandle<()>)>>>;

/// Runs until it is dropped.
pub(crate) struct Kubelet {
    looks: JoinHandle<()>,
    running: Running,
}

impl Kubelet {
    /// A node loses its power: what runs there ends, and nobody tells.
    pub(crate) fn cut_power(&self, of: &str) {
        let mut running = self.running.lock().expect("no panic");
        running.retain(|_, (node, running)| {
            if node == of {
                running.abort();
            }
            node != of
        });
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.looks.abort();
    }
}

/// One that looks after pods.
struct Host {
    pods: Api<Pod>,
    client: Client,
    nodes: Vec<String>,
    coord: Coord,
    containers: Containers,
    running: Running,
    processes: u32,
}

impl Kubelet {
    pub(crate) fn start(
        client: Client,
        namespace: &str,
        nodes: Vec<String>,
        coord: Coord,
        containers: Containers,
    ) -> Self {
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let running = Running::default();
        let runs = running.clone();
        let looks = tokio::spawn(async move {
            let mut host =
                Host { pods: pods.clone(), client, nodes, coord, containers, running: runs, processes: 0 };
            let changed = watcher(pods, watcher::Config::default()).default_backoff().touched_objects();
            pin_mut!(changed);
            while let Some(pod) = changed.next().await {
                if let Ok(pod) = pod {
                    host.look_after(&pod).await;
                }
            }
        });
        Self { looks, running }
    }
}

impl Host {
    async fn look_after(&mut self, pod: &Pod) {
        let uid = pod.uid().unwrap_or_default();
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
        if pod.metadata.deletion_timestamp.is_some() {
            return self.end(pod, &uid).await;
        }
        match node {
            None => self.bind(pod).await,
            Some(node) if phase == "Pending" && self.nodes.contains(&node) => self.run(pod, &uid).await,
            Some(_) => {}
        }
    }

    /// Puts a pod on the node with the fewest of them that takes pods and has what it needs.
    async fn bind(&self, pod: &Pod) {
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(self.client.clone());
        let mut free = Vec::new();
        for name in &self.nodes {
            let node = nodes.get_opt(name).await.ok().flatten();
            let open = node.is_some_and(|node| {
                let closed = node.spec.and_then(|spec| spec.unschedulable).unwrap_or(false);
                let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
                !closed && conditions.iter().any(|is| is.type_ == "Ready" && is.status == "True")
            });
            free.extend(open.then_some(name));
        }
        let wanted = wanted_node(pod);
        let node = match &wanted {
            Some(wanted) => free.into_iter().find(|name| *name == wanted),
            None => free.into_iter().next(),
        };
        let Some(node) = node else { return };
        let target = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod.name_any() },
            "target": { "apiVersion": "v1", "kind": "Node", "name": node } });
        let url = Pod::url_path(&(), pod.namespace().as_deref());
        let request = http_post(&format!("{url}/{}/binding", pod.name_any()), &target);
        // Somebody may have deleted it meanwhile.
        self.client.request::<serde_json::Value>(request).await.ok();
    }

    async fn run(&mut self, pod: &Pod, uid: &str) {
        let container =
            pod.spec.as_ref().and_then(|spec| spec.containers.first().cloned()).unwrap_or_default();
        if container.image.as_deref() == Some(BROKEN) {
            let ended = json!({ "exitCode": 1, "message": LAST_WORDS, "reason": "Error" });
            let waits = json!({ "reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container" });
            let mut ended = ended;
            ended["finishedAt"] =
                pod.metadata.creation_timestamp.clone().map(|time| time.0.to_string()).into();
            let status = json!({ "name": container.name, "ready": false, "restartCount": 3, "image": BROKEN, "imageID": "",
                "state": { "waiting": waits }, "lastState": { "terminated": ended } });
            let phase = if preloads(pod) { "Failed" } else { "Running" };
            let mut status = json!({ "phase": phase, "containerStatuses": [status] });
            if preloads(pod) {
                status["containerStatuses"][0]["state"] = json!({ "terminated": ended });
            }
            return tell(&self.pods, pod, status).await;
        }
        if preloads(pod) && matches!(self.containers, Containers::Played) {
            return tell(&self.pods, pod, json!({ "phase": "Succeeded" })).await;
        }
        self.processes += 1;
        let (pod, pods) = (pod.clone(), self.pods.clone());
        let running = match (&self.containers, pod.labels().get("galerne.dev/group")) {
            (Containers::Real(processes), _) => {
                let processes = processes.clone();
                let pod = pod.clone();
                tokio::spawn(async move { processes.run(&pods, &pod).await })
            }
            (Containers::Played, Some(group)) => {
                ready(&pods, &pod).await;
                tokio::spawn(ranks::play(self.coord.clone(), pod.name_any(), group.clone(), self.processes))
            }
            (Containers::Played, None) => return ready(&pods, &pod).await,
        };
        let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
        self.running.lock().expect("no panic").insert(uid.to_owned(), (node, running));
    }

    async fn end(&mut self, pod: &Pod, uid: &str) {
        if let Some((_, running)) = self.running.lock().expect("no panic").remove(uid) {
            running.abort();
        }
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete(&pod.name_any(), &now).await.ok();
    }
}

/// Whether a pod brings a version to a node.
fn preloads(pod: &Pod) -> bool {
    pod.labels().get("galerne.dev/part").is_some_and(|part| part == "preload")
}

/// The node that a pod must run on, if it says one.
fn wanted_node(pod: &Pod) -> Option<String> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required_during_scheduling_ignored_during_execution.as_ref()?.node_selector_terms;
    terms.first()?.match_fields.as_ref()?.first()?.values.as_ref()?.first().cloned()
}

/// Says that a pod runs and is ready.
pub(crate) async fn ready(pods: &Api<Pod>, pod: &Pod) {
    let ready = json!({ "type": "Ready", "status": "True" });
    tell(pods, pod, json!({ "phase": "Running", "conditions": [ready] })).await;
}

pub(crate) async fn tell(pods: &Api<Pod>, pod: &Pod, status: serde_json::Value) {
    let patch = Patch::Merge(json!({ "status": status }));
    pods.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await.ok();
}

fn http_post(path: &str, body: &serde_json::Value) -> http::Request<Vec<u8>> {
    let request = http::Request::post(path).header("content-type", "application/json");
    request.body(body.to_string().into_bytes()).expect("a request")
}

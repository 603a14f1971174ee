//! The whole on one machine: containers are processes, etcd is etcd, and streams go on whatever happens.

use std::time::Duration;

use galerne_operator::api::{GalerneCluster, Trial};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::processes::{Etcd, Processes, root};
use crate::streams::Streams;
use crate::world::World;

/// So long it may take.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Clients that stream at once.
const CLIENTS: u32 = 4;
/// Answers between two things that happen.
const BREATH: usize = 8;

/// Two groups of two ranks: scaled up and down, a rank killed, a node emptied, a version rolled out, all under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_is_lost() {
    let (etcd, processes) = (Etcd::start(), Processes::new());
    let world = World::real("no_stream_is_lost", &etcd, processes.clone()).await;
    tokio::time::timeout(TIMEOUT, play(&world, &processes)).await.expect("it ends in time");
    world.end().await;
}

async fn play(world: &World, processes: &Processes) {
    let mut spec = world.spec();
    spec["tensorParallel"] = 2.into();
    spec["storage"] = json!({ "hostPath": root().join("tests/golden").display().to_string() });
    spec["workerArgs"] = json!(["--threads=1"]);
    spec["update"] = json!({ "canary": { "enabled": true } });
    world.create(spec).await;
    world.settled(2).await;
    let router = world.eventually("a router", async || processes.router()).await;
    world
        .until("routed", |cluster| cluster.status.as_ref().is_some_and(|status| status.routers_ready == 1))
        .await;
    let mut streams = Streams::start(&router, CLIENTS).await;

    world.patch(json!({ "groups": { "replicas": 3 } })).await;
    world.settled(3).await;
    streams.more(BREATH).await;
    world.patch(json!({ "groups": { "replicas": 2 } })).await;
    world.settled(2).await;
    streams.more(BREATH).await;

    let fleet = world.coord.fleet().await.expect("a fleet");
    let (epoch, record) = fleet.groups.values().find_map(|group| group.epoch.clone()).expect("a group");
    let rank = rustix::process::Pid::from_raw(record.members[1].pid.cast_signed()).expect("a process");
    rustix::process::kill_process(rank, rustix::process::Signal::KILL).expect("a rank to kill");
    let again = |cluster: &GalerneCluster| {
        let groups = cluster.status.clone().unwrap_or_default().groups;
        groups.iter().any(|group| {
            group.last_reformation.is_some() && group.epoch > Some(epoch.0) && group.ranks_ready == 2
        })
    };
    world.until("formed again", again).await;
    world.settled(2).await;
    streams.more(BREATH).await;

    let nodes: Api<Node> = Api::all(world.client.clone());
    let cordon = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
    nodes.patch(&world.nodes[0], &PatchParams::default(), &cordon).await.expect("a node");
    let away = async || {
        let pods = world.pods().await;
        let moved = pods
            .iter()
            .all(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&world.nodes[1]));
        moved.then_some(())
    };
    world.eventually("empty", away).await;
    world.settled(2).await;
    streams.more(BREATH).await;

    let before = world.cluster().await.status.unwrap_or_default().rollout.unwrap_or_default().revision;
    world.patch(json!({ "workerArgs": ["--threads=1", "--kv-blocks=256"] })).await;
    let tried = |cluster: &GalerneCluster| {
        let rollout = cluster.status.clone().unwrap_or_default().rollout.unwrap_or_default();
        assert_ne!(rollout.trial, Trial::Failed, "{}", rollout.message);
        rollout.revision != before
            && rollout.trial == Trial::Passed
            && rollout.message.contains("as those of group")
    };
    world.until("tried against the old version", tried).await;
    world.settled(2).await;
    streams.more(BREATH).await;
}

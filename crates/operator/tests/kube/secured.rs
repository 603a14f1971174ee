//! A cluster in which nothing is open: etcd, leaders and ranks want certificates, and these change.

use std::path::{Path, PathBuf};
use std::time::Duration;

use galerne_coord::{EtcdAccess, EtcdTls};
use galerne_operator::api::{GalerneCluster, Trial};
use galerne_tls::ClusterFiles;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use serde_json::json;

use crate::authority::Authority;
use crate::cases::condition;
use crate::processes::{Etcd, Processes, root};
use crate::streams::Streams;
use crate::world::{Trust, World};

/// So long it may take.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A folder that stands for a secret as Kubernetes has them.
fn secret(folder: &Path, authority: &Authority, name: &str) -> [PathBuf; 3] {
    let (cert, key) = authority.issue(&[name]);
    let files = ["ca.crt", "tls.crt", "tls.key"].map(|file| folder.join(file));
    for (from, to) in [authority.ca(), cert, key].iter().zip(&files) {
        std::fs::copy(from, to).expect("a copy");
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_under_tls_is_tried_and_rolled_and_its_certificates_change() {
    let (members, store) = (Authority::new(), Authority::new());
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
    let [ca, cert, key] = secret(folders[0].path(), &members, "galerne");
    let [etcd_ca, etcd_cert, etcd_key] = secret(folders[1].path(), &store, "client");
    let mut processes = Processes::new();
    for (name, folder) in ["ours", "theirs"].into_iter().zip(&folders) {
        processes.secrets.insert(name.into(), folder.path().to_owned());
    }
    let tls = EtcdTls { ca: etcd_ca, identity: Some((etcd_cert, etcd_key)), name: None };
    let etcd_access = EtcdAccess { tls: Some(tls), login: None };
    let trust = Trust { etcd: etcd_access, cluster: None };
    let etcd = Etcd::start_under_tls(&store);
    let world = World::secured("a_cluster_under_tls", &etcd, trust, processes.clone()).await;
    let renew = || secret(folders[0].path(), &members, "galerne");
    let member = ClusterFiles { ca, cert, key };
    tokio::time::timeout(TIMEOUT, play(&world, &processes, member, renew)).await.expect("it ends in time");
    world.end().await;
}

async fn play(world: &World, processes: &Processes, member: ClusterFiles, renew: impl Fn() -> [PathBuf; 3]) {
    let mut spec = world.spec();
    spec["tensorParallel"] = 2.into();
    spec["groups"]["replicas"] = 1.into();
    spec["storage"] = json!({ "hostPath": root().join("tests/golden").display().to_string() });
    spec["workerArgs"] = json!(["--threads=1"]);
    spec["tls"] = json!({ "secret": "ours" });
    spec["etcd"]["tls"] = json!({ "secret": "theirs" });
    spec["update"] = json!({ "canary": { "enabled": true } });
    world.create(spec).await;
    world.settled(1).await;
    let router = world.eventually("a router", async || processes.router()).await;
    world
        .until("routed", |cluster| cluster.status.as_ref().is_some_and(|status| status.routers_ready == 1))
        .await;
    let mut streams = Streams::start(&router, 1).await;
    streams.more(1).await;

    // An operator that is no member says what it lacks, and nothing goes.
    let before = world.cluster().await.status.unwrap_or_default().rollout.unwrap_or_default().revision;
    world.patch(json!({ "workerArgs": ["--threads=1", "--kv-blocks=256"] })).await;
    let stranger = |cluster: &GalerneCluster| {
        condition(cluster, "Progressing")
            .1
            .contains("the operator has no certificate of the cluster's authority")
    };
    world.until("told why there is no trial", stranger).await;
    world.stop_operator().await;
    world.trust.lock().expect("no panic").cluster = Some(member);

    // What is new serves beside what is old: whoever has read the new files talks to who has not.
    renew();
    world.start_operator("two");
    let tried = |cluster: &GalerneCluster| {
        let rollout = cluster.status.clone().unwrap_or_default().rollout.unwrap_or_default();
        assert_ne!(rollout.trial, Trial::Failed, "{}", rollout.message);
        rollout.revision != before
            && rollout.trial == Trial::Passed
            && rollout.message.contains("as those of group")
    };
    let tried = world.until("tried against the old version", tried).await;
    world.settled(1).await;
    streams.more(1).await;
    drop(streams);

    // All groups go at once, but not before what comes is where they were.
    let update = json!({ "strategy": "Recreate", "canary": { "enabled": true } });
    world.patch(json!({ "workerArgs": ["--threads=1", "--kv-blocks=128"], "update": update })).await;
    let before = tried.status.unwrap_or_default().rollout.unwrap_or_default().revision;
    let updated = |cluster: &GalerneCluster| {
        let rollout = cluster.status.clone().unwrap_or_default().rollout.unwrap_or_default();
        rollout.trial == Trial::Passed && rollout.revision != before
    };
    world.until("updated", updated).await;
    world.settled(1).await;
    let events = world.api::<Event>().list(&ListParams::default()).await.expect("events");
    assert!(events.iter().any(|event| event.reason.as_deref() == Some("Preload")), "people are told");
    Streams::start(&router, 1).await.more(1).await;
}

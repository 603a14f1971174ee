//! What stands in the way, and what stays all the same.

use galerne_operator::api::{GalerneCluster, GroupPhase};
use k8s_openapi::api::core::v1::{Pod, ResourceQuota, Service};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::cases::condition;
use crate::world::World;

/// By the schema or by its rules, in a sentence.
pub(crate) async fn what_cannot_be_is_refused(world: &World) {
    world.create(world.spec()).await;
    for (bad, sentence) in [
        (json!({ "tensorParallel": 99 }), "spec.tensorParallel"),
        (
            json!({ "numerics": { "virtualShards": 3 }, "tensorParallel": 2 }),
            "spec.numerics.virtualShards must be a multiple of spec.tensorParallel",
        ),
        (
            json!({ "model": { "path": "../other" } }),
            "spec.model.path is relative to spec.storage and stays in it",
        ),
        (json!({ "storage": { "hostPath": "/x" } }), "spec.storage is one of claim, hostPath and ephemeral"),
        (
            json!({ "router": { "noAuth": false } }),
            "spec.router names an apiKeysSecret, or says noAuth: true",
        ),
        (json!({ "groups": { "replicas": 9 } }), "spec.groups.replicas must lie between"),
        (
            json!({ "tensorParallel": 4, "ranksPerHost": 3 }),
            "spec.ranksPerHost must divide spec.tensorParallel",
        ),
        (json!({ "device": { "cpu": "lots" } }), "spec.device.cpu"),
        (json!({ "device": { "kind": "Cuda" } }), "spec.device.kind Cuda needs spec.device.resource"),
        (
            json!({ "numerics": { "quantize": "fp8" } }),
            "spec.numerics.quantize is fp8 with spec.device.kind Cuda",
        ),
        (
            json!({ "numerics": { "kvDtype": "fp8" } }),
            "spec.numerics.kvDtype is bf16 or fp8 with spec.device.kind Cuda",
        ),
        (json!({ "numerics": { "fast": true } }), "spec.numerics.fast is for spec.device.kind Cuda"),
        (
            json!({ "storage": { "claim": null, "hostPath": "models" } }),
            "spec.storage.hostPath begins at the root of a node",
        ),
        (
            json!({ "storage": { "claim": null, "ephemeral": "1Gi" } }),
            "spec.model.path names what is in spec.storage already",
        ),
        (json!({ "sla": {} }), "spec.sla names a ttft, a tpot, or both"),
        (
            json!({ "etcd": { "managed": {} } }),
            "spec.etcd names the endpoints of an etcd, or asks for a managed one",
        ),
        (json!({ "etcd": { "tls": { "secret": "s" } } }), "endpoints of spec.etcd that begin with https://"),
        (json!({ "tls": {} }), "spec.tls names the secret that holds the certificate, or the issuer"),
        (
            json!({ "tls": { "secret": "s" } }),
            "spec.tls comes or goes with spec.update.strategy Recreate only",
        ),
    ] {
        let patch = Patch::Merge(json!({ "spec": bad }));
        let clusters = world.api::<GalerneCluster>();
        let refused = clusters.patch("demo", &PatchParams::default(), &patch).await.unwrap_err();
        let kube::Error::Api(status) = &refused else { panic!("{refused}") };
        assert_eq!(status.code, 422, "{refused}");
        assert!(status.message.contains(sentence), "{sentence} is not in {}", status.message);
    }
}

/// Nothing is made beyond this.
async fn limit(world: &World, hard: Value) {
    let quota = json!({ "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "few" }, "spec": { "hard": hard } });
    let quotas = world.api::<ResourceQuota>();
    quotas.patch("few", &PatchParams::apply("test").force(), &Patch::Apply(&quota)).await.unwrap();
}

pub(crate) async fn what_is_refused_is_told(world: &World) {
    let told = |reason: &'static str, words: &'static str| {
        move |cluster: &GalerneCluster| {
            let (status, message) = condition(cluster, "Degraded");
            let is =
                cluster.status.iter().flat_map(|status| &status.conditions).any(|it| it.reason == reason);
            is && status == "True" && message.contains(words)
        }
    };
    let well = |cluster: &GalerneCluster| condition(cluster, "Degraded").0 == "False";
    limit(world, json!({ "count/statefulsets.apps": "1" })).await;
    world.create(world.spec()).await;
    world.until("told", told("WriteRefused", "cannot apply StatefulSet demo-g1: ")).await;
    world.until("told why", told("WriteRefused", "exceeded quota: few")).await;
    limit(world, json!({ "count/statefulsets.apps": "9" })).await;
    world.settled(2).await;
    world.until("well", well).await;

    // Pods are made by controllers, which tell it in events and conditions.
    limit(world, json!({ "pods": "3" })).await;
    world.patch(json!({ "groups": { "replicas": 3 } })).await;
    world.until("told", told("PodsRefused", "pods of group g2 cannot be made: ")).await;
    world.patch(json!({ "groups": { "replicas": 2 }, "router": { "replicas": 2 } })).await;
    world.until("told", told("RouterFails", "pods cannot be made: ")).await;
    limit(world, json!({ "pods": "9" })).await;
    world.until("well", well).await;
}

pub(crate) async fn a_managed_etcd_that_finds_no_room_is_told(world: &World) {
    let mut spec = world.spec();
    spec["etcd"] = json!({ "managed": {} });
    spec["groups"]["replicas"] = 1.into();
    world.create(spec).await;
    let pods = world.api::<Pod>();
    let all = async || {
        let there = pods.list(&ListParams::default()).await.unwrap();
        (there.items.len() == 3).then_some(())
    };
    world.eventually("a group, a router and an etcd", all).await;
    limit(world, json!({ "pods": "2" })).await;
    pods.delete("demo-etcd-0", &DeleteParams::default()).await.unwrap();
    let told = |cluster: &GalerneCluster| {
        let (status, message) = condition(cluster, "Degraded");
        status == "True" && message.contains("its pod cannot be made: ") && message.contains("exceeded quota")
    };
    world.until("told", told).await;
}

pub(crate) async fn what_is_anothers_is_left_alone(world: &World) {
    let theirs = json!({ "metadata": { "name": "demo" }, "spec": { "ports": [{ "port": 9 }] } });
    let services = world.api::<Service>();
    services.create(&PostParams::default(), &serde_json::from_value(theirs).unwrap()).await.unwrap();
    world.create(world.spec()).await;
    let told =
        |cluster: &GalerneCluster| condition(cluster, "Degraded").1.starts_with("cannot make Service demo: ");
    world.until("told", told).await;
    let left = services.get("demo").await.unwrap();
    assert_eq!((left.spec.unwrap().ports.unwrap()[0].port, left.metadata.owner_references), (9, None));
    services.delete("demo", &DeleteParams::default()).await.unwrap();
    world.settled(2).await;

    // What is the cluster's stays so, whatever labels somebody takes away.
    let bare = Patch::Merge(json!({ "metadata": { "labels": null } }));
    services.patch("demo", &PatchParams::default(), &bare).await.unwrap();
    let back = async || {
        let labels = services.get("demo").await.unwrap().metadata.labels.unwrap_or_default();
        labels.contains_key("galerne.dev/cluster").then_some(())
    };
    world.eventually("labelled again", back).await;
}

pub(crate) async fn a_failed_version_takes_nothing_from_the_one_that_serves(world: &World) {
    world.create(world.spec()).await;
    let before = world.settled(2).await.status.unwrap();
    let revision = before.groups[0].revision.clone();
    let passed =
        |cluster: &GalerneCluster| cluster.status.as_ref().is_some_and(|status| status.passed.is_some());
    world.until("noted", passed).await;
    // No group is of this digest, so it fails without a prompt.
    world.patch(json!({ "model": { "digest": "0".repeat(64) }, "workerArgs": ["--kv-blocks=64"] })).await;
    let failed =
        |cluster: &GalerneCluster| condition(cluster, "Progressing").1.contains("the model's digest is");
    world.until("failed", failed).await;
    let of_old = |cluster: &GalerneCluster, count: usize| {
        let status = cluster.status.clone().unwrap_or_default();
        let ready = status.groups.iter().filter(|group| group.phase == GroupPhase::Ready);
        ready.filter(|group| group.revision == revision).count() == count
    };
    world.patch(json!({ "groups": { "replicas": 3 } })).await;
    world.until("scaled", |cluster| of_old(cluster, 3)).await;
    // Another operator knows what has passed, too, also where nothing of it is left.
    world.patch(json!({ "groups": { "replicas": 0 } })).await;
    world
        .until("asleep", |cluster| cluster.status.as_ref().is_some_and(|status| status.groups_total == 0))
        .await;
    world.stop_operator().await;
    world.start_operator("two");
    world.patch(json!({ "groups": { "replicas": 2 } })).await;
    world.until("awake", |cluster| of_old(cluster, 2)).await;
}

pub(crate) async fn without_etcd_nobody_is_ended(world: &World) {
    let Some(link) = &world.link else { return };
    world.create(world.spec()).await;
    world.settled(2).await;
    link.cut();
    let told =
        |cluster: &GalerneCluster| condition(cluster, "Degraded").1.starts_with("etcd cannot be asked");
    world.until("told", told).await;
    world.patch(json!({ "groups": { "replicas": 1 } })).await;
    let looked_at = |cluster: &GalerneCluster| {
        let status = cluster.status.clone().unwrap_or_default();
        status.observed_generation == cluster.metadata.generation && status.groups_wanted == 1
    };
    let blind = world.until("looked at", looked_at).await;
    let phases = blind.status.unwrap_or_default().groups.into_iter().map(|group| group.phase);
    assert_eq!(phases.collect::<Vec<_>>(), [GroupPhase::Ready, GroupPhase::Ready], "as they were");
    link.mend();
    world.settled(1).await;
}

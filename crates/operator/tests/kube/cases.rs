//! What the operator must do, one case each.

use std::time::Duration;

use galerne_operator::api::{GalerneCluster, GroupPhase, PreloadPhase};
use galerne_types::{Fleet, Group, GroupId};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, EvictParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::kubelet::{BROKEN, LAST_WORDS};
use crate::world::{World, store};

/// A moment in which an operator that had something to do would have begun.
const MOMENT: Duration = Duration::from_millis(700);

pub(crate) fn condition<'a>(cluster: &'a GalerneCluster, kind: &str) -> (&'a str, &'a str) {
    let status = cluster.status.as_ref().map(|status| &status.conditions[..]).unwrap_or_default();
    let found = status.iter().find(|condition| condition.type_ == kind);
    found.map_or(("", ""), |condition| (&condition.status, &condition.message))
}

/// Runs for as long as at least `groups` take requests.
fn gapless(world: &World, groups: usize) -> JoinHandle<()> {
    let mut fleet = world.coord.watch_fleet();
    tokio::spawn(async move {
        let taking = |group: &&Group| group.serving().is_some() && group.drain.is_none();
        let enough = |fleet: &Fleet| fleet.groups.values().filter(taking).count() >= groups;
        fleet.wait_for(enough).await.expect("a view that goes on");
        fleet.wait_for(|fleet| !enough(fleet)).await.expect("a view that goes on");
    })
}

pub(crate) async fn a_cluster_comes_up_is_silent_and_goes(world: &World) {
    world.create(world.spec()).await;
    let available = |cluster: &GalerneCluster| condition(cluster, "Available").0 == "True";
    world.settled(2).await;
    let cluster = world.until("available", available).await;
    assert_eq!(condition(&cluster, "Degraded").0, "False");
    let status = cluster.status.clone().unwrap();
    let phases: Vec<_> = status.groups.iter().map(|group| (group.name.as_str(), group.phase)).collect();
    assert_eq!(phases, [("g0", GroupPhase::Ready), ("g1", GroupPhase::Ready)]);
    assert!(status.groups.iter().all(|group| group.epoch.is_some() && group.ranks_ready == 1));

    assert_eq!(world.sets().await, ["demo-g0", "demo-g1"]);
    let set = world.api::<StatefulSet>().get("demo-g0").await.unwrap().spec.unwrap();
    assert_eq!((set.pod_management_policy.as_deref(), set.replicas), (Some("Parallel"), Some(1)));
    assert_eq!(set.update_strategy.unwrap().type_.as_deref(), Some("OnDelete"));
    let budgets = world.api::<PodDisruptionBudget>().list(&ListParams::default()).await.unwrap();
    assert_eq!(budgets.items.len(), 3, "one a group, one for the routers");
    // The client asks again and again when it is told that there are too many requests: it is given a moment.
    let pods = world.api::<Pod>();
    let evicted = tokio::time::timeout(MOMENT, pods.evict("demo-g0-0", &EvictParams::default())).await;
    assert!(!matches!(evicted, Ok(Ok(_))), "a group's budget lets none of its pods go");
    assert_eq!(pods.get("demo-g0-0").await.unwrap().metadata.deletion_timestamp, None);

    // Silence: of what is looked at again, only what is new is written, which is the generation in the status.
    let before = (world.writes().await, store(world).map(|store| store.counts().writes));
    let poke = Patch::Merge(json!({ "metadata": { "annotations": { "poke": "1" } } }));
    world.api::<GalerneCluster>().patch("demo", &PatchParams::default(), &poke).await.unwrap();
    world.patch(json!({ "drainSeconds": 2 })).await;
    world.settled(2).await;
    // It counts a write when it has its answer.
    world.eventually("counted", async || (world.writes().await == before.0 + 1).then_some(())).await;
    if let Some((store, before)) = store(world).zip(before.1) {
        assert_eq!(store.counts().writes, before + 3, "two of this test's, and one of the operator's");
    }

    world.api::<GalerneCluster>().delete("demo", &DeleteParams::default()).await.unwrap();
    let gone = async || world.api::<GalerneCluster>().get_opt("demo").await.unwrap().is_none().then_some(());
    world.eventually("gone", gone).await;
    assert!(world.sets().await.is_empty());
    let left = async || {
        world.api::<Service>().list(&ListParams::default()).await.unwrap().items.is_empty().then_some(())
    };
    world.eventually("collected", left).await;
    assert!(world.coord.fleet().await.unwrap().groups.is_empty(), "nothing is left in etcd");
}

pub(crate) async fn what_others_change_is_mended(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let somebody = PatchParams { field_manager: Some("somebody".into()), ..PatchParams::default() };
    let (sets, services) = (world.api::<StatefulSet>(), world.api::<Service>());
    let (budgets, routers) = (world.api::<PodDisruptionBudget>(), world.api::<Deployment>());
    let set = sets.get("demo-g0").await.unwrap();

    let fewer =
        Patch::Merge(json!({ "spec": { "replicas": 0 }, "metadata": { "labels": { "theirs": "1" } } }));
    sets.patch("demo-g0", &somebody, &fewer).await.unwrap();
    let other = Patch::Merge(json!({ "spec": { "ports": [{ "name": "http", "port": 9 }] } }));
    services.patch("demo", &somebody, &other).await.unwrap();
    let nobodys = Patch::Merge(json!({ "metadata": { "labels": { "galerne.dev/part": null } } }));
    budgets.patch("demo-g1", &somebody, &nobodys).await.unwrap();
    let command = json!({ "spec": { "template": { "spec": { "terminationGracePeriodSeconds": 1 } } } });
    routers.patch("demo-router", &somebody, &Patch::Merge(command)).await.unwrap();

    let mended = async || {
        let set = sets.get("demo-g0").await.unwrap();
        assert_eq!(set.labels()["theirs"], "1", "what others add stays");
        let service = services.get("demo").await.unwrap().spec.unwrap();
        let ports: Vec<i32> = service.ports.unwrap().iter().map(|port| port.port).collect();
        let budget = budgets.get("demo-g1").await.unwrap();
        let router = routers.get("demo-router").await.unwrap().spec.unwrap().template.spec.unwrap();
        (set.spec.unwrap().replicas == Some(1)
            && ports == [8000, 8001]
            && budget.labels().contains_key("galerne.dev/part")
            && router.termination_grace_period_seconds == Some(30))
        .then_some(())
    };
    world.eventually("mended", mended).await;
    world.settled(2).await;
    assert_eq!(sets.get("demo-g0").await.unwrap().uid(), set.uid(), "it is the same one");

    // So is what was changed while no operator acted.
    world.stop_operator().await;
    sets.patch("demo-g1", &somebody, &Patch::Merge(json!({ "spec": { "replicas": 0 } }))).await.unwrap();
    world.start_operator("two");
    let mended = async || (sets.get("demo-g1").await.unwrap().spec?.replicas? == 1).then_some(());
    world.eventually("mended, what was changed meanwhile", mended).await;
    world.settled(2).await;
}

pub(crate) async fn an_operator_that_begins_anew_finds_nothing_to_do(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    world.until("available", |cluster| condition(cluster, "Available").0 == "True").await;
    let before = store(world).map(|store| store.counts().writes);
    world.stop_operator().await;
    world.start_operator("two");
    world.patch(json!({ "drainSeconds": 2 })).await;
    world.settled(2).await;
    let counted = async || (world.writes().await == 1).then_some(());
    world.eventually("counted, the generation in the status", counted).await;
    if let Some((store, before)) = store(world).zip(before) {
        // Whatever the API server has added to what was applied.
        assert_eq!(store.counts().writes, before + 2, "one of this test's, and the generation in the status");
    }

    // As when the whole namespace goes: another operator finds the groups gone, and has only to let the cluster go.
    world.stop_operator().await;
    for set in world.sets().await {
        world.api::<StatefulSet>().delete(&set, &DeleteParams::default()).await.unwrap();
    }
    world.eventually("gone", async || world.sets().await.is_empty().then_some(())).await;
    world.api::<GalerneCluster>().delete("demo", &DeleteParams::default()).await.unwrap();
    world.start_operator("three");
    let gone = async || world.api::<GalerneCluster>().get_opt("demo").await.unwrap().is_none().then_some(());
    world.eventually("gone", gone).await;
    assert_eq!(
        world.counted("galerne_operator_passes_total{result=\"error\"}").await,
        0,
        "in passes that end well"
    );
}

pub(crate) async fn groups_come_and_go_by_the_scale_subresource(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let clusters = world.api::<GalerneCluster>();
    let scale = async |replicas: u32| {
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        clusters.patch_scale("demo", &PatchParams::default(), &patch).await.unwrap();
    };
    scale(4).await;
    world.settled(4).await;
    let told = clusters.get_scale("demo").await.unwrap().status.unwrap();
    assert_eq!(told.replicas, 4);
    assert_eq!(told.selector.as_deref(), Some("galerne.dev/cluster=demo,galerne.dev/part=group"));

    // What goes is drained first: the wish is in etcd before the StatefulSet is gone.
    let mut fleet = world.coord.watch_fleet();
    scale(1).await;
    let drained = |fleet: &Fleet| fleet.groups.get(&GroupId("g3".into())).is_some_and(|g| g.drain.is_some());
    fleet.wait_for(drained).await.unwrap();
    world.settled(1).await;
    assert_eq!(world.sets().await, ["demo-g0"]);
    let forgotten = async || (world.coord.fleet().await.unwrap().groups.len() == 1).then_some(());
    world.eventually("forgotten", forgotten).await;

    scale(0).await;
    let asleep = world.settled(0).await;
    assert_eq!(condition(&asleep, "Available"), ("False", "no group is wanted"));
    scale(2).await;
    world.settled(2).await;
}

pub(crate) async fn a_version_takes_anothers_place_group_by_group(world: &World) {
    world.create(world.spec()).await;
    let before = world.settled(2).await;
    let revision = before.status.unwrap().groups[0].revision.clone();
    let gapless = gapless(world, 2);
    world.patch(json!({ "workerArgs": ["--kv-blocks=64"] })).await;
    let changed = |cluster: &GalerneCluster| {
        let status = cluster.status.clone().unwrap_or_default();
        status.groups_updated == 2
            && status.groups_total == 2
            && status.groups.iter().all(|g| g.revision != revision)
    };
    world.until("updated", changed).await;
    assert!(!gapless.is_finished(), "a group went before another one stood");
    gapless.abort();
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
    let retired = events.iter().filter(|event| event.reason.as_deref() == Some("GroupRetired"));
    assert!(retired.count() >= 1, "people are told");
}

pub(crate) async fn a_cordoned_node_is_emptied_without_a_gap(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let on = async |node: &str| {
        let pods = world.pods().await;
        pods.into_iter().filter(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some(node)).count()
    };
    let first = &world.nodes[0];
    assert_eq!(on(first).await, 2, "both are on the first node");
    let gapless = gapless(world, 2);
    let nodes: Api<Node> = Api::all(world.client.clone());
    let cordon = Patch::Merge(json!({ "spec": { "unschedulable": true } }));
    nodes.patch(first, &PatchParams::default(), &cordon).await.unwrap();
    let empty = async || (on(first).await == 0).then_some(());
    world.eventually("empty", empty).await;
    world.settled(2).await;
    assert!(!gapless.is_finished(), "a group went before another one stood");
    gapless.abort();
}

pub(crate) async fn a_pod_on_a_lost_node_is_replaced(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let pods = world.pods().await;
    let uids: Vec<_> = pods.iter().map(|pod| pod.uid()).collect();
    let nodes: Api<Node> = Api::all(world.client.clone());
    nodes.delete(&world.nodes[0], &DeleteParams::default()).await.unwrap();
    tokio::time::sleep(MOMENT).await;
    let left: Vec<_> = world.pods().await.iter().map(|pod| pod.uid()).collect();
    assert_eq!(left, uids, "their ranks are there, whoever has lost the node");
    world.kubelet.cut_power(&world.nodes[0]);
    let replaced = async || {
        let pods = world.pods().await;
        let new = pods.iter().all(|pod| !uids.contains(&pod.uid()));
        (new && pods.len() == 2).then_some(())
    };
    world.eventually("replaced", replaced).await;
    world.settled(2).await;
    assert_eq!(world.sets().await, ["demo-g0", "demo-g1"], "the groups stayed the same");
}

pub(crate) async fn users_errors_are_told_in_a_sentence(world: &World) {
    let mut spec = world.spec();
    spec["image"] = BROKEN.into();
    world.create(spec).await;
    let says = |words: &'static str| {
        move |cluster: &GalerneCluster| condition(cluster, "Degraded").1.contains(words)
    };
    let failing = world.until("failing", says(LAST_WORDS)).await;
    assert_eq!(condition(&failing, "Available"), ("False", "no group serves"));
    let told = async || {
        let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
        events.iter().any(|event| event.reason.as_deref() == Some("GroupFails")).then_some(())
    };
    world.eventually("told in an event", told).await;

    // What never served gives way to what may, though its pods take the place.
    world.patch(json!({ "image": "galerne:good" })).await;
    world.settled(2).await;
    world.until("available", |cluster| condition(cluster, "Available").0 == "True").await;

    world.patch(json!({ "tls": { "secret": "s" }, "update": { "strategy": "Recreate" } })).await;
    world.patch(json!({ "tls": null, "device": { "resource": "y.dev/npu" } })).await;
    world.until("without a resource", says("no node of this cluster offers y.dev/npu")).await;
}

pub(crate) async fn watches_that_break_are_taken_up_again(world: &World) {
    let Some(store) = store(world) else { return };
    world.create(world.spec()).await;
    world.settled(2).await;
    store.compact();
    world.patch(json!({ "groups": { "replicas": 3 } })).await;
    world.settled(3).await;
    store.compact();
    world.api::<Deployment>().delete("demo-router", &DeleteParams::default()).await.unwrap();
    let back = async || world.api::<Deployment>().get_opt("demo-router").await.unwrap();
    world.eventually("made again", back).await;
}

pub(crate) async fn of_two_operators_one_acts(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let lease = async || world.api::<Lease>().get("galerne-operator").await.unwrap().spec.unwrap();
    assert_eq!(lease().await.holder_identity.as_deref(), Some("one"));
    world.stop_operator().await;
    assert_eq!(lease().await.holder_identity, None, "it was given up");
    world.start_operator("two");
    world.patch(json!({ "groups": { "replicas": 3 } })).await;
    world.settled(3).await;
    let taken = lease().await;
    assert_eq!((taken.holder_identity.as_deref(), taken.lease_transitions), (Some("two"), Some(1)));
}

pub(crate) async fn a_cluster_that_sleeps_is_woken_and_tells_its_number(world: &World) {
    let mut spec = world.spec();
    spec["groups"] = json!({ "min": 0, "max": 4 });
    spec["sla"] = json!({ "ttft": { "percentile": 95, "ms": 500 } });
    world.create(spec).await;
    let asleep = |cluster: &GalerneCluster| condition(cluster, "Available").1 == "no group is wanted";
    world.until("asleep", asleep).await;
    let router = world.play_router();
    let told = async || (world.number().await.1["groups"] == 0).then_some(());
    world.eventually("a decision", told).await;

    router.send_modify(|counted| counted.held = 1);
    world.settled(1).await;
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
    let scaled = events.iter().find(|event| event.reason.as_deref() == Some("Scaled"));
    let note = scaled.and_then(|event| event.note.clone()).unwrap_or_default();
    assert_eq!(note, "1 group: requests have come, and nobody serves");
    router.send_modify(|counted| counted.held = 0);
    let measured = async || world.number().await.1["coldStartSeconds"].is_u64().then_some(());
    world.eventually("how long its group took to start", measured).await;

    // Another operator goes on where this one ends, also before it has heard of any load.
    world.stop_operator().await;
    world.start_operator("two");
    world.patch(json!({ "groups": { "max": 3 } })).await;
    world.settled(1).await;
    let (status, number) = world.number().await;
    assert_eq!((status.as_str(), &number["groups"]), ("200", &json!(1)));

    world.patch(json!({ "groups": { "replicas": 2 } })).await;
    world.settled(2).await;
    assert_eq!(
        world.number().await.1["groups"],
        1,
        "what somebody has set holds, and the number is told all the same"
    );
}

pub(crate) async fn routers_are_others_to_scale_until_the_spec_says_another_number(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let routers = world.api::<Deployment>();
    let replicas = async || routers.get("demo-router").await.unwrap().spec.unwrap().replicas.unwrap();
    assert_eq!(replicas().await, 1);
    // As an HPA does it.
    let scaler =
        PatchParams { field_manager: Some("kube-controller-manager".into()), ..PatchParams::default() };
    let scale = async |count: i32| {
        let patch = Patch::Merge(json!({ "spec": { "replicas": count } }));
        routers.patch_scale("demo-router", &scaler, &patch).await.unwrap();
    };
    scale(3).await;
    // Neither another look, nor a change of something else, nor another operator takes it back.
    world.patch(json!({ "drainSeconds": 2 })).await;
    world.settled(2).await;
    world.patch(json!({ "router": { "args": ["--hold-s-max=7"] } })).await;
    let told = async || {
        let template = routers.get("demo-router").await.unwrap().spec.unwrap().template.spec.unwrap();
        template.containers[0].args.clone()?.contains(&"--hold-s-max=7".to_owned()).then_some(())
    };
    world.eventually("told", told).await;
    assert_eq!(replicas().await, 3);
    world.stop_operator().await;
    world.start_operator("two");
    world.patch(json!({ "drainSeconds": 3 })).await;
    world.settled(2).await;
    assert_eq!(replicas().await, 3);
    // Who changes the field itself has no right to it.
    let somebody = PatchParams { field_manager: Some("somebody".into()), ..PatchParams::default() };
    routers
        .patch("demo-router", &somebody, &Patch::Merge(json!({ "spec": { "replicas": 5 } })))
        .await
        .unwrap();
    let mended = async || (replicas().await == 1).then_some(());
    world.eventually("mended", mended).await;

    scale(4).await;
    world.patch(json!({ "router": { "replicas": 2 } })).await;
    let heeded = async || (replicas().await == 2).then_some(());
    world.eventually("heeded", heeded).await;
}

pub(crate) async fn where_there_is_no_room_a_version_is_brought_to_nodes_first(world: &World) {
    let mut spec = world.spec();
    spec["update"] = json!({ "maxSurge": 0, "maxUnavailable": 1, "canary": { "enabled": false } });
    world.create(spec).await;
    let before = world.settled(2).await.status.unwrap();
    let kept = gapless(world, 2);
    world.patch(json!({ "image": BROKEN })).await;
    let fails = |cluster: &GalerneCluster| {
        let (status, message) = condition(cluster, "Degraded");
        status == "True" && message.contains(LAST_WORDS)
    };
    let failing = world.until("told that the version does not get there", fails).await.status.unwrap();
    let preloads = failing.rollout.unwrap().preloads;
    assert_eq!(preloads.len(), 1, "one group after the other: {preloads:?}");
    assert_eq!((preloads[0].phase, &preloads[0].node), (PreloadPhase::Failed, &world.nodes[0]));
    assert!(!kept.is_finished(), "a group went for a version that cannot take its place");
    kept.abort();

    world.patch(json!({ "image": "galerne:good" })).await;
    let updated = |cluster: &GalerneCluster| {
        let status = cluster.status.clone().unwrap_or_default();
        let all = status.groups_updated == 2 && status.groups_total == 2;
        all && status.groups[0].revision != before.groups[0].revision
    };
    world.until("updated", updated).await;
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
    let brought = events.iter().filter(|event| event.reason.as_deref() == Some("Preload"));
    assert!(brought.count() >= 1, "people are told");
    let pods = world.api::<Pod>();
    let gone = async || {
        let selected = ListParams::default().labels("galerne.dev/part=preload");
        pods.list(&selected).await.unwrap().items.is_empty().then_some(())
    };
    world.eventually("gone, what brought it", gone).await;
}

pub(crate) async fn what_goes_all_at_once_waits_for_what_comes(world: &World) {
    world.create(world.spec()).await;
    world.settled(2).await;
    let routers = async || {
        let template = world.api::<Deployment>().get("demo-router").await.unwrap().spec.unwrap().template;
        template.spec.unwrap().containers[0].image.clone().unwrap_or_default()
    };
    let before = routers().await;
    let kept = gapless(world, 2);
    world.patch(json!({ "image": BROKEN, "update": { "strategy": "Recreate" } })).await;
    let fails = |cluster: &GalerneCluster| condition(cluster, "Degraded").1.contains(LAST_WORDS);
    world.until("told that the version does not get there", fails).await;
    assert_eq!(routers().await, before, "they may not understand the groups that serve");
    assert!(!kept.is_finished(), "groups went for a version that cannot take their place");
    kept.abort();

    world.patch(json!({ "image": "galerne:good" })).await;
    world.settled(2).await;
    let new = async || (routers().await == "galerne:good").then_some(());
    world.eventually("new, the routers, too", new).await;
}

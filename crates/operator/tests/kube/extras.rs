//! Kinds that not every Kubernetes has: with them, and without.

use galerne_operator::api::GalerneCluster;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::cases::condition;
use crate::world::World;

/// Teaches the API server a kind, and the operator begins anew, as it would look only a minute later.
async fn teach(world: &World, group: &str, version: &str, plural: &str, kind: &str) -> Api<DynamicObject> {
    let schema =
        json!({ "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } });
    let version_of = json!({ "name": version, "served": true, "storage": true, "schema": schema });
    let definition = json!({
        "metadata": { "name": format!("{plural}.{group}") },
        "spec": { "group": group, "scope": "Namespaced", "names": { "plural": plural, "kind": kind }, "versions": [version_of] },
    });
    let definitions: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    let definition = serde_json::from_value(definition).expect("a definition");
    definitions.create(&PostParams::default(), &definition).await.expect("a definition that is taken");
    world.stop_operator().await;
    world.start_operator("two");
    objects(world, group, version, plural, kind)
}

fn objects(world: &World, group: &str, version: &str, plural: &str, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
    Api::namespaced_with(world.client.clone(), &world.namespace, &resource)
}

async fn names(api: &Api<DynamicObject>) -> Vec<String> {
    api.list(&ListParams::default()).await.expect("a list").iter().map(ResourceExt::name_any).collect()
}

pub(crate) async fn a_certificate_is_asked_for_where_there_is_cert_manager(world: &World) {
    if world.ours.is_none() {
        return; // a real cluster has it, or has it not, for all who use it
    }
    let mut spec = world.spec();
    spec["tls"] = json!({ "issuer": { "name": "ours" } });
    world.create(spec).await;
    let says = |words: &'static str| {
        move |cluster: &GalerneCluster| condition(cluster, "Degraded").1.contains(words)
    };
    world
        .until("told", says("spec.tls.issuer needs cert-manager, which this Kubernetes does not have"))
        .await;
    assert!(world.sets().await.is_empty(), "nothing begins that cannot be");

    let certificates = teach(world, "cert-manager.io", "v1", "certificates", "Certificate").await;
    world.settled(2).await;
    let certificate = certificates.get("demo-tls").await.expect("a certificate").data;
    assert_eq!(
        certificate["spec"]["issuerRef"],
        json!({ "group": "cert-manager.io", "kind": "Issuer", "name": "ours" })
    );
    let set = world.api::<StatefulSet>().get("demo-g0").await.unwrap();
    let volumes = set.spec.unwrap().template.spec.unwrap().volumes.unwrap();
    let secrets = volumes.iter().filter_map(|volume| volume.secret.as_ref()?.secret_name.as_deref());
    assert_eq!(secrets.collect::<Vec<_>>(), ["demo-tls"]);

    certificates.delete("demo-tls", &kube::api::DeleteParams::default()).await.unwrap();
    let back = async || certificates.get_opt("demo-tls").await.unwrap();
    world.eventually("made again", back).await;
    world.patch(json!({ "tls": { "issuer": null, "secret": "given" } })).await;
    world.settled(2).await;
    let gone = async || names(&certificates).await.is_empty().then_some(());
    world.eventually("gone, because it is given", gone).await;
}

pub(crate) async fn groups_are_gangs_where_kubernetes_can_do_that(world: &World) {
    let served = world.client.list_api_group_resources("scheduling.k8s.io/v1alpha2").await;
    let served = served.is_ok_and(|list| list.resources.iter().any(|resource| resource.name == "podgroups"));
    if !served && world.ours.is_none() {
        return; // not behind this cluster's feature gates
    }
    let mut spec = world.spec();
    spec["tensorParallel"] = 2.into();
    spec["ranksPerHost"] = 1.into();
    spec["groups"]["replicas"] = 1.into();
    world.create(spec).await;
    let sets = world.api::<StatefulSet>();
    let gang = async |name: &str| {
        let set = serde_json::to_value(sets_as_json(world, name).await).unwrap();
        set["spec"]["template"]["spec"]["schedulingGroup"]["podGroupName"].clone()
    };
    let first = world.eventually("made", async || sets.get_opt("demo-g0").await.unwrap()).await;
    assert_eq!(gang("demo-g0").await, if served { json!("demo-g0") } else { Value::Null });

    let [group, version, plural, kind] = ["scheduling.k8s.io", "v1alpha2", "podgroups", "PodGroup"];
    let pod_groups = match served {
        true => objects(world, group, version, plural, kind),
        false => teach(world, group, version, plural, kind).await,
    };
    world.patch(json!({ "groups": { "replicas": 2 } })).await;
    world.eventually("made", async || sets.get_opt("demo-g1").await.unwrap()).await;
    assert_eq!(gang("demo-g1").await, "demo-g1");
    let made = pod_groups.get("demo-g1").await.expect("a gang").data;
    assert_eq!(made["spec"]["schedulingPolicy"], json!({ "gang": { "minCount": 2 } }));
    let gangs = if served { &["demo-g0", "demo-g1"][..] } else { &["demo-g1"] };
    assert_eq!(names(&pod_groups).await, gangs, "what stands is left alone");
    assert_eq!(sets.get("demo-g0").await.unwrap().uid(), first.uid());

    pod_groups.delete("demo-g1", &kube::api::DeleteParams::default()).await.unwrap();
    world.eventually("made again", async || pod_groups.get_opt("demo-g1").await.unwrap()).await;
    world.patch(json!({ "groups": { "replicas": 0 } })).await;
    let gone = async || names(&pod_groups).await.is_empty().then_some(());
    world.eventually("gone with its group", gone).await;
}

/// A StatefulSet with fields that this client's types do not have.
async fn sets_as_json(world: &World, name: &str) -> DynamicObject {
    let resource = ApiResource::erase::<StatefulSet>(&());
    let sets: Api<DynamicObject> = Api::namespaced_with(world.client.clone(), &world.namespace, &resource);
    sets.get(name).await.expect("a StatefulSet")
}

//! A cluster that KUBECONFIG names: what must be there before an operator is, whose rights are those that the chart gives it.

use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Config, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::world::LOOK;
use galerne_operator::api::GalerneCluster;

/// What the chart makes, as it is checked in.
const MANIFESTS: &str = include_str!("../../../../k8s/operator.yaml");

/// A name that no other run has taken.
pub(crate) fn unique(case: &str) -> String {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_millis();
    let case: String = case.replace('_', "-").chars().take(40).collect();
    format!("galerne-{case}-{:x}", now & 0xffff_ffff)
}

/// Makes a namespace, and gives its service account `operator` the chart's rights. A `restricted` one takes only pods that keep to
/// that profile of the Pod Security Standards.
pub(crate) async fn prepare(client: &Client, namespace: &str, restricted: bool) {
    let profile = if restricted { "restricted" } else { "privileged" };
    let labels = json!({ "pod-security.kubernetes.io/enforce": profile });
    let made = json!({ "metadata": { "name": namespace, "labels": labels } });
    create(&Api::<Namespace>::all(client.clone()), made).await;
    let subjects = json!([{ "kind": "ServiceAccount", "name": "operator", "namespace": namespace }]);
    let meta = json!({ "name": namespace });
    let bound = |kind: &str| {
        let role = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": namespace });
        json!({ "metadata": meta, "roleRef": role, "subjects": subjects })
    };
    let role = |kind: &str| json!({ "metadata": meta, "rules": rules(kind) });
    create(&Api::<ClusterRole>::all(client.clone()), role("ClusterRole")).await;
    create(&Api::<ClusterRoleBinding>::all(client.clone()), bound("ClusterRole")).await;
    create(&namespaced::<Role>(client, namespace), role("Role")).await;
    create(&namespaced::<RoleBinding>(client, namespace), bound("Role")).await;
}

/// What the operator's service account asks with, once its rights hold.
pub(crate) async fn operator(namespace: &str) -> Client {
    let mut config = Config::infer().await.expect("the cluster that KUBECONFIG names");
    config.auth_info.impersonate = Some(format!("system:serviceaccount:{namespace}:operator"));
    let groups = ["system:serviceaccounts", "system:authenticated"].map(str::to_owned);
    config.auth_info.impersonate_groups = Some(groups.into());
    let client = Client::try_from(config).expect("a client");
    while Api::<GalerneCluster>::all(client.clone()).list(&ListParams::default()).await.is_err() {
        tokio::time::sleep(LOOK).await; // a real server takes a moment to serve a new kind, and to learn of a right
    }
    client
}

/// Takes away what was made.
pub(crate) async fn end(client: &Client, namespace: &str, nodes: &[String]) {
    let now = DeleteParams::default();
    Api::<Namespace>::all(client.clone()).delete(namespace, &now).await.ok();
    Api::<ClusterRoleBinding>::all(client.clone()).delete(namespace, &now).await.ok();
    Api::<ClusterRole>::all(client.clone()).delete(namespace, &now).await.ok();
    for node in nodes {
        Api::<Node>::all(client.clone()).delete(node, &now).await.ok();
    }
}

/// The rules of the one role of this kind that the chart makes.
fn rules(kind: &str) -> Value {
    let documents =
        MANIFESTS.split("\n---\n").map(|text| serde_saphyr::from_str::<Value>(text).expect("YAML"));
    let mut roles = documents.filter(|document| document["kind"] == kind);
    roles.next().expect("a role")["rules"].take()
}

fn namespaced<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

async fn create<K: Clone + std::fmt::Debug + Serialize + DeserializeOwned>(api: &Api<K>, object: Value) {
    let object = serde_json::from_value(object).expect("an object");
    api.create(&PostParams::default(), &object).await.expect("an object that is taken");
}

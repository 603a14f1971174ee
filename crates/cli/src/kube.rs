//! GalerneClusters as the Kubernetes API shows them, for `galerne status --kube`.

use galerne_operator::api::{GalerneCluster, GroupStatus};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use crate::fleet;

/// The Kubernetes cluster that KUBECONFIG names, or that this process runs in.
pub(crate) async fn config() -> anyhow::Result<kube::Config> {
    kube::Config::infer().await.map_err(|error| {
        anyhow::anyhow!("no Kubernetes cluster is named: run in one, or set KUBECONFIG: {error}")
    })
}

/// The GalerneClusters of a namespace, or of all, by their names.
pub(crate) async fn clusters(client: Client, namespace: Option<&str>) -> anyhow::Result<Vec<GalerneCluster>> {
    let api: Api<GalerneCluster> = match namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    };
    let mut clusters = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await;
        let list = list.map_err(|error| anyhow::anyhow!("GalerneClusters cannot be listed: {error}"))?;
        clusters.extend(list.items);
        match list.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => page = page.continue_token(&more),
            None => return Ok(clusters),
        }
    }
}

/// Clusters that are asked for at a time.
const PAGE: u32 = 500;

fn name(cluster: &GalerneCluster) -> String {
    format!("{}/{}", cluster.namespace().unwrap_or_default(), cluster.name_any())
}

/// Clusters and their groups as a table, and what is to be said of each.
pub(crate) fn table(clusters: &[GalerneCluster]) -> String {
    let header = ["CLUSTER", "MODEL", "READY", "ROUTERS", "GROUP", "PHASE", "EPOCH", "RANKS", "VERSION"];
    let mut rows = vec![header.map(str::to_owned)];
    let (mut said, none) = (Vec::new(), || "-".to_owned());
    for cluster in clusters {
        let status = cluster.status.clone().unwrap_or_default();
        let ready = format!("{} of {}", status.groups_ready, status.groups_wanted);
        let head = [name(cluster), cluster.spec.model.name.clone(), ready, status.routers_ready.to_string()];
        let mut row = |[group, phase, epoch, ranks, version]: [String; 5]| {
            let [name, model, ready, routers] = head.clone();
            rows.push([name, model, ready, routers, group, phase, epoch, ranks, version]);
        };
        if status.groups.is_empty() {
            row([none(), none(), none(), none(), none()]);
        }
        for group in &status.groups {
            let GroupStatus { name, phase, epoch, ranks_ready, revision, .. } = group;
            let epoch = epoch.map_or_else(none, |epoch| epoch.to_string());
            let ranks = format!("{ranks_ready} of {}", cluster.spec.tensor_parallel);
            row([name.clone(), format!("{phase:?}").to_lowercase(), epoch, ranks, revision.clone()]);
        }
        let messages = status.groups.iter().filter(|group| !group.message.is_empty());
        let messages = messages.map(|group| format!("{} {}: {}", name(cluster), group.name, group.message));
        said.extend(messages);
        let summary = match status.summary.as_str() {
            "" => "no operator has looked at it yet",
            summary => summary,
        };
        said.push(format!("{}: {summary}", name(cluster)));
    }
    fleet::lines(&rows).into_iter().chain(said).collect::<Vec<_>>().join("\n")
}

/// The same as JSON: what the API's status says.
pub(crate) fn as_json(clusters: &[GalerneCluster]) -> Value {
    let clusters = clusters.iter().map(|cluster| {
        json!({ "namespace": cluster.namespace(), "name": cluster.name_any(), "model": cluster.spec.model.name, "status": cluster.status })
    });
    json!({ "clusters": clusters.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use galerne_apiserver::ApiServer;
    use galerne_operator::api::crd_yaml;
    use kube::api::{Patch, PatchParams};

    use super::*;

    async fn apply(client: &Client, path: &str, object: &Value) {
        let params = PatchParams::apply("test").force();
        let request = kube::core::Request::new(path.rsplit_once('/').unwrap().0);
        let name = path.rsplit_once('/').unwrap().1;
        let request = request.patch(name, &params, &Patch::Apply(object)).unwrap();
        client.request::<Value>(request).await.unwrap();
    }

    #[tokio::test]
    async fn a_table_of_two_clusters_as_the_api_shows_them() {
        let server = ApiServer::start().await.unwrap();
        let config = kube::Config::new(server.url().parse().unwrap());
        let client = Client::try_from(config).unwrap();
        assert!(clusters(client.clone(), None).await.is_err(), "there is no such kind yet");
        let definition: Value = serde_saphyr::from_str(&crd_yaml()).unwrap();
        let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        apply(&client, &format!("{definitions}/galerneclusters.galerne.dev"), &definition).await;
        for (namespace, cluster) in [("a", "one"), ("b", "two")] {
            let spec = json!({
                "model": { "name": "bard", "path": "bard" }, "tensorParallel": 2, "router": { "noAuth": true },
                "etcd": { "managed": {} }, "storage": { "hostPath": "/models" },
            });
            let object = json!({
                "apiVersion": "galerne.dev/v1alpha1", "kind": "GalerneCluster", "metadata": { "name": cluster }, "spec": spec,
            });
            let all = format!("/apis/galerne.dev/v1alpha1/namespaces/{namespace}/galerneclusters");
            apply(&client, &format!("{all}/{cluster}"), &object).await;
        }
        let api: Api<GalerneCluster> = Api::namespaced(client.clone(), "a");
        let groups = json!([
            { "name": "g0", "phase": "Ready", "since": 1, "epoch": 12, "ranksReady": 2, "revision": "abc" },
            { "name": "g1", "phase": "Failing", "since": 1, "message": "one-g1-0: no such model" },
        ]);
        let status = json!({ "status": {
            "groupsReady": 1, "groupsWanted": 2, "routersReady": 1, "summary": "group g1: no such model", "groups": groups,
        } });
        api.patch_status("one", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();

        let all = clusters(client.clone(), None).await.unwrap();
        let table = table(&all);
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1].join(" "), "a/one bard 1 of 2 1 g0 ready 12 2 of 2 abc", "{table}");
        assert_eq!(lines[2].join(" "), "a/one bard 1 of 2 1 g1 failing - 0 of 2", "{table}");
        assert_eq!(lines[3].join(" "), "b/two bard 0 of 0 0 - - - - -", "{table}");
        let said = [
            "a/one g1: one-g1-0: no such model",
            "a/one: group g1: no such model",
            "b/two: no operator has looked at it yet",
        ];
        assert_eq!(table.lines().skip(4).collect::<Vec<_>>(), said);
        let one = as_json(&clusters(client, Some("a")).await.unwrap());
        assert_eq!(one["clusters"].as_array().map(Vec::len), Some(1));
        assert_eq!(one["clusters"][0]["status"]["groups"][1]["phase"], "Failing");
    }
}

//! The definition that Kubernetes is told of.

use std::path::Path;

use galerne_apiserver::ApiServer;
use galerne_operator::api::{GalerneCluster, crd_yaml};
use galerne_operator::plan::validate;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::PostParams;
use kube::{Api, Client, Config, Resource};
use serde_json::Value;

#[test]
fn the_definition_that_is_checked_in_is_of_these_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../k8s/crds/galerneclusters.yaml");
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    let generated = crd_yaml();
    let differs = (0..).zip(checked_in.lines().zip(generated.lines())).find(|(_, (old, new))| old != new);
    let same = differs.is_none() && checked_in.len() == generated.len();
    assert!(
        same,
        "the types have changed, first in {differs:?}: `make crds` writes k8s/crds/galerneclusters.yaml"
    );
}

#[tokio::test]
async fn every_example_is_taken() {
    let server = ApiServer::start().await.expect("an API server");
    let client = Client::try_from(Config::new(server.url().parse().expect("a URL"))).expect("a client");
    let definition: CustomResourceDefinition = serde_saphyr::from_str(&crd_yaml()).expect("a definition");
    Api::all(client.clone())
        .create(&PostParams::default(), &definition)
        .await
        .expect("a definition that is taken");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../k8s/examples");
    let mut taken = 0;
    for entry in std::fs::read_dir(folder).expect("examples") {
        let path = entry.expect("an example").path();
        let text = std::fs::read_to_string(&path).expect("a readable file");
        for document in text.split("\n---\n").filter(|document| document.contains("kind: GalerneCluster\n")) {
            let cluster: Value = serde_saphyr::from_str(document).expect("YAML");
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let url = GalerneCluster::url_path(&(), Some(&name));
            let request = http::Request::post(url).header("content-type", "application/json");
            let request = request.body(cluster.to_string().into_bytes()).expect("a request");
            let answer = client.request::<GalerneCluster>(request).await;
            let cluster = answer.unwrap_or_else(|refused| panic!("{}: {refused}", path.display()));
            validate(&cluster.spec, String::new(), None)
                .unwrap_or_else(|wrong| panic!("{}: {wrong}", path.display()));
            taken += 1;
        }
    }
    assert!(taken >= 5, "{taken} examples");
}

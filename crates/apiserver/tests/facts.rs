//! What the Kubernetes API's documentation says, and whether this server does so: "Kubernetes API Concepts", "Server-Side Apply",
//! "Finalizers", "Owners and Dependents", "Disruptions", and the reference of each kind. A fact is a request and its answer.

use std::time::Duration;

use futures_util::StreamExt;
use galerne_apiserver::ApiServer;
use http_body_util::{BodyExt, BodyStream, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

const APPLY: &str = "application/apply-patch+yaml";
const MERGE: &str = "application/merge-patch+json";
const MAPS: &str = "/api/v1/namespaces/n/configmaps";
const DEADLINE: Duration = Duration::from_secs(20);

async fn send(
    server: &ApiServer,
    method: Method,
    path: &str,
    media: &str,
    body: Value,
) -> Response<Incoming> {
    let stream = TcpStream::connect(server.address).await.expect("a server that listens");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request =
        Request::builder().method(method).uri(path).header("host", "test").header("content-type", media);
    sender.send_request(request.body(Full::<Bytes>::from(body)).expect("a request")).await.expect("an answer")
}

async fn ask(server: &ApiServer, method: Method, path: &str, media: &str, body: Value) -> (u16, Value) {
    let answer = send(server, method, path, media, body).await;
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.expect("a body").to_bytes();
    (code, serde_json::from_slice(&bytes).expect("JSON"))
}

async fn get(server: &ApiServer, path: &str) -> (u16, Value) {
    ask(server, Method::GET, path, "", Value::Null).await
}

async fn post(server: &ApiServer, path: &str, body: Value) -> (u16, Value) {
    ask(server, Method::POST, path, "application/json", body).await
}

async fn apply(server: &ApiServer, name: &str, manager: &str, force: bool, mut body: Value) -> (u16, Value) {
    (body["apiVersion"], body["kind"]) = ("v1".into(), "ConfigMap".into());
    let path = format!("{MAPS}/{name}?fieldManager={manager}&force={force}");
    ask(server, Method::PATCH, &path, APPLY, body).await
}

fn map(name: &str) -> Value {
    json!({ "metadata": { "name": name }, "data": { "a": "1" } })
}

/// The events of a watch, until there are `count` of them.
async fn events(server: &ApiServer, path: &str, count: usize) -> Vec<(String, Value)> {
    let answer = send(server, Method::GET, path, "", Value::Null).await;
    let mut frames = BodyStream::new(answer.into_body());
    let (mut text, mut events) = (Vec::new(), Vec::new());
    let all = async {
        while events.len() < count {
            let Some(frame) = frames.next().await else { break };
            text.extend_from_slice(&frame.expect("a frame").into_data().expect("data"));
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).expect("JSON");
                events.push((event["type"].as_str().expect("a type").to_owned(), event["object"].clone()));
            }
        }
    };
    tokio::time::timeout(DEADLINE, all).await.expect("events in time");
    events
}

#[tokio::test]
async fn objects_are_created_once_and_conflicts_are_told() {
    let server = ApiServer::start().await.unwrap();
    let (code, created) = post(&server, MAPS, map("a")).await;
    let meta = &created["metadata"];
    assert_eq!(code, 201);
    assert!(
        meta["uid"].is_string()
            && meta["resourceVersion"].is_string()
            && meta["creationTimestamp"].is_string()
    );
    let (code, status) = post(&server, MAPS, map("a")).await;
    assert_eq!((code, &status["kind"], &status["reason"]), (409, &json!("Status"), &json!("AlreadyExists")));
    // "The server will set generateName's prefix and a suffix."
    let (_, generated) = post(&server, MAPS, json!({ "metadata": { "generateName": "x-" } })).await;
    assert!(generated["metadata"]["name"].as_str().unwrap().starts_with("x-"));
    assert_eq!(get(&server, &format!("{MAPS}/none")).await.0, 404);

    // An update at a version that is not the last is a conflict; one without a version is not.
    let path = format!("{MAPS}/a");
    let mut newer = created.clone();
    newer["data"]["a"] = "2".into();
    assert_eq!(ask(&server, Method::PUT, &path, "application/json", newer.clone()).await.0, 200);
    let (code, status) = ask(&server, Method::PUT, &path, "application/json", newer.clone()).await;
    assert_eq!((code, &status["reason"]), (409, &json!("Conflict")));
    newer["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    newer["data"]["a"] = "3".into();
    assert_eq!(ask(&server, Method::PUT, &path, "application/json", newer).await.0, 200);

    // A write that changes nothing has no new version.
    let (_, before) = get(&server, &path).await;
    let (_, after) = ask(&server, Method::PATCH, &path, MERGE, json!({ "data": { "a": "3" } })).await;
    assert_eq!(before["metadata"]["resourceVersion"], after["metadata"]["resourceVersion"]);
    // null in a merge patch removes.
    let (_, after) =
        ask(&server, Method::PATCH, &path, MERGE, json!({ "data": { "a": null, "b": "1" } })).await;
    assert_eq!(after["data"], json!({ "b": "1" }));
}

#[tokio::test]
async fn fields_are_owned_by_those_who_applied_them() {
    let server = ApiServer::start().await.unwrap();
    let (code, first) = apply(&server, "a", "one", false, json!({ "data": { "a": "1", "b": "1" } })).await;
    assert_eq!(code, 201, "an apply creates what is not there");
    let owned = &first["metadata"]["managedFields"][0];
    assert_eq!((&owned["manager"], &owned["operation"]), (&json!("one"), &json!("Apply")));
    assert_eq!(owned["fieldsV1"], json!({ "f:data": { "f:a": {}, "f:b": {} } }));

    let (code, status) = apply(&server, "a", "two", false, json!({ "data": { "a": "2" } })).await;
    assert_eq!((code, &status["reason"]), (409, &json!("Conflict")));
    assert_eq!(status["details"]["causes"][0]["reason"], "FieldManagerConflict");
    // Equal values are shared, not contested.
    assert_eq!(apply(&server, "a", "two", false, json!({ "data": { "a": "1" } })).await.0, 200);
    // What a manager leaves out goes, unless another one owns it, too.
    let (_, left) = apply(&server, "a", "one", false, json!({ "data": {} })).await;
    assert_eq!(left["data"], json!({ "a": "1" }));
    // Force takes the field from the others.
    apply(&server, "a", "one", true, json!({ "data": { "a": "3" } })).await;
    let (_, taken) = apply(&server, "a", "two", false, json!({ "data": { "c": "1" } })).await;
    assert_eq!(taken["data"], json!({ "a": "3", "c": "1" }));
    // Nothing new is no new version.
    let (_, again) = apply(&server, "a", "two", false, json!({ "data": { "c": "1" } })).await;
    assert_eq!(again["metadata"]["resourceVersion"], taken["metadata"]["resourceVersion"]);
    assert_eq!(apply(&server, "a", "", false, map("a")).await.0, 400, "fieldManager is required");

    // Somebody who updates a field owns it from then on, alone.
    let path = format!("{MAPS}/a?fieldManager=three");
    ask(&server, Method::PATCH, &path, MERGE, json!({ "data": { "c": "9" } })).await;
    assert_eq!(apply(&server, "a", "two", false, json!({ "data": { "c": "1" } })).await.0, 409);
}

#[tokio::test]
async fn items_of_lists_are_owned_by_their_keys() {
    let server = ApiServer::start().await.unwrap();
    let path = "/apis/apps/v1/namespaces/n/deployments/d";
    let pod = |containers: Value| json!({ "apiVersion": "apps/v1", "kind": "Deployment", "spec": { "template": { "spec": { "containers": containers } } } });
    let one = pod(json!([{ "name": "a", "image": "1" }, { "name": "b", "image": "1" }]));
    ask(&server, Method::PATCH, &format!("{path}?fieldManager=one"), APPLY, one).await;
    let two = pod(json!([{ "name": "c", "image": "1" }]));
    ask(&server, Method::PATCH, &format!("{path}?fieldManager=two"), APPLY, two).await;
    let fewer = pod(json!([{ "name": "b", "image": "2", "args": ["x", "y"] }]));
    let (_, after) = ask(&server, Method::PATCH, &format!("{path}?fieldManager=one"), APPLY, fewer).await;
    let containers = after["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    let said = containers.iter().map(|container| {
        let said = container.as_object().unwrap().iter();
        said.filter(|(field, _)| ["name", "image", "args"].contains(&field.as_str()))
            .map(|(field, value)| (field.clone(), value.clone()))
            .collect::<Value>()
    });
    let said: Vec<Value> = said.collect();
    assert_eq!(
        said,
        [json!({ "name": "b", "image": "2", "args": ["x", "y"] }), json!({ "name": "c", "image": "1" })]
    );
}

#[tokio::test]
async fn what_is_not_said_is_added_and_nobodys() {
    let server = ApiServer::start().await.unwrap();
    let path = "/apis/apps/v1/namespaces/n/statefulsets/s?fieldManager=one";
    let pod = json!({ "containers": [{ "name": "a", "ports": [{ "containerPort": 1 }] }] });
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "spec": { "serviceName": "s", "template": { "spec": pod } },
    });
    let (_, made) = ask(&server, Method::PATCH, path, APPLY, set.clone()).await;
    // StatefulSetSpec: "If unspecified, defaults to 1." PodSpec: "Default to Always." Container: "Defaults to File."
    assert_eq!(made["spec"]["replicas"], 1);
    let pod = &made["spec"]["template"]["spec"];
    assert_eq!((&pod["restartPolicy"], &pod["dnsPolicy"]), (&json!("Always"), &json!("ClusterFirst")));
    assert_eq!(pod["containers"][0]["terminationMessagePolicy"], "File");
    assert_eq!(pod["containers"][0]["ports"][0]["protocol"], "TCP");
    assert!(made["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"].get("f:replicas").is_none());
    // Applied again, it is what it was.
    let (_, again) = ask(&server, Method::PATCH, path, APPLY, set).await;
    assert_eq!(again["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);

    // A Service gets an address of its own, and keeps it.
    let services = "/api/v1/namespaces/n/services";
    let (_, service) = post(
        &server,
        services,
        json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "port": 80 }] } }),
    )
    .await;
    assert!(service["spec"]["clusterIP"].as_str().unwrap().starts_with("10."));
    assert_eq!(service["spec"]["ports"][0]["targetPort"], 80);
    let bare = json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "port": 81 }] } });
    let (_, put) = ask(&server, Method::PUT, &format!("{services}/s"), "application/json", bare).await;
    assert_eq!(put["spec"]["clusterIP"], service["spec"]["clusterIP"]);
    let twice = json!({ "spec": { "ports": [{ "name": "x", "port": 1 }, { "name": "x", "port": 2 }] } });
    assert_eq!(ask(&server, Method::PATCH, &format!("{services}/s"), MERGE, twice).await.0, 422);
}

#[tokio::test]
async fn what_somebody_removes_is_nobodys() {
    let server = ApiServer::start().await.unwrap();
    apply(&server, "a", "one", false, json!({ "data": { "a": "1", "b": "1" } })).await;
    let path = format!("{MAPS}/a");
    let (_, after) = ask(&server, Method::PATCH, &path, MERGE, json!({ "data": { "a": null } })).await;
    assert_eq!(after["metadata"]["managedFields"][0]["fieldsV1"], json!({ "f:data": { "f:b": {} } }));
}

#[tokio::test]
async fn a_watch_tells_what_changed_since_a_version() {
    let server = ApiServer::start().await.unwrap();
    post(&server, MAPS, map("a")).await;
    let (_, list) = get(&server, MAPS).await;
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let path = format!("{MAPS}/a");
    ask(&server, Method::PATCH, &path, MERGE, json!({ "metadata": { "labels": { "x": "1" } } })).await;
    ask(&server, Method::PATCH, &path, MERGE, json!({ "metadata": { "labels": { "x": "2" } } })).await;
    ask(&server, Method::DELETE, &path, "", Value::Null).await;
    let watch = format!("{MAPS}?watch=1&resourceVersion={version}");
    let kinds = |events: Vec<(String, Value)>| events.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    assert_eq!(kinds(events(&server, &watch, 3).await), ["MODIFIED", "MODIFIED", "DELETED"]);
    // With a selector, what begins to fit is added and what ceases to is deleted.
    assert_eq!(
        kinds(events(&server, &format!("{watch}&labelSelector=x%3D1"), 2).await),
        ["ADDED", "DELETED"]
    );
    // Bookmarks tell of versions without news.
    let (kind, bookmark) =
        events(&server, &format!("{watch}&labelSelector=y&allowWatchBookmarks=true"), 1).await.remove(0);
    assert_eq!(kind, "BOOKMARK");
    assert!(bookmark["metadata"]["resourceVersion"].as_str() > Some(version.as_str()));
    // What is forgotten is gone: 410, as a status in an error.
    server.store.compact();
    let (kind, status) = events(&server, &watch, 1).await.remove(0);
    assert_eq!(
        (kind.as_str(), &status["code"], &status["reason"]),
        ("ERROR", &json!(410), &json!("Expired"))
    );
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = ApiServer::start().await.unwrap();
    for name in ["a", "b", "c"] {
        post(&server, MAPS, map(name)).await;
    }
    let (_, first) = get(&server, &format!("{MAPS}?limit=2")).await;
    let more = first["metadata"]["continue"].as_str().unwrap();
    assert_eq!((first["items"].as_array().unwrap().len(), more.is_empty()), (2, false));
    let (_, second) = get(&server, &format!("{MAPS}?limit=2&continue={more}")).await;
    assert_eq!(second["items"][0]["metadata"]["name"], "c");
    assert_eq!(second["metadata"]["continue"], "");
}

#[tokio::test]
async fn finalizers_hold_and_owners_take_along() {
    let server = ApiServer::start().await.unwrap();
    let held = json!({ "metadata": { "name": "held", "finalizers": ["x/y"] } });
    let (_, held) = post(&server, MAPS, held).await;
    let owner =
        json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "held", "uid": held["metadata"]["uid"] }]);
    post(&server, MAPS, json!({ "metadata": { "name": "owned", "ownerReferences": owner } })).await;
    let path = format!("{MAPS}/held");
    let (_, ending) = ask(&server, Method::DELETE, &path, "", Value::Null).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(get(&server, &path).await.0, 200);
    ask(&server, Method::PATCH, &path, MERGE, json!({ "metadata": { "finalizers": null } })).await;
    assert_eq!(get(&server, &path).await.0, 404);
    assert_eq!(get(&server, &format!("{MAPS}/owned")).await.0, 404);

    post(&server, MAPS, map("a")).await;
    let stale = json!({ "preconditions": { "uid": "another" } });
    assert_eq!(ask(&server, Method::DELETE, &format!("{MAPS}/a"), "application/json", stale).await.0, 409);
}

#[tokio::test]
async fn pods_end_gracefully_and_budgets_hold_them() {
    let server = ApiServer::start().await.unwrap();
    let pods = "/api/v1/namespaces/n/pods";
    let pod = |name: &str| json!({ "metadata": { "name": name, "labels": { "app": "x" } }, "spec": { "nodeName": "node" } });
    post(&server, pods, pod("a")).await;
    ask(
        &server,
        Method::PATCH,
        &format!("{pods}/a/status"),
        MERGE,
        json!({ "status": { "phase": "Running" } }),
    )
    .await;
    let budgets = "/apis/policy/v1/namespaces/n/poddisruptionbudgets";
    let spec = json!({ "maxUnavailable": 0, "selector": { "matchLabels": { "app": "x" } } });
    post(&server, budgets, json!({ "metadata": { "name": "b" }, "spec": spec })).await;
    let (code, status) = post(&server, &format!("{pods}/a/eviction"), json!({})).await;
    assert_eq!((code, &status["reason"]), (429, &json!("TooManyRequests")));
    assert_eq!(status["details"]["causes"][0]["reason"], "DisruptionBudget");
    ask(&server, Method::DELETE, &format!("{budgets}/b"), "", Value::Null).await;
    assert_eq!(post(&server, &format!("{pods}/a/eviction"), json!({})).await.0, 201);
    // It stays until its node says that it has ended, with a grace of 0.
    let (_, ending) = get(&server, &format!("{pods}/a")).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    let at_once = json!({ "gracePeriodSeconds": 0 });
    ask(&server, Method::DELETE, &format!("{pods}/a"), "application/json", at_once).await;
    assert_eq!(get(&server, &format!("{pods}/a")).await.0, 404);
}

#[tokio::test]
async fn a_group_tells_what_there_is_of_a_version() {
    let server = ApiServer::start().await.unwrap();
    let (code, list) = get(&server, "/apis/apps/v1").await;
    assert_eq!(
        (code, &list["kind"], &list["groupVersion"]),
        (200, &json!("APIResourceList"), &json!("apps/v1"))
    );
    let names =
        list["resources"].as_array().unwrap().iter().map(|resource| resource["name"].as_str().unwrap());
    assert!(names.collect::<Vec<_>>().contains(&"statefulsets"), "{list}");
    assert_eq!(get(&server, "/apis/cert-manager.io/v1").await.0, 404);
}

#[tokio::test]
async fn a_status_is_written_by_itself_and_generations_count_specs() {
    let server = ApiServer::start().await.unwrap();
    let sets = "/apis/apps/v1/namespaces/n/statefulsets";
    let set = json!({ "metadata": { "name": "s" }, "spec": { "replicas": 1, "serviceName": "x" }, "status": { "replicas": 9 } });
    let (_, created) = post(&server, sets, set).await;
    assert!(created.get("status").is_none(), "a status that comes with the rest is dropped");
    let path = format!("{sets}/s");
    let both = json!({ "spec": { "replicas": 5 }, "status": { "replicas": 1 } });
    let (_, after) = ask(&server, Method::PATCH, &format!("{path}/status"), MERGE, both.clone()).await;
    assert_eq!((&after["spec"]["replicas"], &after["status"]["replicas"]), (&json!(1), &json!(1)));
    assert_eq!(after["metadata"]["generation"], 1);
    let (_, after) = ask(&server, Method::PATCH, &path, MERGE, both).await;
    assert_eq!((&after["metadata"]["generation"], &after["spec"]["replicas"]), (&json!(2), &json!(5)));
    let (code, scale) = get(&server, &format!("{path}/scale")).await;
    assert_eq!((code, &scale["kind"], &scale["spec"]["replicas"]), (200, &json!("Scale"), &json!(5)));
    let (_, scale) =
        ask(&server, Method::PATCH, &format!("{path}/scale"), MERGE, json!({ "spec": { "replicas": 2 } }))
            .await;
    assert_eq!(scale["spec"]["replicas"], 2);
    // Who scales owns the number, under the subresource's name.
    let (_, after) = get(&server, &path).await;
    let owners = after["metadata"]["managedFields"].as_array().unwrap().iter();
    let owners: Vec<&Value> =
        owners.filter(|entry| !entry["fieldsV1"]["f:spec"]["f:replicas"].is_null()).collect();
    assert_eq!(owners.len(), 1);
    assert_eq!((&owners[0]["subresource"], &owners[0]["operation"]), (&json!("scale"), &json!("Update")));
    // Most of a StatefulSet's spec is for ever.
    let (code, _) =
        ask(&server, Method::PATCH, &path, MERGE, json!({ "spec": { "serviceName": "y" } })).await;
    assert_eq!(code, 422);
}

#[tokio::test]
async fn custom_resources_keep_to_their_schemas() {
    let server = ApiServer::start().await.unwrap();
    let schema = json!({ "type": "object", "required": ["spec"], "properties": {
        "spec": { "type": "object", "required": ["a"], "properties": {
            "a": { "type": "integer", "minimum": 1 }, "b": { "type": "string", "default": "x" } },
            "x-kubernetes-validations": [
                { "rule": "!has(self.b) || self.a < 9 || self.b != 'x'", "message": "an x is below 9" },
                { "rule": "self.a >= oldSelf.a", "message": "a only grows" },
            ] },
        "status": { "type": "object", "properties": { "n": { "type": "integer" } } } } });
    let scale = json!({ "specReplicasPath": ".spec.a", "statusReplicasPath": ".status.n" });
    let version = json!({ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema },
        "subresources": { "status": {}, "scale": scale } });
    let definition = json!({ "metadata": { "name": "toys.x.dev" }, "spec": { "group": "x.dev", "scope": "Namespaced",
        "names": { "plural": "toys", "kind": "Toy" }, "versions": [version] } });
    let toys = "/apis/x.dev/v1/namespaces/n/toys";
    assert_eq!(get(&server, toys).await.0, 404);
    post(&server, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition).await;
    let (code, toy) =
        post(&server, toys, json!({ "metadata": { "name": "t" }, "spec": { "a": 2, "unknown": 1 } })).await;
    assert_eq!(
        (code, &toy["spec"]),
        (201, &json!({ "a": 2, "b": "x" })),
        "unknown fields are pruned, defaults come"
    );
    let (code, status) =
        post(&server, toys, json!({ "metadata": { "name": "u" }, "spec": { "a": 0 } })).await;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));
    assert_eq!(get(&server, &format!("{toys}/t/scale")).await.1["spec"]["replicas"], 2);
    // Rules are asked with the defaults; one about a change only where something changes, the scale subresource included.
    let (code, status) =
        post(&server, toys, json!({ "metadata": { "name": "v" }, "spec": { "a": 9 } })).await;
    assert_eq!(
        (code, status["message"].as_str().unwrap().contains("spec: Invalid value: an x is below 9")),
        (422, true)
    );
    let scale = json!({ "spec": { "replicas": 1 } });
    let (code, status) = ask(&server, Method::PATCH, &format!("{toys}/t/scale"), MERGE, scale).await;
    assert_eq!((code, status["message"].as_str().unwrap().contains("a only grows")), (422, true));
}

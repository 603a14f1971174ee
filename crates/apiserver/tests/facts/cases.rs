//! The facts.

use hyper::Method;
use serde_json::{Value, json};

use crate::{APPLY, MAPS, MERGE, Server, apply, ask, events, get, map, post, until, until_it};

/// Selects what [`map`] makes: a namespace may hold others.
const FACTS: &str = "labelSelector=test%3Dfacts";

const QUOTAS: &str = "/api/v1/namespaces/n/resourcequotas";

/// What a controller makes pods from.
fn template(pod: &Value) -> Value {
    let labels = json!({ "app": "x" });
    json!({ "selector": { "matchLabels": labels }, "template": { "metadata": { "labels": labels }, "spec": pod } })
}

/// Defines a kind with a status and a scale.
fn toys(group: &str, schema: &Value, scale: &Value) -> Value {
    let version = json!({ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema },
        "subresources": { "status": {}, "scale": scale } });
    json!({ "metadata": { "name": format!("toys.{group}") }, "spec": { "group": group, "scope": "Namespaced",
        "names": { "plural": "toys", "kind": "Toy" }, "versions": [version] } })
}

pub(crate) async fn objects_are_created_once_and_conflicts_are_told(server: &Server) {
    let (code, created) = post(server, MAPS, map("a")).await;
    let meta = &created["metadata"];
    assert_eq!(code, 201);
    assert!(
        meta["uid"].is_string()
            && meta["resourceVersion"].is_string()
            && meta["creationTimestamp"].is_string()
    );
    let (code, status) = post(server, MAPS, map("a")).await;
    assert_eq!((code, &status["kind"], &status["reason"]), (409, &json!("Status"), &json!("AlreadyExists")));
    // "The server will set generateName's prefix and a suffix."
    let (_, generated) = post(server, MAPS, json!({ "metadata": { "generateName": "x-" } })).await;
    assert!(generated["metadata"]["name"].as_str().unwrap().starts_with("x-"));
    assert_eq!(get(server, &format!("{MAPS}/none")).await.0, 404);

    // An update at a version that is not the last is a conflict; one without a version is not.
    let path = format!("{MAPS}/a");
    let mut newer = created.clone();
    newer["data"]["a"] = "2".into();
    assert_eq!(ask(server, Method::PUT, &path, "application/json", newer.clone()).await.0, 200);
    let (code, status) = ask(server, Method::PUT, &path, "application/json", newer.clone()).await;
    assert_eq!((code, &status["reason"]), (409, &json!("Conflict")));
    newer["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    newer["data"]["a"] = "3".into();
    assert_eq!(ask(server, Method::PUT, &path, "application/json", newer).await.0, 200);

    // A write that changes nothing has no new version.
    let (_, before) = get(server, &path).await;
    let (_, after) = ask(server, Method::PATCH, &path, MERGE, json!({ "data": { "a": "3" } })).await;
    assert_eq!(before["metadata"]["resourceVersion"], after["metadata"]["resourceVersion"]);
    // null in a merge patch removes.
    let (_, after) =
        ask(server, Method::PATCH, &path, MERGE, json!({ "data": { "a": null, "b": "1" } })).await;
    assert_eq!(after["data"], json!({ "b": "1" }));
}

pub(crate) async fn fields_are_owned_by_those_who_applied_them(server: &Server) {
    let (code, first) = apply(server, "a", "one", false, json!({ "data": { "a": "1", "b": "1" } })).await;
    assert_eq!(code, 201, "an apply creates what is not there");
    let owned = &first["metadata"]["managedFields"][0];
    assert_eq!((&owned["manager"], &owned["operation"]), (&json!("one"), &json!("Apply")));
    assert_eq!(owned["fieldsV1"], json!({ "f:data": { "f:a": {}, "f:b": {} } }));

    let (code, status) = apply(server, "a", "two", false, json!({ "data": { "a": "2" } })).await;
    assert_eq!((code, &status["reason"]), (409, &json!("Conflict")));
    assert_eq!(status["details"]["causes"][0]["reason"], "FieldManagerConflict");
    // Equal values are shared, not contested.
    assert_eq!(apply(server, "a", "two", false, json!({ "data": { "a": "1" } })).await.0, 200);
    // What a manager leaves out goes, unless another one owns it, too.
    let (_, left) = apply(server, "a", "one", false, json!({ "data": {} })).await;
    assert_eq!(left["data"], json!({ "a": "1" }));
    // Force takes the field from the others.
    apply(server, "a", "one", true, json!({ "data": { "a": "3" } })).await;
    let (_, taken) = apply(server, "a", "two", false, json!({ "data": { "c": "1" } })).await;
    assert_eq!(taken["data"], json!({ "a": "3", "c": "1" }));
    // Nothing new is no new version.
    let (_, again) = apply(server, "a", "two", false, json!({ "data": { "c": "1" } })).await;
    assert_eq!(again["metadata"]["resourceVersion"], taken["metadata"]["resourceVersion"]);
    assert_eq!(apply(server, "a", "", false, map("a")).await.0, 422, "fieldManager is required");
    let nameless = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": {} });
    let path = format!("{MAPS}/nameless?fieldManager=one");
    assert_eq!(ask(server, Method::PATCH, &path, APPLY, nameless).await.0, 400, "so is the name");

    // Somebody who updates a field owns it from then on, alone.
    let path = format!("{MAPS}/a?fieldManager=three");
    ask(server, Method::PATCH, &path, MERGE, json!({ "data": { "c": "9" } })).await;
    assert_eq!(apply(server, "a", "two", false, json!({ "data": { "c": "1" } })).await.0, 409);
}

pub(crate) async fn items_of_lists_are_owned_by_their_keys(server: &Server) {
    let path = "/apis/apps/v1/namespaces/n/deployments/d";
    let pod = |containers: Value| json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "d" }, "spec": template(&json!({ "containers": containers })) });
    let one = pod(json!([{ "name": "a", "image": "1" }, { "name": "b", "image": "1" }]));
    ask(server, Method::PATCH, &format!("{path}?fieldManager=one"), APPLY, one).await;
    let two = pod(json!([{ "name": "c", "image": "1" }]));
    ask(server, Method::PATCH, &format!("{path}?fieldManager=two"), APPLY, two).await;
    let fewer = pod(json!([{ "name": "b", "image": "2", "args": ["x", "y"] }]));
    let (_, after) = ask(server, Method::PATCH, &format!("{path}?fieldManager=one"), APPLY, fewer).await;
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

pub(crate) async fn what_is_not_said_is_added_and_nobodys(server: &Server) {
    let path = "/apis/apps/v1/namespaces/n/statefulsets/s?fieldManager=one";
    let mut spec = template(
        &json!({ "containers": [{ "name": "a", "image": "i", "ports": [{ "containerPort": 1 }] }] }),
    );
    spec["serviceName"] = "s".into();
    let set =
        json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "s" }, "spec": spec });
    let (_, made) = ask(server, Method::PATCH, path, APPLY, set.clone()).await;
    // StatefulSetSpec: "If unspecified, defaults to 1." PodSpec: "Default to Always." Container: "Defaults to File."
    assert_eq!(made["spec"]["replicas"], 1);
    let pod = &made["spec"]["template"]["spec"];
    assert_eq!((&pod["restartPolicy"], &pod["dnsPolicy"]), (&json!("Always"), &json!("ClusterFirst")));
    assert_eq!(pod["containers"][0]["terminationMessagePolicy"], "File");
    assert_eq!(pod["containers"][0]["ports"][0]["protocol"], "TCP");
    assert!(made["metadata"]["managedFields"][0]["fieldsV1"]["f:spec"].get("f:replicas").is_none());
    // Applied again, it is what it was.
    let (_, again) = ask(server, Method::PATCH, path, APPLY, set).await;
    assert_eq!(again["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);

    // A Service gets an address of its own, and keeps it.
    let services = "/api/v1/namespaces/n/services";
    let (_, service) =
        post(server, services, json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "port": 80 }] } }))
            .await;
    assert!(service["spec"]["clusterIP"].as_str().unwrap().starts_with("10."));
    assert_eq!(service["spec"]["ports"][0]["targetPort"], 80);
    let bare = json!({ "metadata": { "name": "s" }, "spec": { "ports": [{ "port": 81 }] } });
    let (_, put) = ask(server, Method::PUT, &format!("{services}/s"), "application/json", bare).await;
    assert_eq!(put["spec"]["clusterIP"], service["spec"]["clusterIP"]);
    let twice = json!({ "spec": { "ports": [{ "name": "x", "port": 1 }, { "name": "x", "port": 2 }] } });
    assert_eq!(ask(server, Method::PATCH, &format!("{services}/s"), MERGE, twice).await.0, 422);
}

pub(crate) async fn what_somebody_removes_is_nobodys(server: &Server) {
    apply(server, "a", "one", false, json!({ "data": { "a": "1", "b": "1" } })).await;
    let path = format!("{MAPS}/a");
    let (_, after) = ask(server, Method::PATCH, &path, MERGE, json!({ "data": { "a": null } })).await;
    assert_eq!(after["metadata"]["managedFields"][0]["fieldsV1"], json!({ "f:data": { "f:b": {} } }));
}

/// Watches without a bookmark, one after the other.
const WATCHES_MAX: usize = 20;

pub(crate) async fn a_watch_tells_what_changed_since_a_version(server: &Server) {
    post(server, MAPS, map("a")).await;
    let (_, list) = get(server, &format!("{MAPS}?{FACTS}")).await;
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let path = format!("{MAPS}/a");
    ask(server, Method::PATCH, &path, MERGE, json!({ "metadata": { "labels": { "x": "1" } } })).await;
    ask(server, Method::PATCH, &path, MERGE, json!({ "metadata": { "labels": { "x": "2" } } })).await;
    ask(server, Method::DELETE, &path, "", Value::Null).await;
    let watch = format!("{MAPS}?watch=1&resourceVersion={version}&timeoutSeconds=3");
    let ours = format!("{watch}&{FACTS}");
    let kinds = |events: Vec<(String, Value)>| events.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    assert_eq!(kinds(events(server, &ours, 3).await), ["MODIFIED", "MODIFIED", "DELETED"]);
    // With a selector, what begins to fit is added and what ceases to is deleted.
    let fitting = events(server, &format!("{watch}&labelSelector=x%3D1"), 2).await;
    assert_eq!(fitting[1].1["metadata"]["labels"]["x"], "1", "as it was when it fitted last");
    assert_ne!(fitting[1].1["metadata"]["resourceVersion"], fitting[0].1["metadata"]["resourceVersion"]);
    assert_eq!(kinds(fitting), ["ADDED", "DELETED"]);
    // Bookmarks tell of versions without news; none is promised to a watch, and one of a server that has just begun may get none.
    let silent = format!("{watch}&labelSelector=y&allowWatchBookmarks=true");
    let mut told = Vec::new();
    for _ in 0..WATCHES_MAX {
        if told.is_empty() {
            told = events(server, &silent, 1).await;
        }
    }
    let (kind, bookmark) = told.remove(0);
    assert_eq!(kind, "BOOKMARK");
    let number = |version: &str| version.parse::<u64>().unwrap();
    assert!(number(bookmark["metadata"]["resourceVersion"].as_str().unwrap()) > number(&version));
    // What is forgotten is gone: 410, as a status in an error.
    let Some(of_ours) = &server.ours else { return }; // nobody asks a real one to forget
    of_ours.store.compact();
    let (kind, status) = events(server, &watch, 1).await.remove(0);
    assert_eq!(
        (kind.as_str(), &status["code"], &status["reason"]),
        ("ERROR", &json!(410), &json!("Expired"))
    );
}

pub(crate) async fn lists_come_in_pages(server: &Server) {
    for name in ["a", "b", "c"] {
        post(server, MAPS, map(name)).await;
    }
    let (_, first) = get(server, &format!("{MAPS}?limit=2&{FACTS}")).await;
    let more = first["metadata"]["continue"].as_str().unwrap();
    assert_eq!((first["items"].as_array().unwrap().len(), more.is_empty()), (2, false));
    let (_, second) = get(server, &format!("{MAPS}?limit=2&{FACTS}&continue={more}")).await;
    assert_eq!(second["items"][0]["metadata"]["name"], "c");
    assert_eq!(second["metadata"]["continue"].as_str().unwrap_or_default(), "");
}

pub(crate) async fn finalizers_hold_and_owners_take_along(server: &Server) {
    let held = json!({ "metadata": { "name": "held", "finalizers": ["x/y"] } });
    let (_, held) = post(server, MAPS, held).await;
    let owner =
        json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "held", "uid": held["metadata"]["uid"] }]);
    post(server, MAPS, json!({ "metadata": { "name": "owned", "ownerReferences": owner } })).await;
    let path = format!("{MAPS}/held");
    let (_, ending) = ask(server, Method::DELETE, &path, "", Value::Null).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(get(server, &path).await.0, 200);
    ask(server, Method::PATCH, &path, MERGE, json!({ "metadata": { "finalizers": null } })).await;
    assert_eq!(get(server, &path).await.0, 404);
    until(server, &format!("{MAPS}/owned"), 404).await;

    post(server, MAPS, map("a")).await;
    let stale = json!({ "preconditions": { "uid": "another" } });
    assert_eq!(ask(server, Method::DELETE, &format!("{MAPS}/a"), "application/json", stale).await.0, 409);
}

pub(crate) async fn pods_end_gracefully_and_budgets_hold_them(server: &Server) {
    let pods = "/api/v1/namespaces/n/pods";
    let pod = |name: &str| json!({ "metadata": { "name": name, "labels": { "app": "x" } }, "spec": { "nodeName": "node", "containers": [{ "name": "a", "image": "i" }] } });
    post(server, pods, pod("a")).await;
    ask(
        server,
        Method::PATCH,
        &format!("{pods}/a/status"),
        MERGE,
        json!({ "status": { "phase": "Running" } }),
    )
    .await;
    let budgets = "/apis/policy/v1/namespaces/n/poddisruptionbudgets";
    let spec = json!({ "maxUnavailable": 0, "selector": { "matchLabels": { "app": "x" } } });
    post(server, budgets, json!({ "metadata": { "name": "b" }, "spec": spec })).await;
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": "a" } });
    let (code, status) = post(server, &format!("{pods}/a/eviction"), eviction.clone()).await;
    assert_eq!((code, &status["reason"]), (429, &json!("TooManyRequests")));
    assert_eq!(status["details"]["causes"][0]["reason"], "DisruptionBudget");
    ask(server, Method::DELETE, &format!("{budgets}/b"), "", Value::Null).await;
    assert_eq!(post(server, &format!("{pods}/a/eviction"), eviction).await.0, 201);
    // It stays until its node says that it has ended, with a grace of 0.
    let (_, ending) = get(server, &format!("{pods}/a")).await;
    assert!(ending["metadata"]["deletionTimestamp"].is_string());
    let at_once = json!({ "gracePeriodSeconds": 0 });
    ask(server, Method::DELETE, &format!("{pods}/a"), "application/json", at_once).await;
    assert_eq!(get(server, &format!("{pods}/a")).await.0, 404);
}

pub(crate) async fn a_group_tells_what_there_is_of_a_version(server: &Server) {
    let (code, list) = get(server, "/apis/apps/v1").await;
    assert_eq!(
        (code, &list["kind"], &list["groupVersion"]),
        (200, &json!("APIResourceList"), &json!("apps/v1"))
    );
    let names =
        list["resources"].as_array().unwrap().iter().map(|resource| resource["name"].as_str().unwrap());
    assert!(names.collect::<Vec<_>>().contains(&"statefulsets"), "{list}");
    // A version that there is not is told in a Status; a group that nobody has defined in a line of text.
    let (code, status) = get(server, "/apis/apps/v9").await;
    assert_eq!((code, &status["reason"]), (404, &json!("NotFound")));
    assert_eq!(get(server, "/apis/not.known.dev/v1").await, (404, json!("404 page not found\n")));
}

pub(crate) async fn a_status_is_written_by_itself_and_generations_count_specs(server: &Server) {
    let sets = "/apis/apps/v1/namespaces/n/statefulsets";
    let mut spec = template(&json!({ "containers": [{ "name": "a", "image": "i" }] }));
    (spec["replicas"], spec["serviceName"]) = (1.into(), "x".into());
    let set = json!({ "metadata": { "name": "s" }, "spec": spec, "status": { "replicas": 9 } });
    let (_, created) = post(server, sets, set).await;
    assert_ne!(created["status"]["replicas"], 9, "a status that comes with the rest is dropped");
    let path = format!("{sets}/s");
    let both = json!({ "spec": { "replicas": 5 }, "status": { "replicas": 1 } });
    let (_, after) = ask(server, Method::PATCH, &format!("{path}/status"), MERGE, both.clone()).await;
    assert_eq!((&after["spec"]["replicas"], &after["status"]["replicas"]), (&json!(1), &json!(1)));
    assert_eq!(after["metadata"]["generation"], 1);
    let (_, after) = ask(server, Method::PATCH, &path, MERGE, both).await;
    assert_eq!((&after["metadata"]["generation"], &after["spec"]["replicas"]), (&json!(2), &json!(5)));
    let (code, scale) = get(server, &format!("{path}/scale")).await;
    assert_eq!((code, &scale["kind"], &scale["spec"]["replicas"]), (200, &json!("Scale"), &json!(5)));
    let (_, scale) =
        ask(server, Method::PATCH, &format!("{path}/scale"), MERGE, json!({ "spec": { "replicas": 2 } }))
            .await;
    assert_eq!(scale["spec"]["replicas"], 2);
    // Who scales owns the number, under the subresource's name.
    let (_, after) = get(server, &path).await;
    let owners = after["metadata"]["managedFields"].as_array().unwrap().iter();
    let owners: Vec<&Value> =
        owners.filter(|entry| !entry["fieldsV1"]["f:spec"]["f:replicas"].is_null()).collect();
    assert_eq!(owners.len(), 1);
    assert_eq!((&owners[0]["subresource"], &owners[0]["operation"]), (&json!("scale"), &json!("Update")));
    // Most of a StatefulSet's spec is for ever.
    let (code, _) = ask(server, Method::PATCH, &path, MERGE, json!({ "spec": { "serviceName": "y" } })).await;
    assert_eq!(code, 422);
}

pub(crate) async fn custom_resources_keep_to_their_schemas(server: &Server) {
    let schema = json!({ "type": "object", "required": ["spec"], "properties": {
        "spec": { "type": "object", "required": ["a"], "properties": {
            "a": { "type": "integer", "minimum": 1 }, "b": { "type": "string", "default": "x" } },
            "x-kubernetes-validations": [
                { "rule": "!has(self.b) || self.a < 9 || self.b != 'x'", "message": "an x is below 9" },
                { "rule": "self.a >= oldSelf.a", "message": "a only grows" },
            ] },
        "status": { "type": "object", "properties": { "n": { "type": "integer" } } } } });
    let scale = json!({ "specReplicasPath": ".spec.a", "statusReplicasPath": ".status.n" });
    let group = format!("{}.dev", server.namespace);
    let definition = toys(&group, &schema, &scale);
    let toys = &format!("/apis/{group}/v1/namespaces/n/toys");
    assert_eq!(get(server, toys).await.0, 404);
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    assert_eq!(post(server, definitions, definition).await.0, 201);
    until(server, toys, 200).await;
    let of = format!("{group}/v1");
    let toy = |name: &str, spec: Value| json!({ "apiVersion": of, "kind": "Toy", "metadata": { "name": name }, "spec": spec });
    let (code, made) = post(server, toys, toy("t", json!({ "a": 2, "unknown": 1 }))).await;
    assert_eq!(
        (code, &made["spec"]),
        (201, &json!({ "a": 2, "b": "x" })),
        "unknown fields are pruned, defaults come"
    );
    let (code, status) = post(server, toys, toy("u", json!({ "a": 0 }))).await;
    assert_eq!((code, &status["reason"]), (422, &json!("Invalid")));
    assert_eq!(get(server, &format!("{toys}/t/scale")).await.1["spec"]["replicas"], 2);
    // Rules are asked with the defaults; one about a change only where something changes, the scale subresource included.
    let (code, status) = post(server, toys, toy("v", json!({ "a": 9 }))).await;
    assert_eq!(
        (code, status["message"].as_str().unwrap().contains("spec: Invalid value: an x is below 9")),
        (422, true)
    );
    let scale = json!({ "spec": { "replicas": 1 } });
    let (code, status) = ask(server, Method::PATCH, &format!("{toys}/t/scale"), MERGE, scale).await;
    assert_eq!((code, status["message"].as_str().unwrap().contains("a only grows")), (422, true));
    ask(server, Method::DELETE, &format!("{definitions}/toys.{group}"), "", Value::Null).await;
}

pub(crate) async fn a_scale_without_a_number_is_none(server: &Server) {
    let number = json!({ "type": "object", "properties": { "n": { "type": "integer" } } });
    let schema = json!({ "type": "object", "properties": { "spec": number, "status": number } });
    let scale = json!({ "specReplicasPath": ".spec.n", "statusReplicasPath": ".status.n" });
    let group = format!("scaled.{}.dev", server.namespace);
    let definition = toys(&group, &schema, &scale);
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    assert_eq!(post(server, definitions, definition).await.0, 201);
    let toys = &format!("/apis/{group}/v1/namespaces/n/toys");
    until(server, toys, 200).await;
    let toy = json!({ "apiVersion": format!("{group}/v1"), "kind": "Toy", "metadata": { "name": "t" }, "spec": {} });
    assert_eq!(post(server, toys, toy).await.0, 201);
    let path = format!("{toys}/t/scale");
    let (code, status) = get(server, &path).await;
    assert_eq!((code, &status["reason"]), (500, &json!("InternalError")));
    let says = status["message"].as_str().unwrap();
    assert!(says.ends_with("the spec replicas field \".spec.n\" does not exist"), "{says}");
    // It can be set by the subresource all the same, and is there from then on.
    let (code, _) = ask(server, Method::PATCH, &path, MERGE, json!({ "spec": { "replicas": 2 } })).await;
    assert_eq!((code, &get(server, &path).await.1["spec"]["replicas"]), (200, &json!(2)));
    ask(server, Method::DELETE, &format!("{definitions}/toys.{group}"), "", Value::Null).await;
}

pub(crate) async fn names_labels_and_quantities_are_checked(server: &Server) {
    let service = |name: &str| json!({ "metadata": { "name": name }, "spec": { "ports": [{ "port": 80 }] } });
    let services = "/api/v1/namespaces/n/services";
    for name in ["a.b".to_owned(), "x".repeat(64), "A".to_owned()] {
        assert_eq!(post(server, services, service(&name)).await.0, 422, "{name}");
    }
    let labelled = |value: &str| json!({ "metadata": { "name": "a", "labels": { "l": value } } });
    for value in ["x".repeat(64), "-x".to_owned()] {
        let (code, status) = post(server, MAPS, labelled(&value)).await;
        assert_eq!((code, &status["reason"]), (422, &json!("Invalid")), "{value}");
    }
    assert_eq!(post(server, MAPS, labelled("")).await.0, 201);
    let pod = |cpu: &str| {
        json!({ "metadata": { "name": "p" }, "spec": { "containers": [{
        "name": "a", "image": "i", "resources": { "requests": { "cpu": cpu } } }] } })
    };
    let pods = "/api/v1/namespaces/n/pods";
    let (code, status) = post(server, pods, pod("lots")).await;
    let says = status["message"].as_str().unwrap_or_default();
    assert_eq!((code, says.contains("quantities must match")), (400, true), "{says}");
    assert_eq!(post(server, pods, pod("1500m")).await.0, 201);
}

pub(crate) async fn a_quota_lets_no_more_in(server: &Server) {
    let quota = json!({ "metadata": { "name": "q" }, "spec": { "hard": { "count/services": "1" } } });
    assert_eq!(post(server, QUOTAS, quota).await.0, 201);
    if server.ours.is_none() {
        // A controller counts first.
        until_it(server, &format!("{QUOTAS}/q"), |_, quota| !quota["status"]["used"].is_null()).await;
    }
    let service = |name: &str| json!({ "metadata": { "name": name }, "spec": { "ports": [{ "port": 80 }] } });
    let services = "/api/v1/namespaces/n/services";
    assert_eq!(post(server, services, service("one")).await.0, 201);
    let (code, status) = post(server, services, service("two")).await;
    let says = status["message"].as_str().unwrap_or_default();
    assert_eq!((code, &status["reason"]), (403, &json!("Forbidden")));
    assert!(
        says.contains("exceeded quota: q, requested: count/services=1, used: count/services=1"),
        "{says}"
    );
}

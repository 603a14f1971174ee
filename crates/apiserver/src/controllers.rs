//! What a controller manager does with StatefulSets and Deployments: pods, and how many of them are ready. ReplicaSets are left
//! out: a Deployment's pods are its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::change::{Deletion, Write};
use crate::store::{State, Store};

/// Controllers that run until this is dropped.
pub struct Controllers(JoinHandle<()>);

impl Controllers {
    /// Starts them.
    pub fn start(store: Arc<Store>) -> Self {
        Self(tokio::spawn(async move {
            let mut versions = store.versions();
            loop {
                store.change(|state| {
                    for (resource, named) in [("apps/statefulsets", true), ("apps/deployments", false)] {
                        let owners: Vec<Arc<Value>> =
                            state.of(resource, None).map(|(_, owner)| owner.clone()).collect();
                        owners.iter().for_each(|owner| keep(state, owner, named));
                    }
                });
                if versions.changed().await.is_err() {
                    return;
                }
            }
        }))
    }
}

impl Drop for Controllers {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes and deletes the pods of `owner`, which are numbered if they are `named`, and tells how many are ready.
fn keep(state: &mut State, owner: &Value, named: bool) {
    let (meta, spec) = (&owner["metadata"], &owner["spec"]);
    let (namespace, name) = (text(&meta["namespace"]), text(&meta["name"]));
    let kind =
        |state: &State, group: &str, plural: &str| state.kind(group, "v1", plural).expect("a built-in kind");
    let pods = kind(state, "", "pods");
    let write = Write { manager: "kube-controller-manager".into(), ..Write::default() };
    let mine = |pod: &&Arc<Value>| pod["metadata"]["ownerReferences"][0]["uid"] == meta["uid"];
    let all: Vec<Arc<Value>> =
        state.of("/pods", Some(&namespace)).map(|(_, pod)| pod).filter(mine).cloned().collect();
    let wanted =
        if meta.get("deletionTimestamp").is_some() { 0 } else { spec["replicas"].as_u64().unwrap_or(1) };
    let there: BTreeSet<String> = all.iter().map(|pod| text(&pod["metadata"]["name"])).collect();
    let is_new = |pod: &Value| {
        let mut spec_of = pod["spec"].clone();
        spec_of.as_object_mut().map(|spec| spec.remove("nodeName"));
        spec_of == spec["template"]["spec"]
    };
    let missing: Vec<Value> = match named {
        true => (0..wanted)
            .map(|number| format!("{name}-{number}"))
            .filter(|name| !there.contains(name))
            .map(|name| json!({ "name": name }))
            .collect(),
        false => {
            let alive =
                all.iter().filter(|pod| is_new(pod) && pod["metadata"].get("deletionTimestamp").is_none());
            (alive.count() as u64..wanted).map(|_| json!({ "generateName": format!("{name}-") })).collect()
        }
    };
    let refused = make(state, owner, missing);
    if let Some(why) = refused.as_ref().filter(|_| named) {
        complain(state, owner, why);
    }
    let number = |pod: &Value| {
        text(&pod["metadata"]["name"]).rsplit_once('-').and_then(|(_, number)| number.parse::<u64>().ok())
    };
    // A Deployment's old pods go once the new ones are ready.
    let updated = all.iter().filter(|pod| is_new(pod) && is_ready(pod)).count() as u64 >= wanted;
    let mut kept = 0;
    let surplus = all.iter().filter(|pod| match named {
        true => number(pod).is_none_or(|number| number >= wanted),
        false if is_new(pod) => {
            kept += 1;
            kept > wanted
        }
        false => updated,
    });
    for pod in surplus {
        let _ = state.delete(&pods, &namespace, &text(&pod["metadata"]["name"]), &Deletion::default());
    }
    let ready = all.iter().filter(|pod| is_ready(pod)).count();
    let plural = if named { "statefulsets" } else { "deployments" };
    let owners = kind(state, "apps", plural);
    let failed = refused.map(
        |why| json!({ "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": why }),
    );
    let status = json!({ "status": {
        "observedGeneration": meta["generation"], "replicas": all.len(), "readyReplicas": ready, "availableReplicas": ready,
        "updatedReplicas": all.iter().filter(|pod| is_new(pod)).count(),
        "conditions": failed.into_iter().filter(|_| !named).collect::<Vec<_>>(),
    } });
    let _ = state.merge(&owners, &namespace, &name, &status, &Write { subresource: Some("status"), ..write });
}

/// Makes pods of `owner`; tells why one of them cannot be.
fn make(state: &mut State, owner: &Value, missing: Vec<Value>) -> Option<String> {
    let (meta, template) = (&owner["metadata"], &owner["spec"]["template"]);
    let pods = state.kind("", "v1", "pods").expect("a built-in kind");
    let write = Write { manager: "kube-controller-manager".into(), ..Write::default() };
    let mut refused = None;
    for mut metadata in missing {
        metadata["labels"] = template["metadata"]["labels"].clone();
        metadata["ownerReferences"] = json!([{
            "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": meta["name"], "uid": meta["uid"], "controller": true,
        }]);
        let pod = json!({ "metadata": metadata, "spec": template["spec"] });
        // It may be there already: the next round sees it.
        if let Err(failure) = state.create(&pods, &text(&meta["namespace"]), pod, &write)
            && failure.reason != "AlreadyExists"
        {
            refused = Some(failure.message);
        }
    }
    refused
}

/// Tells in an event why a pod of a StatefulSet cannot be made; once, as the recorder counts what it has told before.
fn complain(state: &mut State, owner: &Value, why: &str) {
    let (namespace, name) = (text(&owner["metadata"]["namespace"]), text(&owner["metadata"]["name"]));
    let message = format!("create Pod in StatefulSet {name} failed error: {why}");
    let told = |event: &Arc<Value>| event["message"] == *message;
    if state.of("/events", Some(&namespace)).any(|(_, event)| told(event)) {
        return;
    }
    let about = json!({ "kind": owner["kind"], "namespace": namespace, "name": name, "uid": owner["metadata"]["uid"] });
    let event = json!({
        "metadata": { "generateName": format!("{name}.") }, "involvedObject": about, "type": "Warning",
        "reason": "FailedCreate", "message": message, "count": 1,
    });
    let events = state.kind("", "v1", "events").expect("a built-in kind");
    let write = Write { manager: "kube-controller-manager".into(), ..Write::default() };
    let _ = state.create(&events, &namespace, event, &write);
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.filter(|condition| condition["type"] == "Ready" && condition["status"] == "True").count() > 0
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

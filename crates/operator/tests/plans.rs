//! Plans, case by case: what is asked and seen, and the steps that follow.

use std::collections::BTreeMap;

use galerne_operator::api::{ClusterStatus, GalerneClusterSpec, GroupPhase, GroupStatus, Rollout, Trial};
use galerne_operator::names;
use galerne_operator::plan::{About, Asked, Seen, plan, status, validate};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Case {
    name: String,
    #[serde(default)]
    asked: Value,
    seen: Seen,
    /// etcd cannot be asked.
    #[serde(default)]
    blind: bool,
    /// What groups were doing last, and since when.
    #[serde(default)]
    phases: BTreeMap<u32, (GroupPhase, i64)>,
    #[serde(default)]
    trial: Trial,
    /// The version that passed last.
    #[serde(default)]
    passed: Option<String>,
    /// Groups that have served.
    #[serde(default)]
    served: Vec<u32>,
    /// As they are in Rust.
    steps: Vec<String>,
    /// Routers stay those of the old groups.
    #[serde(default)]
    routers_stay: bool,
}

#[test]
fn what_is_seen_and_asked_becomes_steps() {
    let cases: Vec<Case> = serde_saphyr::from_str(include_str!("plans/cases.yaml")).expect("cases");
    assert!(cases.len() > 20);
    for Case { name, asked, mut seen, blind, phases, trial, passed, served, steps, routers_stay } in cases {
        let mut spec = json!({
            "model": { "name": "m", "path": "m" },
            "groups": { "min": 0, "max": 4, "replicas": 2 },
            "router": { "noAuth": true },
            "etcd": { "managed": {} },
            "storage": { "hostPath": "/models" },
        });
        for (field, value) in asked.as_object().into_iter().flatten() {
            spec[field] = value.clone();
        }
        let spec: GalerneClusterSpec = serde_json::from_value(spec).expect("a spec");
        let asked = validate(&spec, "new".into(), None).expect("a spec that can be");
        let asked = Asked { passed, ..asked };
        seen.fleet_known = !blind;
        let served = served.into_iter().map(|number| GroupStatus {
            name: names::group(number),
            served: true,
            ..GroupStatus::default()
        });
        let phases = phases.into_iter().map(|(number, (phase, since))| GroupStatus {
            name: names::group(number),
            phase,
            since,
            ..GroupStatus::default()
        });
        let groups = phases.chain(served);
        let rollout = Rollout { revision: "new".into(), trial, ..Rollout::default() };
        let last =
            ClusterStatus { groups: groups.collect(), rollout: Some(rollout), ..ClusterStatus::default() };
        let planned = plan(&asked, &seen, &last);
        let taken: Vec<String> = planned.steps.iter().map(|step| format!("{step:?}")).collect();
        assert_eq!((taken, planned.routers_stay), (steps, routers_stay), "{name}");
    }
}

#[test]
fn what_cannot_be_is_told() {
    let spec = |numerics: Value| -> GalerneClusterSpec {
        serde_json::from_value(json!({
            "model": { "name": "m", "path": "m" }, "tensorParallel": 2, "numerics": numerics,
            "router": { "noAuth": true }, "etcd": { "managed": {} }, "storage": { "hostPath": "/models" },
        }))
        .expect("a spec")
    };
    let refused = validate(&spec(json!({ "virtualShards": 3 })), "r".into(), None).unwrap_err().to_string();
    assert!(refused.contains("3 virtual shards cannot be shared by 2 ranks"), "{refused}");
    let cannot = |field: &str, value: Value| {
        let mut wrong = serde_json::to_value(spec(json!({}))).unwrap();
        wrong[field] = value;
        validate(&serde_json::from_value(wrong).unwrap(), "r".into(), None).unwrap_err().to_string()
    };
    assert_eq!(cannot("tls", json!({})), "spec.tls has either secret or issuer");
    let open = cannot("etcd", json!({ "endpoints": ["https://e:1"] }));
    assert_eq!(
        open,
        "spec.etcd.tls must name a secret with ca.crt: https://e:1 is to be spoken to under TLS"
    );
    let both =
        cannot("etcd", json!({ "endpoints": ["https://e:1", "http://f:1"], "tls": { "secret": "s" } }));
    assert!(both.ends_with("begin with https://, and http://f:1 does not"), "{both}");
    let managed = cannot("etcd", json!({ "managed": {}, "tls": { "secret": "s" } }));
    assert!(managed.ends_with("a managed etcd has the certificate of spec.tls"), "{managed}");
    for (field, value, sentence) in [
        ("device", json!({ "kind": "Cuda" }), "spec.device.kind Cuda needs spec.device.resource"),
        (
            "numerics",
            json!({ "quantize": "fp8" }),
            "spec.numerics.quantize is fp8 with spec.device.kind Cuda",
        ),
        ("numerics", json!({ "kvDtype": "fp8" }), "spec.numerics.kvDtype is bf16 or fp8"),
        ("numerics", json!({ "fast": true }), "spec.numerics.fast is for spec.device.kind Cuda"),
        ("storage", json!({ "ephemeral": "1Gi" }), "spec.model.path names what is in spec.storage already"),
        ("storage", json!({ "hostPath": "models" }), "spec.storage.hostPath begins at the root"),
        ("ranksPerHost", json!(3), "spec.ranksPerHost (3) must divide spec.tensorParallel (2)"),
    ] {
        let says = cannot(field, value);
        assert!(says.starts_with(sentence), "{says}");
    }
    let asked = validate(&spec(json!({})), "r".into(), Some(9)).unwrap();
    assert_eq!(asked.wanted, 1, "what the load wants is bounded by min and max");
}

#[test]
fn what_somebody_has_set_goes_before_what_the_load_wants() {
    let wanted = |groups: Value, load: Option<u32>| {
        let spec = json!({
            "model": { "name": "m", "path": "m" }, "groups": groups,
            "router": { "noAuth": true }, "etcd": { "managed": {} }, "storage": { "hostPath": "/models" },
        });
        let spec: GalerneClusterSpec = serde_json::from_value(spec).expect("a spec");
        validate(&spec, "r".into(), load).expect("a spec that can be").wanted
    };
    for (replicas, load, expected) in [
        (Some(3), Some(5), 3),
        (Some(3), None, 3),
        (None, Some(5), 5),
        (None, Some(0), 1),
        (None, Some(9), 6),
        (None, None, 1),
    ] {
        assert_eq!(wanted(json!({ "min": 1, "max": 6, "replicas": replicas }), load), expected);
    }
    assert_eq!(wanted(json!({ "min": 0, "max": 6 }), Some(0)), 0);
}

#[test]
fn what_stands_in_the_way_is_told_in_a_sentence() {
    let spec = json!({
        "model": { "name": "m", "path": "m" }, "router": { "noAuth": true },
        "etcd": { "managed": {} }, "storage": { "hostPath": "/models" },
    });
    let spec: GalerneClusterSpec = serde_json::from_value(spec).expect("a spec");
    let asked = validate(&spec, "new".into(), None).expect("a spec that can be");
    let degraded = |seen: Value| {
        let seen: Seen = serde_json::from_value(seen).expect("what is seen");
        let last = ClusterStatus::default();
        let planned = plan(&asked, &seen, &last);
        let about = About {
            generation: None,
            model: "m",
            selector: String::new(),
            autoscale: None,
            refusal: None,
            passed: None,
        };
        let told = status(&asked, &seen, &planned, about, &last);
        let degraded = told.conditions.iter().find(|condition| condition.type_ == "Degraded").expect("it");
        (degraded.reason.clone(), degraded.message.clone())
    };
    let again = json!({ "revision": "new", "pods": [{ "name": "demo-g0-0", "phase": "Running", "message": "galerne: no" }] });
    let (reason, says) = degraded(json!({ "fleetKnown": true, "groups": { "0": again } }));
    assert_eq!((reason.as_str(), says.as_str()), ("GroupFails", "group g0: demo-g0-0: galerne: no"));
    let (reason, says) = degraded(json!({ "etcdTrouble": "demo-etcd-0: no such image" }));
    assert_eq!(reason, "NoEtcd");
    assert!(says.ends_with("those that do go on: demo-etcd-0: no such image"), "{says}");
    let router = "demo-router-x: secret \"keys\" not found";
    let (reason, says) = degraded(json!({ "fleetKnown": true, "routerTrouble": router }));
    assert_eq!(
        (reason.as_str(), says.as_str()),
        ("RouterFails", "router demo-router-x: secret \"keys\" not found")
    );
    let (reason, says) = degraded(json!({ "lacks": "name one with its --cluster-ca" }));
    assert_eq!(reason, "NoEtcd");
    assert!(says.ends_with("those that do go on: name one with its --cluster-ca"), "{says}");
    let failed =
        json!({ "pod": "p", "node": "a", "revision": "new", "phase": "Failed", "message": "no space left" });
    let old = json!({ "revision": "old", "serving": true, "ranksReady": 1, "ranksLiving": 1, "epoch": 5 });
    let (reason, says) =
        degraded(json!({ "fleetKnown": true, "preloads": [failed], "groups": { "0": old } }));
    assert_eq!(reason, "PreloadFails");
    assert_eq!(says, "version new cannot be brought to node a, which is tried again: no space left");
}

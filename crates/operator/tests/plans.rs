//! Plans, case by case: what is asked and seen, and the steps that follow.

use std::collections::BTreeMap;

use galerne_operator::api::{ClusterStatus, GalerneClusterSpec, GroupPhase, GroupStatus, Rollout, Trial};
use galerne_operator::names;
use galerne_operator::plan::{Seen, plan, validate};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
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
    /// As they are in Rust.
    steps: Vec<String>,
}

#[test]
fn what_is_seen_and_asked_becomes_steps() {
    let cases: Vec<Case> = serde_saphyr::from_str(include_str!("plans/cases.yaml")).expect("cases");
    assert!(cases.len() > 20);
    for Case { name, asked, mut seen, blind, phases, trial, steps } in cases {
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
        seen.fleet_known = !blind;
        let groups = phases.into_iter().map(|(number, (phase, since))| GroupStatus {
            name: names::group(number),
            phase,
            since,
            ..GroupStatus::default()
        });
        let rollout = Rollout { revision: "new".into(), trial, message: String::new() };
        let last =
            ClusterStatus { groups: groups.collect(), rollout: Some(rollout), ..ClusterStatus::default() };
        let planned: Vec<String> =
            plan(&asked, &seen, &last).steps.iter().map(|step| format!("{step:?}")).collect();
        assert_eq!(planned, steps, "{name}");
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

//! What the operator may do.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::restricted::list;
use crate::tools::{chart, documents};

/// Rules of roles of a kind, each as `group/resource verb`.
fn rights(manifests: &[Value], kind: &str) -> BTreeSet<String> {
    let roles = manifests.iter().filter(|manifest| manifest["kind"] == kind);
    let rules = roles.flat_map(|role| list(&role["rules"]));
    let all = rules.flat_map(|rule| {
        let text =
            |field: &str| list(&rule[field]).iter().map(|value| value.as_str().expect("a name").to_owned());
        let names: Vec<String> = text("apiGroups").collect();
        let resources: Vec<String> = text("resources").collect();
        let verbs: Vec<String> = text("verbs").collect();
        let each = names.into_iter().flat_map(move |group| {
            let (resources, verbs) = (resources.clone(), verbs.clone());
            resources.into_iter().flat_map(move |resource| {
                let right = format!("{group}/{resource}");
                verbs.clone().into_iter().map(move |verb| format!("{right} {verb}"))
            })
        });
        each.collect::<Vec<_>>()
    });
    all.collect()
}

#[test]
fn the_operator_reads_no_secrets_and_has_no_right_to_everything() {
    for settings in [&[][..], &["watchNamespaces={one,two}"]] {
        let manifests = documents(&chart(settings).unwrap());
        for right in ["ClusterRole", "Role"].into_iter().flat_map(|kind| rights(&manifests, kind)) {
            assert!(!right.contains("secrets") && !right.contains('*'), "{right}");
            assert!(!right.contains("rbac.authorization") && !right.contains("escalate"), "{right}");
        }
    }
}

#[test]
fn with_namespaces_named_it_sees_beyond_them_nodes_at_most() {
    let of = |settings: &[&str]| documents(&chart(settings).unwrap());
    let named = of(&["watchNamespaces={one,two}"]);
    let nodes = ["get", "list", "watch"].map(|verb| format!("/nodes {verb}"));
    assert_eq!(rights(&named, "ClusterRole"), nodes.into());
    let without = of(&["watchNamespaces={one,two}", "rbac.nodes=false"]);
    assert!(without.iter().all(|manifest| !manifest["kind"].as_str().unwrap().starts_with("ClusterRole")));
    // What it has there is what it would have everywhere.
    let everywhere = rights(&of(&["rbac.nodes=false"]), "ClusterRole");
    let there: BTreeSet<String> =
        rights(&without, "Role").into_iter().filter(|right| !right.contains("/leases ")).collect();
    assert_eq!(there, everywhere);
}

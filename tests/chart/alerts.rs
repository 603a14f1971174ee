//! The alert rules: that Prometheus takes them, that they speak of metrics that there are, and that they ring.

use std::collections::BTreeSet;

use crate::tools::{chart, documents, program, root, run};

/// The rules as the chart makes them, as a file that promtool reads.
fn rules() -> String {
    let manifests = documents(&chart(&["metrics.rules.enabled=true"]).unwrap());
    let rule = manifests.iter().find(|manifest| manifest["kind"] == "PrometheusRule").expect("the rules");
    rule["spec"].to_string()
}

#[test]
fn rules_pass_promtool_and_ring_when_they_should() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("rules.yaml"), rules()).expect("written");
    let tests = folder.path().join("alerts.yaml");
    std::fs::copy(root().join("tests/chart/alerts.yaml"), &tests).expect("copied");
    run(program("promtool")
        .args(["check", "rules", "--lint=all", "--lint-fatal"])
        .arg(folder.path().join("rules.yaml")));
    run(program("promtool").args(["test", "rules"]).arg(tests));
}

#[test]
fn rules_speak_of_metrics_that_there_are() {
    let rules = rules();
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    let words: BTreeSet<&str> = rules.split(|c| !is_name(c)).collect();
    let begins = |word: &&str| word.starts_with("galerne_") || word.starts_with("vllm:");
    let names: Vec<&str> = words.into_iter().filter(begins).collect();
    assert!(names.len() >= 8, "{names:?}");
    let source = |folder: &str| -> Option<String> {
        let files = std::fs::read_dir(root().join(folder)).ok()?.map(|entry| entry.expect("an entry").path());
        Some(files.filter_map(|path| std::fs::read_to_string(path).ok()).collect())
    };
    let routers = source("crates/router/src/metrics").expect("the router's metrics");
    let operators = source("crates/operator/src/run"); // as soon as there is one
    let tells = |source: &String, name: &str| source.contains(&format!("\"{name}\""));
    for name in names {
        let name = name.trim_end_matches("_bucket");
        let of_operators =
            ["galerne_operator_", "galerne_cluster_"].iter().any(|begin| name.starts_with(begin));
        let known = if of_operators {
            operators.as_ref().is_none_or(|source| tells(source, name))
        } else {
            tells(&routers, name)
        };
        assert!(known, "{name} is told by nobody");
    }
}

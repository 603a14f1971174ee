//! The definition that Kubernetes is told of.

use std::path::Path;

#[test]
fn the_definition_that_is_checked_in_is_of_these_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../k8s/crds/galerneclusters.yaml");
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    let generated = galerne_operator::api::crd_yaml();
    let differs = (0..).zip(checked_in.lines().zip(generated.lines())).find(|(_, (old, new))| old != new);
    let same = differs.is_none() && checked_in.len() == generated.len();
    assert!(
        same,
        "the types have changed, first in {differs:?}: `make crds` writes k8s/crds/galerneclusters.yaml"
    );
}

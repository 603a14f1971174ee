//! What the tests stand on.

pub(crate) mod files;
pub(crate) mod group;
pub(crate) mod k_quants;
pub(crate) mod local;
pub(crate) mod near;
pub(crate) mod reference;
pub(crate) mod script;

/// Every value within 2e-3 absolute plus 1e-3 relative.
pub(crate) fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= 2e-3 + 1e-3 * expected.abs(), "{what}: [{i}] is {found}, expected {expected}");
    }
}

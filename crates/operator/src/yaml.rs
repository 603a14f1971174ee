//! Manifests as text.

use serde::Serialize;

/// `manifest` as YAML.
pub(crate) fn write(manifest: &impl Serialize) -> String {
    // By way of JSON, whose objects keep the order of fields and leave nothing but plain maps, lists and strings.
    let plain = serde_json::to_value(manifest).expect("a manifest is JSON");
    serde_saphyr::to_string(&plain).expect("JSON is YAML")
}

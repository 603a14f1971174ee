//! Places in a schema: as `$ref` names them, and as errors do.

use serde_json::Value;

/// The part of `root` that a `$ref` means, and its path; `None` if there is none, or it lies outside.
pub(crate) fn resolve<'a>(root: &'a Value, reference: &str) -> Option<(String, &'a Value)> {
    let mut path = String::from("$");
    if reference == "#" || reference == "#/" {
        return Some((path, root));
    }
    let mut value = root;
    for segment in reference.strip_prefix("#/")?.split('/') {
        value = match value {
            Value::Array(items) => {
                let index: usize = segment.parse().ok()?;
                path = at_index(&path, index);
                items.get(index)?
            }
            Value::Object(map) => {
                path = at_key(&path, segment);
                map.get(segment)?
            }
            _ => return None,
        };
    }
    Some((path, value))
}

/// `path` and a key below it.
pub(crate) fn at_key(path: &str, key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '-');
    if !key.is_empty() && key.chars().all(plain) {
        format!("{path}.{key}")
    } else {
        format!("{path}[{}]", Value::from(key))
    }
}

/// `path` and a place in a list below it.
pub(crate) fn at_index(path: &str, index: usize) -> String {
    format!("{path}[{index}]")
}

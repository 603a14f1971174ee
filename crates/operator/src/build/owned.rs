//! Whether an object is as it was applied, told by who owns its fields: who changes a field takes it from us, and what is removed
//! is nobody's. Values need not be compared, which the API server writes in its own way, nor what it adds, which nobody owns.

use serde_json::Value;

/// Whether all that `body` says is among `fields`, the `fieldsV1` of whoever applied it.
pub fn is_owned(body: &Value, fields: &Value) -> bool {
    let parts = body.as_object().into_iter().flatten();
    parts.filter(|(name, _)| !matches!(name.as_str(), "apiVersion" | "kind")).all(|(name, part)| {
        let Some(fields) = fields.get(format!("f:{name}")) else { return false };
        let mut part = part.clone();
        if let (Some(meta), "metadata") = (part.as_object_mut(), name.as_str()) {
            meta.retain(|name, _| !matches!(name.as_str(), "name" | "namespace"));
        }
        holds(&part, fields)
    })
}

/// The same within a field. What has no parts in `fields` is owned as a whole.
fn holds(said: &Value, fields: &Value) -> bool {
    let Some(parts) = fields.as_object().filter(|parts| !parts.is_empty()) else { return true };
    match said {
        Value::Object(map) => map
            .iter()
            .all(|(name, value)| parts.get(&format!("f:{name}")).is_some_and(|fields| holds(value, fields))),
        Value::Array(items) => items
            .iter()
            .all(|item| parts.iter().any(|(name, fields)| is_named(item, name) && holds(item, fields))),
        _ => false,
    }
}

/// Whether `name` means this item of a list: by its keys (`k:`), of which one that is not said has a default, or by itself (`v:`).
fn is_named(item: &Value, name: &str) -> bool {
    match name.split_once(':').map(|(kind, json)| (kind, serde_json::from_str::<Value>(json))) {
        Some(("k", Ok(Value::Object(keys)))) => {
            keys.iter().all(|(key, value)| item.get(key).is_none_or(|said| said == value))
        }
        Some(("v", Ok(value))) => *item == value,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_applied_is_owned_until_somebody_takes_it() {
        let body = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "s", "namespace": "n", "labels": { "a.b/c": "1" }, "ownerReferences": [{ "uid": "u", "name": "x" }] },
            "spec": { "selector": { "app": "x" }, "ports": [{ "port": 80, "name": "http" }, { "port": 81 }], "tls": [] },
        });
        let fields = json!({
            "f:metadata": { "f:labels": { "f:a.b/c": {} }, "f:ownerReferences": { "k:{\"uid\":\"u\"}": {} } },
            "f:spec": {
                "f:selector": {}, "f:tls": {},
                "f:ports": {
                    "k:{\"port\":80,\"protocol\":\"TCP\"}": { ".": {}, "f:port": {}, "f:name": {} },
                    "k:{\"port\":81,\"protocol\":\"TCP\"}": { ".": {}, "f:port": {} },
                },
            },
        });
        assert!(is_owned(&body, &fields));
        for (place, field) in [
            ("/f:metadata/f:labels", "f:a.b/c"),
            ("/f:metadata", "f:labels"),
            ("/f:spec", "f:selector"),
            ("/f:spec/f:ports", "k:{\"port\":81,\"protocol\":\"TCP\"}"),
            ("/f:spec/f:ports/k:{\"port\":80,\"protocol\":\"TCP\"}", "f:name"),
            ("", "f:spec"),
        ] {
            let mut left = fields.clone();
            let place = left.pointer_mut(&place.replace("a.b/c", "a.b~1c")).unwrap().as_object_mut().unwrap();
            assert!(place.remove(field).is_some(), "{field}");
            place.insert("f:other".into(), json!({})); // what is left has other parts
            assert!(!is_owned(&body, &left), "{field}");
        }
        assert!(!is_owned(&body, &Value::Null));
    }
}

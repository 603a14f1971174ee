//! Custom resources by their schemas: unknown fields go, defaults come, and the rest must fit. CEL rules are not evaluated.

use serde_json::Value;

/// Prunes, defaults and checks `object`.
///
/// # Errors
/// What does not fit, and where.
pub(crate) fn check(schema: &Value, object: &mut Value) -> Result<(), String> {
    for (field, value) in object.as_object_mut().into_iter().flatten() {
        if let Some(schema) = schema["properties"].get(field).filter(|_| field != "metadata") {
            settle(schema, value);
        }
    }
    let validator = jsonschema::validator_for(schema).map_err(|error| error.to_string())?;
    let mut errors = validator.iter_errors(object);
    match errors.next() {
        Some(error) => Err(format!(
            "{}: {error}",
            error.instance_path().to_string().trim_start_matches('/').replace('/', ".")
        )),
        None => Ok(()),
    }
}

/// Removes what the schema does not know, and adds what it has defaults for.
fn settle(schema: &Value, value: &mut Value) {
    if schema["x-kubernetes-preserve-unknown-fields"] == true {
        return;
    }
    match value {
        Value::Object(map) => {
            let properties = schema["properties"].as_object();
            if let Some(properties) = properties {
                // A null is as good as nothing where the field has no null of its own.
                map.retain(|field, value| properties.contains_key(field) && !value.is_null());
                for (field, schema) in properties {
                    if let Some(default) = schema.get("default") {
                        map.entry(field.clone()).or_insert_with(|| default.clone());
                    }
                }
            }
            for (field, value) in map.iter_mut() {
                let schema =
                    properties.and_then(|known| known.get(field)).unwrap_or(&schema["additionalProperties"]);
                settle(schema, value);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| settle(&schema["items"], item)),
        _ => {}
    }
}

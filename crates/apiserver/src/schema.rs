//! Custom resources by their schemas: unknown fields go, defaults come, and the rest must fit. CEL rules are not evaluated.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::Value;

/// `openAPIV3Schema`, and its patterns, which are dear to make.
#[derive(Debug)]
pub(crate) struct Schema {
    root: Value,
    patterns: BTreeMap<String, Regex>,
}

impl Schema {
    pub(crate) fn new(root: Value) -> Self {
        let mut patterns = BTreeMap::new();
        collect(&root, &mut patterns);
        Self { root, patterns }
    }

    /// Prunes, defaults and checks `object`.
    ///
    /// # Errors
    /// What does not fit, and where.
    pub(crate) fn check(&self, object: &mut Value) -> Result<(), String> {
        for (field, value) in object.as_object_mut().into_iter().flatten() {
            if let Some(schema) = self.root["properties"].get(field).filter(|_| field != "metadata") {
                settle(schema, value);
            }
        }
        self.fits(&self.root, object, "")
    }

    /// Whether `value`, which is at `place`, fits.
    fn fits(&self, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
        let wrong = |what: String| Err(format!("{place}: Invalid value: {value}: {what}"));
        let is = match schema["type"].as_str() {
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("number") => value.is_number(),
            Some("boolean") => value.is_boolean(),
            _ => true,
        };
        if !is {
            return wrong(format!("must be of type {}", schema["type"]));
        }
        if schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
            return wrong(format!("must be one of {}", schema["enum"]));
        }
        let size = match value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => Some(text.chars().count() as f64),
            Value::Array(items) => Some(items.len() as f64),
            _ => None,
        };
        for (least, most) in [("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems")] {
            let (least, most) = (schema[least].as_f64(), schema[most].as_f64());
            if size.is_some_and(|size| {
                least.is_some_and(|least| size < least) || most.is_some_and(|most| size > most)
            }) {
                return wrong(format!("must lie between {least:?} and {most:?}"));
            }
        }
        if let (Some(pattern), Some(text)) = (schema["pattern"].as_str(), value.as_str())
            && !self.patterns.get(pattern).is_some_and(|pattern| pattern.is_match(text))
        {
            return wrong(format!("must match {pattern}"));
        }
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        if let Some(missing) = required.into_iter().find(|field| value.get(field).is_none()) {
            return Err(format!("{place}.{missing}: Required value"));
        }
        for (field, inner) in value.as_object().into_iter().flatten() {
            let schema = schema["properties"].get(field).unwrap_or(&schema["additionalProperties"]);
            self.fits(schema, inner, &format!("{place}.{field}"))?;
        }
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            self.fits(&schema["items"], item, &format!("{place}[{index}]"))?;
        }
        Ok(())
    }
}

/// All patterns of a schema. One that is none fits nothing.
fn collect(schema: &Value, patterns: &mut BTreeMap<String, Regex>) {
    if let Some(pattern) = schema["pattern"].as_str()
        && let Ok(regex) = Regex::new(pattern)
    {
        patterns.insert(pattern.to_owned(), regex);
    }
    let inner = schema["properties"].as_object().into_iter().flat_map(|properties| properties.values());
    inner
        .chain([&schema["items"], &schema["additionalProperties"]])
        .filter(|inner| inner.is_object())
        .for_each(|inner| collect(inner, patterns));
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

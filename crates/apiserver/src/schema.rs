//! Custom resources by their schemas: unknown fields go, defaults come, and the rest must fit and keep to its rules.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::Value;

use crate::cel::Expr;

/// `openAPIV3Schema`, and its patterns and rules, which are dear to make.
#[derive(Debug)]
pub(crate) struct Schema {
    root: Value,
    patterns: BTreeMap<String, Regex>,
    rules: BTreeMap<String, Result<Expr, String>>,
}

impl Schema {
    pub(crate) fn new(root: Value) -> Self {
        let mut made = Self { patterns: BTreeMap::new(), rules: BTreeMap::new(), root: Value::Null };
        made.collect(&root);
        Self { root, ..made }
    }

    /// Prunes, defaults and checks `object`, which takes the place of `before`, if there was one.
    ///
    /// # Errors
    /// What does not fit, and where.
    pub(crate) fn check(&self, object: &mut Value, before: Option<&Value>) -> Result<(), String> {
        for (field, value) in object.as_object_mut().into_iter().flatten() {
            if let Some(schema) = self.root["properties"].get(field).filter(|_| field != "metadata") {
                settle(schema, value);
            }
        }
        self.fits(&self.root, object, "")?;
        let mut broken = Vec::new();
        self.broken(&self.root, object, before, "", &mut broken);
        if broken.is_empty() { Ok(()) } else { Err(broken.join(", ")) }
    }

    /// The rules that `value` does not keep; those about a change are for what was there before.
    fn broken(
        &self,
        schema: &Value,
        value: &Value,
        before: Option<&Value>,
        place: &str,
        broken: &mut Vec<String>,
    ) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let text = rule["rule"].as_str().unwrap_or_default();
            let mut wrong = |what: &str| broken.push(format!("{place}: Invalid value: {what}"));
            let parsed = match self.rules.get(text) {
                Some(Ok(parsed)) => parsed,
                Some(Err(error)) => {
                    wrong(&format!("the rule {text:?} is none: {error}"));
                    continue;
                }
                None => continue,
            };
            let mut scope = vec![("self", value)];
            match before {
                Some(before) => scope.push(("oldSelf", before)),
                None if parsed.names("oldSelf") => continue,
                None => {}
            }
            match parsed.holds(&scope) {
                Ok(true) => {}
                Ok(false) => wrong(rule["message"].as_str().unwrap_or(text)),
                Err(error) => wrong(&format!("the rule {text:?} cannot be evaluated: {error}")),
            }
        }
        for (field, inner) in value.as_object().into_iter().flatten() {
            let schema = schema["properties"].get(field).unwrap_or(&schema["additionalProperties"]);
            let before = before.and_then(|before| before.get(field));
            self.broken(schema, inner, before, &format!("{place}.{field}"), broken);
        }
        // Items of most lists have no predecessors.
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            self.broken(&schema["items"], item, None, &format!("{place}[{index}]"), broken);
        }
    }

    /// Takes in all patterns and rules of a schema. A pattern that is none fits nothing.
    fn collect(&mut self, schema: &Value) {
        if let Some(pattern) = schema["pattern"].as_str()
            && let Ok(regex) = Regex::new(pattern)
        {
            self.patterns.insert(pattern.to_owned(), regex);
        }
        let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
        for rule in rules.filter_map(|rule| rule["rule"].as_str()) {
            self.rules.insert(rule.to_owned(), Expr::parse(rule));
        }
        let inner = schema["properties"].as_object().into_iter().flat_map(|properties| properties.values());
        let inner = inner.chain([&schema["items"], &schema["additionalProperties"]]);
        for schema in inner.filter(|inner| inner.is_object()) {
            self.collect(schema);
        }
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

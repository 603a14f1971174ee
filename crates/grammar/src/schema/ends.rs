//! Recursion without an end: a schema that each of its values must hold a value of has none.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{children, reference, wrong};
use crate::error::GrammarError;
use crate::pointer::{at_index, at_key, resolve};

/// Refuses a schema that reaches a reference which no finite value can meet.
pub(super) fn check(root: &Value) -> Result<(), GrammarError> {
    let mut reached = BTreeMap::new();
    collect("$", root, root, &mut reached);
    let mut met: BTreeSet<&str> = BTreeSet::new();
    loop {
        let before = met.len();
        // Most schemas stand behind what they need.
        for (path, schema) in reached.iter().rev() {
            if !met.contains(path.as_str()) && can_be_met(path, schema, root, &met) {
                met.insert(path);
            }
        }
        if met.len() == before {
            break;
        }
    }
    for (path, schema) in &reached {
        if reference(schema).is_some() && !met.contains(path.as_str()) {
            return wrong(path, "no value can meet it: it needs itself without end");
        }
    }
    Ok(())
}

/// All schemas that a value can come to, by path.
fn collect<'a>(path: &str, schema: &'a Value, root: &'a Value, reached: &mut BTreeMap<String, &'a Value>) {
    if reached.insert(path.to_owned(), schema).is_some() {
        return;
    }
    for (path, child) in children(path, schema) {
        collect(&path, child, root, reached);
    }
    if let Some((path, target)) = reference(schema).and_then(|reference| resolve(root, reference)) {
        collect(&path, target, root, reached);
    }
}

/// Whether a value can meet `schema`, as far as is known of the schemas that it needs.
fn can_be_met(path: &str, schema: &Value, root: &Value, met: &BTreeSet<&str>) -> bool {
    if let Value::Bool(any) = schema {
        return *any;
    }
    let is_met = |path: String| met.contains(path.as_str());
    let list = |keyword| {
        let path = at_key(path, keyword);
        let count = schema.get(keyword).and_then(Value::as_array).map_or(0, Vec::len);
        (0..count).map(move |index| at_index(&path, index))
    };
    let target = reference(schema).and_then(|reference| resolve(root, reference));
    let applied = target.is_none_or(|(path, _)| is_met(path))
        && list("allOf").all(is_met)
        && ["anyOf", "oneOf"]
            .into_iter()
            .all(|keyword| schema.get(keyword).is_none() || list(keyword).any(is_met));
    if !applied {
        return false;
    }
    if schema.get("const").is_some() || schema.get("enum").is_some() {
        return true;
    }
    match schema.get("type") {
        None => true,
        Some(Value::Array(types)) => types.iter().any(|kind| kind_can_be_met(path, kind, schema, met)),
        Some(kind) => kind_can_be_met(path, kind, schema, met),
    }
}

fn kind_can_be_met(path: &str, kind: &Value, schema: &Value, met: &BTreeSet<&str>) -> bool {
    let is_met = |path: String| met.contains(path.as_str());
    let has = |keyword| schema.get(keyword).is_some();
    match kind.as_str() {
        Some("object") => {
            let required = schema.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            required.iter().filter_map(Value::as_str).all(|name| {
                if schema.get("properties").is_some_and(|map| map.get(name).is_some()) {
                    is_met(at_key(&at_key(path, "properties"), name))
                } else {
                    has("patternProperties")
                        || !has("additionalProperties")
                        || is_met(at_key(path, "additionalProperties"))
                }
            })
        }
        Some("array") => {
            let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0);
            let tuple =
                if schema.get("items").is_some_and(Value::is_array) { "items" } else { "prefixItems" };
            let first = schema.get(tuple).and_then(Value::as_array).map_or(0, Vec::len);
            let needed = usize::try_from(least).unwrap_or(usize::MAX).min(first);
            let rest = if tuple == "items" { "additionalItems" } else { "items" };
            (0..needed).all(|index| is_met(at_index(&at_key(path, tuple), index)))
                && (least <= first as u64 || !has(rest) || is_met(at_key(path, rest)))
        }
        _ => true,
    }
}

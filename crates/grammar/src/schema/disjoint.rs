//! `oneOf` whose members exclude each other means the same as `anyOf`, which the parser can hold.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{DEFINITIONS, LISTS, MAPS, ONES, reference};
use crate::pointer::resolve;

/// References that are followed from one member of a list to a schema that is none.
const REFERENCES_MAX: usize = 8;

/// `root` with `oneOf` written as `anyOf` wherever its members are seen to exclude each other: by their types, or,
/// as tagged unions do, by a required property that is a constant of its own in each.
pub(super) fn one_of_as_any_of(root: &Value) -> Value {
    let mut rewritten = root.clone();
    rewrite(&mut rewritten, root);
    rewritten
}

fn rewrite(schema: &mut Value, root: &Value) {
    let Value::Object(keywords) = schema else { return };
    let exclusive = |list: &Vec<Value>| {
        let members: Vec<&Value> = list.iter().map(|member| follow(member, root)).collect();
        let pair = |(index, member): (usize, &&Value)| {
            members[index + 1..].iter().all(|other| disjoint(member, other, root))
        };
        members.iter().enumerate().all(pair)
    };
    let is_exclusive = keywords.get("oneOf").and_then(Value::as_array).is_some_and(exclusive);
    if is_exclusive && !keywords.contains_key("anyOf") {
        // In the same place: the order of keywords is that of properties.
        let renamed = std::mem::take(keywords).into_iter();
        keywords.extend(renamed.map(|(key, value)| match key.as_str() {
            "oneOf" => ("anyOf".to_owned(), value),
            _ => (key, value),
        }));
    }
    for keyword in MAPS.into_iter().chain(DEFINITIONS) {
        if let Some(Value::Object(map)) = keywords.get_mut(keyword) {
            map.values_mut().for_each(|schema| rewrite(schema, root));
        }
    }
    for keyword in LISTS {
        if let Some(Value::Array(list)) = keywords.get_mut(keyword) {
            list.iter_mut().for_each(|schema| rewrite(schema, root));
        }
    }
    for keyword in ONES {
        if let Some(one) = keywords.get_mut(keyword) {
            rewrite(one, root);
        }
    }
}

fn follow<'a>(mut schema: &'a Value, root: &'a Value) -> &'a Value {
    for _ in 0..REFERENCES_MAX {
        match reference(schema).and_then(|reference| resolve(root, reference)) {
            Some((_, target)) => schema = target,
            None => break,
        }
    }
    schema
}

fn disjoint(one: &Value, other: &Value, root: &Value) -> bool {
    if let (Some(mine), Some(theirs)) = (constants(one), constants(other)) {
        return mine.iter().all(|value| !theirs.contains(value));
    }
    let (Some(mine), Some(theirs)) = (types(one), types(other)) else { return false };
    if mine.is_disjoint(&theirs) {
        return true;
    }
    let objects = BTreeSet::from(["object"]);
    mine == objects && theirs == objects && {
        let required = |schema: &Value, name: &str| {
            let names = schema.get("required").and_then(Value::as_array);
            names.is_some_and(|names| names.iter().any(|required| required == name))
        };
        let properties = one.get("properties").and_then(Value::as_object);
        properties.into_iter().flatten().any(|(name, property)| {
            let other_property = other.get("properties").and_then(|properties| properties.get(name));
            let tagged = required(one, name) || required(other, name);
            tagged
                && other_property
                    .is_some_and(|theirs| disjoint_constants(follow(property, root), follow(theirs, root)))
        })
    }
}

fn disjoint_constants(one: &Value, other: &Value) -> bool {
    match (constants(one), constants(other)) {
        (Some(mine), Some(theirs)) => mine.iter().all(|value| !theirs.contains(value)),
        _ => false,
    }
}

/// The only values that a schema allows, if it says so; numbers are left out, since 1 is 1.0.
fn constants(schema: &Value) -> Option<Vec<&Value>> {
    let values = match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => vec![value],
        (None, Some(Value::Array(values))) => values.iter().collect(),
        _ => return None,
    };
    values.iter().all(|value| value.is_string() || value.is_boolean() || value.is_null()).then_some(values)
}

/// The types that a schema allows; an integer is a number.
fn types(schema: &Value) -> Option<BTreeSet<&str>> {
    let name = |value: &'_ Value| match value.as_str() {
        Some("integer") => Some("number"),
        Some("null") => Some("null"),
        Some("boolean") => Some("boolean"),
        Some("number") => Some("number"),
        Some("string") => Some("string"),
        Some("array") => Some("array"),
        Some("object") => Some("object"),
        _ => None,
    };
    match schema.get("type")? {
        Value::Array(types) => types.iter().map(name).collect(),
        one => name(one).map(|name| BTreeSet::from([name])),
    }
}

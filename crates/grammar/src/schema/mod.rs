//! JSON schemas before they are compiled: hostile until checked here.

mod blame;
mod check;
mod disjoint;
mod ends;
mod parts;
mod rewrite;

use serde_json::Value;

pub(crate) use blame::blame;

use crate::error::GrammarError;
use crate::limits::Limits;
use crate::pointer::{at_index, at_key};
use crate::vocabulary::with_options;

/// Keywords whose value maps names to schemas.
const MAPS: [&str; 2] = ["properties", "patternProperties"];

/// Keywords whose value is a list of schemas.
const LISTS: [&str; 5] = ["allOf", "anyOf", "oneOf", "prefixItems", "items"];

/// Keywords whose value is a schema.
const ONES: [&str; 3] = ["items", "additionalItems", "additionalProperties"];

/// Keywords that hold schemas to refer to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// The schema in `text`.
pub(crate) fn parse(text: &str) -> Result<Value, GrammarError> {
    serde_json::from_str(text)
        .map_err(|error| GrammarError::Syntax(format!("the schema is no JSON: {error}")))
}

/// A schema that the parser may compile: within the limits, without contradictions that the eye can see, and with
/// nothing in it that cannot be held.
pub(crate) fn prepare(mut schema: Value, limits: &Limits) -> Result<Value, GrammarError> {
    check::depth(&schema, limits.depth_max)?;
    rewrite::rewrite(&mut schema);
    check::check(&schema, limits)?;
    parts::check(&schema, limits)?;
    ends::check(&schema)?;
    Ok(with_options(disjoint::one_of_as_any_of(&schema)))
}

pub(crate) fn wrong<T>(path: &str, says: impl Into<String>) -> Result<T, GrammarError> {
    Err(GrammarError::Schema { path: path.to_owned(), says: says.into() })
}

/// The schemas within a schema that constrain a value, each with its path; not those that it refers to.
fn children<'a>(path: &str, schema: &'a Value) -> Vec<(String, &'a Value)> {
    let mut children = Vec::new();
    for keyword in MAPS {
        let Some(Value::Object(map)) = schema.get(keyword) else { continue };
        let path = at_key(path, keyword);
        children.extend(map.iter().map(|(name, schema)| (at_key(&path, name), schema)));
    }
    for keyword in LISTS {
        let Some(Value::Array(list)) = schema.get(keyword) else { continue };
        let path = at_key(path, keyword);
        children.extend(list.iter().enumerate().map(|(index, schema)| (at_index(&path, index), schema)));
    }
    for keyword in ONES {
        if let Some(one) = schema.get(keyword).filter(|one| !one.is_array()) {
            children.push((at_key(path, keyword), one));
        }
    }
    children
}

/// What a schema's `$ref` says.
fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref").and_then(Value::as_str)
}

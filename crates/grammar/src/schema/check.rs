use std::collections::BTreeSet;

use serde_json::Value;

use super::{children, reference, wrong};
use crate::error::GrammarError;
use crate::limits::Limits;
use crate::pointer::{at_key, resolve};

/// Keywords that constrain a value and that the parser cannot hold.
const UNSUPPORTED: [&str; 18] = [
    "$dynamicRef",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "disallow",
    "divisibleBy",
    "else",
    "extends",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

/// Pairs of keywords of which the first must not be above the second.
const BOUNDS: [(&str, &str); 6] = [
    ("minimum", "maximum"),
    ("exclusiveMinimum", "maximum"),
    ("minimum", "exclusiveMaximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
];

/// Refuses a value that nests deeper than `depth_max`.
pub(super) fn depth(schema: &Value, depth_max: usize) -> Result<(), GrammarError> {
    let mut level: Vec<&Value> = vec![schema];
    for _ in 0..=depth_max {
        let mut next = Vec::new();
        for value in level {
            match value {
                Value::Array(items) => next.extend(items),
                Value::Object(map) => next.extend(map.values()),
                _ => {}
            }
        }
        if next.is_empty() {
            return Ok(());
        }
        level = next;
    }
    Err(GrammarError::TooLarge(format!("nests deeper than the {depth_max} levels that are taken")))
}

/// Looks at every schema that a value can come to, once.
pub(super) fn check(root: &Value, limits: &Limits) -> Result<(), GrammarError> {
    Check { root, limits, seen: BTreeSet::new(), patterns: 0 }.visit("$", root, 0)
}

struct Check<'a> {
    root: &'a Value,
    limits: &'a Limits,
    seen: BTreeSet<&'a str>,
    patterns: usize,
}

impl<'a> Check<'a> {
    fn visit(&mut self, path: &str, schema: &'a Value, depth: usize) -> Result<(), GrammarError> {
        if depth > self.limits.reference_depth_max {
            let max = self.limits.reference_depth_max;
            return wrong(path, format!("its references nest deeper than the {max} levels that are taken"));
        }
        match schema {
            Value::Bool(_) => return Ok(()),
            Value::Object(_) => {}
            _ => return wrong(path, "a schema is an object, or true or false"),
        }
        if let Some(keyword) = UNSUPPORTED.into_iter().find(|&keyword| schema.get(keyword).is_some()) {
            return wrong(&at_key(path, keyword), format!("`{keyword}` is not supported: leave it out"));
        }
        self.count(path, schema)?;
        contradictions(path, schema)?;
        for (path, child) in children(path, schema) {
            self.visit(&path, child, depth + 1)?;
        }
        self.follow(path, schema, depth)
    }

    fn count(&mut self, path: &str, schema: &Value) -> Result<(), GrammarError> {
        let size = |keyword| schema.get(keyword).and_then(Value::as_object).map_or(0, serde_json::Map::len);
        let (properties, max) = (size("properties"), self.limits.properties_max);
        if properties > max {
            let path = at_key(path, "properties");
            return wrong(&path, format!("{properties} properties are more than the {max} that are taken"));
        }
        self.patterns += size("patternProperties") + usize::from(schema.get("pattern").is_some());
        let max = self.limits.patterns_max;
        if self.patterns > max {
            return wrong(path, format!("the schema has more than the {max} patterns that are taken"));
        }
        Ok(())
    }

    fn follow(&mut self, path: &str, schema: &'a Value, depth: usize) -> Result<(), GrammarError> {
        let Some(reference) = reference(schema) else {
            return match schema.get("$ref") {
                Some(_) => wrong(&at_key(path, "$ref"), "a reference is a string"),
                None => Ok(()),
            };
        };
        if !self.seen.insert(reference) {
            return Ok(());
        }
        let path = at_key(path, "$ref");
        if !reference.starts_with('#') {
            return wrong(&path, "a reference leads to a place in the schema itself, as `#/$defs/name`");
        }
        if reference.contains(['~', '%']) {
            return wrong(&path, "a reference through a name with `/`, `~` or `%` is not supported");
        }
        let Some((target_path, target)) = resolve(self.root, reference) else {
            return wrong(&path, "this reference leads nowhere");
        };
        self.visit(&target_path, target, depth + 1)
    }
}

/// What no value can meet, whatever stands around it.
fn contradictions(path: &str, schema: &Value) -> Result<(), GrammarError> {
    for (low, high) in BOUNDS {
        let bound = |keyword| schema.get(keyword).and_then(Value::as_f64);
        let (Some(from), Some(to)) = (bound(low), bound(high)) else { continue };
        let empty = from > to || from >= to && (low, high) != BOUNDS[0] && low.ends_with("inimum");
        if empty {
            let (from, to) = (&schema[low], &schema[high]);
            return wrong(path, format!("no value can meet it: `{low}` is {from} and `{high}` is {to}"));
        }
    }
    for keyword in ["enum", "anyOf", "oneOf", "type"] {
        if schema.get(keyword).and_then(Value::as_array).is_some_and(Vec::is_empty) {
            return wrong(&at_key(path, keyword), "no value can meet an empty list");
        }
    }
    Ok(())
}

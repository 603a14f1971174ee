//! How large a schema becomes when it is compiled. Alternatives beside alternatives multiply, so a short text can
//! stand for more than fits any memory.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{children, reference, wrong};
use crate::error::GrammarError;
use crate::limits::Limits;
use crate::pointer::resolve;

/// Alternatives of different types meet nowhere, so each type is counted by itself.
const TYPES: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];

/// An upper bound on what a schema becomes, by type.
#[derive(Clone, Copy)]
struct Size([Share; TYPES.len()]);

#[derive(Clone, Copy, Default)]
struct Share {
    alternatives: u64,
    parts: u64,
}

impl Size {
    /// `parts` in one alternative of each of the types that `is` holds for.
    fn of(parts: u64, is: impl Fn(&str) -> bool) -> Self {
        Self(TYPES.map(|name| if is(name) { Share { alternatives: 1, parts } } else { Share::default() }))
    }

    /// Both at once: each alternative of one meets each of the other of its type, and holds a copy of it.
    fn and(self, other: Self) -> Self {
        let both = |(mine, theirs): (Share, Share)| {
            let copies = mine.alternatives.saturating_mul(theirs.parts);
            Share {
                alternatives: mine.alternatives.saturating_mul(theirs.alternatives),
                parts: copies.saturating_add(theirs.alternatives.saturating_mul(mine.parts)),
            }
        };
        self.with(other, both)
    }

    fn or(self, other: Self) -> Self {
        self.with(other, |(mine, theirs)| Share {
            alternatives: mine.alternatives.saturating_add(theirs.alternatives),
            parts: mine.parts.saturating_add(theirs.parts),
        })
    }

    fn with(self, other: Self, one: impl Fn((Share, Share)) -> Share) -> Self {
        let mut shares = self.0;
        for (mine, theirs) in shares.iter_mut().zip(other.0) {
            *mine = one((*mine, theirs));
        }
        Self(shares)
    }

    fn alternatives(self) -> u64 {
        self.0.iter().fold(0, |sum, share| sum.saturating_add(share.alternatives))
    }

    fn parts(self) -> u64 {
        self.0.iter().fold(0, |sum, share| sum.saturating_add(share.parts))
    }
}

/// Refuses a schema that becomes too large.
pub(super) fn check(root: &Value, limits: &Limits) -> Result<(), GrammarError> {
    let mut count = Count { root, max: limits.schema_parts_max, spent: 0, known: BTreeMap::new() };
    count.size("$", root).map(|_| ())
}

struct Count<'a> {
    root: &'a Value,
    max: u64,
    spent: u64,
    /// Sizes by reference; `None` while one is being found.
    known: BTreeMap<&'a str, Option<Size>>,
}

impl<'a> Count<'a> {
    fn size(&mut self, path: &str, schema: &'a Value) -> Result<Size, GrammarError> {
        if schema.is_boolean() {
            return Ok(anything());
        }
        let mut size = self.own_size(path, schema)?;
        if let Some(value) = schema.get("const") {
            size = self.meet(path, size, constants([value]))?;
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            size = self.meet(path, size, constants(values))?;
        }
        for keyword in ["allOf", "anyOf", "oneOf"] {
            let list = schema.get(keyword).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let mut either: Option<Size> = None;
            for schema in list {
                let one = self.size(path, schema)?;
                match keyword {
                    "allOf" => size = self.meet(path, size, one)?,
                    _ => either = Some(either.map_or(one, |either| either.or(one))),
                }
            }
            if keyword == "oneOf" {
                self.spend(path, (list.len() as u64).saturating_pow(2))?; // each is compared with each
            }
            if let Some(either) = either {
                size = self.meet(path, size, either)?;
            }
        }
        if let Some(reference) = reference(schema) {
            let target = self.target(reference)?;
            let alone = schema.as_object().is_some_and(|keywords| keywords.len() == 1);
            size = if alone { anything() } else { self.meet(path, size, target)? };
        }
        self.spend(path, size.parts())?;
        Ok(size)
    }

    /// Both at once; until their types are compared, each alternative of one has a copy of all of the other.
    fn meet(&mut self, path: &str, one: Size, other: Size) -> Result<Size, GrammarError> {
        let copies = one.alternatives().saturating_mul(other.parts());
        self.spend(path, copies.saturating_add(other.alternatives().saturating_mul(one.parts())))?;
        Ok(one.and(other))
    }

    /// Of the keywords that speak of one type each.
    fn own_size(&mut self, path: &str, schema: &'a Value) -> Result<Size, GrammarError> {
        let mut parts = 1_u64;
        for (path, child) in children(path, schema) {
            if !is_applied(&path) {
                parts = parts.saturating_add(self.size(&path, child)?.parts());
            }
        }
        let is = |name: &str, kind: &Value| kind == name || name == "number" && kind == "integer";
        Ok(match schema.get("type") {
            None => Size::of(parts, |_| true),
            Some(Value::Array(kinds)) => Size::of(parts, |name| kinds.iter().any(|kind| is(name, kind))),
            Some(kind) => Size::of(parts, |name| is(name, kind)),
        })
    }

    fn target(&mut self, reference: &'a str) -> Result<Size, GrammarError> {
        match self.known.get(reference) {
            Some(known) => Ok(known.unwrap_or_else(anything)),
            None => {
                self.known.insert(reference, None);
                let Some((path, target)) = resolve(self.root, reference) else { return Ok(anything()) };
                let size = self.size(&path, target)?;
                self.known.insert(reference, Some(size));
                Ok(size)
            }
        }
    }

    fn spend(&mut self, path: &str, parts: u64) -> Result<(), GrammarError> {
        self.spent = self.spent.saturating_add(parts);
        if self.spent <= self.max {
            return Ok(());
        }
        let max = self.max;
        wrong(
            path,
            format!(
                "with its alternatives multiplied out the schema has more than the {max} parts that are taken"
            ),
        )
    }
}

/// Whether the schema at `path` stands in a list whose members hold for the same value as the schema around it.
fn is_applied(path: &str) -> bool {
    let Some(list) = path.strip_suffix(']').and_then(|path| path.rsplit_once('[')) else { return false };
    ["allOf", "anyOf", "oneOf"].into_iter().any(|keyword| list.0.ends_with(&format!(".{keyword}")))
}

fn anything() -> Size {
    Size::of(1, |_| true)
}

fn constants<'a>(values: impl IntoIterator<Item = &'a Value>) -> Size {
    let mut size = Size::of(0, |_| false);
    for value in values {
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        size = size.or(Size::of(parts_of(value), |name| name == kind));
    }
    size
}

fn parts_of(value: &Value) -> u64 {
    match value {
        Value::Array(items) => items.iter().map(parts_of).sum::<u64>() + 1,
        Value::Object(map) => map.values().map(parts_of).sum::<u64>() + 1,
        _ => 1,
    }
}

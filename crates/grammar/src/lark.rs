//! Rules in llguidance's dialect of Lark, before they are compiled: hostile until checked here.

use serde_json::Value;

use crate::error::GrammarError;
use crate::limits::Limits;
use crate::schema;

/// What introduces a JSON schema in rules.
const JSON: &str = "%json";

/// A grammar of `choices`, each as it stands.
pub(crate) fn choice(choices: &[String]) -> String {
    let quoted: Vec<String> = choices.iter().map(|choice| quote(choice)).collect();
    format!("start: CHOICE\nCHOICE: {}\n", quoted.join(" | "))
}

/// A string in Lark's quotes. Every control character is written by its number.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\0'..='\x1f' | '\x7f' => quoted.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

/// Rules that the parser may compile: their brackets nest within the limits, and each schema in them is one that
/// [`schema::prepare`] takes.
pub(crate) fn prepare(rules: &str, limits: &Limits) -> Result<String, GrammarError> {
    let mut prepared = String::with_capacity(rules.len());
    let (mut rest, mut depth) = (rules, 0_usize);
    while let Some(first) = rest.chars().next() {
        if let Some(schema_on) = rest.strip_prefix(JSON) {
            let mut values = serde_json::Deserializer::from_str(schema_on).into_iter::<Value>();
            let schema = values.next().and_then(Result::ok);
            let schema =
                schema.ok_or_else(|| syntax("a `%json` in the grammar is not followed by a schema"))?;
            let after = values.byte_offset();
            prepared.push_str(&format!("{JSON} {}", schema::prepare(schema, limits)?));
            rest = &schema_on[after..];
            continue;
        }
        let length = match first {
            '"' => quoted(rest, '"'),
            '/' if !rest.starts_with("//") => quoted(rest, '/'),
            '#' | '/' => rest.find('\n').unwrap_or(rest.len()),
            _ => first.len_utf8(),
        };
        match first {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limits.depth_max {
            let max = limits.depth_max;
            return Err(GrammarError::TooLarge(format!("nests deeper than the {max} levels that are taken")));
        }
        prepared.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    Ok(prepared)
}

/// Bytes of a text in quotes at the beginning of `rest`, its closing quote included.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            '\n' if quote == '"' => return at,
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

fn syntax(says: &str) -> GrammarError {
    GrammarError::Syntax(says.to_owned())
}

//! What an answer must be: OpenAI's `response_format`, and vLLM's ways to say the same.

use galerne_types::Grammar;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::limits::ECHO_CHARS_MAX;

#[derive(Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<NamedSchema>,
}

#[derive(Deserialize)]
struct NamedSchema {
    schema: Option<Value>,
    // Its name and description tell a model more than a grammar can; `strict` is always so.
}

/// vLLM's newer form.
#[derive(Deserialize, Default)]
struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// What vLLM's newer form says of backends and whitespace, which changes nothing that a schema can see.
const UNSEEN: [&str; 4] = ["_backend", "_backend_was_auto", "disable_any_whitespace", "whitespace_pattern"];

/// Takes all fields that say what the answer must be; at most one may. With it comes its field's name.
pub(in crate::http) fn grammar(fields: &mut Fields<'_>) -> Result<Option<(Grammar, &'static str)>, ApiError> {
    let mut found = Vec::new();
    found.extend(response_format(fields)?.map(|grammar| (grammar, "response_format")));
    let json = fields.take::<Value>("guided_json", "a JSON schema")?;
    found.extend(json.map(|json| schema("guided_json", json)).transpose()?.map(|g| (g, "guided_json")));
    let regex = fields.take("guided_regex", "a string")?;
    found.extend(regex.map(|regex| (Grammar::Regex(regex), "guided_regex")));
    let choice = fields.take("guided_choice", "a list of strings")?;
    found.extend(
        choice.map(|choice| choices("guided_choice", choice)).transpose()?.map(|g| (g, "guided_choice")),
    );
    let rules = fields.take("guided_grammar", "a string")?;
    found.extend(rules.map(|rules| (Grammar::Lark(rules), "guided_grammar")));
    found.extend(structured_outputs(fields)?.into_iter().map(|grammar| (grammar, "structured_outputs")));
    if found.len() > 1 {
        let (one, other) = (found[0].1, found[1].1);
        let message = if one == other {
            format!("{one} must say one thing that the answer must be, not two")
        } else {
            format!("{one} and {other} both say what the answer must be: leave one of them out")
        };
        return Err(ApiError::invalid(Some(other), message));
    }
    Ok(found.pop())
}

fn response_format(fields: &mut Fields<'_>) -> Result<Option<Grammar>, ApiError> {
    const NAME: &str = "response_format";
    let format = fields.take(NAME, "an object with a type: text, json_object or json_schema")?;
    let Some(ResponseFormat { r#type, json_schema }) = format else { return Ok(None) };
    match (r#type.as_str(), json_schema.and_then(|named| named.schema)) {
        ("text", _) => Ok(None),
        ("json_object", _) => Ok(Some(Grammar::JsonObject)),
        ("json_schema", Some(json)) => schema(NAME, json).map(Some),
        ("json_schema", None) => {
            Err(ApiError::invalid(Some(NAME), "response_format.json_schema.schema is missing"))
        }
        _ => {
            let message = "response_format.type must be text, json_object or json_schema";
            Err(ApiError::invalid(Some(NAME), message))
        }
    }
}

fn structured_outputs(fields: &mut Fields<'_>) -> Result<Vec<Grammar>, ApiError> {
    const NAME: &str = "structured_outputs";
    let expected = "an object with one of json, regex, choice, grammar and json_object";
    let StructuredOutputs { json, regex, choice, grammar, json_object, others } =
        fields.take(NAME, expected)?.unwrap_or_default();
    let said = |value: &Value| !value.is_null() && *value != Value::Bool(false);
    if let Some((name, _)) =
        others.iter().find(|(name, value)| said(value) && !UNSEEN.contains(&name.as_str()))
    {
        let name: String = name.chars().take(ECHO_CHARS_MAX).collect();
        let message =
            format!("structured_outputs.{name} is not supported: use one of json, regex, choice and grammar");
        return Err(ApiError::unsupported(NAME.to_owned(), message));
    }
    let mut found = Vec::new();
    found.extend(json.map(|json| schema(NAME, json)).transpose()?);
    found.extend(regex.map(Grammar::Regex));
    found.extend(choice.map(|choice| choices(NAME, choice)).transpose()?);
    found.extend(grammar.map(Grammar::Lark));
    found.extend(json_object.filter(|wanted| *wanted).map(|_| Grammar::JsonObject));
    Ok(found)
}

/// A schema, as JSON or as a text that holds JSON.
pub(in crate::http) fn schema(field: &'static str, json: Value) -> Result<Grammar, ApiError> {
    let wrong =
        || ApiError::invalid(Some(field), format!("{field} must hold a JSON schema, which is an object"));
    let json = match json {
        Value::String(text) => serde_json::from_str(&text).map_err(|_| wrong())?,
        json => json,
    };
    match json {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::JsonSchema(json.to_string())),
        _ => Err(wrong()),
    }
}

fn choices(field: &'static str, choice: Vec<String>) -> Result<Grammar, ApiError> {
    if choice.is_empty() || choice.iter().any(String::is_empty) {
        let message = format!("{field} must have at least one choice, and none of them empty");
        return Err(ApiError::invalid(Some(field), message));
    }
    Ok(Grammar::Choice(choice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_say_it_is_understood() {
        let object = r#"{"type":"object"}"#;
        for (body, expected) in [
            (r#"{"response_format":{"type":"text"}}"#, None),
            (r#"{"response_format":{"type":"json_object"}}"#, Some(Grammar::JsonObject)),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"x","strict":true,"schema":{"type":"object"}}}}"#,
                Some(Grammar::JsonSchema(object.into())),
            ),
            (r#"{"guided_json":{"type":"object"}}"#, Some(Grammar::JsonSchema(object.into()))),
            (r#"{"guided_json":"{\"type\":\"object\"}"}"#, Some(Grammar::JsonSchema(object.into()))),
            (r#"{"guided_regex":"a+"}"#, Some(Grammar::Regex("a+".into()))),
            (r#"{"guided_choice":["a","b"]}"#, Some(Grammar::Choice(vec!["a".into(), "b".into()]))),
            (r#"{"guided_grammar":"start: \"a\""}"#, Some(Grammar::Lark("start: \"a\"".into()))),
            (r#"{"structured_outputs":{"regex":"a"}}"#, Some(Grammar::Regex("a".into()))),
            (r#"{"structured_outputs":{"json_object":true}}"#, Some(Grammar::JsonObject)),
            (r#"{"structured_outputs":{}}"#, None),
            (
                r#"{"structured_outputs":{"regex":"a","disable_any_whitespace":true,"structural_tag":null}}"#,
                Some(Grammar::Regex("a".into())),
            ),
        ] {
            let found = grammar(&mut Fields::parse(body.as_bytes()).unwrap()).unwrap();
            assert_eq!(found.map(|(grammar, _)| grammar), expected, "{body}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (body, field) in [
            (r#"{"guided_regex":"a","guided_json":{}}"#, "guided_regex"),
            (r#"{"structured_outputs":{"regex":"a","choice":["a"]}}"#, "structured_outputs"),
            (r#"{"structured_outputs":{"structural_tag":{}}}"#, "structured_outputs"),
            (r#"{"structured_outputs":{"regexp":"a"}}"#, "structured_outputs"),
            (
                r#"{"structured_outputs":{"json":{},"disable_additional_properties":true}}"#,
                "structured_outputs",
            ),
            (r#"{"response_format":{"type":"xml"}}"#, "response_format"),
            (r#"{"response_format":{"type":"json_schema","json_schema":{"name":"x"}}}"#, "response_format"),
            (r#"{"guided_json":7}"#, "guided_json"),
            (r#"{"guided_choice":[]}"#, "guided_choice"),
        ] {
            let error = grammar(&mut Fields::parse(body.as_bytes()).unwrap()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field), "{body}");
        }
    }
}

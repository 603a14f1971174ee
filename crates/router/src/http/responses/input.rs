//! What a request brings: a text, or items, as the turns of a conversation.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::http::content::Content;
use crate::http::error::ApiError;

/// What input is, to complete "input must be …".
pub(super) const EXPECTED: &str =
    "a string, or a list of items: messages, function_call, function_call_output";

/// What a request brings.
pub(super) enum Input {
    Text(String),
    Items(Vec<Item>),
}

/// An item of any kind that is understood; what it is called and how far it had come says nothing to a model.
#[derive(Deserialize)]
pub(super) struct Item {
    r#type: Option<String>,
    role: Option<String>,
    content: Option<Content>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    output: Option<Content>,
}

/// The turns as templates and Mistral's formats expect them, behind the instructions.
pub(super) fn turns(input: Option<Input>, instructions: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let items = match input {
        Some(Input::Items(items)) if !items.is_empty() => items,
        Some(Input::Text(text)) => {
            return Ok(system(instructions).chain([json!({ "role": "user", "content": text })]).collect());
        }
        None | Some(Input::Items(_)) => {
            return Err(ApiError::invalid(Some("input"), format!("input is missing: give {EXPECTED}")));
        }
    };
    let mut turns: Vec<_> = system(instructions).collect();
    let mut names = BTreeMap::new();
    for (at, item) in items.into_iter().enumerate() {
        let turn = item
            .turn(&mut names)
            .map_err(|what| ApiError::invalid(Some("input"), format!("input[{at}]{what}")))?;
        add(&mut turns, turn);
    }
    Ok(turns)
}

fn system(instructions: Option<&str>) -> impl Iterator<Item = Value> {
    instructions.map(|text| json!({ "role": "system", "content": text })).into_iter()
}

/// Adds a turn; calls that follow each other, or the words before them, are one turn of the assistant.
fn add(turns: &mut Vec<Value>, mut turn: Value) {
    if let (Some(calls), Some(last)) = (turn.get_mut("tool_calls"), turns.last_mut())
        && last["role"] == "assistant"
    {
        let calls = calls.take();
        match (last.get_mut("tool_calls").and_then(Value::as_array_mut), calls) {
            (Some(all), Value::Array(calls)) => all.extend(calls),
            (_, calls) => last["tool_calls"] = calls,
        }
        return;
    }
    turns.push(turn);
}

impl Item {
    /// The turn that this item is; `names` are those of the functions called so far, by their calls' ids.
    fn turn(self, names: &mut BTreeMap<String, String>) -> Result<Value, String> {
        let Self { r#type, role, content, call_id, name, arguments, output } = self;
        let id = || call_id.ok_or(".call_id is missing");
        match r#type.as_deref() {
            None | Some("message") => {
                let role = match role.as_deref() {
                    Some("developer") => "system", // OpenAI's newer word for it, which templates do not know
                    Some(role @ ("system" | "user" | "assistant")) => role,
                    _ => return Err(".role must be system, developer, user or assistant".to_owned()),
                };
                Ok(json!({ "role": role, "content": text(content, ".content")? }))
            }
            Some("function_call") => {
                let (id, name) = (id()?, name.ok_or(".name is missing")?);
                let arguments = arguments.filter(|text| !text.trim().is_empty());
                let arguments: Map<String, Value> = match arguments {
                    Some(text) => serde_json::from_str(&text)
                        .map_err(|_| ".arguments must be a text that holds a JSON object")?,
                    None => Map::new(),
                };
                names.insert(id.clone(), name.clone());
                let function = json!({ "name": name, "arguments": arguments });
                let call = json!({ "id": id, "type": "function", "function": function });
                Ok(json!({ "role": "assistant", "content": "", "tool_calls": [call] }))
            }
            Some("function_call_output") => {
                let id = id()?;
                let mut turn = json!({ "role": "tool", "content": text(output, ".output")? });
                if let Some(name) = names.get(&id) {
                    turn["name"] = name.as_str().into();
                }
                turn["tool_call_id"] = id.into();
                Ok(turn)
            }
            Some("item_reference") => {
                Err(" refers to an item, but nothing is stored here: send it".to_owned())
            }
            Some(_) => Err(".type must be message, function_call or function_call_output".to_owned()),
        }
    }
}

fn text(content: Option<Content>, what: &str) -> Result<Value, String> {
    let content = content.ok_or_else(|| format!("{what} is missing"))?;
    content.text().ok_or_else(|| format!("{what} must have text parts only"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: Value) -> Result<Vec<Value>, ApiError> {
        turns(Some(Input::Items(serde_json::from_value(input).unwrap())), None)
    }

    #[test]
    fn items_become_turns() {
        let turns = read(json!([
            { "role": "developer", "content": "Brief." },
            { "role": "user", "content": [{ "type": "input_text", "text": "Add" }, { "type": "input_text", "text": "1" }] },
            { "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
              "content": [{ "type": "output_text", "text": "So be it.", "annotations": [] }] },
            { "type": "function_call", "call_id": "a", "name": "add", "arguments": "{\"a\": 1}", "status": "completed" },
            { "type": "function_call", "call_id": "b", "name": "sub", "arguments": "" },
            { "type": "function_call_output", "call_id": "a", "output": "2" },
            { "type": "function_call_output", "call_id": "b", "output": [{ "type": "input_text", "text": "0" }] },
        ]));
        let call = |id: &str, name: &str, arguments: Value| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
        let calls = json!([call("a", "add", json!({ "a": 1 })), call("b", "sub", json!({}))]);
        let text = |text: &str| json!({ "type": "text", "text": text });
        assert_eq!(
            turns.unwrap(),
            [
                json!({ "role": "system", "content": "Brief." }),
                json!({ "role": "user", "content": [text("Add"), text("1")] }),
                json!({ "role": "assistant", "content": [text("So be it.")], "tool_calls": calls }),
                json!({ "role": "tool", "content": "2", "name": "add", "tool_call_id": "a" }),
                json!({ "role": "tool", "content": [text("0")], "name": "sub", "tool_call_id": "b" }),
            ]
        );
    }

    #[test]
    fn what_is_not_understood_is_told_with_its_place() {
        for (item, what) in [
            (json!({ "role": "king", "content": "" }), ".role"),
            (json!({ "role": "user" }), ".content is missing"),
            (
                json!({ "role": "user", "content": [{ "type": "input_image" }] }),
                ".content must have text parts",
            ),
            (json!({ "type": "item_reference", "id": "msg_1" }), "nothing is stored"),
            (json!({ "type": "web_search_call" }), ".type"),
            (
                json!({ "type": "function_call", "call_id": "a", "name": "f", "arguments": "[]" }),
                ".arguments",
            ),
            (json!({ "type": "function_call_output", "output": "" }), ".call_id"),
        ] {
            let error = read(json!([{ "role": "user", "content": "Speak" }, item])).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("input"));
            assert!(
                error.message().starts_with("input[1]") && error.message().contains(what),
                "{}",
                error.message()
            );
        }
    }
}

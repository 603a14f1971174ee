//! The turns of a conversation, checked and in one form.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::content::Content;
use crate::http::error::ApiError;

#[derive(Deserialize)]
pub(in crate::http) struct Message {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
    tool_call_id: Option<String>,
    /// Mistral's: the answer goes on with this message.
    prefix: Option<bool>,
    function_call: Option<Value>,
}

/// What messages are, to complete "messages must be …".
pub(in crate::http) const EXPECTED: &str =
    "a list of objects, each with a role and a content that is a string or a list of text parts";

#[derive(Deserialize)]
struct ToolCall {
    id: Option<String>,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    /// A text that holds JSON; some clients send the JSON itself.
    arguments: Option<Value>,
}

/// The turns as templates and Mistral's formats expect them.
pub(in crate::http) fn turns(messages: Vec<Message>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid(Some("messages"), "messages must have at least one"));
    }
    let last = messages.len() - 1;
    if let Some(at) = messages.iter().position(|message| message.prefix == Some(true))
        && (at < last || messages[at].role != "assistant")
    {
        let message = format!("messages[{at}].prefix may be true only for the last message, the assistant's");
        return Err(ApiError::invalid(Some("messages"), message));
    }
    messages.into_iter().enumerate().map(|(at, message)| turn(at, message)).collect()
}

fn turn(at: usize, message: Message) -> Result<Value, ApiError> {
    let invalid = |what: &str| ApiError::invalid(Some("messages"), format!("messages[{at}]{what}"));
    let Message { role, content, name, tool_calls, tool_call_id, prefix, function_call } = message;
    if function_call.is_some_and(|call| !call.is_null()) || role == "function" {
        return Err(invalid(" has OpenAI's older form of calls: use tool_calls and the role tool"));
    }
    let role = role.as_str();
    if !matches!(role, "system" | "developer" | "user" | "assistant" | "tool") {
        return Err(invalid(".role must be system, developer, user, assistant or tool"));
    }
    let calls = tool_calls.unwrap_or_default();
    if !calls.is_empty() && role != "assistant" {
        return Err(invalid(".tool_calls belong to the assistant"));
    }
    let content = match content {
        Some(content) => content.text().ok_or_else(|| invalid(".content must have text parts only"))?,
        None if role == "assistant" => "".into(),
        None => return Err(invalid(".content is missing")),
    };
    let mut turn = json!({ "role": role, "content": content });
    if let Some(name) = name {
        turn["name"] = name.into();
    }
    if prefix == Some(true) {
        turn["prefix"] = true.into();
    }
    if role == "tool" {
        let id =
            tool_call_id.ok_or_else(|| invalid(".tool_call_id is missing: say which call this answers"))?;
        turn["tool_call_id"] = id.into();
    }
    if !calls.is_empty() {
        let calls =
            calls.into_iter().map(|call| {
                call.object().ok_or_else(|| {
            invalid(".tool_calls must each have a function with a name and arguments that are text, which holds JSON")
        })
            });
        turn["tool_calls"] = calls.collect::<Result<_, _>>()?;
    }
    Ok(turn)
}

impl ToolCall {
    /// As OpenAI writes it. What the text of its arguments may be is for the model's chat format to say.
    fn object(self) -> Option<Value> {
        let Self { id, function: Function { name, arguments } } = self;
        let arguments = match arguments {
            None | Some(Value::Null) => json!({}),
            Some(arguments @ (Value::String(_) | Value::Object(_))) => arguments,
            Some(_) => return None,
        };
        Some(json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } }))
    }
}

//! Conversations as Mistral's own formats see them: checked, and brought into few kinds of turns. The rules are those
//! of mistral-common's request validator and normalizer.

use serde_json::Value;

use super::Chat;
use crate::error::TextError;
use crate::python_json::{dumps, reformat};

const FUNCTION_NAME_CHARS_MAX: usize = 64;
/// Tool calls of v3 are named by this many letters and digits.
const CALL_ID_CHARS: usize = 9;
const SEPARATOR: &str = "\n\n";
/// What mistral-common takes for a call without an id.
const NO_ID: &str = "null";

/// A turn, in which neighbouring messages of one role are one.
#[derive(Debug)]
pub(super) enum Turn {
    User(String),
    Assistant {
        content: String,
        calls: Vec<Call>,
        /// It is to be continued.
        prefix: bool,
    },
    Tool {
        name: Option<String>,
        call_id: Option<String>,
        /// JSON, spelled as Python does.
        content: String,
    },
}

/// A call of a tool.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    /// JSON, spelled as Python does.
    pub(super) arguments: String,
}

/// A conversation in turns; the first is the user's.
#[derive(Debug)]
pub(super) struct Turns {
    pub(super) system: String,
    pub(super) turns: Vec<Turn>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
    Tool,
}

struct Message {
    role: Role,
    /// Its texts that are not empty; several if it has several parts.
    texts: Vec<String>,
    /// It has content, be it a list of empty parts.
    has_content: bool,
    calls: Vec<Call>,
    prefix: bool,
    name: Option<String>,
    call_id: Option<String>,
}

fn refuse<T>(problem: impl Into<String>) -> Result<T, TextError> {
    Err(TextError::Conversation(problem.into()))
}

impl Turns {
    /// `with_ids`: calls of tools have ids of nine characters, as from v3 on.
    pub(super) fn of(chat: &Chat, with_ids: bool) -> Result<Self, TextError> {
        let messages = chat.messages.iter().enumerate();
        let mut messages = messages
            .map(|(place, message)| Message::read(place, message, with_ids))
            .collect::<Result<Vec<_>, _>>()?;
        if chat.continue_final {
            match messages.last_mut() {
                Some(last) if last.role == Role::Assistant => last.prefix = true,
                _ => return refuse("to continue the final message, it must be the assistant's"),
            }
        }
        check_order(&messages)?;
        let system = messages.iter().filter(|message| message.role == Role::System && message.has_content);
        let system = system.map(|message| message.texts.join(SEPARATOR)).collect::<Vec<_>>().join(SEPARATOR);
        Ok(Self { system, turns: join(messages)? })
    }
}

impl Role {
    fn of(name: &str) -> Option<Self> {
        match name {
            "system" | "developer" => Some(Self::System),
            "user" => Some(Self::User),
            "assistant" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    fn may_follow(self, before: Self) -> bool {
        match before {
            Self::System => matches!(self, Self::User | Self::Assistant | Self::System),
            Self::User => matches!(self, Self::Assistant | Self::System | Self::User),
            Self::Assistant | Self::Tool => self != Self::System,
        }
    }
}

impl Message {
    fn read(place: usize, message: &Value, with_ids: bool) -> Result<Self, TextError> {
        let wrong = |problem: &str| TextError::Conversation(format!("message {place}: {problem}"));
        let role = message["role"].as_str().and_then(Role::of);
        let role = role.ok_or_else(|| wrong("its role must be system, user, assistant or tool"))?;
        let (texts, has_content) = read_content(&message["content"])
            .ok_or_else(|| wrong("its content must be text or a list of text parts"))?;
        let absent = message["content"].is_null();
        if absent && role != Role::Assistant {
            return Err(wrong(&format!("a {} message must have content", role.name())));
        }
        let text_of = |field: &str| match &message[field] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(wrong(&format!("its {field} must be text"))),
        };
        let mut read =
            Self { role, texts, has_content, calls: vec![], prefix: false, name: None, call_id: None };
        match role {
            Role::System | Role::User => {}
            Role::Assistant => {
                read.prefix = message["prefix"].as_bool().unwrap_or(false);
                read.calls =
                    read_calls(&message["tool_calls"], with_ids).map_err(|problem| wrong(&problem))?;
                if read.has_content != read.calls.is_empty() {
                    return Err(wrong(
                        "an assistant message must have either content or tool_calls, not both",
                    ));
                }
            }
            Role::Tool => {
                (read.name, read.call_id) = (text_of("name")?, text_of("tool_call_id")?);
                if read.name.as_deref().is_some_and(|name| !is_function_name(name)) {
                    return Err(wrong(&function_name_rule("its name")));
                }
                if with_ids && !read.call_id.as_deref().is_some_and(is_call_id) {
                    return Err(wrong(&call_id_rule("its tool_call_id")));
                }
            }
        }
        Ok(read)
    }
}

/// The texts of a message that are not empty, and whether there is any content; `None` for what is not text.
fn read_content(content: &Value) -> Option<(Vec<String>, bool)> {
    let (mut texts, has_content) = match content {
        Value::Null => (Vec::new(), false),
        Value::String(text) => (vec![text.clone()], !text.is_empty()),
        Value::Array(parts) => {
            let text = |part: &Value| match part["type"].as_str() {
                Some("text") | None => part["text"].as_str().map(str::to_owned),
                Some(_) => None,
            };
            (parts.iter().map(text).collect::<Option<Vec<_>>>()?, !parts.is_empty())
        }
        _ => return None,
    };
    texts.retain(|text| !text.is_empty());
    Some((texts, has_content))
}

fn read_calls(calls: &Value, with_ids: bool) -> Result<Vec<Call>, String> {
    let calls = match calls {
        Value::Null => return Ok(Vec::new()),
        Value::Array(calls) => calls,
        _ => return Err("its tool_calls must be a list".to_owned()),
    };
    let read = |call: &Value| {
        let id = call["id"].as_str().unwrap_or(NO_ID);
        if with_ids && !is_call_id(id) {
            return Err(call_id_rule("a tool call's id"));
        }
        let function = &call["function"];
        let name = function["name"].as_str().filter(|name| is_function_name(name));
        let name = name.ok_or_else(|| function_name_rule("a tool call's function name"))?;
        let arguments = match &function["arguments"] {
            Value::Null => "{}".to_owned(),
            Value::String(text) => embed(text)?,
            object @ Value::Object(_) => dumps(object),
            _ => return Err("a tool call's arguments must be JSON text".to_owned()),
        };
        Ok(Call { id: id.to_owned(), name: name.to_owned(), arguments })
    };
    calls.iter().map(read).collect()
}

/// JSON that holds what `text` says: the value if it is JSON, else itself as a string; nothing is an empty object.
fn embed(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Ok("{}".to_owned());
    }
    Ok(reformat(text)?.unwrap_or_else(|| dumps(&Value::from(text))))
}

pub(super) fn is_function_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (1..=FUNCTION_NAME_CHARS_MAX).contains(&name.len()) && name.chars().all(plain)
}

pub(super) fn function_name_rule(what: &str) -> String {
    format!("{what} must be 1 to {FUNCTION_NAME_CHARS_MAX} characters of a-z, A-Z, 0-9, _ and -")
}

fn is_call_id(id: &str) -> bool {
    id.len() == CALL_ID_CHARS && id.chars().all(|c| c.is_ascii_alphanumeric())
}

fn call_id_rule(what: &str) -> String {
    format!("{what} must be {CALL_ID_CHARS} characters of a-z, A-Z and 0-9")
}

fn check_order(messages: &[Message]) -> Result<(), TextError> {
    let Some(last) = messages.last() else { return refuse("there must be at least one message") };
    if messages.len() == 1 && !matches!(last.role, Role::User | Role::System) {
        return refuse("it must begin with a system or user message");
    }
    if last.role == Role::Assistant && !last.prefix {
        return refuse("the last message must be the user's or a tool's, or an assistant's with prefix");
    }
    for (place, pair) in messages.windows(2).enumerate() {
        if !pair[1].role.may_follow(pair[0].role) {
            let (role, before) = (pair[1].role.name(), pair[0].role.name());
            return refuse(format!("message {}: the role {role} cannot follow {before}", place + 1));
        }
        if pair[0].prefix {
            return refuse(format!("message {place}: only the last message can have prefix"));
        }
    }
    // Results that come before the next assistant message must be as many as the calls of the last.
    let mut due = 0usize;
    let mut results = 0;
    for (place, message) in messages.iter().enumerate().skip(1) {
        match message.role {
            Role::Tool => results += 1,
            Role::Assistant => {
                if due != results {
                    return refuse(format!(
                        "message {place}: before it, {due} tool calls have {results} results"
                    ));
                }
                (due, results) = (message.calls.len(), 0);
            }
            Role::System | Role::User => {}
        }
    }
    Ok(())
}

/// Makes one turn of neighbouring messages of one role; tool results stay apart, system messages are left out.
fn join(messages: Vec<Message>) -> Result<Vec<Turn>, TextError> {
    let mut turns = Vec::new();
    let mut messages = messages.into_iter().peekable();
    while let Some(mut message) = messages.next() {
        let role = message.role;
        if role == Role::Tool {
            let content = embed(&message.texts.join(SEPARATOR)).map_err(TextError::Conversation)?;
            turns.push(Turn::Tool { name: message.name, call_id: message.call_id, content });
            continue;
        }
        while let Some(next) = messages.next_if(|next| next.role == role) {
            message.texts.extend(next.texts);
            message.calls.extend(next.calls);
            message.prefix |= next.prefix;
        }
        let content = message.texts.join(SEPARATOR);
        match role {
            Role::User => turns.push(Turn::User(content)),
            Role::Assistant => {
                if content.is_empty() == message.calls.is_empty() {
                    return refuse("an assistant's turn must have either content or tool_calls, not both");
                }
                turns.push(Turn::Assistant { content, calls: message.calls, prefix: message.prefix });
            }
            Role::System | Role::Tool => {}
        }
    }
    if !matches!(turns.first(), Some(Turn::User(_))) {
        turns.insert(0, Turn::User(String::new()));
    }
    Ok(turns)
}

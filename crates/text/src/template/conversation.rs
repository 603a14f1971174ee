//! What becomes of a conversation before a template sees it.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value};

use crate::error::TextError;

pub(super) const DEVELOPER: &str = "developer";

/// Variables that say what the conversation is, which `chat_template_kwargs` cannot change.
const RESERVED: [&str; 5] = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];

/// Stands at the end of a message that is to be continued while it is rendered: private characters, so that no template
/// knows it, and a space, which tells whether the template trims.
const MARK: &str = "\u{f8ff}\u{e000}continue\u{e000}\u{f8ff} ";

pub(super) fn check_variables(extra: &Map<String, Value>) -> Result<(), TextError> {
    match RESERVED.into_iter().find(|&name| extra.contains_key(name)) {
        Some(name) => {
            refuse(format!("chat_template_kwargs cannot set {name}: the request says it elsewhere"))
        }
        None => Ok(()),
    }
}

fn refuse<T>(problem: impl Into<String>) -> Result<T, TextError> {
    Err(TextError::Conversation(problem.into()))
}

/// OpenAI's newer word for the system, which most templates do not know.
pub(super) fn name_developers_system(messages: &mut Cow<'_, [Value]>) {
    if messages.iter().any(|message| message["role"] == DEVELOPER) {
        for message in messages.to_mut().iter_mut().filter(|message| message["role"] == DEVELOPER) {
            message["role"] = "system".into();
        }
    }
}

/// What stands between the parts of a message for a template that takes it for one text, as vLLM has it.
const SEPARATOR: &str = "\n";

/// Whether a template looks at the parts of a message one by one: it loops over some content, as it is or filtered.
pub(super) fn takes_parts(source: &str) -> bool {
    static LOOP: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(r#"\{%[-+]?\s*for\s+\w+\s+in\s+[\w.\[\]'"]*\bcontent\b['"\]]*\s*(?:\||if\b|[-+]?%\})"#)
            .ok()
    });
    LOOP.as_ref().is_some_and(|content| content.is_match(source))
}

/// Makes one text of a message's parts, if they are texts.
pub(super) fn join_parts(messages: &mut Cow<'_, [Value]>) {
    if !messages.iter().any(|message| message["content"].is_array()) {
        return;
    }
    for message in messages.to_mut() {
        let parts = message["content"].as_array();
        let texts = parts.and_then(|parts| parts.iter().map(|part| part["text"].as_str()).collect());
        if let Some(texts) = texts.map(|texts: Vec<_>| texts.join(SEPARATOR)) {
            message["content"] = texts.into();
        }
    }
}

/// Reads the arguments of calls that are a text, as OpenAI's API has them: templates expect the object in it.
pub(super) fn read_arguments(messages: &mut Cow<'_, [Value]>) -> Result<(), TextError> {
    let written = |call: &Value| call["function"]["arguments"].is_string();
    let calls =
        |message: &Value| message["tool_calls"].as_array().is_some_and(|calls| calls.iter().any(written));
    if !messages.iter().any(calls) {
        return Ok(());
    }
    for (place, message) in messages.to_mut().iter_mut().enumerate() {
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            let Some(text) = arguments.as_str() else { continue };
            let object = if text.trim().is_empty() { Ok(Map::new()) } else { serde_json::from_str(text) };
            match object {
                Ok(object) => *arguments = Value::Object(object),
                Err(_) => {
                    return refuse(format!(
                        "message {place}: the arguments of its tool_calls must each hold a JSON object, which the \
                         model's chat template expects"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Puts the mark behind the last message, which is to be continued.
pub(super) fn mark_end(messages: &mut [Value]) -> Result<(), TextError> {
    let Some(last) = messages.last_mut().filter(|last| last["role"] == "assistant") else {
        return refuse("to continue the final message, it must be the assistant's");
    };
    if last["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()) {
        return refuse("a final message with tool_calls cannot be continued: send their results");
    }
    let text = match &mut last["content"] {
        Value::Array(parts) => parts.last_mut().and_then(|part| part.get_mut("text")),
        content => Some(content),
    };
    match text {
        Some(Value::String(text)) => {
            text.push_str(MARK);
            Ok(())
        }
        _ => refuse("to continue the final message, its content must be text or end with a text part"),
    }
}

/// The prompt up to where the last message ends: what closes the message is left out, as transformers does.
pub(super) fn cut_at_mark(mut prompt: String) -> Result<String, TextError> {
    let mark = MARK.trim_end();
    let at = match prompt.match_indices(mark).map(|(at, _)| at).collect::<Vec<_>>()[..] {
        [at] => at,
        _ => {
            return refuse(
                "the model's chat template does not write the final message as it is, so it cannot be continued",
            );
        }
    };
    let trims = !prompt[at..].starts_with(MARK);
    prompt.truncate(at);
    if trims {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}

//! What becomes of a conversation before a template sees it.

use std::borrow::Cow;

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

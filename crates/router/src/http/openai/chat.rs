//! Bodies of `/v1/chat/completions`.

use galerne_text::Chat;
use serde_json::{Map, Value};

use super::known::KNOWN;
use super::messages::{self, Message};
use super::options::{alternatives, count, options, view};
use super::reply::View;
use super::tools::Tools;
use crate::ask::{Caller, MaxTokens, Prompt, Several};
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::mistral;
use crate::http::name::RequestName;
use crate::http::shape::Calls;
use crate::limits::RequestLimits;
use crate::serve::Router;

/// A chat request, and what its client wants to see of the answer.
pub(in crate::http) struct Wanted {
    pub(in crate::http) asked: Several,
    pub(in crate::http) view: View,
    pub(in crate::http) calls: Calls,
    /// What the answer goes on with, if its client is to see that as its beginning.
    pub(in crate::http) lead: String,
    pub(in crate::http) name: RequestName,
    /// Its client speaks Mistral's API, by the fields that it used.
    pub(in crate::http) mistral: bool,
}

/// Reads a body; what tools need depends on the model.
pub(in crate::http) fn parse(router: &Router, body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let mut mistral = mistral::speaks(&fields);
    let mut chat = without_tools(&mut fields, &router.requests)?;
    let lead = mistral::lead(&chat.messages);
    mistral |= lead.is_some();
    let max_tokens = fields.take_u32("max_tokens")?;
    let newer = fields.take_u32("max_completion_tokens")?;
    let max = newer.or(max_tokens).map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let logprobs = logprobs(&mut fields)?;
    let mut options = options(&mut fields, max, logprobs)?;
    if newer.is_some() {
        options.max_tokens_field = "max_completion_tokens";
    }
    let each = count(&mut fields, "n", &router.requests)?.unwrap_or(1);
    let view = view(&mut fields, &options)?;
    let tools = Tools::take(&mut fields, &router.requests)?;
    let name = RequestName::take(&mut fields)?;
    let model: String = fields.take("model", "a string")?.unwrap_or_default();
    fields.finish(&KNOWN)?;
    let calls = match tools {
        Some(tools) => tools.apply(&*router.model(&model)?, &mut chat, &mut options)?,
        None => Calls::Never,
    };
    let prompts = vec![Prompt::Chat(chat)];
    let asked = Several { model, prompts, each, options, caller: Caller::default() };
    Ok(Wanted { asked, view, calls, lead: lead.unwrap_or_default(), name, mistral })
}

/// Takes a conversation with its tools, and nothing of how it is answered.
pub(in crate::http) fn conversation(
    fields: &mut Fields<'_>,
    limits: &RequestLimits,
) -> Result<Chat, ApiError> {
    let chat = without_tools(fields, limits)?;
    let tools = Tools::take(fields, limits)?.map_or_else(Vec::new, |tools| tools.list);
    Ok(Chat { tools, ..chat })
}

/// Takes what says how a conversation becomes a prompt, but for its tools.
fn without_tools(fields: &mut Fields<'_>, limits: &RequestLimits) -> Result<Chat, ApiError> {
    let messages: Vec<Message> = fields.take_list("messages", messages::EXPECTED, limits.messages_max)?;
    let mut messages = messages::turns(messages)?;
    let continue_final = fields.take_bool("continue_final_message")? || mistral::lead(&messages).is_some();
    if fields.take_bool("safe_prompt")? {
        mistral::make_safe(&mut messages);
    }
    let add = fields.take::<bool>("add_generation_prompt", "true or false")?;
    if continue_final && add == Some(true) {
        let message = "continue_final_message needs add_generation_prompt to be false: the answer goes on with the last \
                       message, or begins a new one";
        return Err(ApiError::invalid(Some("continue_final_message"), message));
    }
    let mut extra: Map<String, Value> = fields
        .take("chat_template_kwargs", "an object of variables for the chat template")?
        .unwrap_or_default();
    let effort: Option<String> = fields.take("reasoning_effort", "a string")?;
    if let Some(effort) = effort {
        extra.insert("reasoning_effort".to_owned(), effort.into()); // templates that do not know it ignore it
    }
    let add_generation_prompt = add.unwrap_or(!continue_final);
    Ok(Chat { messages, tools: Vec::new(), continue_final, add_generation_prompt, extra })
}

fn logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let top = alternatives(fields, "top_logprobs")?;
    match (fields.take_bool("logprobs")?, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::invalid(Some("top_logprobs"), "top_logprobs needs logprobs to be true"))
        }
    }
}

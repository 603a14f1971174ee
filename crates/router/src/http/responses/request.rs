//! Bodies of `/v1/responses`.

use galerne_text::Chat;
use galerne_types::Grammar;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::input::{self, Input};
use super::known::KNOWN;
use crate::ask::{Caller, MaxTokens, Options, Prompt, Several};
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::openai::format::schema;
use crate::http::openai::options::{alternatives, options, view};
use crate::http::openai::reply::View;
use crate::http::openai::tools::{Tool, ToolChoice, Tools};
use crate::http::shape::Calls;
use crate::serve::Router;

/// What a client includes to see log probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

/// A request, and what its answer repeats of it.
pub(super) struct Wanted {
    pub(super) asked: Several,
    pub(super) view: View,
    pub(super) calls: Calls,
    pub(super) terms: Map<String, Value>,
}

#[derive(Deserialize, Default)]
struct Text {
    format: Option<Format>,
    verbosity: Option<String>,
}

#[derive(Deserialize)]
struct Format {
    r#type: String,
    schema: Option<Value>,
    // Its name and description tell a model more than a grammar can; `strict` is always so.
}

#[derive(Deserialize, Default)]
struct Reasoning {
    effort: Option<String>,
    // Whether to sum it up: no reasoning is told apart.
}

/// Reads a body; what tools need depends on the model.
pub(super) fn parse(router: &Router, body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let instructions: Option<String> = fields.take("instructions", "a string")?;
    let input = match fields.is_list("input") {
        true => {
            let max = router.requests.messages_max;
            Some(Input::Items(fields.take_list("input", input::EXPECTED, max)?))
        }
        false => fields.take("input", input::EXPECTED)?.map(Input::Text),
    };
    let turns = input::turns(input, instructions.as_deref())?;
    let max = fields.take_u32("max_output_tokens")?;
    let top = alternatives(&mut fields, "top_logprobs")?;
    let include: Vec<String> = fields.take("include", "a list of strings")?.unwrap_or_default();
    let shown = top.is_some_and(|top| top > 0) || include.iter().any(|name| name == LOGPROBS);
    let logprobs = shown.then(|| top.unwrap_or(0));
    let max_tokens = max.map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let mut options =
        Options { max_tokens_field: "max_output_tokens", ..options(&mut fields, max_tokens, logprobs)? };
    let text: Option<Value> = fields.take("text", TEXT)?;
    format(text.as_ref(), &mut options)?;
    let view = view(&mut fields, &options)?;
    let mut chat = Chat {
        messages: turns,
        tools: Vec::new(),
        continue_final: false,
        add_generation_prompt: true,
        extra: Map::new(),
    };
    let reasoning: Reasoning = fields.take("reasoning", "an object with an effort")?.unwrap_or_default();
    if let Some(effort) = &reasoning.effort {
        chat.extra.insert("reasoning_effort".to_owned(), effort.as_str().into()); // as in a chat
    }
    let given: Vec<Value> = fields.take_list("tools", "a list of objects", router.requests.tools_max)?;
    let choice: Option<Value> = fields.take("tool_choice", CHOICE)?;
    let parallel = fields.take_bool_or("parallel_tool_calls", true)?;
    let tools = tools(&given, choice.as_ref(), parallel)?;
    let terms = json!({
        "object": "response",
        "background": false,
        "instructions": instructions,
        "max_output_tokens": max,
        "max_tool_calls": null,
        "metadata": fields.take::<Map<String, Value>>("metadata", "an object")?.unwrap_or_default(),
        "parallel_tool_calls": parallel,
        "previous_response_id": null,
        "reasoning": { "effort": reasoning.effort, "summary": null },
        "service_tier": "default",
        "store": false,
        "temperature": options.sampling.temperature,
        "text": text.filter(|text| !text["format"].is_null()).unwrap_or_else(|| json!({ "format": { "type": "text" } })),
        "tool_choice": choice.unwrap_or_else(|| "auto".into()),
        "tools": given,
        "top_logprobs": top.unwrap_or(0),
        "top_p": options.sampling.top_p,
        "truncation": "disabled",
        "user": fields.take::<String>("user", "a string")?,
    });
    let model: String = fields.take("model", "a string")?.unwrap_or_default();
    fields.finish(&KNOWN)?;
    let calls = match tools {
        Some(tools) => tools.apply(&*router.model(&model)?, &mut chat, &mut options)?,
        None => Calls::Never,
    };
    let prompts = vec![Prompt::Chat(chat)];
    let asked = Several { model, prompts, each: 1, options, caller: Caller::default() };
    let Value::Object(terms) = terms else { unreachable!("written as an object above") };
    Ok(Wanted { asked, view, calls, terms })
}

/// What `text` is, to complete "text must be …".
const TEXT: &str = "an object with a format, which has the type text, json_object or json_schema";

/// Puts what the answer must be among the options.
fn format(text: Option<&Value>, options: &mut Options) -> Result<(), ApiError> {
    let invalid = |message: &str| ApiError::invalid(Some("text"), message);
    let text = text.map(Text::deserialize).transpose();
    let Text { format, verbosity } =
        text.map_err(|_| invalid(&format!("text must be {TEXT}")))?.unwrap_or_default();
    if verbosity.is_some_and(|verbosity| verbosity != "medium") {
        let message = "text.verbosity is not supported with this value: leave it out or set it to medium";
        return Err(ApiError::unsupported("text".to_owned(), message.to_owned()));
    }
    let Some(Format { r#type, schema: given }) = format else { return Ok(()) };
    let grammar = match (r#type.as_str(), given) {
        ("text", _) => return Ok(()),
        ("json_object", _) => Grammar::JsonObject,
        ("json_schema", Some(given)) => schema("text", given)?,
        ("json_schema", None) => return Err(invalid("text.format.schema is missing")),
        _ => return Err(invalid("text.format.type must be text, json_object or json_schema")),
    };
    if options.grammar.is_some() {
        let other = options.grammar_field;
        let message = format!("text and {other} both say what the answer must be: leave one of them out");
        return Err(invalid(&message));
    }
    (options.grammar, options.grammar_field) = (Some(grammar), "text");
    Ok(())
}

/// What `tool_choice` is, to complete "tool_choice must be …".
const CHOICE: &str = "none, auto, required, or {\"type\": \"function\", \"name\": …}";

/// The tools, which this API writes flat.
fn tools(given: &[Value], choice: Option<&Value>, parallel: bool) -> Result<Option<Tools>, ApiError> {
    let wrong = || ApiError::invalid(Some("tool_choice"), format!("tool_choice must be {CHOICE}"));
    let choice = match choice {
        None if given.is_empty() => ToolChoice::Never,
        None => ToolChoice::Auto,
        Some(Value::String(word)) => ToolChoice::of_word(word).ok_or_else(wrong)?,
        Some(object) if object["type"] == "function" => {
            ToolChoice::Named(object["name"].as_str().ok_or_else(wrong)?.to_owned())
        }
        Some(_) => return Err(wrong()),
    };
    let read = |(at, tool): (usize, &Value)| {
        let function = Option::deserialize(tool).ok().filter(|_| tool["type"] == "function");
        function.map(|function| Tool { r#type: "function".to_owned(), function }).ok_or_else(|| {
            let message = format!(
                "tools[{at}] must have the type \"function\", a name and parameters: others are not supported"
            );
            ApiError::invalid(Some("tools"), message)
        })
    };
    let list = given.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    Tools::among(list, choice, parallel)
}

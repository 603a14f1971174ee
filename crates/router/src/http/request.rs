//! Bodies of `/v1/chat/completions` and `/v1/completions`, as requests.

use galerne_types::limits::TOP_LOGPROBS_MAX;
use galerne_types::{Sampling, TokenId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use crate::ask::{Ask, Caller, MaxTokens, Options, Prompt, random_seed};

/// Tokens of a text completion whose request sets no limit, as OpenAI and vLLM have it.
const COMPLETION_TOKENS: u32 = 16;

/// A request, and what its client wants to see of the answer.
pub(super) struct Wanted {
    pub(super) ask: Ask,
    pub(super) view: View,
}

/// What a client wants to see of an answer.
#[derive(Clone, Copy, Default)]
pub(super) struct View {
    /// Server-sent events instead of one body.
    pub(super) stream: bool,
    /// A last event with the usage.
    pub(super) include_usage: bool,
    /// The usage so far in every event.
    pub(super) continuous_usage: bool,
    /// vLLM's `token_ids` and `prompt_token_ids`.
    pub(super) token_ids: bool,
    /// Log probabilities.
    pub(super) logprobs: bool,
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
    #[serde(default)]
    continuous_usage_stats: Option<bool>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<Value>>,
    function_call: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TextPrompt {
    Text(String),
    Tokens(Vec<TokenId>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<TokenId>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// Reads the body of `/v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let messages: Option<Vec<Message>> = fields.take(
        "messages",
        "a list of objects, each with a role and a content that is a string or a list of text parts",
    )?;
    let messages = messages.filter(|messages| !messages.is_empty());
    let messages =
        messages.ok_or_else(|| ApiError::invalid(Some("messages"), "messages must have at least one"))?;
    let turns =
        messages.into_iter().enumerate().map(|(at, message)| turn(at, message)).collect::<Result<_, _>>()?;

    let max_tokens = fields.take_u32("max_tokens")?;
    let max_tokens = fields.take_u32("max_completion_tokens")?.or(max_tokens);
    let max_tokens = max_tokens.map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let top = fields.take_u32("top_logprobs")?;
    if let Some(count) = top.filter(|count| *count > TOP_LOGPROBS_MAX) {
        let says = format!("top_logprobs must be at most {TOP_LOGPROBS_MAX}, not {count}");
        return Err(ApiError::invalid(Some("top_logprobs"), says));
    }
    let logprobs = match (fields.take_bool("logprobs")?, top) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::invalid(Some("top_logprobs"), "top_logprobs needs logprobs to be true"));
        }
    };
    common(fields, Prompt::Chat(turns), max_tokens, logprobs)
}

/// Reads the body of `/v1/completions`.
pub(super) fn completion(body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let invalid = |message| ApiError::invalid(Some("prompt"), message);
    let prompt = fields.take("prompt", "a string or a list of token ids")?;
    let prompt = match prompt
        .ok_or_else(|| invalid("prompt is missing: give a string or a list of token ids"))?
    {
        TextPrompt::Text(text) => Prompt::Text(text),
        TextPrompt::Tokens(tokens) => Prompt::Tokens(tokens),
        TextPrompt::Texts(texts) => Prompt::Text(only(texts).ok_or_else(|| invalid(SEVERAL_PROMPTS))?),
        TextPrompt::TokenLists(lists) => Prompt::Tokens(only(lists).ok_or_else(|| invalid(SEVERAL_PROMPTS))?),
    };
    let max_tokens = fields.take_u32("max_tokens")?;
    let max_tokens = max_tokens.map_or(MaxTokens::UpTo(COMPLETION_TOKENS), MaxTokens::Exactly);
    let logprobs = fields.take_u32("logprobs")?;
    common(fields, prompt, max_tokens, logprobs)
}

const SEVERAL_PROMPTS: &str = "prompt must be one prompt: send several as several requests";

fn only<T>(list: Vec<T>) -> Option<T> {
    let [item] = <[T; 1]>::try_from(list).ok()?;
    Some(item)
}

/// Takes what both bodies have in common, and refuses the rest.
fn common(
    mut fields: Fields<'_>,
    prompt: Prompt,
    max_tokens: MaxTokens,
    logprobs: Option<u32>,
) -> Result<Wanted, ApiError> {
    let seed = fields.take::<i128>("seed", "an integer of 64 bits")?;
    let seed = match seed {
        None => random_seed()?,
        Some(seed) => u64::try_from(seed)
            .or_else(|_| i64::try_from(seed).map(i64::cast_unsigned))
            .map_err(|_| ApiError::invalid(Some("seed"), "seed must be an integer of 64 bits"))?,
    };
    let top_k = match fields.take::<i64>("top_k", "an integer: -1 or 0 for all tokens, or how many")? {
        None | Some(-1) => 0,
        Some(top_k) => u32::try_from(top_k).map_err(|_| {
            ApiError::invalid(Some("top_k"), format!("top_k must be -1, 0 or a count of tokens, not {top_k}"))
        })?,
    };
    let sampling = Sampling {
        temperature: fields.take("temperature", "a number")?.unwrap_or(1.0),
        top_k,
        top_p: fields.take("top_p", "a number")?.unwrap_or(1.0),
        seed,
        logprobs,
        ..Sampling::greedy()
    };
    let stop = match fields.take("stop", "a string or a list of strings")? {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Several(stops)) => stops,
    };
    let stream = fields.take_bool("stream")?;
    let stream_options: Option<StreamOptions> = fields.take("stream_options", "an object of truth values")?;
    if stream_options.is_some() && !stream {
        return Err(ApiError::invalid(Some("stream_options"), "stream_options needs stream to be true"));
    }
    let StreamOptions { include_usage, continuous_usage_stats } = stream_options.unwrap_or_default();
    let include_usage = include_usage.unwrap_or(false);
    let view = View {
        stream,
        include_usage,
        continuous_usage: include_usage && continuous_usage_stats.unwrap_or(false),
        token_ids: fields.take_bool("return_token_ids")?,
        logprobs: logprobs.is_some(),
    };
    let options = Options {
        sampling,
        max_tokens,
        min_tokens: fields.take_u32("min_tokens")?.unwrap_or(0),
        stop,
        stop_token_ids: fields.take("stop_token_ids", "a list of token ids")?.unwrap_or_default(),
        ignore_eos: fields.take_bool("ignore_eos")?,
        skip_special: true,
        prompt_logprobs: None,
        grammar: None,
    };
    let model = fields.take("model", "a string")?.unwrap_or_default();
    fields.finish()?;
    Ok(Wanted { ask: Ask { model, prompt, options, caller: Caller::default() }, view })
}

/// One turn as chat templates expect it.
fn turn(at: usize, message: Message) -> Result<Value, ApiError> {
    let invalid = |what: &str| ApiError::invalid(Some("messages"), format!("messages[{at}]{what}"));
    let Message { role, content, name, tool_calls, function_call } = message;
    if tool_calls.is_some_and(|calls| !calls.is_empty()) || function_call.is_some() {
        return Err(invalid(" has tool calls, which are not supported: leave them out"));
    }
    let role = match role.as_str() {
        "developer" => "system", // OpenAI's newer word for it, which templates do not know
        "system" | "user" | "assistant" => &role,
        _ => return Err(invalid(".role must be system, developer, user or assistant")),
    };
    let content = match content {
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => {
            let texts = parts.into_iter().map(|part| part.text.filter(|_| part.r#type == "text"));
            let texts: Option<Vec<String>> = texts.collect();
            texts.ok_or_else(|| invalid(".content must have text parts only"))?.join("\n")
        }
        None if role == "assistant" => String::new(),
        None => return Err(invalid(".content is missing")),
    };
    let mut turn = json!({ "role": role, "content": content });
    if let Some(name) = name {
        turn["name"] = name.into();
    }
    Ok(turn)
}

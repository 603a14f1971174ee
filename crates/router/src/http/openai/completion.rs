//! Bodies of `/v1/completions`.

use galerne_types::TokenId;
use serde::Deserialize;

use super::known::KNOWN;
use super::options::{alternatives, count, options, view};
use super::reply::View;
use super::text_reply::Echo;
use crate::ask::{Caller, MaxTokens, Prompt, Several};
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::name::RequestName;
use crate::limits::RequestLimits;

/// Tokens of a text completion whose request sets no limit, as OpenAI and vLLM have it.
const COMPLETION_TOKENS: u32 = 16;

/// A completion request, and what its client wants to see of the answer.
pub(in crate::http) struct Wanted {
    pub(in crate::http) asked: Several,
    pub(in crate::http) view: View,
    pub(in crate::http) echo: Echo,
    pub(in crate::http) name: RequestName,
    /// Of the choices of each prompt, show only this many: the most likely.
    pub(in crate::http) keep: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Given {
    Text(String),
    Tokens(Vec<TokenId>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<TokenId>>),
}

/// What a prompt is, to complete "prompt must be …".
const EXPECTED: &str = "a string, a list of token ids, or a list of either";

/// Reads a body.
pub(in crate::http) fn parse(limits: &RequestLimits, body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let given = fields
        .take("prompt", EXPECTED)?
        .ok_or_else(|| ApiError::invalid(Some("prompt"), format!("prompt is missing: give {EXPECTED}")))?;
    let shown = fields.take_bool("echo")?;
    let logprobs = alternatives(&mut fields, "logprobs")?;
    let max_tokens = match fields.take_u32("max_tokens")? {
        None => MaxTokens::UpTo(COMPLETION_TOKENS),
        Some(0) if shown => MaxTokens::Nothing,
        Some(max) => MaxTokens::Exactly(max),
    };
    let mut options = options(&mut fields, max_tokens, logprobs)?;
    let view = view(&mut fields, &options)?;
    if shown {
        options.prompt_logprobs = options.prompt_logprobs.max(logprobs);
    }
    let n = count(&mut fields, "n", limits)?;
    let best_of = count(&mut fields, "best_of", limits)?;
    let (each, keep) = choices(n.unwrap_or(1), best_of, view.stream)?;
    if keep.is_some() {
        options.sampling.logprobs.get_or_insert(0);
    }
    let suffix: Option<String> = fields.take("suffix", "a string")?;
    let suffix = suffix.filter(|suffix| !suffix.is_empty());
    if shown && suffix.is_some() {
        return Err(ApiError::invalid(Some("suffix"), "suffix and echo exclude each other: leave one out"));
    }
    let special = fields.take_bool_or("add_special_tokens", true)?;
    let (prompts, texts) = prompts(given, suffix.as_deref(), special)?;
    let name = RequestName::take(&mut fields)?;
    let model = fields.take("model", "a string")?.unwrap_or_default();
    fields.finish(&KNOWN)?;
    let original = shown && options.truncate.is_none();
    let asked = Several { model, prompts, each, options, caller: Caller::default() };
    let echo = Echo { shown, texts: if original { texts } else { Vec::new() } };
    Ok(Wanted { asked, view, echo, name, keep })
}

/// How many choices to generate for each prompt, and how many of them to keep.
fn choices(n: u32, best_of: Option<u32>, stream: bool) -> Result<(u32, Option<usize>), ApiError> {
    let Some(best_of) = best_of.filter(|best_of| *best_of != n) else { return Ok((n, None)) };
    let message = match best_of {
        _ if best_of < n => format!("best_of must be at least n, which is {n}, not {best_of}"),
        _ if stream => "best_of cannot be streamed: the best choice is known at the end".to_owned(),
        _ => return Ok((best_of, Some(n as usize))),
    };
    Err(ApiError::invalid(Some("best_of"), message))
}

/// The prompts, and the texts among them as they are.
fn prompts(
    given: Given,
    suffix: Option<&str>,
    special: bool,
) -> Result<(Vec<Prompt>, Vec<Option<String>>), ApiError> {
    let invalid = |message| ApiError::invalid(Some("prompt"), message);
    let (texts, token_lists) = match given {
        Given::Text(text) => (vec![text], Vec::new()),
        Given::Texts(texts) => (texts, Vec::new()),
        Given::Tokens(tokens) => (Vec::new(), vec![tokens]),
        Given::TokenLists(lists) => (Vec::new(), lists),
    };
    if texts.is_empty() && token_lists.is_empty() {
        return Err(invalid("prompt must have at least one"));
    }
    if suffix.is_some() && !token_lists.is_empty() {
        return Err(ApiError::invalid(Some("suffix"), "suffix needs a prompt that is text"));
    }
    let text = |text: &String| match suffix {
        Some(suffix) => Prompt::Fim { prompt: text.clone(), suffix: suffix.to_owned() },
        None if special => Prompt::Text(text.clone()),
        None => Prompt::Bare(text.clone()),
    };
    let tokens = token_lists.into_iter().map(Prompt::Tokens);
    let prompts = texts.iter().map(text).chain(tokens).collect();
    Ok((prompts, texts.into_iter().map(Some).collect()))
}

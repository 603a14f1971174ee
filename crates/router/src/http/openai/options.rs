//! Fields that say how an answer is generated; chat and text completions share them.

use std::collections::BTreeMap;

use galerne_types::limits::TOP_LOGPROBS_MAX;
use galerne_types::{Sampling, TokenId};
use serde::Deserialize;

use super::format;
use super::reply::View;
use crate::ask::{MaxTokens, Options, Truncate, salt};
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::limits::RequestLimits;

#[derive(Deserialize, Default)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
    #[serde(default)]
    continuous_usage_stats: Option<bool>,
    // `include_obfuscation` pads chunks against eavesdroppers and changes no answer; others are ignored likewise.
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PromptLogprobs {
    Wanted(bool),
    Count(i64),
}

/// Takes everything about sampling and stopping, but the seed's name and the log probabilities, which differ.
pub(in crate::http) fn options(
    fields: &mut Fields<'_>,
    max_tokens: MaxTokens,
    logprobs: Option<u32>,
) -> Result<Options, ApiError> {
    let stop = match fields.take("stop", "a string or a list of strings")? {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Several(stops)) => stops,
    };
    let grammar = format::grammar(fields)?;
    let (grammar, grammar_field) = grammar.unzip();
    let truncate = truncate(fields)?;
    Ok(Options {
        min_tokens: fields.take_u32("min_tokens")?.unwrap_or(0),
        stop,
        stop_token_ids: fields.take("stop_token_ids", "a list of token ids")?.unwrap_or_default(),
        ignore_eos: fields.take_bool("ignore_eos")?,
        skip_special: fields.take_bool_or("skip_special_tokens", true)?,
        prompt_logprobs: prompt_logprobs(fields)?,
        grammar,
        grammar_field: grammar_field.unwrap_or("grammar"),
        include_stop: fields.take_bool("include_stop_str_in_output")?,
        truncate,
        cache_salt: Some(salt(&fields.take::<String>("cache_salt", "a string")?.unwrap_or_default())),
        priority: fields.take("priority", "an integer of 32 bits")?.unwrap_or(0),
        seed: seed(fields)?,
        ..Options::new(sampling(fields, logprobs)?, max_tokens)
    })
}

/// Takes how many tokens of the prompt to keep, and from which side.
fn truncate(fields: &mut Fields<'_>) -> Result<Option<Truncate>, ApiError> {
    const NAME: &str = "truncate_prompt_tokens";
    let side: Option<String> = fields.take("truncation_side", "left or right")?;
    let first = match side.as_deref() {
        None | Some("left") => false, // what is cut off is on the left
        Some("right") => true,
        Some(_) => {
            return Err(ApiError::invalid(Some("truncation_side"), "truncation_side must be left or right"));
        }
    };
    let keep: Option<i64> = fields.take(NAME, "-1 or a count of tokens")?;
    let truncate = keep.map(|keep| Truncate::of(keep, first)).transpose();
    truncate.map_err(|says| ApiError::invalid(Some(NAME), says))
}

fn sampling(fields: &mut Fields<'_>, logprobs: Option<u32>) -> Result<Sampling, ApiError> {
    let top_k = match fields.take::<i64>("top_k", "an integer: -1 or 0 for all tokens, or how many")? {
        None | Some(-1) => 0,
        Some(top_k) => u32::try_from(top_k).map_err(|_| {
            ApiError::invalid(Some("top_k"), format!("top_k must be -1, 0 or a count of tokens, not {top_k}"))
        })?,
    };
    Ok(Sampling {
        temperature: fields.take_f32("temperature", 1.0)?,
        top_k,
        top_p: fields.take_f32("top_p", 1.0)?,
        min_p: fields.take_f32("min_p", 0.0)?,
        repetition_penalty: fields.take_f32("repetition_penalty", 1.0)?,
        presence_penalty: fields.take_f32("presence_penalty", 0.0)?,
        frequency_penalty: fields.take_f32("frequency_penalty", 0.0)?,
        logit_bias: logit_bias(fields)?,
        seed: 0,
        logprobs,
    })
}

/// Takes a seed, under OpenAI's name or Mistral's.
fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, ApiError> {
    let mut take = |name| {
        let expected = "an integer of 64 bits";
        let Some(seed) = fields.take::<i128>(name, expected)? else { return Ok(None) };
        let seed = u64::try_from(seed).or_else(|_| i64::try_from(seed).map(i64::cast_unsigned));
        seed.map(Some).map_err(|_| ApiError::invalid(Some(name), format!("{name} must be {expected}")))
    };
    match (take("seed")?, take("random_seed")?) {
        (Some(seed), Some(random_seed)) if seed != random_seed => {
            let message = "seed and random_seed mean the same, and differ: leave one of them out";
            Err(ApiError::invalid(Some("random_seed"), message))
        }
        (seed, random_seed) => Ok(seed.or(random_seed)),
    }
}

/// Takes how many alternatives to show of the prompt's tokens, as vLLM or as Mistral says it.
fn prompt_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let top = alternatives(fields, "top_prompt_logprobs")?;
    match fields.take("prompt_logprobs", "true, false, or how many alternatives to show")? {
        Some(PromptLogprobs::Count(count)) => told("prompt_logprobs", count).map(Some),
        Some(PromptLogprobs::Wanted(true)) => Ok(Some(top.unwrap_or(0))),
        Some(PromptLogprobs::Wanted(false)) | None if top.unwrap_or(0) == 0 => Ok(None),
        Some(PromptLogprobs::Wanted(false)) | None => {
            let message = "top_prompt_logprobs needs prompt_logprobs to be true";
            Err(ApiError::invalid(Some("top_prompt_logprobs"), message))
        }
    }
}

fn logit_bias(fields: &mut Fields<'_>) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const EXPECTED: &str = "an object of token ids and numbers";
    let Some(given) = fields.take::<BTreeMap<String, f32>>("logit_bias", EXPECTED)? else {
        return Ok(Vec::new());
    };
    let wrong = |_| ApiError::invalid(Some("logit_bias"), format!("logit_bias must be {EXPECTED}"));
    let bias = given.into_iter().map(|(id, bias)| Ok((id.parse().map_err(wrong)?, bias)));
    let bias = bias.collect::<Result<BTreeMap<TokenId, f32>, ApiError>>()?; // "7" and "07" are one token
    Ok(bias.into_iter().collect())
}

/// Takes how many choices a client wants.
pub(in crate::http) fn count(
    fields: &mut Fields<'_>,
    name: &'static str,
    limits: &RequestLimits,
) -> Result<Option<u32>, ApiError> {
    let count = fields.take_u32(name)?;
    let max = limits.choices_max;
    if let Some(count) = count.filter(|count| !(1..=max).contains(count)) {
        let message = format!("{name} must be from 1 to {max}, not {count}");
        return Err(ApiError::invalid(Some(name), message));
    }
    Ok(count)
}

/// Takes how many alternatives a client wants to see of each token.
pub(in crate::http) fn alternatives(
    fields: &mut Fields<'_>,
    name: &'static str,
) -> Result<Option<u32>, ApiError> {
    let count: Option<i64> = fields.take(name, "an integer")?;
    count.map(|count| told(name, count)).transpose()
}

/// How many alternatives to tell; -1 is vLLM's word for the whole vocabulary, which it, too, refuses unless started
/// with a higher limit.
fn told(name: &'static str, count: i64) -> Result<u32, ApiError> {
    let asked = if count == -1 { "-1, which is all of the vocabulary".to_owned() } else { count.to_string() };
    u32::try_from(count).ok().filter(|count| *count <= TOP_LOGPROBS_MAX).ok_or_else(|| {
        ApiError::invalid(Some(name), format!("{name} must be from 0 to {TOP_LOGPROBS_MAX}, not {asked}"))
    })
}

/// Takes what the client wants to see.
pub(in crate::http) fn view(fields: &mut Fields<'_>, options: &Options) -> Result<View, ApiError> {
    let stream = fields.take_bool("stream")?;
    let stream_options: Option<StreamOptions> = fields.take("stream_options", "an object of truth values")?;
    if stream_options.is_some() && !stream {
        return Err(ApiError::invalid(Some("stream_options"), "stream_options needs stream to be true"));
    }
    if stream && options.prompt_logprobs.is_some() {
        let message = "prompt_logprobs cannot be streamed: leave one of prompt_logprobs and stream out";
        return Err(ApiError::invalid(Some("prompt_logprobs"), message));
    }
    let StreamOptions { include_usage, continuous_usage_stats } = stream_options.unwrap_or_default();
    let include_usage = include_usage.unwrap_or(false);
    Ok(View {
        stream,
        include_usage,
        continuous_usage: include_usage && continuous_usage_stats.unwrap_or(false),
        token_ids: fields.take_bool("return_token_ids")?,
        logprobs: options.sampling.logprobs.is_some(),
        tokens_as_ids: fields.take_bool("return_tokens_as_token_ids")?,
        prompt_logprobs: options.prompt_logprobs.is_some(),
    })
}

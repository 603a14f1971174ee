//! What a request must be to be accepted.

use galerne_types::limits::{STOP_TOKENS_MAX, TOP_LOGPROBS_MAX};
use galerne_types::{Refusal, Request, Sampling, TokenId};

use crate::scheduler::Limits;

/// Whether `request` can run within `limits`, whatever else runs. Texts name positions, never prompt tokens.
pub(crate) fn check(request: &Request, limits: &Limits) -> Result<(), Refusal> {
    check_prompt(request, limits)?;
    check_length(request)?;
    check_stop_tokens(&request.stop_tokens, limits.vocab)?;
    check_sampling(&request.sampling)
}

fn check_prompt(request: &Request, limits: &Limits) -> Result<(), Refusal> {
    let prompt_tokens = request.prompt.len();
    if prompt_tokens == 0 {
        return invalid("the prompt is empty: give at least one token".into());
    }
    if prompt_tokens >= limits.context_tokens_max as usize {
        let context_tokens_max = limits.context_tokens_max as usize;
        return Err(Refusal::TooLong { prompt_tokens, context_tokens_max });
    }
    if let Some(position) = request.prompt.iter().position(|&token| token >= limits.vocab) {
        let vocab = limits.vocab;
        return invalid(format!(
            "token {position} of the prompt is outside the vocabulary of {vocab} tokens"
        ));
    }
    Ok(())
}

fn check_length(request: &Request) -> Result<(), Refusal> {
    let Request { first_index, max_tokens, .. } = *request;
    if max_tokens == 0 {
        return invalid("max_tokens is 0: ask for at least one token".into());
    }
    if first_index >= max_tokens {
        return invalid(format!(
            "nothing is left to generate: first_index {first_index}, max_tokens {max_tokens}"
        ));
    }
    if first_index as usize >= request.prompt.len() {
        return invalid(format!(
            "a replay from index {first_index} carries a prompt and {first_index} tokens behind it"
        ));
    }
    Ok(())
}

fn check_stop_tokens(stop_tokens: &[TokenId], vocab: u32) -> Result<(), Refusal> {
    let count = stop_tokens.len();
    if count > STOP_TOKENS_MAX {
        return invalid(format!("{count} stop tokens are more than the {STOP_TOKENS_MAX} that are allowed"));
    }
    if let Some(token) = stop_tokens.iter().find(|&&token| token >= vocab) {
        return invalid(format!("stop token {token} is outside the vocabulary of {vocab} tokens"));
    }
    // Before min_tokens the stop tokens are banned, and something must be left to draw.
    if (0..vocab).all(|token| stop_tokens.contains(&token)) {
        return invalid("every token of the vocabulary is a stop token: leave one out".into());
    }
    Ok(())
}

fn check_sampling(sampling: &Sampling) -> Result<(), Refusal> {
    let &Sampling { temperature, top_p, logprobs, .. } = sampling;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return invalid(format!("temperature {temperature} is not a number from 0 upwards"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return invalid(format!("top_p {top_p} is not above 0 and at most 1"));
    }
    match logprobs {
        Some(count) if count > TOP_LOGPROBS_MAX => {
            invalid(format!("{count} logprobs are more than the {TOP_LOGPROBS_MAX} that are allowed"))
        }
        _ => Ok(()),
    }
}

fn invalid(why: String) -> Result<(), Refusal> {
    Err(Refusal::Invalid(why))
}

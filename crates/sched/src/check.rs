//! What a request must be to be accepted.

use galerne_types::limits::{LOGIT_BIAS_MAX, STOP_TOKENS_MAX, TOP_LOGPROBS_MAX};
use galerne_types::{Refusal, Request, Sampling, TokenId};

use crate::scheduler::Limits;

/// Whether `request` can run within `limits`, whatever else runs. Texts name positions, never prompt tokens.
pub(crate) fn check(request: &Request, limits: &Limits) -> Result<(), Refusal> {
    check_prompt(request, limits)?;
    check_length(request)?;
    check_stop_tokens(&request.stop_tokens, limits.vocab)?;
    check_prompt_logprobs(request)?;
    check_sampling(&request.sampling)?;
    check_bias(&request.sampling.logit_bias, limits.vocab)
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

fn check_prompt_logprobs(request: &Request) -> Result<(), Refusal> {
    match request.prompt_logprobs {
        Some(count) if count > TOP_LOGPROBS_MAX => {
            invalid(format!("{count} prompt logprobs are more than the {TOP_LOGPROBS_MAX} that are allowed"))
        }
        Some(_) if request.first_index > 0 => {
            invalid("a replay does not score its prompt again: leave out prompt_logprobs".into())
        }
        _ => Ok(()),
    }
}

fn check_sampling(sampling: &Sampling) -> Result<(), Refusal> {
    let &Sampling { temperature, top_k: _, top_p, min_p, repetition_penalty, seed: _, logprobs, .. } =
        sampling;
    let &Sampling { presence_penalty, frequency_penalty, logit_bias: _, .. } = sampling;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return invalid(format!("temperature {temperature} is not a number from 0 upwards"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return invalid(format!("top_p {top_p} is not above 0 and at most 1"));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return invalid(format!("min_p {min_p} is not from 0 to 1"));
    }
    if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
        return invalid(format!("repetition_penalty {repetition_penalty} is not a number above 0"));
    }
    for (name, penalty) in [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)]
    {
        if !(-2.0..=2.0).contains(&penalty) {
            return invalid(format!("{name} {penalty} is not from -2 to 2"));
        }
    }
    match logprobs {
        Some(count) if count > TOP_LOGPROBS_MAX => {
            invalid(format!("{count} logprobs are more than the {TOP_LOGPROBS_MAX} that are allowed"))
        }
        _ => Ok(()),
    }
}

fn check_bias(bias: &[(TokenId, f32)], vocab: u32) -> Result<(), Refusal> {
    let count = bias.len();
    if count > LOGIT_BIAS_MAX {
        return invalid(format!(
            "a logit bias of {count} tokens is more than the {LOGIT_BIAS_MAX} that are allowed"
        ));
    }
    if let Some((token, _)) = bias.iter().find(|&&(token, _)| token >= vocab) {
        return invalid(format!(
            "logit bias of token {token}, which is outside the vocabulary of {vocab} tokens"
        ));
    }
    if let Some((token, bias)) = bias.iter().find(|(_, bias)| !(-100.0..=100.0).contains(bias)) {
        return invalid(format!("the logit bias {bias} of token {token} is not from -100 to 100"));
    }
    let mut tokens: Vec<TokenId> = bias.iter().map(|&(token, _)| token).collect();
    tokens.sort_unstable();
    match tokens.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => invalid(format!("token {} has more than one logit bias: give one", pair[0])),
        None => Ok(()),
    }
}

fn invalid(why: String) -> Result<(), Refusal> {
    Err(Refusal::Invalid(why))
}

//! Conversions between messages and types.

use galerne_types as types;
use galerne_types::limits::{
    LOGIT_BIAS_MAX, STEP_TRACES_MAX, STOP_TOKENS_MAX, TOP_LOGPROBS_MAX, TRACEPARENT_BYTES,
};

use crate::v1;

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be set is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value is outside its range.
    #[error("{field} must be {expected}, not {found}")]
    Range {
        /// Which field.
        field: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
}

fn in_range(
    ok: bool,
    field: &'static str,
    expected: impl Into<String>,
    found: &dyn ToString,
) -> Result<(), WireError> {
    if ok {
        Ok(())
    } else {
        Err(WireError::Range { field, expected: expected.into(), found: found.to_string() })
    }
}

/// Checks a sampling's ranges; used for every request, whichever door it came through.
pub fn check_sampling(sampling: &types::Sampling) -> Result<(), WireError> {
    let types::Sampling {
        temperature,
        top_k: _,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed: _,
        logprobs,
    } = sampling;
    in_range(
        temperature.is_finite() && *temperature >= 0.0,
        "temperature",
        "a finite number of at least 0",
        temperature,
    )?;
    in_range(*top_p > 0.0 && *top_p <= 1.0, "top_p", "greater than 0 and at most 1", top_p)?;
    in_range((0.0..=1.0).contains(min_p), "min_p", "from 0 to 1", min_p)?;
    in_range(
        repetition_penalty.is_finite() && *repetition_penalty > 0.0,
        "repetition_penalty",
        "a finite number above 0",
        repetition_penalty,
    )?;
    in_range((-2.0..=2.0).contains(presence_penalty), "presence_penalty", "from -2 to 2", presence_penalty)?;
    in_range(
        (-2.0..=2.0).contains(frequency_penalty),
        "frequency_penalty",
        "from -2 to 2",
        frequency_penalty,
    )?;
    let entries = logit_bias.len();
    in_range(entries <= LOGIT_BIAS_MAX, "logit_bias", format!("at most {LOGIT_BIAS_MAX} tokens"), &entries)?;
    for (_, bias) in logit_bias {
        in_range((-100.0..=100.0).contains(bias), "logit_bias", "from -100 to 100", bias)?;
    }
    let count = logprobs.unwrap_or(0);
    in_range(count <= TOP_LOGPROBS_MAX, "logprobs", format!("at most {TOP_LOGPROBS_MAX}"), &count)
}

impl From<&types::Sampling> for v1::Sampling {
    fn from(sampling: &types::Sampling) -> Self {
        let types::Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            ref logit_bias,
            seed,
            logprobs,
        } = *sampling;
        Self {
            temperature: Some(temperature),
            top_k,
            top_p: Some(top_p),
            seed: Some(seed),
            logprobs,
            min_p,
            repetition_penalty: Some(repetition_penalty),
            presence_penalty,
            frequency_penalty,
            logit_bias: logit_bias.iter().map(|&(id, bias)| v1::LogitBias { id, bias }).collect(),
        }
    }
}

impl TryFrom<v1::Sampling> for types::Sampling {
    type Error = WireError;

    fn try_from(sampling: v1::Sampling) -> Result<Self, WireError> {
        let v1::Sampling {
            temperature,
            top_k,
            top_p,
            seed,
            logprobs,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logit_bias,
        } = sampling;
        let sampling = Self {
            temperature: temperature.unwrap_or(0.0),
            top_k,
            top_p: top_p.unwrap_or(1.0),
            min_p,
            repetition_penalty: repetition_penalty.unwrap_or(1.0),
            presence_penalty,
            frequency_penalty,
            logit_bias: logit_bias.iter().map(|entry| (entry.id, entry.bias)).collect(),
            seed: seed.ok_or(WireError::Missing("sampling.seed"))?,
            logprobs,
        };
        check_sampling(&sampling)?;
        Ok(sampling)
    }
}

impl From<types::TokenOut> for v1::Token {
    fn from(token: types::TokenOut) -> Self {
        let top = token.top.iter().map(|top| v1::TopToken { id: top.id, logprob: top.logprob }).collect();
        Self { id: token.id, logprob: token.logprob, top, rank: token.rank }
    }
}

impl From<v1::Token> for types::TokenOut {
    fn from(token: v1::Token) -> Self {
        let top = token.top.iter().map(|top| types::TopToken { id: top.id, logprob: top.logprob }).collect();
        Self { id: token.id, logprob: token.logprob, rank: token.rank, top }
    }
}

impl From<types::FinishReason> for v1::FinishReason {
    fn from(reason: types::FinishReason) -> Self {
        match reason {
            types::FinishReason::Stop => Self::Stop,
            types::FinishReason::Length => Self::Length,
            types::FinishReason::Cancelled => Self::Cancelled,
            types::FinishReason::Error => Self::Error,
        }
    }
}

impl v1::FinishReason {
    /// The reason, or `None` when the stream goes on.
    pub fn into_type(self) -> Option<types::FinishReason> {
        match self {
            Self::Unspecified => None,
            Self::Stop => Some(types::FinishReason::Stop),
            Self::Length => Some(types::FinishReason::Length),
            Self::Cancelled => Some(types::FinishReason::Cancelled),
            Self::Error => Some(types::FinishReason::Error),
        }
    }
}

/// What a client calls a request, by a digest.
pub type RepeatKey = [u8; 32];

impl v1::RunRequest {
    /// The message that asks for `request`. The stream that carries it gives it its id there; the leader
    /// knows it under one of its own.
    pub fn new(request: &types::Request) -> Self {
        let types::Request {
            id: _,
            tenant,
            prompt,
            first_index,
            sampling,
            max_tokens,
            min_tokens,
            stop_tokens,
            prompt_logprobs,
            grammar,
            cache_salt,
            priority,
            trace: _, // the caller names its own span
        } = request;
        Self {
            id: 0,
            prompt: prompt.clone(),
            first_index: *first_index,
            sampling: Some(sampling.into()),
            max_tokens: *max_tokens,
            min_tokens: *min_tokens,
            stop_tokens: stop_tokens.clone(),
            tenant: tenant.0,
            prompt_logprobs: *prompt_logprobs,
            grammar: grammar.as_ref().map(v1::Grammar::from),
            traceparent: String::new(),
            cache_salt: *cache_salt,
            priority: *priority,
            accepted: false, // whoever sends it knows that and its client's name
            repeat_key: Vec::new(),
        }
    }

    /// What its client calls it.
    pub fn key(&self) -> Result<Option<RepeatKey>, WireError> {
        let (bytes, key) = (self.repeat_key.len(), RepeatKey::try_from(&*self.repeat_key).ok());
        in_range(bytes == 0 || key.is_some(), "repeat_key", "of 32 bytes, or empty", &bytes)?;
        Ok(key)
    }

    /// The request, under the leader's `id`.
    pub fn into_request(self, id: types::RequestId) -> Result<types::Request, WireError> {
        in_range(!self.prompt.is_empty(), "prompt", "at least one token", &"empty")?;
        in_range(
            self.max_tokens > self.first_index,
            "max_tokens",
            format!("greater than first_index {}", self.first_index),
            &self.max_tokens,
        )?;
        let stops = self.stop_tokens.len();
        in_range(stops <= STOP_TOKENS_MAX, "stop_tokens", format!("at most {STOP_TOKENS_MAX}"), &stops)?;
        Ok(types::Request {
            id,
            tenant: types::TenantId(self.tenant),
            prompt: self.prompt,
            first_index: self.first_index,
            sampling: self.sampling.ok_or(WireError::Missing("sampling"))?.try_into()?,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_tokens: self.stop_tokens,
            prompt_logprobs: self.prompt_logprobs,
            grammar: self.grammar.map(types::Grammar::try_from).transpose()?,
            cache_salt: self.cache_salt,
            priority: self.priority,
            trace: None,
        })
    }
}

impl From<&types::Grammar> for v1::Grammar {
    fn from(grammar: &types::Grammar) -> Self {
        use v1::grammar::Grammar;
        Self {
            grammar: Some(match grammar {
                types::Grammar::JsonObject => Grammar::JsonObject(true),
                types::Grammar::JsonSchema(schema) => Grammar::JsonSchema(schema.clone()),
                types::Grammar::Regex(regex) => Grammar::Regex(regex.clone()),
                types::Grammar::Choice(texts) => Grammar::Choice(v1::Choices { texts: texts.clone() }),
                types::Grammar::Lark(rules) => Grammar::Lark(rules.clone()),
            }),
        }
    }
}

impl TryFrom<v1::Grammar> for types::Grammar {
    type Error = WireError;

    fn try_from(grammar: v1::Grammar) -> Result<Self, WireError> {
        use v1::grammar::Grammar;
        Ok(match grammar.grammar.ok_or(WireError::Missing("grammar"))? {
            Grammar::JsonObject(_) => Self::JsonObject,
            Grammar::JsonSchema(schema) => Self::JsonSchema(schema),
            Grammar::Regex(regex) => Self::Regex(regex),
            Grammar::Choice(choices) => Self::Choice(choices.texts),
            Grammar::Lark(rules) => Self::Lark(rules),
        })
    }
}

impl From<&types::Step> for v1::Step {
    fn from(step: &types::Step) -> Self {
        let types::Step { epoch, number, slices, traces } = step;
        Self {
            epoch: epoch.0,
            number: *number,
            slices: slices.iter().map(v1::Slice::from).collect(),
            traceparents: traces.clone(),
        }
    }
}

impl TryFrom<v1::Step> for types::Step {
    type Error = WireError;

    fn try_from(step: v1::Step) -> Result<Self, WireError> {
        let v1::Step { epoch, number, slices, traceparents: traces } = step;
        let (count, most) = (traces.len(), format!("at most {STEP_TRACES_MAX}"));
        in_range(count <= STEP_TRACES_MAX, "traceparents", most, &count)?;
        let longest = traces.iter().map(String::len).max().unwrap_or(0);
        let bytes = format!("at most {TRACEPARENT_BYTES} bytes each");
        in_range(longest <= TRACEPARENT_BYTES, "traceparents", bytes, &longest)?;
        let slices = slices.into_iter().map(types::Slice::try_from).collect::<Result<_, _>>()?;
        Ok(Self { epoch: types::Epoch(epoch), number, slices, traces })
    }
}

impl From<&types::Slice> for v1::Slice {
    fn from(slice: &types::Slice) -> Self {
        let types::Slice { slot, start, input, first_block, blocks, draw, score } = slice;
        let tokens = match input {
            types::Input::Tokens(tokens) => tokens.clone(),
            types::Input::Last => Vec::new(),
        };
        let draw = draw.as_ref().map(|draw| v1::Draw {
            sampling: Some((&draw.sampling).into()),
            index: draw.index,
            banned: draw.banned.clone(),
            history: draw.history.as_ref().map(|types::History { prompt, answer }| v1::History {
                prompt: prompt.clone(),
                answer: answer.clone(),
            }),
            grammar: draw.grammar.map(|request| request.0),
            draft: draw.draft.clone(),
        });
        let score = score
            .as_ref()
            .map(|types::Score { top, targets }| v1::Score { top: *top, targets: targets.clone() });
        let (slot, start, first_block) = (*slot, *start, *first_block);
        Self { slot, start, tokens, first_block, blocks: blocks.clone(), draw, score }
    }
}

impl TryFrom<v1::Slice> for types::Slice {
    type Error = WireError;

    fn try_from(slice: v1::Slice) -> Result<Self, WireError> {
        let v1::Slice { slot, start, tokens, first_block, blocks, draw, score } = slice;
        let input = if tokens.is_empty() { types::Input::Last } else { types::Input::Tokens(tokens) };
        let draw = draw.map(|v1::Draw { sampling, index, banned, history, grammar, draft }| {
            let sampling = sampling.ok_or(WireError::Missing("draw.sampling"))?.try_into()?;
            let history = history.map(|v1::History { prompt, answer }| types::History { prompt, answer });
            let grammar = grammar.map(types::RequestId);
            Ok(types::Draw { sampling, index, banned, history, grammar, draft })
        });
        let score = score.map(|v1::Score { top, targets }| types::Score { top, targets });
        Ok(Self { slot, start, input, first_block, blocks, draw: draw.transpose()?, score })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling() -> impl Strategy<Value = types::Sampling> {
        let filters = (0.0f32..5.0, 0u32..100, 0.01f32..=1.0, 0.0f32..=1.0);
        let penalties = (0.1f32..3.0, -2.0f32..=2.0, -2.0f32..=2.0);
        let bias = proptest::collection::vec((any::<u32>(), -100.0f32..=100.0), 0..3);
        (filters, penalties, bias, any::<u64>(), proptest::option::of(0..=TOP_LOGPROBS_MAX)).prop_map(
            |(
                (temperature, top_k, top_p, min_p),
                (repetition, presence, frequency),
                logit_bias,
                seed,
                logprobs,
            )| {
                types::Sampling {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty: repetition,
                    presence_penalty: presence,
                    frequency_penalty: frequency,
                    logit_bias,
                    seed,
                    logprobs,
                }
            },
        )
    }

    fn slice() -> impl Strategy<Value = types::Slice> {
        let ids = || proptest::collection::vec(any::<u32>(), 1..5);
        let input = prop_oneof![Just(types::Input::Last), ids().prop_map(types::Input::Tokens)];
        let history = proptest::option::of((ids(), ids()));
        let (grammar, draft) = (proptest::option::of(any::<u64>()), ids());
        let draw = (sampling(), any::<u32>(), ids(), history, grammar, draft).prop_map(
            |(sampling, index, banned, history, grammar, draft)| types::Draw {
                draft,
                banned,
                history: history.map(|(prompt, answer)| types::History { prompt, answer }),
                grammar: grammar.map(types::RequestId),
                ..types::Draw::new(sampling, index)
            },
        );
        let score = proptest::option::of((0..=TOP_LOGPROBS_MAX, ids()));
        let blocks = (any::<u32>(), ids());
        (any::<u32>(), any::<u32>(), input, blocks, proptest::option::of(draw), score).prop_map(
            |(slot, start, input, (first_block, blocks), draw, score)| {
                let score = score.map(|(top, targets)| types::Score { top, targets });
                types::Slice { slot, start, input, first_block, blocks, draw, score }
            },
        )
    }

    proptest! {
        #[test]
        fn a_step_survives_the_wire(epoch: u64, number: u64, slices in proptest::collection::vec(slice(), 0..4), traces in proptest::collection::vec("[0-9a-f-]{55}", 0..3)) {
            let step = types::Step { epoch: types::Epoch(epoch), number, slices, traces };
            prop_assert_eq!(types::Step::try_from(v1::Step::from(&step)), Ok(step));
        }

        #[test]
        fn a_request_survives_the_wire(sampling in sampling(), first_index in 0u32..100, prompt in proptest::collection::vec(any::<u32>(), 1..9)) {
            let request = types::Request {
                id: types::RequestId(7), tenant: types::TenantId(9), prompt, first_index, sampling,
                max_tokens: first_index + 5, min_tokens: 2, stop_tokens: vec![1, 2],
                prompt_logprobs: Some(3), grammar: Some(types::Grammar::Choice(vec!["a".into(), "b".into()])),
                cache_salt: Some(1 << 63), priority: -3, trace: None,
            };
            let wire = v1::RunRequest::new(&request);
            prop_assert_eq!(wire.into_request(types::RequestId(7)), Ok(request));
        }
    }

    #[test]
    fn wrong_values_are_named() {
        let good = types::Sampling::greedy();
        for (bad, says) in [
            (types::Sampling { temperature: -1.0, ..good.clone() }, "temperature must be"),
            (types::Sampling { temperature: f32::NAN, ..good.clone() }, "temperature must be"),
            (types::Sampling { top_p: 0.0, ..good.clone() }, "top_p must be"),
            (types::Sampling { logprobs: Some(21), ..good }, "logprobs must be at most 20, not 21"),
        ] {
            let error = check_sampling(&bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let empty = v1::RunRequest { max_tokens: 1, ..Default::default() };
        assert_eq!(
            empty.into_request(types::RequestId(0)).unwrap_err().to_string(),
            "prompt must be at least one token, not empty"
        );
    }
}

//! Conversions between messages and types.

use galerne_types as types;
use galerne_types::limits::{STOP_TOKENS_MAX, TOP_LOGPROBS_MAX};

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
    let types::Sampling { temperature, top_k: _, top_p, seed: _, logprobs } = sampling;
    in_range(
        temperature.is_finite() && *temperature >= 0.0,
        "temperature",
        "a finite number of at least 0",
        temperature,
    )?;
    in_range(*top_p > 0.0 && *top_p <= 1.0, "top_p", "greater than 0 and at most 1", top_p)?;
    let count = logprobs.unwrap_or(0);
    in_range(count <= TOP_LOGPROBS_MAX, "logprobs", format!("at most {TOP_LOGPROBS_MAX}"), &count)
}

impl From<&types::Sampling> for v1::Sampling {
    fn from(sampling: &types::Sampling) -> Self {
        let types::Sampling { temperature, top_k, top_p, seed, logprobs } = *sampling;
        Self { temperature: Some(temperature), top_k, top_p: Some(top_p), seed: Some(seed), logprobs }
    }
}

impl TryFrom<v1::Sampling> for types::Sampling {
    type Error = WireError;

    fn try_from(sampling: v1::Sampling) -> Result<Self, WireError> {
        let v1::Sampling { temperature, top_k, top_p, seed, logprobs } = sampling;
        let sampling = Self {
            temperature: temperature.unwrap_or(0.0),
            top_k,
            top_p: top_p.unwrap_or(1.0),
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
        Self { id: token.id, logprob: token.logprob, top }
    }
}

impl From<v1::Token> for types::TokenOut {
    fn from(token: v1::Token) -> Self {
        let top = token.top.iter().map(|top| types::TopToken { id: top.id, logprob: top.logprob }).collect();
        Self { id: token.id, logprob: token.logprob, top }
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

impl v1::RunRequest {
    /// The message that asks the leader of `epoch` for `request`; the leader gives it an id of its own.
    pub fn new(epoch: types::Epoch, request: &types::Request) -> Self {
        let types::Request { id: _, prompt, first_index, sampling, max_tokens, min_tokens, stop_tokens } =
            request;
        Self {
            epoch: epoch.0,
            prompt: prompt.clone(),
            first_index: *first_index,
            sampling: Some(sampling.into()),
            max_tokens: *max_tokens,
            min_tokens: *min_tokens,
            stop_tokens: stop_tokens.clone(),
        }
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
            prompt: self.prompt,
            first_index: self.first_index,
            sampling: self.sampling.ok_or(WireError::Missing("sampling"))?.try_into()?,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_tokens: self.stop_tokens,
        })
    }
}

impl From<&types::Step> for v1::Step {
    fn from(step: &types::Step) -> Self {
        let types::Step { epoch, number, slices } = step;
        Self { epoch: epoch.0, number: *number, slices: slices.iter().map(v1::Slice::from).collect() }
    }
}

impl TryFrom<v1::Step> for types::Step {
    type Error = WireError;

    fn try_from(step: v1::Step) -> Result<Self, WireError> {
        let v1::Step { epoch, number, slices } = step;
        let slices = slices.into_iter().map(types::Slice::try_from).collect::<Result<_, _>>()?;
        Ok(Self { epoch: types::Epoch(epoch), number, slices })
    }
}

impl From<&types::Slice> for v1::Slice {
    fn from(slice: &types::Slice) -> Self {
        let types::Slice { slot, start, input, blocks, draw } = slice;
        let tokens = match input {
            types::Input::Tokens(tokens) => tokens.clone(),
            types::Input::Last => Vec::new(),
        };
        let draw = draw.as_ref().map(|draw| v1::Draw {
            sampling: Some((&draw.sampling).into()),
            index: draw.index,
            banned: draw.banned.clone(),
        });
        Self { slot: *slot, start: *start, tokens, blocks: blocks.clone(), draw }
    }
}

impl TryFrom<v1::Slice> for types::Slice {
    type Error = WireError;

    fn try_from(slice: v1::Slice) -> Result<Self, WireError> {
        let v1::Slice { slot, start, tokens, blocks, draw } = slice;
        let input = if tokens.is_empty() { types::Input::Last } else { types::Input::Tokens(tokens) };
        let draw = draw.map(|v1::Draw { sampling, index, banned }| {
            let sampling = sampling.ok_or(WireError::Missing("draw.sampling"))?.try_into()?;
            Ok(types::Draw { sampling, index, banned })
        });
        Ok(Self { slot, start, input, blocks, draw: draw.transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling() -> impl Strategy<Value = types::Sampling> {
        (0.0f32..5.0, 0u32..100, 0.01f32..=1.0, any::<u64>(), proptest::option::of(0..=TOP_LOGPROBS_MAX))
            .prop_map(|(temperature, top_k, top_p, seed, logprobs)| types::Sampling {
                temperature,
                top_k,
                top_p,
                seed,
                logprobs,
            })
    }

    fn slice() -> impl Strategy<Value = types::Slice> {
        let ids = || proptest::collection::vec(any::<u32>(), 1..5);
        let input = prop_oneof![Just(types::Input::Last), ids().prop_map(types::Input::Tokens)];
        let draw = (sampling(), any::<u32>(), ids()).prop_map(|(sampling, index, banned)| types::Draw {
            sampling,
            index,
            banned,
        });
        (any::<u32>(), any::<u32>(), input, ids(), proptest::option::of(draw))
            .prop_map(|(slot, start, input, blocks, draw)| types::Slice { slot, start, input, blocks, draw })
    }

    proptest! {
        #[test]
        fn a_step_survives_the_wire(epoch: u64, number: u64, slices in proptest::collection::vec(slice(), 0..4)) {
            let step = types::Step { epoch: types::Epoch(epoch), number, slices };
            prop_assert_eq!(types::Step::try_from(v1::Step::from(&step)), Ok(step));
        }

        #[test]
        fn a_request_survives_the_wire(sampling in sampling(), first_index in 0u32..100, prompt in proptest::collection::vec(any::<u32>(), 1..9)) {
            let request = types::Request {
                id: types::RequestId(7), prompt, first_index, sampling,
                max_tokens: first_index + 5, min_tokens: 2, stop_tokens: vec![1, 2],
            };
            let wire = v1::RunRequest::new(types::Epoch(3), &request);
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

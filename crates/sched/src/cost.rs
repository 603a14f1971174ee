//! How long a step takes, by a simple law: for rehearsals, which run no model.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use galerne_types::{Slice, Step};

/// What the parts of a step take, in nanoseconds. The law is that of a memory-bound pass with work on top: weights are
/// read once a step, every token costs its products, every key that a token attends to its share of attention, and
/// every position whose logits are wanted its share of the head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Any step.
    pub step_ns: u64,
    /// Each token.
    pub token_ns: u64,
    /// Each key that a token attends to.
    pub key_ns: u64,
    /// Each position that is drawn from or scored.
    pub logits_ns: u64,
    /// Keys that a token sees at most: the sliding window.
    pub window_tokens: Option<u32>,
}

/// What is wrong with the text of a law.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no part of a law: give some of step_ns=, token_ns=, key_ns=, logits_ns=, window=, with commas between"
)]
pub struct CostError(String);

/// `step_ns=5000000,token_ns=20000`: what is not named is 0, and no window.
impl FromStr for Cost {
    type Err = CostError;

    fn from_str(text: &str) -> Result<Self, CostError> {
        let mut cost = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let wrong = || CostError(part.to_owned());
            let (name, value) = part.split_once('=').ok_or_else(wrong)?;
            let value: u64 = value.parse().map_err(|_| wrong())?;
            match name {
                "step_ns" => cost.step_ns = value,
                "token_ns" => cost.token_ns = value,
                "key_ns" => cost.key_ns = value,
                "logits_ns" => cost.logits_ns = value,
                "window" => cost.window_tokens = Some(u32::try_from(value).map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        Ok(cost)
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step_ns, token_ns, key_ns, logits_ns, window_tokens } = self;
        write!(f, "step_ns={step_ns},token_ns={token_ns},key_ns={key_ns},logits_ns={logits_ns}")?;
        window_tokens.map_or(Ok(()), |tokens| write!(f, ",window={tokens}"))
    }
}

impl Cost {
    /// How long `step` takes; never longer than some 500 years.
    pub fn predict(&self, step: &Step) -> Duration {
        let of_slice = |slice: &Slice| {
            let tokens = slice.tokens() as u64;
            let scored = slice.score.as_ref().map_or(0, |score| score.targets.len() as u64);
            let drawn = slice.draw.as_ref().map_or(0, |draw| 1 + draw.draft.len() as u64);
            let logits = drawn + scored;
            [
                tokens.saturating_mul(self.token_ns),
                self.keys(slice.start.into(), tokens).saturating_mul(self.key_ns),
                logits.saturating_mul(self.logits_ns),
            ]
        };
        let parts = step.slices.iter().flat_map(of_slice);
        Duration::from_nanos(parts.fold(self.step_ns, u64::saturating_add))
    }

    /// Keys that the tokens of a step see, together.
    pub(crate) fn step_keys(&self, step: &Step) -> u64 {
        let keys = step.slices.iter().map(|slice| self.keys(slice.start.into(), slice.tokens() as u64));
        keys.fold(0, u64::saturating_add)
    }

    /// Keys that `tokens` tokens from position `start` on see, each itself and those before it, together.
    fn keys(&self, start: u64, tokens: u64) -> u64 {
        let window = self.window_tokens.map_or(u64::MAX, u64::from);
        let end = start.saturating_add(tokens);
        let growing = end.min(window).saturating_sub(start); // tokens that see everything before them
        let all = growing.saturating_mul(start).saturating_add(growing.saturating_mul(growing + 1) / 2);
        all.saturating_add((tokens - growing).saturating_mul(window))
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::{Draw, Epoch, Input, Sampling, Score};

    use super::*;

    fn slice(start: u32, tokens: usize) -> Slice {
        let input = Input::Tokens(vec![1; tokens]);
        Slice { slot: 0, start, input, first_block: 0, blocks: Vec::new(), draw: None, score: None }
    }

    #[test]
    fn every_part_counts() {
        let cost =
            Cost { step_ns: 1_000_000, token_ns: 1000, key_ns: 1, logits_ns: 50_000, window_tokens: None };
        let draw = Some(Draw::new(Sampling::greedy(), 0));
        let score = Some(Score { top: 0, targets: vec![1, 1] });
        let slices = vec![slice(10, 3), Slice { draw, score, ..slice(0, 2) }];
        let step = Step { epoch: Epoch(1), number: 1, slices, traces: Vec::new() };
        let keys = 11 + 12 + 13 + 1 + 2;
        assert_eq!(cost.step_keys(&step), keys);
        assert_eq!(cost.predict(&step), Duration::from_nanos(1_000_000 + 5 * 1000 + keys + 3 * 50_000));
    }

    #[test]
    fn a_law_survives_its_text() {
        for window_tokens in [None, Some(64)] {
            let cost = Cost { step_ns: 1, token_ns: 2, key_ns: 3, logits_ns: 4, window_tokens };
            assert_eq!(cost.to_string().parse(), Ok(cost));
        }
        assert_eq!("step_ns=5".parse(), Ok(Cost { step_ns: 5, ..Cost::default() }));
        for wrong in ["step_ns", "step_ns=x", "steps=1", "step_ns=-1", "window=9999999999"] {
            assert!(wrong.parse::<Cost>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_are_those_of_a_plain_count() {
        for window_tokens in [None, Some(1), Some(7), Some(40)] {
            let cost = Cost { window_tokens, ..Cost::default() };
            for (start, tokens) in (0..50).flat_map(|start| (0..60).map(move |tokens| (start, tokens))) {
                let sees = |position: u64| (position + 1).min(window_tokens.map_or(u64::MAX, u64::from));
                let expected: u64 = (start..start + tokens).map(sees).sum();
                assert_eq!(cost.keys(start, tokens), expected, "{window_tokens:?}, {tokens} from {start}");
            }
        }
        assert_eq!(Cost::default().keys(u64::MAX, 3), u64::MAX);
    }
}

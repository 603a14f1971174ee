//! How many tokens of prompts a step may hold, so that the answers under way keep their pace.

use std::time::Duration;

use galerne_types::{Input, Step};

/// Tokens of prompts that a step may hold even where the target leaves room for none: they go on, if slowly.
const PROMPT_TOKENS_MIN: u32 = 8;

/// Tokens of prompts in the steps from which their cost is learned.
const PROMPT_TOKENS_FIRST: u32 = 32;

/// A step that takes longer than was believed counts by this part, one that takes less by the other: what is believed too
/// soon to be quick is felt by every answer.
const SLOWER_PART: u64 = 2;
const QUICKER_PART: u64 = 8;

/// What steps take, as they are measured: so much with answers alone, and more for each token of a prompt beside them. The
/// line need not be true everywhere: it is drawn through the steps that were run last, and those to come resemble them.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    answers_ns: u64,
    prompt_token_ns: u64,
}

impl Pace {
    /// A step has taken so long.
    pub(crate) fn learn(&mut self, step: &Step, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let prompts = step.slices.iter().filter(|slice| slice.input != Input::Last);
        let prompt_tokens: u64 = prompts.map(|slice| slice.tokens() as u64).sum();
        let answers = step.slices.iter().any(|slice| slice.input == Input::Last);
        if prompt_tokens == 0 {
            self.answers_ns = follow(self.answers_ns, took_ns);
        } else if answers || self.prompt_token_ns == 0 {
            self.answers_ns = self.answers_ns.min(took_ns);
            let each_ns = (took_ns - self.answers_ns) / prompt_tokens;
            self.prompt_token_ns = follow(self.prompt_token_ns, each_ns.max(1));
        }
    }

    /// Tokens of prompts for which a step with answers has room if it may take so long.
    pub(crate) fn prompt_tokens(&self, target: Duration) -> u32 {
        if self.prompt_token_ns == 0 {
            return PROMPT_TOKENS_FIRST;
        }
        let target_ns = u64::try_from(target.as_nanos()).unwrap_or(u64::MAX);
        let tokens = target_ns.saturating_sub(self.answers_ns) / self.prompt_token_ns;
        u32::try_from(tokens).unwrap_or(u32::MAX).max(PROMPT_TOKENS_MIN)
    }
}

/// What is believed after a measurement.
fn follow(believed: u64, measured: u64) -> u64 {
    match believed {
        0 => measured,
        _ if measured > believed => believed + (measured - believed) / SLOWER_PART,
        _ => believed - (believed - measured) / QUICKER_PART,
    }
}

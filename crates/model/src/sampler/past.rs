//! The tokens before a draw, as penalties see them.

use std::collections::BTreeMap;

use galerne_types::{History, Sampling, TokenId};

use super::clean;

/// Which tokens stand in a sequence's prompt, and how often each stands in its answer so far.
#[derive(Clone, Debug, Default)]
pub struct Past {
    seen: BTreeMap<TokenId, Seen>,
}

/// A token that stands in the sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Times in the answer; 0 where it stands in the prompt only.
    in_answer: u32,
}

impl Past {
    /// What a request's first draw is told.
    pub fn new(history: &History) -> Self {
        let mut past = Self::default();
        for &token in &history.prompt {
            past.seen.entry(token).or_default();
        }
        history.answer.iter().for_each(|&token| past.push(token));
        past
    }

    /// Adds a token to the answer.
    pub fn push(&mut self, token: TokenId) {
        let seen = self.seen.entry(token).or_default();
        seen.in_answer = seen.in_answer.saturating_add(1);
    }

    /// The tokens that stand in the sequence, by id, and how often each stands in the answer.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = (TokenId, u32)> {
        self.seen.iter().map(|(&token, seen)| (token, seen.in_answer))
    }

    /// Repetition penalty, then frequency, then presence. A score that is a number or -∞ stays one.
    pub(super) fn penalize(&self, scores: &mut [f32], sampling: &Sampling) {
        let &Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = sampling;
        for (&token, seen) in &self.seen {
            let Some(score) = scores.get_mut(token as usize) else { continue };
            if *score > 0.0 {
                *score /= repetition_penalty;
            } else {
                *score *= repetition_penalty;
            }
            if seen.in_answer > 0 {
                *score -= frequency_penalty * seen.in_answer as f32;
                *score -= presence_penalty;
            }
            *score = clean(*score);
        }
    }
}

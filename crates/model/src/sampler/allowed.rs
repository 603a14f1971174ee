//! Which tokens may be drawn.

use std::sync::Arc;

use galerne_types::TokenId;

/// Bit i % 32 of word i / 32 is set where token i may be drawn; tokens beyond the last word may not.
pub type Mask = Arc<[u32]>;

/// The tokens that a draw may choose from: never none.
pub(crate) struct Allowed<'a> {
    vocab: usize,
    banned: &'a [TokenId],
    mask: Option<&'a [u32]>,
}

impl<'a> Allowed<'a> {
    /// The first of these sets that is not empty: the mask without the banned tokens, the mask, the vocabulary without
    /// the banned tokens, the vocabulary.
    pub(crate) fn new(vocab: usize, banned: &'a [TokenId], mask: Option<&'a [u32]>) -> Self {
        let candidates = [
            Self { vocab, banned, mask },
            Self { vocab, banned: &[], mask },
            Self { vocab, banned, mask: None },
        ];
        let possible = candidates.into_iter().find(|allowed| allowed.first().is_some());
        possible.unwrap_or(Self { vocab, banned: &[], mask: None })
    }

    pub(crate) fn contains(&self, id: TokenId) -> bool {
        self.masked_in(id) && !self.banned.contains(&id)
    }

    pub(crate) fn lowest(&self) -> TokenId {
        self.first().unwrap_or_default()
    }

    fn first(&self) -> Option<TokenId> {
        (0..self.vocab as TokenId).find(|&id| self.contains(id))
    }

    fn masked_in(&self, id: TokenId) -> bool {
        let word = |mask: &[u32]| mask.get(id as usize / 32).copied().unwrap_or_default();
        self.mask.is_none_or(|mask| word(mask) >> (id % 32) & 1 == 1)
    }

    /// Gives all other tokens a score that is never drawn.
    pub(super) fn exclude_others(&self, scores: &mut [f32]) {
        if let Some(mask) = self.mask {
            let words = mask.iter().copied().chain(std::iter::repeat(0));
            for (scores, word) in scores.chunks_mut(32).zip(words) {
                for (bit, score) in scores.iter_mut().enumerate() {
                    *score = if word >> bit & 1 == 1 { *score } else { f32::NEG_INFINITY };
                }
            }
        }
        for &id in self.banned {
            if let Some(score) = scores.get_mut(id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

use std::sync::Arc;

use llguidance::Matcher;

use crate::error::{GrammarError, sentence};
use crate::vocabulary::Tokens;

/// One answer's place in its grammar.
pub struct Constraint {
    /// The mask of this place, once it is worked out.
    mask: Option<Arc<[u32]>>,
    matcher: Matcher,
    tokens: Arc<Tokens>,
    /// Memory for the compiled grammar.
    bytes: usize,
    /// An end token was drawn: whatever is asked or told afterwards changes nothing.
    ended: bool,
}

impl Constraint {
    pub(crate) fn new(matcher: Matcher, tokens: Arc<Tokens>) -> Self {
        Self { mask: None, matcher, tokens, bytes: 0, ended: false }
    }

    pub(crate) fn measured(&mut self, bytes: usize) {
        self.bytes = bytes;
    }

    /// Memory for the compiled grammar when it was compiled, in bytes: an estimate.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Another answer under the same grammar, which is where this one is. They share nothing that one of them could
    /// use up.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            mask: self.mask.clone(),
            matcher: self.matcher.deep_clone(),
            tokens: Arc::clone(&self.tokens),
            bytes: self.bytes,
            ended: self.ended,
        }
    }

    /// The tokens that may be drawn now: bit `i % 32` of word `i / 32` stands for token i. Never all zero. When the
    /// text is whole and nothing can follow, and after the end, it holds the end tokens alone.
    ///
    /// # Errors
    /// [`GrammarError::Failed`] if the limits of a step are exceeded, or no token of the vocabulary can go on; it
    /// stays in that state.
    pub fn mask(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        if let Some(mask) = &self.mask {
            return Ok(Arc::clone(mask));
        }
        let mask = if self.ended || self.matcher.is_stopped() && !self.matcher.is_error() {
            Arc::clone(&self.tokens.end_mask)
        } else {
            let set = self.matcher.compute_mask().map_err(|error| failed(&error))?;
            let words = self.tokens.end_mask.len();
            set.as_slice().iter().copied().chain(std::iter::repeat(0)).take(words).collect()
        };
        self.mask = Some(Arc::clone(&mask));
        Ok(mask)
    }

    /// Takes in a token that was drawn under the last mask.
    ///
    /// # Errors
    /// [`GrammarError::Forbidden`] for a token that the mask did not hold, [`GrammarError::Failed`] if the parser
    /// gives up.
    pub fn drawn(&mut self, token: u32) -> Result<(), GrammarError> {
        if self.ended {
            return Ok(());
        }
        self.mask = None;
        if self.tokens.end_tokens.contains(&token) && self.matcher.is_accepting().unwrap_or(false) {
            self.ended = true;
            return Ok(());
        }
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Err(GrammarError::Forbidden(token));
        }
        match self.matcher.try_consume_tokens(&[token]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(GrammarError::Forbidden(token)),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Takes in the tokens of an answer that is replayed.
    ///
    /// # Errors
    /// As [`drawn`](Self::drawn).
    pub fn advance(&mut self, tokens: &[u32]) -> Result<(), GrammarError> {
        tokens.iter().try_for_each(|&token| self.drawn(token))
    }

    /// Whether the text so far is a whole one.
    pub fn is_whole(&mut self) -> bool {
        self.ended || self.matcher.is_accepting().unwrap_or(false)
    }
}

/// Without what was drawn: logs show requests.
impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").field("ended", &self.ended).finish_non_exhaustive()
    }
}

fn failed(error: &impl std::fmt::Display) -> GrammarError {
    GrammarError::Failed(sentence(&error.to_string()))
}

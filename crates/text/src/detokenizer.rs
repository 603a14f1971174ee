use std::sync::Arc;

use compact_str::CompactString;

use crate::Tokenizer;
use crate::stop::StopScanner;
use crate::vocabulary::Utf8Stream;

/// What one more token adds to a text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Text that is certain and will never be taken back; may be empty. Most tokens' text needs no memory of its own.
    pub text: CompactString,
    /// A stop string was met: `text` is what stood before it, or ends with it if it is to be included, and
    /// nothing follows.
    pub stopped: bool,
}

/// Turns the token ids of one answer into text as they come.
///
/// The pieces and [`finish`](Self::finish), put together, are exactly [`Tokenizer::decode`] of all ids, or its
/// beginning up to the first stop string. A piece never holds half a character, nor a part of a stop string.
/// A token costs its own bytes times the number of stop strings, however long the text has become.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Stream,
    stop: StopScanner,
    skip_special: bool,
    /// Special tokens that are text all the same, sorted.
    spelled_out: Vec<u32>,
    pushed: usize,
    min_tokens: usize,
}

impl Detokenizer {
    /// `prompt_tail`: the last ids of the prompt that the answer continues; one is enough, none is fine. It
    /// tells whether a space before the answer's first word is real: `Once upon a` goes on with ` time`, but
    /// after a special token, or after nothing, SentencePiece's first space is silent.
    ///
    /// `stop`: strings that end the text; empty ones are ignored. `skip_special`: leave special tokens out.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        prompt_tail: &[u32],
        stop: Vec<String>,
        skip_special: bool,
    ) -> Self {
        let begun = prompt_tail.last().is_some_and(|&id| !tokenizer.is_special(id));
        let (utf8, stop) = (Utf8Stream::new(begun), StopScanner::new(stop));
        Self { tokenizer, utf8, stop, skip_special, spelled_out: Vec::new(), pushed: 0, min_tokens: 0 }
    }

    /// Whether a stop string may end the text.
    pub fn may_stop(&self) -> bool {
        !self.stop.is_empty()
    }

    /// Stop strings that end within the first `min_tokens` tokens are text like any other.
    #[must_use]
    pub fn with_min_tokens(mut self, min_tokens: usize) -> Self {
        self.min_tokens = min_tokens;
        self
    }

    /// Writes these special tokens out, though others are left out: the marks of a tool call, which are parsed
    /// from the text.
    #[must_use]
    pub fn spelling_out(mut self, markers: &[u32]) -> Self {
        self.spelled_out = markers.to_vec();
        self.spelled_out.sort_unstable();
        self
    }

    /// Whether the stop string that ends the text is part of it.
    #[must_use]
    pub fn including_stop(mut self, including: bool) -> Self {
        self.stop.include(including);
        self
    }

    /// Takes the next id. After a stop, and for an id that has no token, there is no text.
    pub fn push(&mut self, id: u32) -> Piece {
        let mut text = CompactString::default();
        let skip_special = self.skip_special && self.spelled_out.binary_search(&id).is_err();
        self.utf8.push(self.tokenizer.vocabulary(), id, skip_special, &mut text);
        self.pushed += 1;
        let text = self.stop.push(text, self.pushed > self.min_tokens);
        Piece { text, stopped: self.stop.stopped().is_some() }
    }

    /// The stop string that ended the text, once one has.
    pub fn stopped(&self) -> Option<&str> {
        self.stop.stopped()
    }

    /// The answer ends here: what was held back for a stop string that did not come, and U+FFFD for a
    /// character that was never finished.
    pub fn finish(&mut self) -> String {
        let mut text = CompactString::default();
        self.utf8.finish(&mut text);
        self.stop.push(text, true).into_string() + &self.stop.finish()
    }
}

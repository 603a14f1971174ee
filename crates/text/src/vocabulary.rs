//! What every token id stands for: the bytes that it adds to a text.

use compact_str::CompactString;

/// The bytes of all tokens, and which of them are special.
pub(crate) struct Vocabulary {
    tokens: Vec<Token>,
    /// The bytes of the long ones, side by side.
    long: Vec<u8>,
    /// SentencePiece writes a space before the first word of a text, which decoding takes away again.
    first_space_is_silent: bool,
}

/// What decoding needs to know of a token lies together: answers jump from token to token, and the cache does not hold
/// them all.
#[derive(Clone, Copy)]
enum Token {
    Short { special: bool, len: u8, bytes: [u8; SHORT_BYTES_MAX] },
    Long { special: bool, start: u32, end: u32 },
}

/// Bytes of a token that stand in its entry of 16.
const SHORT_BYTES_MAX: usize = 13;

impl Token {
    fn is_special(&self) -> bool {
        let (Self::Short { special, .. } | Self::Long { special, .. }) = self;
        *special
    }
}

impl Vocabulary {
    pub(crate) fn new(first_space_is_silent: bool) -> Self {
        Self { tokens: Vec::new(), long: Vec::new(), first_space_is_silent }
    }

    /// Gives the next id its bytes.
    ///
    /// # Panics
    ///
    /// When the long ones have 4 GiB together; no file that is read is so large.
    pub(crate) fn push(&mut self, bytes: &[u8], special: bool) {
        let mut short = [0; SHORT_BYTES_MAX];
        self.tokens.push(match short.get_mut(..bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                Token::Short { special, len: bytes.len() as u8, bytes: short }
            }
            None => {
                let end = |long: &Vec<u8>| u32::try_from(long.len()).expect("tokens of less than 4 GiB");
                let start = end(&self.long);
                self.long.extend_from_slice(bytes);
                Token::Long { special, start, end: end(&self.long) }
            }
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Nothing for an id without a token: models pad their vocabulary beyond their tokenizer's.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        match self.tokens.get(id as usize) {
            Some(Token::Short { len, bytes, .. }) => &bytes[..usize::from(*len)],
            Some(Token::Long { start, end, .. }) => &self.long[*start as usize..*end as usize],
            None => &[],
        }
    }

    pub(crate) fn first_space_is_silent(&self) -> bool {
        self.first_space_is_silent
    }

    /// The special token that is spelled `text`.
    pub(crate) fn special(&self, text: &str) -> Option<u32> {
        (0..self.len() as u32).find(|&id| self.is_special(id) && self.bytes(id) == text.as_bytes())
    }

    /// Whether `other` has the same tokens, and maybe more behind them.
    pub(crate) fn begins(&self, other: &Self) -> bool {
        let same = |id| self.bytes(id) == other.bytes(id);
        self.len() <= other.len() && (0..self.len() as u32).all(same)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(Token::is_special)
    }
}

/// A text growing by tokens: keeps back what is not yet a whole character.
#[derive(Default)]
pub(crate) struct Utf8Stream {
    /// At most 3 bytes: the beginning of a character.
    pending: Vec<u8>,
    /// Whether the text has begun, so that a space at its front is a real one.
    begun: bool,
}

impl Utf8Stream {
    /// `begun`: whether text stands before the first token that will be pushed.
    pub(crate) fn new(begun: bool) -> Self {
        Self { pending: Vec::new(), begun }
    }

    /// Appends to `out` the characters that `id` completes. Bytes that can never become a character turn into
    /// U+FFFD, one for each maximal invalid part, as in [`String::from_utf8_lossy`].
    pub(crate) fn push(
        &mut self,
        vocabulary: &Vocabulary,
        id: u32,
        skip_special: bool,
        out: &mut CompactString,
    ) {
        if skip_special && vocabulary.is_special(id) {
            return;
        }
        let mut bytes = vocabulary.bytes(id);
        if bytes.is_empty() {
            return;
        }
        if vocabulary.first_space_is_silent && !self.begun {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.begun = true;
        if let (true, Ok(whole)) = (self.pending.is_empty(), std::str::from_utf8(bytes)) {
            out.push_str(whole); // most tokens are whole characters
            return;
        }
        self.pending.extend_from_slice(bytes);
        let mut unfinished = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let may_go_on = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if may_go_on && chunks.peek().is_none() {
                unfinished = invalid.len();
            } else if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - unfinished);
    }

    /// The text ends here: an unfinished character becomes U+FFFD.
    pub(crate) fn finish(&mut self, out: &mut CompactString) {
        if !self.pending.is_empty() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

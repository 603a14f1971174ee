//! What every token id stands for: the bytes that it adds to a text.

/// The bytes of all tokens, side by side, and which of them are special.
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` belongs to `id`.
    ends: Vec<usize>,
    special: Vec<bool>,
    /// SentencePiece writes a space before the first word of a text, which decoding takes away again.
    first_space_is_silent: bool,
}

impl Vocabulary {
    pub(crate) fn new(first_space_is_silent: bool) -> Self {
        Self { bytes: Vec::new(), ends: Vec::new(), special: Vec::new(), first_space_is_silent }
    }

    /// Gives the next id its bytes.
    pub(crate) fn push(&mut self, bytes: &[u8], special: bool) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.special.push(special);
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Nothing for an id without a token: models pad their vocabulary beyond their tokenizer's.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }

    pub(crate) fn first_space_is_silent(&self) -> bool {
        self.first_space_is_silent
    }

    /// The special token that is spelled `text`.
    pub(crate) fn special(&self, text: &str) -> Option<u32> {
        (0..)
            .zip(&self.special)
            .find(|&(id, &special)| special && self.bytes(id) == text.as_bytes())
            .map(|(id, _)| id)
    }

    /// Whether `other` has the same tokens, and maybe more behind them.
    pub(crate) fn begins(&self, other: &Self) -> bool {
        self.ends == other.ends[..self.ends.len().min(other.ends.len())]
            && other.bytes.starts_with(&self.bytes)
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
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
    pub(crate) fn push(&mut self, vocabulary: &Vocabulary, id: u32, skip_special: bool, out: &mut String) {
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
    pub(crate) fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

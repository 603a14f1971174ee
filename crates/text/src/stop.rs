//! Stop strings, found in a text that arrives in pieces.

use compact_str::CompactString;

/// One stop string and how much of it the end of the text so far matches (Knuth, Morris, Pratt 1977).
struct Matcher {
    pattern: String,
    /// `fallback[n]`: length of the longest proper prefix of `pattern` that ends its first `n + 1` bytes.
    fallback: Vec<usize>,
    matched: usize,
}

impl Matcher {
    fn new(pattern: String) -> Self {
        let bytes = pattern.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut matched = 0;
        for i in 1..bytes.len() {
            while matched > 0 && bytes[i] != bytes[matched] {
                matched = fallback[matched - 1];
            }
            matched += usize::from(bytes[i] == bytes[matched]);
            fallback[i] = matched;
        }
        Self { pattern, fallback, matched: 0 }
    }

    /// Takes one byte; true when it completes the pattern.
    fn step(&mut self, byte: u8) -> bool {
        let pattern = self.pattern.as_bytes();
        if self.matched == pattern.len() {
            self.matched = self.fallback[self.matched - 1];
        }
        while self.matched > 0 && pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(pattern[self.matched] == byte);
        self.matched == pattern.len()
    }

    /// How many bytes at the end of the text may still become this pattern.
    fn may_grow(&self) -> usize {
        if self.matched == self.pattern.len() { self.fallback[self.matched - 1] } else { self.matched }
    }
}

/// Lets text through up to the first stop string, and never a part of one.
///
/// The first stop string is the one that ends first; of two that end together, the one that begins first.
/// So the outcome does not depend on how the text was cut into tokens.
pub(crate) struct StopScanner {
    matchers: Vec<Matcher>,
    /// The end of the text, which may be the beginning of a stop string.
    held: String,
    /// The matcher of the stop string that ended the text.
    stopped: Option<usize>,
    /// The stop string that ends the text is part of it.
    included: bool,
}

impl StopScanner {
    /// Whether there is nothing to look for.
    pub(crate) fn is_empty(&self) -> bool {
        self.matchers.is_empty()
    }

    /// Empty stop strings are ignored.
    pub(crate) fn new(stop: Vec<String>) -> Self {
        let matchers = stop.into_iter().filter(|s| !s.is_empty()).map(Matcher::new).collect();
        Self { matchers, held: String::new(), stopped: None, included: false }
    }

    pub(crate) fn include(&mut self, included: bool) {
        self.included = included;
    }

    /// The stop string that ended the text.
    pub(crate) fn stopped(&self) -> Option<&str> {
        self.stopped.map(|at| self.matchers[at].pattern.as_str())
    }

    /// Returns the text that is certain now. With `armed` false a stop string that ends in `text` is text.
    pub(crate) fn push(&mut self, text: CompactString, armed: bool) -> CompactString {
        if self.stopped.is_some() {
            return CompactString::default();
        }
        if self.is_empty() {
            return text;
        }
        let from = self.held.len();
        self.held.push_str(&text);
        for (at, byte) in text.bytes().enumerate() {
            let (mut longest, mut by) = (0, 0);
            for (number, matcher) in self.matchers.iter_mut().enumerate() {
                if matcher.step(byte) && matcher.pattern.len() > longest {
                    (longest, by) = (matcher.pattern.len(), number);
                }
            }
            if longest > 0 && armed {
                self.stopped = Some(by);
                let end = from + at + 1;
                self.held.truncate(if self.included { end } else { end - longest });
                return std::mem::take(&mut self.held).into();
            }
        }
        let hold = self.matchers.iter().map(Matcher::may_grow).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        std::mem::replace(&mut self.held, rest).into()
    }

    /// The text ends here: what was held back is text after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

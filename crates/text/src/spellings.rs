//! Tokens that are found in a text by their spelling, whatever stands around them.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::error::TextError;

/// Tokens found by their spelling, the longest first.
pub(crate) struct Spellings {
    finder: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Spellings {
    pub(crate) fn new(mut tokens: Vec<(String, u32)>) -> Result<Self, TextError> {
        tokens.retain(|(spelling, _)| !spelling.is_empty());
        let ids = tokens.iter().map(|&(_, id)| id).collect::<Vec<_>>();
        if ids.is_empty() {
            return Ok(Self { finder: None, ids });
        }
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(spelling, _)| spelling))
            .map_err(|e| TextError::Vocabulary(format!("its special tokens cannot be indexed: {e}")))?;
        Ok(Self { finder: Some(finder), ids })
    }

    /// Appends the ids of the spellings in `text`, and what `other` makes of the text between them.
    pub(crate) fn split(&self, text: &str, ids: &mut Vec<u32>, other: impl FnMut(&str, &mut Vec<u32>)) {
        self.split_where(text, ids, |_| true, other);
    }

    /// As [`split`](Self::split), but a spelling found of a token that is none is text.
    pub(crate) fn split_where(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        is_token: impl Fn(u32) -> bool,
        mut other: impl FnMut(&str, &mut Vec<u32>),
    ) {
        let mut done = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            let id = self.ids[found.pattern().as_usize()];
            if is_token(id) {
                other(&text[done..found.start()], ids);
                ids.push(id);
                done = found.end();
            }
        }
        other(&text[done..], ids);
    }
}

//! Grammars as strangers send them, against plain statements of what they mean.

mod gbnf;
mod hostile;
mod masks;
mod schemas;

use galerne_grammar::{Constraint, GrammarError, Limits, Vocabulary};
use galerne_types::Grammar;

/// Every byte, some words, and an end token behind them.
pub(crate) struct Words {
    words: Vec<Vec<u8>>,
}

pub(crate) const TEXTS: [&str; 26] = [
    "ab", "abc", "bc", "\"", "\":", "\": ", "{\"", "\",", "},", "true", "tr", "ue", "false", "null", "  ",
    "\n  ", "é", "10", "100", "-1", "0.5", "name", "age\"", "[[", "]]", "cd",
];

impl Words {
    pub(crate) fn new() -> Self {
        let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        words.extend(TEXTS.iter().map(|text| text.as_bytes().to_vec()));
        words.push(b"a".to_vec()); // twice in the vocabulary, as byte tokens of SentencePiece are
        words.push(b"<|tool|>".to_vec());
        words.push(b"<|end|>".to_vec());
        Self { words }
    }

    pub(crate) fn end(&self) -> u32 {
        self.words.len() as u32 - 1
    }

    pub(crate) fn tool(&self) -> u32 {
        self.end() - 1
    }

    pub(crate) fn size(&self) -> u32 {
        self.words.len() as u32
    }

    pub(crate) fn bytes(&self, token: u32) -> &[u8] {
        &self.words[token as usize]
    }

    pub(crate) fn vocabulary(&self) -> Vocabulary {
        Vocabulary::new(self.size(), &[self.end()], |id| (self.bytes(id), id >= self.tool())).unwrap()
    }
}

pub(crate) fn compile(grammar: &Grammar) -> Result<Constraint, GrammarError> {
    Words::new().vocabulary().compile(grammar, &Limits::default())
}

pub(crate) fn schema(text: &str) -> Grammar {
    Grammar::JsonSchema(text.to_owned())
}

pub(crate) fn allows(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] >> (token % 32) & 1 == 1
}

/// Whether the answer `text`, byte by byte, is whole under `grammar`.
pub(crate) fn accepts(grammar: &Grammar, text: &str) -> bool {
    let words = Words::new();
    let mut constraint = words.vocabulary().compile(grammar, &Limits::default()).unwrap();
    for byte in text.bytes() {
        if !allows(&constraint.mask().unwrap(), byte.into()) {
            return false;
        }
        constraint.drawn(byte.into()).unwrap();
    }
    allows(&constraint.mask().unwrap(), words.end())
}

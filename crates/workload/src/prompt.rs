//! What is asked: the same text or token ids for the same seed.

use std::str::FromStr;

use crate::dice::{Dice, Purpose};
use crate::error::WorkloadError;

/// A prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// As it is.
    Text(String),
    /// To be made up: parts that several prompts have in common begin them, so that a server may know them already.
    Parts(Vec<Part>),
}

/// Tokens that are the same wherever this part appears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub(crate) purpose: Purpose,
    pub(crate) number: u64,
    pub(crate) tokens: u32,
}

/// Token ids that prompts are made of, both ends included: ordinary words, no special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenIds {
    /// The lowest.
    pub first: u32,
    /// The highest.
    pub last: u32,
}

/// `1000-30000`.
impl FromStr for TokenIds {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let parse = || {
            let (first, last) = text.split_once('-')?;
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            (first < last).then_some(Self { first, last })
        };
        parse().ok_or_else(|| WorkloadError::TokenIds(text.to_owned()))
    }
}

/// Short, and so common that a tokenizer has each of them, with the blank before it, as one token.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "was", "for", "that", "with", "as", "on", "by", "at", "from",
    "his", "are", "this", "be", "not", "or", "an", "had", "her", "were", "which", "but", "has", "one", "all",
    "their", "they", "you", "have", "new", "who", "its", "more", "first", "two", "she", "been", "other",
    "when", "time", "into", "some", "can", "out", "only", "may", "over", "after", "would", "about", "then",
    "people", "also", "such", "year", "made", "most", "world", "where",
];

impl Prompt {
    /// Tokens that were asked for, if they were.
    pub fn tokens(&self) -> Option<u64> {
        match self {
            Self::Text(_) => None,
            Self::Parts(parts) => Some(parts.iter().map(|part| u64::from(part.tokens)).sum()),
        }
    }

    /// As token ids of the wanted number; `None` for a text, which only a tokenizer could turn into them.
    pub fn ids(&self, seed: u64, ids: TokenIds) -> Option<Vec<u32>> {
        let Self::Parts(parts) = self else { return None };
        let span = u64::from(ids.last - ids.first) + 1;
        let draw = |dice: &mut Dice| ids.first + dice.below(span) as u32;
        Some(parts.iter().flat_map(|part| part.draw(seed, draw)).collect())
    }

    /// As text of about the wanted number of tokens: a word of English each.
    pub fn text(self, seed: u64) -> String {
        let parts = match self {
            Self::Text(text) => return text,
            Self::Parts(parts) => parts,
        };
        let draw = |dice: &mut Dice| WORDS[dice.below(WORDS.len() as u64) as usize];
        let words: Vec<&str> = parts.iter().flat_map(|part| part.draw(seed, draw)).collect();
        words.join(" ")
    }
}

impl Part {
    fn draw<T>(&self, seed: u64, draw: impl Fn(&mut Dice) -> T) -> impl Iterator<Item = T> {
        let mut dice = Dice::new(seed, self.purpose, self.number);
        (0..self.tokens).map(move |_| draw(&mut dice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: TokenIds = TokenIds { first: 100, last: 200 };

    fn prompt(number: u64) -> Prompt {
        let prefix = Part { purpose: Purpose::Shared, number: 0, tokens: 30 };
        Prompt::Parts(vec![prefix, Part { purpose: Purpose::Own, number, tokens: 50 }])
    }

    #[test]
    fn prompts_share_their_prefix_and_nothing_else() {
        let (one, other) = (prompt(1).ids(7, IDS).unwrap(), prompt(2).ids(7, IDS).unwrap());
        assert_eq!((one.len(), one[..30] == other[..30], one[30] == other[30]), (80, true, false));
        assert!(one.iter().all(|id| (100..=200).contains(id)));
        assert_eq!(one, prompt(1).ids(7, IDS).unwrap());
        assert_ne!(one, prompt(1).ids(8, IDS).unwrap());
        let text = prompt(1).text(7);
        assert_eq!((prompt(1).tokens(), text.split(' ').count()), (Some(80), 80));
        assert_eq!(text, prompt(1).text(7));
    }

    #[test]
    fn a_text_stays_as_it_is() {
        let text = Prompt::Text("Why?".to_owned());
        assert_eq!((text.ids(1, IDS), text.tokens(), text.text(1)), (None, None, "Why?".to_owned()));
    }

    #[test]
    fn a_range_has_two_ends() {
        assert_eq!("100-200".parse(), Ok(IDS));
        for wrong in ["", "5", "5-5", "9-5", "-1-5", "a-b"] {
            assert!(wrong.parse::<TokenIds>().is_err(), "{wrong}");
        }
    }
}

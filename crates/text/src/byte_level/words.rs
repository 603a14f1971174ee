//! How text is cut into words before its bytes are merged.

use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

pub(super) struct Words {
    /// Each digit stands alone.
    digits: bool,
    pattern: Pattern,
}

enum Pattern {
    /// All is one word.
    None,
    /// That of GPT-2: `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    Gpt2(&'static [Kind]),
    /// Any other, without the look-ahead that keeps one space for the next word.
    Regular(Regex),
}

/// What GPT-2's pattern distinguishes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

/// Patterns that leave the last of several spaces before a word to that word; all else in them is regular.
const KEEP_ONE_SPACE: &str = r"\s+(?!\S)|\s+";
const NEW_LINES_APART: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|";
/// There are letters, numbers and spaces in the first four planes of Unicode only.
const KINDS: u32 = 0x4_0000;

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    ByteLevel {
        add_prefix_space: bool,
        use_regex: bool,
    },
    Digits {
        individual_digits: bool,
    },
    Split {
        pattern: serde_json::Value,
        behavior: String,
        invert: bool,
    },
    #[serde(other)]
    Other,
}

impl Words {
    pub(super) fn of(json: serde_json::Value) -> Option<Self> {
        let stages = match serde_json::from_value(json).ok()? {
            PreTokenizer::Sequence { pretokenizers } => pretokenizers,
            alone => vec![alone],
        };
        let mut words = Self { digits: false, pattern: Pattern::None };
        let (last, before) = stages.split_last()?;
        let PreTokenizer::ByteLevel { add_prefix_space: false, use_regex } = last else { return None };
        for stage in before {
            match (stage, &words.pattern) {
                (PreTokenizer::Digits { individual_digits: true }, Pattern::None) => words.digits = true,
                (PreTokenizer::Split { pattern, behavior, invert: false }, Pattern::None)
                    if behavior == "Isolated" && !use_regex =>
                {
                    words.pattern = Pattern::Regular(regular(pattern["Regex"].as_str()?)?);
                }
                _ => return None,
            }
        }
        if *use_regex {
            words.pattern = Pattern::Gpt2(&GPT_2_KINDS);
        }
        Some(words)
    }

    pub(super) fn each(&self, text: &str, mut word: impl FnMut(&str)) {
        if !self.digits {
            return self.cut(text, &mut word);
        }
        let mut done = 0;
        for (at, digit) in text.match_indices(char::is_numeric) {
            self.cut(&text[done..at], &mut word);
            word(digit);
            done = at + digit.len();
        }
        self.cut(&text[done..], &mut word);
    }

    fn cut(&self, text: &str, word: &mut impl FnMut(&str)) {
        let mut rest = text;
        while !rest.is_empty() {
            let end = match &self.pattern {
                Pattern::None => rest.len(),
                Pattern::Gpt2(kinds) => gpt_2(kinds, rest),
                // Runs with line ends match another part of the pattern, which keeps nothing back.
                Pattern::Regular(pattern) => {
                    let Some(found) = pattern.find(rest) else { return };
                    keep_one_space(rest, found.end(), |c| c.is_whitespace() && c != '\r' && c != '\n')
                }
            };
            word(&rest[..end]);
            rest = &rest[end..];
        }
    }
}

/// The pattern at a text's beginning and without its look-ahead, if that is all that is not regular in it.
fn regular(pattern: &str) -> Option<Regex> {
    let (rest, "") = pattern.rsplit_once(KEEP_ONE_SPACE)? else { return None };
    pattern.contains(NEW_LINES_APART).then(|| Regex::new(&format!(r"\A(?:{rest}\s+)")).ok())?
}

/// The end of a word that a pattern without look-ahead has found: of several spaces before another word, that word gets
/// the last.
fn keep_one_space(text: &str, end: usize, is_space: impl Fn(char) -> bool) -> usize {
    let mut back = text[..end].chars().rev();
    match (back.next(), back.next()) {
        (Some(last), Some(_)) if end < text.len() && is_space(last) => end - last.len_utf8(),
        _ => end,
    }
}

static GPT_2_KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let kind = |c: Option<char>| match c {
        Some(c) if c.is_numeric() => Kind::Number,
        Some(c) if c.is_whitespace() => Kind::Space,
        _ => Kind::Other,
    };
    let mut kinds = (0..KINDS).map(|c| kind(char::from_u32(c))).collect::<Vec<_>>();
    let all = (0..KINDS).filter_map(char::from_u32).collect::<String>();
    let letters = Regex::new(r"\p{L}+").expect("a pattern of our own");
    for letter in letters.find_iter(&all).flat_map(|found| found.as_str().chars()) {
        kinds[letter as usize] = Kind::Letter;
    }
    kinds
});

/// The end of the first word of a text that is not empty.
fn gpt_2(kinds: &[Kind], text: &str) -> usize {
    let kind = |c: char| kinds.get(c as usize).copied().unwrap_or(Kind::Other);
    match text.as_bytes() {
        [b'\'', b's' | b'd' | b'm' | b't', ..] => return 2,
        [b'\'', b'l', b'l', ..] | [b'\'', b'v' | b'r', b'e', ..] => return 3,
        _ => {}
    }
    let run = usize::from(text.starts_with(' '));
    let first = text[run..].chars().next().map_or(Kind::Space, kind);
    let end = text[run..].find(|c| kind(c) != first).map_or(text.len(), |length| run + length);
    if first == Kind::Space { keep_one_space(text, end, |c| kind(c) == Kind::Space) } else { end }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    proptest! {
        #[test]
        fn words_are_those_of_gpt_2(
            parts in prop::collection::vec(prop_oneof![
                "[ \t\n']{1,3}", "[a-z']{1,3}", "[0-9½٣]{1,2}", "[!-/é你😀\u{301}\u{a0}\u{2028}ǅª]{1,2}", "\\PC", "\u{5}",
            ], 0..24),
        ) {
            let text = parts.concat();
            let words = Words { digits: false, pattern: Pattern::Gpt2(&GPT_2_KINDS) };
            let mut ours = Vec::new();
            words.each(&text, |word| ours.push(word.to_owned()));
            let mut reference = PreTokenizedString::from(text.as_str());
            ByteLevel::new(false, true, true).pre_tokenize(&mut reference).expect("words");
            let splits = reference.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let expected = splits.iter().map(|(_, (from, to), _)| text[*from..*to].to_owned()).collect::<Vec<_>>();
            prop_assert_eq!(ours, expected);
        }
    }
}

//! SentencePiece's BPE, as the vocabularies of Mistral and Llama 2 use it: pieces with scores, `▁` for a space,
//! byte tokens for whatever no piece covers (Kudo and Richardson 2018; `bpe_model.cc`).

use std::collections::HashMap;

use galerne_checkpoint::{GgufVocab, SentencePieceModel};

use crate::error::TextError;
use crate::merge::{Merges, Scratch};
use crate::spellings::Spellings;
use crate::vocabulary::Vocabulary;

const SPACE: &str = "\u{2581}";
/// Symbols are addressed by 32 bits; a space grows to the 3 bytes of `▁`.
const TEXT_BYTES_MAX: usize = u32::MAX as usize / 3 - 1;
const NONE: u32 = u32::MAX;

/// Kinds of pieces, numbered alike in SentencePiece's own files and in GGUF.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const BYTE: i32 = 6;
}

/// A vocabulary as its file has it: pieces by id, with their scores and kinds.
#[derive(Clone, Copy)]
pub(crate) struct Pieces<'a> {
    tokens: &'a [String],
    scores: &'a [f32],
    types: &'a [i32],
    space_prefix: bool,
}

impl<'a> From<&'a GgufVocab> for Pieces<'a> {
    fn from(GgufVocab { tokens, scores, types, add_space_prefix, .. }: &'a GgufVocab) -> Self {
        Self { tokens, scores, types, space_prefix: *add_space_prefix }
    }
}

impl<'a> From<&'a SentencePieceModel> for Pieces<'a> {
    fn from(model: &'a SentencePieceModel) -> Self {
        let SentencePieceModel { tokens, scores, types, add_space_prefix, .. } = model;
        Self { tokens, scores, types, space_prefix: *add_space_prefix }
    }
}

/// Encoder of one vocabulary.
pub(crate) struct SentencePiece {
    /// Symbols that a text begins as: pieces of one character, and characters that pieces are made of.
    chars: HashMap<char, u32>,
    /// The same for ASCII; [`NONE`] for a character that is no symbol.
    ascii: [u32; 128],
    /// Characters that are symbols but no pieces, from the symbol `first_bare` on.
    bare: Vec<char>,
    first_bare: u32,
    merges: Merges,
    byte_ids: [u32; 256],
    /// Tokens that text can only name, as `<s>`.
    control: Spellings,
    /// Tokens that are taken whole wherever they stand.
    user_defined: Spellings,
    space_prefix: bool,
}

impl SentencePiece {
    pub(crate) fn new(from: Pieces<'_>) -> Result<Self, TextError> {
        if from.scores.len() != from.tokens.len() || from.scores.iter().any(|s| s.is_nan()) {
            return Err(TextError::Vocabulary(
                "a SentencePiece vocabulary needs one score for each token".into(),
            ));
        }
        let mut pieces = HashMap::<&str, _>::new();
        let mut byte_ids = [NONE; 256];
        let (mut control, mut user_defined) = (Vec::new(), Vec::new());
        for ((id, token), &score) in (0u32..).zip(from.tokens).zip(from.scores) {
            match from.kind(id) {
                kind::NORMAL => {
                    pieces.entry(token.as_str()).or_insert((id, score));
                }
                kind::CONTROL | kind::UNKNOWN => control.push((token.clone(), id)),
                kind::USER_DEFINED => user_defined.push((token.replace(' ', SPACE), id)),
                kind::BYTE => {
                    let byte = byte_of(token).ok_or_else(|| {
                        TextError::Vocabulary(format!(
                            "token {id} has the type of a byte but is not written <0xXX>"
                        ))
                    })?;
                    byte_ids[usize::from(byte)] = id;
                }
                // Unused: rows that only pad the vocabulary.
                _ => {}
            }
        }
        if let Some(byte) = byte_ids.iter().position(|&id| id == NONE) {
            return Err(TextError::Vocabulary(format!(
                "it has no token for the byte 0x{byte:02X}; convert the model with byte fallback, or use its tokenizer.json"
            )));
        }
        let first_bare = index(from.tokens.len());
        let symbols = Symbols::of(&pieces, first_bare);
        let merges = symbols.merges(&pieces);
        let Symbols { chars, bare, .. } = symbols;
        let mut ascii = [NONE; 128];
        for (&c, &symbol) in chars.iter().filter(|(c, _)| c.is_ascii()) {
            ascii[c as usize] = symbol;
        }
        Ok(Self {
            chars,
            ascii,
            bare,
            first_bare,
            merges,
            byte_ids,
            control: Spellings::new(control)?,
            user_defined: Spellings::new(user_defined)?,
            space_prefix: from.space_prefix,
        })
    }

    /// Ids of `text`; spellings of control tokens are those tokens if `parse_control`, else text.
    pub(crate) fn encode(&self, text: &str, parse_control: bool) -> Result<Vec<u32>, TextError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TextError::Encode(format!("it is longer than {TEXT_BYTES_MAX} bytes")));
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut work = Work::default();
        let mut encode_segment = |segment: &str, ids: &mut Vec<u32>| {
            if segment.is_empty() {
                return;
            }
            let prefix = if self.space_prefix { SPACE } else { "" };
            let normalized = format!("{prefix}{}", segment.replace(' ', SPACE));
            self.user_defined.split(&normalized, ids, |words, ids| self.merge(words, &mut work, ids));
        };
        if parse_control {
            self.control.split(text, &mut ids, encode_segment);
        } else {
            encode_segment(text, &mut ids);
        }
        Ok(ids)
    }

    /// Joins the characters of `text` into pieces; what is part of none becomes its bytes.
    fn merge(&self, text: &str, Work { symbols, joined, scratch }: &mut Work, ids: &mut Vec<u32>) {
        let mut flush = |symbols: &mut Vec<u32>, ids: &mut Vec<u32>| {
            joined.clear();
            self.merges.merge(symbols, scratch, joined);
            symbols.clear();
            for &symbol in joined.iter() {
                match symbol.checked_sub(self.first_bare) {
                    None => ids.push(symbol),
                    Some(bare) => self.push_bytes(self.bare[bare as usize], ids),
                }
            }
        };
        for c in text.chars() {
            let symbol = match self.ascii.get(c as usize) {
                Some(&symbol) => symbol,
                None => self.chars.get(&c).copied().unwrap_or(NONE),
            };
            if symbol == NONE {
                flush(symbols, ids);
                self.push_bytes(c, ids);
            } else {
                symbols.push(symbol);
            }
        }
        flush(symbols, ids);
    }

    fn push_bytes(&self, c: char, ids: &mut Vec<u32>) {
        ids.extend(c.encode_utf8(&mut [0; 4]).bytes().map(|byte| self.byte_ids[usize::from(byte)]));
    }
}

/// Memory of one encoding.
#[derive(Default)]
struct Work {
    symbols: Vec<u32>,
    joined: Vec<u32>,
    scratch: Scratch,
}

/// Numbers of the characters that pieces are made of.
struct Symbols {
    chars: HashMap<char, u32>,
    bare: Vec<char>,
}

impl Symbols {
    fn of(pieces: &HashMap<&str, (u32, f32)>, first_bare: u32) -> Self {
        let mut symbols = Self { chars: HashMap::new(), bare: Vec::new() };
        for c in pieces.keys().flat_map(|piece| piece.chars()) {
            symbols.chars.entry(c).or_insert_with(|| match pieces.get(&*c.encode_utf8(&mut [0; 4])) {
                Some(&(id, _)) => id,
                None => {
                    symbols.bare.push(c);
                    first_bare + index(symbols.bare.len() - 1)
                }
            });
        }
        symbols
    }

    /// The symbol that is spelled so.
    fn symbol(&self, pieces: &HashMap<&str, (u32, f32)>, text: &str) -> Option<u32> {
        let mut chars = text.chars();
        match (chars.next(), chars.next()) {
            (Some(c), None) => self.chars.get(&c).copied(),
            _ => pieces.get(text).map(|&(id, _)| id),
        }
    }

    /// Every way to put a piece together from two symbols; the higher its score, the sooner.
    fn merges(&self, pieces: &HashMap<&str, (u32, f32)>) -> Merges {
        let mut scores = pieces.values().map(|&(_, score)| score).collect::<Vec<_>>();
        scores.sort_unstable_by(|a, b| b.total_cmp(a));
        scores.dedup_by(|a, b| a == b);
        let rank = |score: f32| index(scores.partition_point(|&better| better > score));
        let merges = pieces.iter().flat_map(|(piece, &(id, score))| {
            piece.char_indices().skip(1).filter_map(move |(middle, _)| {
                let (left, right) = piece.split_at(middle);
                Some((self.symbol(pieces, left)?, self.symbol(pieces, right)?, rank(score), id))
            })
        });
        Merges::new(merges)
    }
}

impl Pieces<'_> {
    fn kind(&self, id: u32) -> i32 {
        self.types.get(id as usize).copied().unwrap_or(kind::NORMAL)
    }

    /// Bytes of every token.
    pub(crate) fn vocabulary(&self) -> Vocabulary {
        let mut vocabulary = Vocabulary::new(self.space_prefix);
        for (id, token) in (0u32..).zip(self.tokens) {
            match self.kind(id) {
                kind::CONTROL | kind::UNKNOWN => vocabulary.push(token.as_bytes(), true),
                kind::BYTE => vocabulary.push(&token_bytes(token), false),
                _ => vocabulary.push(token.replace(SPACE, " ").as_bytes(), false),
            }
        }
        vocabulary
    }
}

/// Bytes of a piece: `<0xXX>` is a byte, `▁` a space, everything else itself.
pub(crate) fn token_bytes(token: &str) -> Vec<u8> {
    byte_of(token).map_or_else(|| token.replace(SPACE, " ").into_bytes(), |byte| vec![byte])
}

fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// A checkpoint's vocabulary fits into 32 bits by far.
fn index(n: usize) -> u32 {
    u32::try_from(n).expect("a vocabulary is limited to 32-bit ids")
}

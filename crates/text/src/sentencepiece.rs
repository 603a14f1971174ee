//! SentencePiece's BPE, as the vocabularies of Mistral and Llama 2 use it: pieces with scores, `▁` for a space,
//! byte tokens for whatever no piece covers (Kudo and Richardson 2018; `bpe_model.cc`).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use galerne_checkpoint::{GgufVocab, SentencePieceModel};

use crate::error::TextError;
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
    /// Pieces that merges can make, with the urgency of making them: the order of scores.
    pieces: HashMap<Box<str>, (u32, u32)>,
    piece_bytes_max: usize,
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
        let mut pieces = HashMap::<Box<str>, _>::new();
        let mut byte_ids = [NONE; 256];
        let (mut control, mut user_defined) = (Vec::new(), Vec::new());
        for ((id, token), &score) in (0u32..).zip(from.tokens).zip(from.scores) {
            match from.kind(id) {
                kind::NORMAL => {
                    pieces.entry(token.as_str().into()).or_insert((id, urgency(score)));
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
        Ok(Self {
            piece_bytes_max: pieces.keys().map(|p| p.len()).max().unwrap_or(0),
            pieces,
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
        let mut symbols = Vec::new();
        let mut encode_segment = |segment: &str, ids: &mut Vec<u32>| {
            if segment.is_empty() {
                return;
            }
            let prefix = if self.space_prefix { SPACE } else { "" };
            let normalized = format!("{prefix}{}", segment.replace(' ', SPACE));
            self.user_defined.split(&normalized, ids, |words, ids| self.merge(words, &mut symbols, ids));
        };
        if parse_control {
            self.control.split(text, &mut ids, encode_segment);
        } else {
            encode_segment(text, &mut ids);
        }
        Ok(ids)
    }

    /// Joins the characters of `text` into pieces, the best score first and of equals the leftmost, until no
    /// two neighbours make a piece. O(n log n): a heap of possible merges over a linked list of symbols.
    fn merge(&self, text: &str, symbols: &mut Vec<Symbol>, ids: &mut Vec<u32>) {
        symbols.clear();
        symbols.extend(text.char_indices().map(|(start, c)| Symbol::at(start, start + c.len_utf8())));
        for (left, right) in (0..index(symbols.len())).zip(1..index(symbols.len())) {
            symbols[left as usize].next = right;
            symbols[right as usize].prev = left;
        }
        let all = 0..index(symbols.len());
        let mut heap = all.filter_map(|left| self.proposal(text, symbols, left)).collect::<BinaryHeap<_>>();
        while let Some(merge) = heap.pop() {
            let Reverse(at) = merge.left;
            let left = symbols[at as usize];
            let Some(right) = symbols.get_mut(left.next as usize) else { continue };
            // Stale: one of the two has since become part of something longer.
            if left.is_gone() || right.end != merge.end {
                continue;
            }
            let next = right.next;
            right.end = right.start;
            symbols[at as usize] = Symbol { end: merge.end, next, ..left };
            if let Some(next) = symbols.get_mut(next as usize) {
                next.prev = at;
            }
            heap.extend(self.proposal(text, symbols, at));
            heap.extend(self.proposal(text, symbols, left.prev));
        }
        for symbol in symbols.iter().filter(|s| !s.is_gone()) {
            match self.pieces.get(symbol.text(text)) {
                Some(&(id, _)) => ids.push(id),
                None => ids.extend(symbol.text(text).bytes().map(|b| self.byte_ids[usize::from(b)])),
            }
        }
    }

    /// The merge of the symbol at `left` with its right neighbour, if there are both and they make a piece.
    fn proposal(&self, text: &str, symbols: &[Symbol], left: u32) -> Option<Merge> {
        let start = symbols.get(left as usize)?;
        let Symbol { end, .. } = *symbols.get(start.next as usize)?;
        let piece = &text[start.start as usize..end as usize];
        if piece.len() > self.piece_bytes_max {
            return None;
        }
        let &(_, urgency) = self.pieces.get(piece)?;
        Some(Merge { urgency, left: Reverse(left), end })
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

/// Maps scores to integers of the same order.
fn urgency(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// Symbols are fewer than the bytes of a text, which `encode` limits.
fn index(n: usize) -> u32 {
    u32::try_from(n).expect("a text is limited to 32-bit offsets")
}

/// A stretch of the text that is one piece or one character so far; empty once it belongs to its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    end: u32,
    prev: u32,
    next: u32,
}

impl Symbol {
    fn at(start: usize, end: usize) -> Self {
        Self { start: index(start), end: index(end), prev: NONE, next: NONE }
    }

    fn is_gone(&self) -> bool {
        self.start == self.end
    }

    fn text<'t>(&self, text: &'t str) -> &'t str {
        &text[self.start as usize..self.end as usize]
    }
}

/// A merge that was possible when it was proposed; the greatest is the next.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    urgency: u32,
    left: Reverse<u32>,
    /// Where the right symbol ended: tells whether it still is what it was.
    end: u32,
}

/// Tokens found by their spelling, the longest first.
struct Spellings {
    finder: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Spellings {
    fn new(mut tokens: Vec<(String, u32)>) -> Result<Self, TextError> {
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
    fn split(&self, text: &str, ids: &mut Vec<u32>, mut other: impl FnMut(&str, &mut Vec<u32>)) {
        let mut done = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            other(&text[done..found.start()], ids);
            ids.push(self.ids[found.pattern().as_usize()]);
            done = found.end();
        }
        other(&text[done..], ids);
    }
}

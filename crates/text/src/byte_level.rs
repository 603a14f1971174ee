//! The byte-level alphabet of GPT-2: every byte as one printable character, so that BPE can work on text.

mod words;

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::hugging_face::unless_it_panics;
use crate::merge::{Merges, Scratch};
use crate::spellings::Spellings;
use words::Words;

/// The byte that `c` stands for. Printable Latin-1 stands for itself; the other 68 bytes, in order, are the
/// characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let byte = match u32::from(c) {
        n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => n,
        n @ 0x100..=0x120 => n - 0x100,
        n @ 0x121..=0x142 => n - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The bytes of a token of a byte-level vocabulary; a token that is not in that alphabet is ordinary text.
pub(crate) fn token_bytes(token: &str) -> Vec<u8> {
    in_alphabet(token).unwrap_or_else(|| token.as_bytes().to_vec())
}

fn in_alphabet(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

fn char_of(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte) - 0x7f,
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or_default()
}

/// Byte-level BPE as tokenizer.json files commonly describe it, done in near-linear time and without the offsets that
/// the `tokenizers` crate keeps. Whatever is described otherwise is left to the crate.
pub(crate) struct ByteLevel {
    words: Words,
    /// `None` for a byte that the vocabulary passes over.
    bytes: [Option<u32>; 256],
    merges: Merges,
    /// Words that are tokens as they stand: most words of a text are, and need not be merged.
    whole: HashMap<Box<[u8]>, u32>,
    /// Added tokens that are found in the text before, and after, it is normalized.
    added: [Spellings; 2],
    special: HashSet<u32>,
    /// What is put around a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

/// The model of a tokenizer.json, as far as it matters here.
#[derive(Deserialize)]
struct Model {
    r#type: String,
    dropout: Option<f32>,
    unk_token: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
}

impl ByteLevel {
    /// The same as `tokenizer`, if it is of the common kind.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        if tokenizer.get_normalizer().is_some() {
            return None;
        }
        let words = Words::of(serde_json::to_value(tokenizer.get_pre_tokenizer()?).ok()?)?;
        let model = serde_json::to_vec(tokenizer.get_model()).ok()?;
        let model = serde_json::from_slice::<Model>(&model).ok()?;
        let affixed = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if model.r#type != "BPE"
            || model.dropout.is_some_and(|dropout| dropout > 0.0)
            || model.byte_fallback
            || model.unk_token.is_some() && model.fuse_unk
            || affixed.into_iter().flatten().any(|affix| !affix.is_empty())
        {
            return None;
        }
        // Vocabularies lack bytes that they never saw.
        let unknown = match &model.unk_token {
            Some(token) => Some(*model.vocab.get(token)?),
            None => None,
        };
        let mut bytes = [unknown; 256];
        for byte in 0..=u8::MAX {
            let token = model.vocab.get(char_of(byte).encode_utf8(&mut [0; 4]));
            bytes[usize::from(byte)] = token.copied().or(unknown);
        }
        let added = tokenizer.get_added_tokens_decoder();
        if added.values().any(|token| token.single_word || token.lstrip || token.rstrip) {
            return None;
        }
        let spellings = |normalized: bool| {
            let tokens = added.iter().filter(|(_, token)| token.normalized == normalized);
            Spellings::new(tokens.map(|(&id, token)| (token.content.clone(), id)).collect()).ok()
        };
        let (prefix, suffix) = surroundings(tokenizer)?;
        let merges = merges(&model)?;
        let mut scratch = Scratch::default();
        let mut stands = |token: &[u8], id: u32| {
            let symbols: Vec<u32> = token.iter().filter_map(|&byte| bytes[usize::from(byte)]).collect();
            let mut merged = Vec::new();
            merges.merge(&symbols, &mut scratch, &mut merged);
            merged == [id]
        };
        let tokens = model.vocab.iter().filter_map(|(token, &id)| Some((in_alphabet(token)?, id)));
        let whole = tokens.filter(|(token, id)| model.ignore_merges || stands(token, *id));
        let whole = whole.map(|(token, id)| (token.into_boxed_slice(), id)).collect();
        Some(Self {
            merges,
            words,
            bytes,
            whole,
            added: [spellings(false)?, spellings(true)?],
            special: added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect(),
            prefix,
            suffix,
        })
    }

    /// Ids of `text`; spellings of special tokens are those tokens if `parse_special`, else text.
    pub(crate) fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (mut scratch, mut symbols) = (Scratch::default(), Vec::new());
        let is_token = |id: u32| parse_special || !self.special.contains(&id);
        if add_special {
            ids.extend(&self.prefix);
        }
        self.added[0].split_where(text, &mut ids, is_token, |text, ids| {
            self.added[1].split_where(text, ids, is_token, |text, ids| {
                self.words.each(text, |word| {
                    if let Some(&id) = self.whole.get(word.as_bytes()) {
                        ids.push(id);
                        return;
                    }
                    symbols.clear();
                    symbols.extend(word.bytes().filter_map(|byte| self.bytes[usize::from(byte)]));
                    self.merges.merge(&symbols, &mut scratch, ids);
                });
            });
        });
        if add_special {
            ids.extend(&self.suffix);
        }
        ids
    }
}

/// What the post-processor puts before and behind a text.
fn surroundings(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let probe = |special| {
        let encoding = unless_it_panics(|| tokenizer.encode_fast("a", special)).ok()?;
        Some(encoding.get_ids().to_vec())
    };
    let (inner, whole) = (probe(false)?, probe(true)?);
    if inner.is_empty() {
        return None; // a vocabulary without an `a`: what stands around it cannot be told
    }
    let at = whole.windows(inner.len()).position(|ids| ids == inner)?;
    Some((whole[..at].to_vec(), whole[at + inner.len()..].to_vec()))
}

fn merges(model: &Model) -> Option<Merges> {
    let id = |token: &str| model.vocab.get(token).copied();
    let merges = (0u32..)
        .zip(&model.merges)
        .map(|(rank, (left, right))| Some((id(left)?, id(right)?, rank, id(&format!("{left}{right}"))?)));
    Some(Merges::new(merges.collect::<Option<Vec<_>>>()?.into_iter()))
}

//! The models that the tests read.

use std::path::{Path, PathBuf};

use galerne_checkpoint::{Checkpoint, GgufVocab, TextAssets, TokenizerAsset};
use galerne_text::Tokenizer;
use serde_json::Value;

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

/// An expectation, or a list of them, from `golden/`.
pub(crate) fn golden(name: &str) -> Value {
    read_json(&Path::new(CRATE).join("tests/golden").join(name))
}

/// An expectation of the whole workspace.
pub(crate) fn shared_golden(name: &str) -> Value {
    read_json(&workspace().join("tests/golden").join(name))
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn workspace() -> PathBuf {
    Path::new(CRATE).join("../..")
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

pub(crate) fn assets(tokenizer: TokenizerAsset) -> TextAssets {
    TextAssets { tokenizer, chat_template: None, bos_token: None, eos_token: None, add_bos: true }
}

/// Byte-level BPE of 1,024 tokens, in a `tokenizer.json`.
pub(crate) fn bard_path() -> PathBuf {
    workspace().join("tests/golden/bard-1m/tokenizer.json")
}

pub(crate) fn bard() -> Tokenizer {
    Tokenizer::load(&assets(TokenizerAsset::Json(bard_path()))).expect("bard-1m's tokenizer")
}

/// SmolLM2-135M-Instruct, a GGUF file too large for the repository.
pub(crate) fn demo() -> TextAssets {
    let path = std::env::var_os("GALERNE_DEMO_MODEL")
        .map_or_else(|| workspace().join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"), PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: run `make test`, which fetches it, or set GALERNE_DEMO_MODEL",
        path.display()
    );
    Checkpoint::open(&path).expect("the demo model").text().clone()
}

/// Mistral's SentencePiece model `version` (v1, v2, v3), as llama.cpp writes it into a GGUF file.
pub(crate) fn mistral(version: &str) -> Tokenizer {
    Tokenizer::load(&assets(TokenizerAsset::Gguf(mistral_vocab(version))))
        .expect("a SentencePiece vocabulary")
}

pub(crate) fn mistral_vocab(version: &str) -> GgufVocab {
    let path = Path::new(CRATE).join("tests/golden").join(format!("{version}.model"));
    let file = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (mut tokens, mut scores, mut types) = (Vec::new(), Vec::new(), Vec::new());
    for (_, piece) in fields(&file).into_iter().filter(|&(number, _)| number == 1) {
        let (mut token, mut score, mut kind) = (String::new(), 0.0, 1);
        for (number, value) in fields(piece) {
            match number {
                1 => token = String::from_utf8(value.to_vec()).expect("UTF-8"),
                2 => score = f32::from_le_bytes(value.try_into().expect("four bytes")),
                3 => kind = i32::from(value[0]),
                _ => {}
            }
        }
        tokens.push(token);
        scores.push(score);
        types.push(kind);
    }
    GgufVocab {
        model: "llama".into(),
        pre: None,
        tokens,
        types,
        merges: Vec::new(),
        scores,
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_space_prefix: true,
    }
}

/// The fields of a protobuf message: their numbers, and their bytes as they stand.
fn fields(mut message: &[u8]) -> Vec<(u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let end = bytes.iter().position(|b| b & 0x80 == 0).expect("a varint ends") + 1;
        let (number, rest) = bytes.split_at(end);
        *bytes = rest;
        number.iter().rev().fold(0, |value, b| value << 7 | u64::from(b & 0x7f))
    }
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let length = match key & 7 {
            0 => message.iter().position(|b| b & 0x80 == 0).expect("a varint ends") + 1,
            1 => 8,
            2 => usize::try_from(varint(&mut message)).expect("a length"),
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let (value, rest) = message.split_at(length);
        fields.push((key >> 3, value));
        message = rest;
    }
    fields
}

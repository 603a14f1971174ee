//! The models that the tests read.

use std::path::{Path, PathBuf};

use galerne_checkpoint::{
    Checkpoint, GgufVocab, MistralVersion, SentencePieceFile, SentencePieceModel, TextAssets, TokenizerAsset,
};
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
    TextAssets {
        tokenizer,
        sentencepiece: None,
        chat_template: None,
        bos_token: None,
        eos_token: None,
        add_bos: true,
    }
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

/// Mistral's SentencePiece model `version` (v1, v2, v3), from its own file, under a name that tells the version.
pub(crate) fn mistral(version: &str) -> Tokenizer {
    Tokenizer::load(&mistral_assets(version)).expect("a SentencePiece model")
}

pub(crate) fn mistral_assets(version: &str) -> TextAssets {
    let file = SentencePieceFile {
        path: model_path(version),
        version: Some(match version {
            "v1" => MistralVersion::V1,
            "v2" => MistralVersion::V2,
            _ => MistralVersion::V3,
        }),
        mistral: true,
    };
    TextAssets { sentencepiece: Some(file), ..assets(TokenizerAsset::None) }
}

pub(crate) fn model_path(version: &str) -> PathBuf {
    Path::new(CRATE).join("tests/golden").join(format!("{version}.model"))
}

/// The same vocabulary as llama.cpp writes it into a GGUF file.
pub(crate) fn mistral_vocab(version: &str) -> GgufVocab {
    let model = SentencePieceModel::read(&model_path(version)).expect("a SentencePiece model");
    GgufVocab {
        model: "llama".into(),
        pre: None,
        tokens: model.tokens,
        types: model.types,
        merges: Vec::new(),
        scores: model.scores,
        bos: model.bos,
        eos: model.eos,
        unk: Some(0),
        add_space_prefix: model.add_space_prefix,
    }
}

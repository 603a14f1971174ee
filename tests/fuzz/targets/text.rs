//! Tokenizers as files bring them, and text as clients bring it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use galerne_checkpoint::{GgufVocab, SentencePieceFile, TextAssets, TokenizerAsset};
use galerne_text::{ChatFormat, Detokenizer, Tokenizer, ToolParser};
use serde_json::{Value, json};

use super::checkpoint::sentencepiece_model;
use crate::engine::{Outcome, Target, alone, fuzz, mutate};

const NO_ASSETS: TextAssets = TextAssets {
    tokenizer: TokenizerAsset::None,
    sentencepiece: None,
    chat_template: None,
    bos_token: None,
    eos_token: None,
    add_bos: true,
};

pub(super) fn sentencepiece_assets(path: PathBuf) -> TextAssets {
    TextAssets { sentencepiece: Some(SentencePieceFile { path, version: None, mistral: true }), ..NO_ASSETS }
}

pub(super) fn bard_assets() -> TextAssets {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bard-1m/tokenizer.json");
    TextAssets { tokenizer: TokenizerAsset::Json(path), ..NO_ASSETS }
}

pub(super) fn load(assets: &TextAssets) -> Result<Tokenizer, String> {
    Tokenizer::load(assets).map_err(|error| error.to_string())
}

/// Encodes and decodes with a tokenizer that was loaded: it may refuse, and must come back.
pub(super) fn uses(tokenizer: &Tokenizer) -> Outcome {
    let long = "aaaa the ".repeat(200);
    for text in ["", " the wind, l\u{e9}ger \u{1f32c}\u{0}\n\n  1234567", "<s>[INST]</s><|im_end|>", &long] {
        for ids in [tokenizer.encode(text, true), tokenizer.encode(text, false), tokenizer.encode_plain(text)]
        {
            let ids = ids.map_err(|error| error.to_string())?;
            tokenizer.decode(&ids, true);
        }
    }
    let all: Vec<u32> = (0..2_000).chain([u32::MAX]).collect();
    tokenizer.decode(&all, false);
    Ok(())
}

/// A `tokenizer.json` of byte-level BPE, and one of SentencePiece's kind.
fn tokenizer_jsons() -> [Value; 4] {
    let added = json!([{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}]);
    let bytes: serde_json::Map<String, Value> =
        (0..=255).map(|byte| (format!("<0x{byte:02X}>"), json!(byte + 10))).collect();
    let letters = json!({"<s>": 0, "a": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6, "\u{2581}": 7, "\u{120}": 8, "\u{120}the": 9});
    let mut all = letters.as_object().cloned().unwrap_or_default();
    all.extend(bytes);
    let bpe = |vocab: &Value, fallback: bool| {
        json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": fallback, "ignore_merges": false, "vocab": vocab,
        "merges": [["t", "h"], ["th", "e"]]})
    };
    let whole = |normalizer: Value, words: Value, post: Value, decoder: Value, model: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": words, "post_processor": post, "decoder": decoder, "model": model})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let split = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+(?!\\S)|\\s+|."}, "behavior": "Isolated", "invert": false},
        {"type": "Digits", "individual_digits": true}, byte_level]});
    let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    let pieces = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let spaces = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false});
    let unigram = json!({"type": "Unigram", "unk_id": 0, "byte_fallback": true,
        "vocab": [["<s>", 0.0], ["a", -1.0], ["\u{2581}the", -2.0], ["<0x41>", -3.0]]});
    let all = Value::Object(all);
    [
        whole(Value::Null, byte_level.clone(), byte_level.clone(), byte_level.clone(), bpe(&letters, false)),
        whole(json!({"type": "NFC"}), split, template.clone(), byte_level, bpe(&letters, false)),
        whole(spaces, Value::Null, template.clone(), pieces.clone(), bpe(&all, true)),
        whole(Value::Null, metaspace, template, pieces, unigram),
    ]
}

#[test]
fn tokenizer_json() {
    let alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    let target = Target {
        name: "tokenizer_json",
        seeds: tokenizer_jsons().iter().map(|seed| seed.to_string().into_bytes()).collect(),
        words: &[
            "type",
            "BPE",
            "Unigram",
            "WordPiece",
            "WordLevel",
            "Precompiled",
            "precompiled_charsmap",
            "Regex",
            "(a+)+$",
            "(a|a)*b",
            "Replace",
            "Sequence",
            "ByteLevel",
            "Split",
            "Isolated",
            "content",
            "special",
            "merges",
            "vocab",
            "\u{2581}",
            "<0x41>",
            "Punctuation",
            "Whitespace",
            "BertNormalizer",
            "StripAccents",
            "NFKC",
            "CharDelimiterSplit",
            "Metaspace",
            "dropout",
            "max_input_chars_per_word",
            "unk_token",
            "unk_id",
            "Truncate",
            "Prepend",
            "UnicodeScripts",
            "CTC",
            "FixedLength",
        ],
        change: mutate::json,
        runs: 1_500,
        memory_bytes: (16 << 20, 1_000),
        cpu: (Duration::from_secs(4), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        std::fs::write(&path, input).expect("a file");
        uses(&load(&TextAssets { tokenizer: TokenizerAsset::Json(path.clone()), ..NO_ASSETS })?)
    });
}

#[test]
fn vocabularies() {
    let alone = alone();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes).collect();
    let types: Vec<i32> = (0..tokens.len()).map(|at| if at < 3 { 3 } else { 6 }).collect();
    let seeds = [
        json!({"model": "llama", "tokens": tokens, "types": types, "scores": vec![0.0; tokens.len()], "merges": [], "space": true}),
        json!({"model": "gpt2", "pre": "llama-bpe", "tokens": ["a", "b", "ab", "\u{120}", "\u{120}a", "<s>"], "types": [1, 1, 1, 1, 1, 3],
            "scores": [], "merges": ["a b", "\u{120} a"], "space": false}),
    ];
    let target = Target {
        name: "vocabularies",
        seeds: seeds.iter().map(|seed| seed.to_string().into_bytes()).collect(),
        words: &["llama", "gpt2", "smollm", "gpt-2", "<0xFF>", "\u{2581}", "a b", "a  b", " ", "\u{120}"],
        change: mutate::json,
        runs: 1_500,
        memory_bytes: (8 << 20, 1_000),
        cpu: (Duration::from_secs(2), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        let Ok(value) = serde_json::from_slice::<Value>(input) else { return Ok(()) };
        let list = |name: &str| value[name].as_array().cloned().unwrap_or_default();
        let texts =
            |name| list(name).iter().filter_map(|item| item.as_str().map(str::to_owned)).collect::<Vec<_>>();
        let tokens = texts("tokens");
        // The checkpoint has seen to the lengths; see `GgufVocab`.
        let mut types: Vec<i32> =
            list("types").iter().map(|item| item.as_i64().unwrap_or(1) as i32).collect();
        types.resize(if types.is_empty() { 0 } else { tokens.len() }, 1);
        let mut scores: Vec<f32> =
            list("scores").iter().map(|item| item.as_f64().unwrap_or(f64::NAN) as f32).collect();
        scores.resize(if scores.is_empty() { 0 } else { tokens.len() }, 0.0);
        let within =
            |name: &str| value[name].as_u64().map(|id| id as u32).filter(|id| (*id as usize) < tokens.len());
        let vocab = GgufVocab {
            model: value["model"].as_str().unwrap_or_default().to_owned(),
            pre: value["pre"].as_str().map(str::to_owned),
            types,
            merges: texts("merges"),
            scores,
            bos: within("bos"),
            eos: within("eos"),
            unk: within("unk"),
            add_space_prefix: value["space"] == true,
            tokens,
        };
        uses(&load(&TextAssets { tokenizer: TokenizerAsset::Gguf(vocab), ..NO_ASSETS })?)
    });
}

#[test]
fn text() {
    let alone = alone();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.model");
    std::fs::write(&path, sentencepiece_model()).expect("a file");
    let tokenizers =
        [bard_assets(), sentencepiece_assets(path)].map(|assets| Arc::new(load(&assets).expect("one")));
    let target = Target {
        name: "text",
        seeds: [
            "The wind.",
            "l\u{e9}ger \u{1f32c}\u{fe0f}  \n\t 12345",
            "<s>[INST] a [/INST]</s>",
            "aaaaaaaa",
            "\u{0}\u{301}\u{200d}",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        words: &[
            "a",
            "  ",
            "\n",
            "the",
            "\u{e9}",
            "e\u{301}",
            "\u{1f469}\u{200d}\u{1f52c}",
            "<s>",
            "[INST]",
            "\u{2581}",
            "'ll",
            "1",
            "\u{feff}",
        ],
        change: mutate::bytes,
        runs: 3_000,
        memory_bytes: (4 << 20, 300),
        cpu: (Duration::from_millis(300), Duration::from_micros(10)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        let text = String::from_utf8_lossy(input);
        for tokenizer in &tokenizers {
            let plain = tokenizer.encode_plain(&text).map_err(|error| error.to_string())?;
            let back = tokenizer.decode(&plain, false);
            // SentencePiece writes a space as this character, so that it comes back as one.
            let blank = |text: &str| text.replace('\u{2581}', " ");
            assert_eq!(blank(&back).trim_start(), blank(&text).trim_start(), "a text comes back as it was");
            let ids = tokenizer.encode(&text, true).map_err(|error| error.to_string())?;
            let mut pieces = Detokenizer::new(Arc::clone(tokenizer), &[], vec!["the w".to_owned()], false);
            let whole: String = ids.iter().map(|&id| pieces.push(id).text).collect();
            assert!(whole.len() <= 4 * text.len() + 64, "a text does not grow");
        }
        Ok(())
    });
}

/// What a model writes when it was taught to call tools; a client can make it write anything.
#[test]
fn calls() {
    let alone = alone();
    let bard = load(&bard_assets()).expect("a tokenizer");
    let format = |template: &str| {
        let assets = TextAssets { chat_template: Some(template.to_owned()), ..bard_assets() };
        let format = ChatFormat::load(&assets, &bard, None).expect("a format").expect("a template");
        format.tool_format().expect("tools")
    };
    let formats = ["[TOOL_CALLS]", "<tool_call>", "<|python_tag|>"].map(format);
    let target = Target {
        name: "calls",
        seeds: [
            "Let me see.[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [1, \"\u{e9}\"]}, \"id\": \"123456789\"}]",
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call><tool_call>{\"name\": \"g\"}</tool_call>",
            "{\"name\": \"f\", \"parameters\": {\"a\": \"\\\"\\u00e9\"}}",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        words: &["[TOOL_CALLS]", "<tool_call>", "</tool_call>", "\"name\": ", "\"arguments\": ", "{", "[", "\\u", "}]", "null"],
        change: mutate::bytes,
        runs: 800,
        memory_bytes: (1 << 20, 100),
        cpu: (Duration::from_millis(300), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        let text = String::from_utf8_lossy(input);
        for format in &formats {
            let mut parser = ToolParser::new(format, || "id".to_owned());
            let mut at = 0;
            let mut told = 0;
            while at < text.len() {
                let end = text.ceil_char_boundary((at + 1 + at % 7).min(text.len()));
                told += parser.push(&text[at..end]).len();
                at = end;
            }
            told += parser.finish().len();
            assert!(told <= 2 * text.len() + 16, "few parts");
        }
        Ok(())
    });
}

//! Files of models: GGUF, safetensors with their configuration and index, SentencePiece.

use std::path::Path;
use std::time::Duration;

use galerne_checkpoint::{Checkpoint, Dtype, SentencePieceModel, Weight};
use galerne_text::{ChatFormat, Tokenizer};
use serde_json::{Value, json};

use crate::engine::{Outcome, Target, alone, fuzz, mutate};

#[path = "../../../crates/checkpoint/tests/it/support/mod.rs"]
#[allow(dead_code, reason = "the crate's own tests use the rest")]
mod support;

use support::gguf::{Gguf, Meta};
use support::safetensors::Safetensors;
use support::{Folder, Model};

const TARGET: Target = Target {
    name: "",
    seeds: Vec::new(),
    words: &[],
    change: mutate::bytes,
    runs: 800,
    memory_bytes: (4 << 20, 64),
    cpu: (Duration::from_millis(500), Duration::from_micros(20)),
    secret: None,
};

/// Opens what lies there, reads all of it, and makes a tokenizer and a chat format of it.
fn open(path: &Path) -> Outcome {
    let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
    let mut out = Vec::new();
    for weight in Weight::all(checkpoint.config()) {
        let info = checkpoint.tensor(weight);
        checkpoint
            .read_rows(weight, 0..info.rows, 0..info.cols, &mut out)
            .expect("a weight that was checked");
        assert_eq!(out.len(), info.bytes());
    }
    let tokenizer = Tokenizer::load(checkpoint.text()).map_err(|error| error.to_string())?;
    ChatFormat::load(checkpoint.text(), &tokenizer, None).map_err(|error| error.to_string())?;
    let ids = tokenizer.encode("The wind, l\u{e9}ger.", true).map_err(|error| error.to_string())?;
    tokenizer.decode(&ids, false);
    Ok(())
}

/// The vocabularies of 40 tokens, as GGUF has them.
fn vocabularies() -> [Gguf; 3] {
    let text = |text: &str| Meta::Text(text.to_owned());
    let plain = Model::small(Dtype::Q8_0).gguf();
    let mut byte_level = Model::small(Dtype::F16).gguf();
    let tokens = (0..40_u8).map(|at| match at {
        0..26 => char::from(b'a' + at).to_string(),
        26 => "th".into(),
        27 => "the".into(),
        28 => "<s>".into(),
        _ => char::from(b'0' + at - 29).to_string(),
    });
    byte_level.set("tokenizer.ggml.model", text("gpt2"));
    byte_level.set("tokenizer.ggml.pre", text("smollm"));
    byte_level.set("tokenizer.ggml.tokens", Meta::Texts(tokens.collect()));
    byte_level.set("tokenizer.ggml.merges", Meta::Texts(vec!["t h".into(), "th e".into()]));
    byte_level.set(
        "tokenizer.ggml.token_type",
        Meta::I32s((0..40).map(|at| if at == 28 { 3 } else { 1 }).collect()),
    );
    byte_level.set("tokenizer.chat_template", text("{% for m in messages %}{{ m.content }}{% endfor %}"));
    let mut model = Model::small(Dtype::F32);
    model.config.vocab = 300;
    let mut pieces = model.gguf();
    let tokens = (0..300).map(|at| match at {
        0..3 => ["<unk>", "<s>", "</s>"][at].to_owned(),
        3..259 => format!("<0x{:02X}>", at - 3),
        _ => format!("\u{2581}{}", "ab".repeat(at - 258)),
    });
    pieces.set("tokenizer.ggml.model", text("llama"));
    pieces.set("tokenizer.ggml.tokens", Meta::Texts(tokens.collect()));
    pieces.set("tokenizer.ggml.scores", Meta::F32s((0..300).map(|at| -(at as f32)).collect()));
    let kind = |at| {
        if at < 3 {
            3
        } else if at < 259 {
            6
        } else {
            1
        }
    };
    pieces.set("tokenizer.ggml.token_type", Meta::I32s((0..300).map(kind).collect()));
    pieces.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
    [plain, byte_level, pieces]
}

#[test]
fn gguf() {
    let alone = alone();
    let folder = Folder::new();
    let target = Target {
        name: "gguf",
        seeds: vocabularies().iter().map(Gguf::encode).collect(),
        words: &["GGUF", "llama", "gpt2", "tokenizer.ggml.tokens", "general.alignment", "\u{2581}", "<0x00>"],
        change: |seed, input, other, words| {
            // Most of a file is weights, of which nothing can be wrong.
            let head = input.len().min(9_000);
            let mut out = mutate::bytes(seed, &input[..head], other, words);
            if seed.one_in(2) {
                out.resize(head, 0);
            }
            [&out[..], &input[head..]].concat()
        },
        ..TARGET
    };
    fuzz(&alone, &target, |input| open(&folder.write("small.gguf", input)));
}

#[test]
fn safetensors() {
    let alone = alone();
    let folder = Folder::new();
    let (config, tensors) = Model::small(Dtype::Bf16).hugging_face();
    folder.write("config.json", config.to_string());
    let target = Target {
        name: "safetensors",
        seeds: vec![tensors.encode(), tensors.encode_with("{}")],
        words: &["dtype", "shape", "data_offsets", "__metadata__", "BF16", "F8_E4M3", "[0,0]"],
        change: |seed, input, other, words| {
            let Some((bytes, rest)) = input.split_first_chunk() else {
                return mutate::bytes(seed, input, other, words);
            };
            let header = usize::try_from(u64::from_le_bytes(*bytes)).unwrap_or(0).min(rest.len());
            if seed.one_in(6) {
                return [&mutate::bytes(seed, &input[..header + 8], other, words), &rest[header..]].concat();
            }
            let other = other.get(8..).unwrap_or_default();
            let changed = mutate::json(seed, &rest[..header], other, words);
            [&(changed.len() as u64).to_le_bytes()[..], &changed, &rest[header..]].concat()
        },
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        folder.write("model.safetensors", input);
        open(folder.path())
    });
}

/// Files of a folder in one JSON text, each under its name.
#[test]
fn configurations() {
    let alone = alone();
    let (config, tensors) = Model::small(Dtype::F16).hugging_face();
    let (params, native) = Model::small(Dtype::F16).native();
    let (index, parts) = tensors.split(5);
    let tokenizer = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": true,
        "chat_template": [{"name": "default", "template": "{{ messages }}"}]});
    let template = json!({"chat_template": "{{ messages }}"});
    let generation = json!({"eos_token_id": [2, 3]});
    let seeds = [
        json!({"config.json": config, "tokenizer_config.json": tokenizer, "generation_config.json": generation}),
        json!({"params.json": params, "tokenizer_config.json": tokenizer, "chat_template.json": template}),
        json!({"config.json": config, "model.safetensors.index.json": index}),
    ];
    let target = Target {
        name: "configurations",
        seeds: seeds.iter().map(|seed| seed.to_string().into_bytes()).collect(),
        words: &[
            "rope_theta",
            "rope_scaling",
            "sliding_window",
            "head_dim",
            "eos_token_id",
            "weight_map",
            "../x.safetensors",
            "mistral",
            "default",
            "layer_types",
            "sliding_attention",
            "moe",
            "chat_template",
        ],
        change: mutate::json,
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        let folder = Folder::new();
        let files = serde_json::from_slice::<serde_json::Map<String, Value>>(input).unwrap_or_default();
        for (name, content) in &files {
            // What was a JSON text may have become a text that is none.
            let content = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
            if !name.is_empty()
                && name.len() < 200
                && !name.contains(['/', '\0'])
                && name != "."
                && name != ".."
            {
                folder.write(name, content);
            }
        }
        let weights = if files.contains_key("params.json") {
            vec![("consolidated.safetensors".to_owned(), &native)]
        } else if files.contains_key("model.safetensors.index.json") {
            parts.iter().map(|(name, part)| (name.clone(), part)).collect()
        } else {
            vec![("model.safetensors".to_owned(), &tensors)]
        };
        weights
            .iter()
            .for_each(|(name, part): &(String, &Safetensors)| drop(folder.write(name, part.encode())));
        open(folder.path())
    });
}

/// A protobuf field of bytes.
fn bytes_field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend(content);
    out
}

/// A SentencePiece model of all bytes and some pieces.
pub(super) fn sentencepiece_model() -> Vec<u8> {
    let piece = |text: &str, kind: u8, score: f32| {
        let score = [&[0x15][..], &score.to_le_bytes()].concat();
        bytes_field(1, &[bytes_field(1, text.as_bytes()), score, vec![0x18, kind]].concat())
    };
    let mut out = [piece("<unk>", 2, 0.0), piece("<s>", 3, 0.0), piece("</s>", 3, 0.0)].concat();
    for control in ["[INST]", "[/INST]", "[TOOL_CALLS]"] {
        out.extend(piece(control, 3, 0.0));
    }
    (0..=255_u8).for_each(|byte| out.extend(piece(&format!("<0x{byte:02X}>"), 6, 0.0)));
    for (at, text) in
        ["\u{2581}t", "he", "\u{2581}the", "a", "t", "h", "e", "\u{2581}", "aa", "aaaa"].iter().enumerate()
    {
        out.extend(piece(text, 1, -(at as f32)));
    }
    // Byte-pair encoding, with byte fallback; no extra spaces are removed.
    out.extend(bytes_field(2, &[0x18, 2, 0x98, 0x02, 1]));
    out.extend(bytes_field(3, &[0x20, 0]));
    out
}

#[test]
fn sentencepiece() {
    let alone = alone();
    let folder = Folder::new();
    let target = Target {
        name: "sentencepiece",
        seeds: vec![sentencepiece_model()],
        words: &["<0x41>", "\u{2581}", "[INST]", "\u{18}\u{6}"],
        memory_bytes: (4 << 20, 256),
        ..TARGET
    };
    fuzz(&alone, &target, |input| {
        let path = folder.write("tokenizer.model", input);
        SentencePieceModel::parse(&path, input).map_err(|error| error.to_string())?;
        super::text::load(&super::text::sentencepiece_assets(path))
            .and_then(|tokenizer| super::text::uses(&tokenizer))
    });
}

//! Mistral's own client, and OpenAI's Responses, against a model with Mistral's v3 vocabulary: random weights, so that
//! nothing it says makes sense, but its formats, tools and gaps are the real ones.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, json};

use crate::process::{self, Process};
use crate::setup::{self, Cluster};

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const HEAD_DIM: usize = 16;
const INTERMEDIATE: usize = 96;
const LAYERS: usize = 2;
const VOCAB: usize = 32_768;
const CONTEXT_TOKENS: usize = 4096;

#[test]
fn mistrals_client_and_openais_responses_are_served() {
    let model = random_v3();
    let mut inspect = Process::start(setup::galerne().args(["model", "inspect"]).arg(model.path()));
    assert!(inspect.exit_within(process::PATIENCE).success(), "{}", inspect.output());
    assert!(
        inspect.output().contains("tokenizer SentencePiece; chat format mistral-v3"),
        "{}",
        inspect.output()
    );
    let cluster = Cluster::up(model.path(), &["--tp", "2", "--model-name", "random-v3"]);
    let told = cluster.process.line_with("random-v3: chat format");
    assert!(told.ends_with("mistral-v3 (its vocabulary is Mistral's), with calls of tools"), "{told}");
    for script in ["mistral_client.py", "openai_responses.py"] {
        let mut client = Process::start(setup::python(script).args([&cluster.http, "random-v3"]));
        let status = client.exit_within(process::PATIENCE);
        assert!(status.success(), "{script}: {}", client.output());
    }
}

/// A checkpoint of Mistral's shape with random weights beside the SentencePiece model of v3.
fn random_v3() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let vocabulary = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/text/tests/golden/v3.model");
    std::fs::copy(vocabulary, folder.path().join("tokenizer.model.v3")).expect("the vocabulary");
    let config = json!({
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT_TOKENS, "sliding_window": null, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    std::fs::write(folder.path().join("model.safetensors"), random_tensors()).expect("written");
    folder
}

/// All tensors as bf16 in one file.
fn random_tensors() -> Vec<u8> {
    let attention = HEADS * HEAD_DIM;
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
    for layer in 0..LAYERS {
        let tensors = [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![attention, HIDDEN]),
            ("self_attn.k_proj", vec![attention, HIDDEN]),
            ("self_attn.v_proj", vec![attention, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, attention]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ];
        shapes.extend(tensors.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    shapes.push(("model.norm.weight".to_owned(), vec![HIDDEN]));

    let (mut header, mut data, mut state) = (Map::new(), Vec::new(), 1_u64);
    for (name, shape) in shapes {
        let begin = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1_u64 << 24) as f32; // 0 to 1
            let value = if shape.len() == 1 { 1.0 } else { (unit - 0.5) * 0.25 };
            data.extend_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes());
        }
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, data.len()] });
        header.insert(name, entry);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    let padding = header.len().next_multiple_of(8) - header.len();
    write!(header, "{}", " ".repeat(padding)).expect("a string grows");
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

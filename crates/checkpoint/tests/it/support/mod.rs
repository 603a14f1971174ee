//! A small model of known bytes, and writers that put it into each form of checkpoint.

pub(crate) mod gguf;
pub(crate) mod safetensors;

use std::fs;
use std::path::{Path, PathBuf};

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight};
use serde_json::{Value, json};
use tempfile::TempDir;

use gguf::Gguf;
use safetensors::Safetensors;

/// A model whose bytes depend on their place only, with q/k rows in Hugging Face's order.
pub(crate) struct Model {
    pub(crate) config: Config,
    /// Of the matrices; norms are F32.
    pub(crate) dtype: Dtype,
}

impl Model {
    pub(crate) fn small(dtype: Dtype) -> Self {
        let config = Config {
            layers: 2,
            hidden: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            intermediate: 96,
            vocab: 40,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            window: Some(16),
            context_tokens_max: 128,
            tied: false,
            bos: Some(1),
            eos: vec![2],
        };
        Self { config, dtype }
    }

    pub(crate) fn dtype(&self, weight: Weight) -> Dtype {
        if weight.is_norm() { Dtype::F32 } else { self.dtype }
    }

    /// The whole of a weight, as [`Checkpoint::read_rows`] must return it.
    pub(crate) fn bytes(&self, weight: Weight) -> Vec<u8> {
        let (rows, cols) = weight.shape(&self.config);
        let seed =
            format!("{weight:?}").bytes().fold(17u64, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte));
        let byte = |at: usize| ((seed + at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8;
        (0..rows * self.dtype(weight).row_bytes(cols)).map(byte).collect()
    }

    /// The same with the q/k rows of each head in adjacent pairs, as Mistral's own files and llama.cpp's have them.
    pub(crate) fn paired_bytes(&self, weight: Weight) -> Vec<u8> {
        let bytes = self.bytes(weight);
        if !matches!(weight, Weight::Q(_) | Weight::K(_)) {
            return bytes;
        }
        let (_, cols) = weight.shape(&self.config);
        let row_bytes = self.dtype(weight).row_bytes(cols);
        let mut paired = Vec::with_capacity(bytes.len());
        for head in bytes.chunks(self.config.head_dim * row_bytes) {
            let (first_half, second_half) = head.split_at(head.len() / 2);
            for (a, b) in first_half.chunks(row_bytes).zip(second_half.chunks(row_bytes)) {
                paired.extend_from_slice(a);
                paired.extend_from_slice(b);
            }
        }
        paired
    }

    pub(crate) fn hugging_face(&self) -> (Value, Safetensors) {
        let config = &self.config;
        let json = json!({
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": config.hidden,
            "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim, "vocab_size": config.vocab, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "sliding_window": config.window,
            "max_position_embeddings": config.context_tokens_max, "tie_word_embeddings": config.tied,
            "bos_token_id": config.bos, "eos_token_id": config.eos,
        });
        let mut file = Safetensors::default();
        for weight in Weight::all(config) {
            file.push(&names(weight)[0], self.dtype(weight), &shape(weight, config), &self.bytes(weight));
        }
        (json, file)
    }

    pub(crate) fn native(&self) -> (Value, Safetensors) {
        let config = &self.config;
        let json = json!({
            "dim": config.hidden, "n_layers": config.layers, "head_dim": config.head_dim,
            "hidden_dim": config.intermediate, "n_heads": config.heads, "n_kv_heads": config.kv_heads,
            "norm_eps": config.norm_eps, "vocab_size": config.vocab, "sliding_window": config.window,
            "max_seq_len": config.context_tokens_max, "tied_embeddings": config.tied,
        });
        let mut file = Safetensors::default();
        for weight in Weight::all(config) {
            file.push(
                &names(weight)[1],
                self.dtype(weight),
                &shape(weight, config),
                &self.paired_bytes(weight),
            );
        }
        (json, file)
    }

    pub(crate) fn gguf(&self) -> Gguf {
        let mut file = Gguf::of(&self.config);
        for weight in Weight::all(&self.config) {
            let shape = shape(weight, &self.config);
            file.push(&names(weight)[2], self.dtype(weight), &shape, &self.paired_bytes(weight));
        }
        file
    }
}

fn shape(weight: Weight, config: &Config) -> Vec<usize> {
    let (rows, cols) = weight.shape(config);
    if weight.is_norm() { vec![cols] } else { vec![rows, cols] }
}

/// Hugging Face's, Mistral's and llama.cpp's name.
fn names(weight: Weight) -> [String; 3] {
    let layer = |layer: usize, names: [&str; 3]| {
        let [hugging_face, native, gguf] = names;
        [
            format!("model.layers.{layer}.{hugging_face}.weight"),
            format!("layers.{layer}.{native}.weight"),
            format!("blk.{layer}.{gguf}.weight"),
        ]
    };
    match weight {
        Weight::Embedding => {
            ["model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"].map(String::from)
        }
        Weight::Head => ["lm_head.weight", "output.weight", "output.weight"].map(String::from),
        Weight::FinalNorm => ["model.norm.weight", "norm.weight", "output_norm.weight"].map(String::from),
        Weight::AttnNorm(n) => layer(n, ["input_layernorm", "attention_norm", "attn_norm"]),
        Weight::MlpNorm(n) => layer(n, ["post_attention_layernorm", "ffn_norm", "ffn_norm"]),
        Weight::Q(n) => layer(n, ["self_attn.q_proj", "attention.wq", "attn_q"]),
        Weight::K(n) => layer(n, ["self_attn.k_proj", "attention.wk", "attn_k"]),
        Weight::V(n) => layer(n, ["self_attn.v_proj", "attention.wv", "attn_v"]),
        Weight::O(n) => layer(n, ["self_attn.o_proj", "attention.wo", "attn_output"]),
        Weight::Gate(n) => layer(n, ["mlp.gate_proj", "feed_forward.w1", "ffn_gate"]),
        Weight::Up(n) => layer(n, ["mlp.up_proj", "feed_forward.w3", "ffn_up"]),
        Weight::Down(n) => layer(n, ["mlp.down_proj", "feed_forward.w2", "ffn_down"]),
    }
}

/// A folder that lives as long as the test.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).expect("a file in a temporary folder");
        path
    }

    pub(crate) fn hugging_face(config: &Value, tensors: &Safetensors) -> Self {
        let folder = Self::new();
        folder.write("config.json", config.to_string());
        folder.write("model.safetensors", tensors.encode());
        folder
    }

    pub(crate) fn native(params: &Value, tensors: &Safetensors) -> Self {
        let folder = Self::new();
        folder.write("params.json", params.to_string());
        folder.write("consolidated.safetensors", tensors.encode());
        folder
    }

    /// Opens the folder's checkpoint; a reason to refuse it comes as its sentence.
    pub(crate) fn open(&self) -> Result<Checkpoint, String> {
        Checkpoint::open(self.path()).map_err(|error| error.to_string())
    }

    /// Writes a GGUF file into the folder and opens it.
    pub(crate) fn open_gguf(&self, content: impl AsRef<[u8]>) -> Result<Checkpoint, String> {
        Checkpoint::open(&self.write("small.gguf", content)).map_err(|error| error.to_string())
    }
}

/// Holds every weight of an open checkpoint against the model.
pub(crate) fn assert_holds(checkpoint: &Checkpoint, model: &Model) {
    let mut read = Vec::new();
    for weight in Weight::all(&model.config) {
        let info = checkpoint.tensor(weight);
        assert_eq!((info.rows, info.cols), weight.shape(&model.config), "{weight}");
        assert_eq!(info.dtype, model.dtype(weight), "{weight}");
        checkpoint.read_rows(weight, 0..info.rows, 0..info.cols, &mut read).expect("a whole tensor");
        assert_eq!(read, model.bytes(weight), "{weight}");
    }
}

/// Asserts that a checkpoint was refused with a sentence that has all of these words.
pub(crate) fn assert_refused(case: &str, opened: Result<Checkpoint, String>, words: &[&str]) {
    let Err(sentence) = opened else { panic!("{case}: accepted") };
    for word in words {
        assert!(sentence.contains(word), "{case}: expected {word:?} in: {sentence}");
    }
    assert!(sentence.len() < 1000, "{case}: {} bytes of error", sentence.len());
}

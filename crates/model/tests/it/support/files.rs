//! Small checkpoints, written by hand so that nothing of the reader under test is used.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight, dequantize};
use half::{bf16, f16};

use super::k_quants;

/// Tensors by their Hugging Face names, `[rows][cols]` in Hugging Face's order, and what they mean in f32.
pub(crate) struct Model {
    pub(crate) config: Config,
    pub(crate) tensors: BTreeMap<String, Matrix>,
}

#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) values: Vec<f32>,
}

/// A small repeatable generator.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    /// In -1 … 1.
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub(crate) fn config(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
) -> Config {
    Config {
        layers: 2,
        hidden: 64,
        heads,
        kv_heads,
        head_dim,
        intermediate,
        vocab,
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        window: None,
        context_tokens_max: 256,
        tied: false,
        bos: Some(1),
        eos: vec![2],
    }
}

/// `config`, with widths that are whole blocks of `dtype` in each of four shards.
pub(crate) fn in_whole_blocks(config: Config, dtype: Dtype) -> Config {
    match dtype {
        Dtype::Q4K | Dtype::Q6K => Config { hidden: 256, head_dim: 128, intermediate: 1024, ..config },
        _ => config,
    }
}

impl Model {
    /// The model as a GGUF file, opened; it is there as long as the folder.
    pub(crate) fn gguf(&self, dtype: Dtype) -> (tempfile::TempDir, Checkpoint) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        self.write_gguf(&path, dtype);
        let checkpoint = Checkpoint::open(&path).unwrap();
        (folder, checkpoint)
    }

    /// Random weights, large enough for every part to show in the logits.
    pub(crate) fn random(config: Config, seed: u64) -> Self {
        let mut noise = Noise(seed);
        let mut tensors = BTreeMap::new();
        let &Config { hidden, heads, kv_heads, head_dim, intermediate, vocab, .. } = &config;
        let mut matrix = |name: String, rows: usize, cols: usize| {
            let values = match rows {
                1 => (0..cols).map(|_| 1.0 + 0.5 * noise.next()).collect(),
                _ => (0..rows * cols).map(|_| 0.25 * noise.next()).collect(),
            };
            tensors.insert(name, Matrix { rows, cols, values });
        };
        matrix("model.embed_tokens.weight".into(), vocab, hidden);
        matrix("model.norm.weight".into(), 1, hidden);
        if !config.tied {
            matrix("lm_head.weight".into(), vocab, hidden);
        }
        for layer in 0..config.layers {
            let mut part =
                |name: &str, rows, cols| matrix(format!("model.layers.{layer}.{name}.weight"), rows, cols);
            part("input_layernorm", 1, hidden);
            part("post_attention_layernorm", 1, hidden);
            part("self_attn.q_proj", heads * head_dim, hidden);
            part("self_attn.k_proj", kv_heads * head_dim, hidden);
            part("self_attn.v_proj", kv_heads * head_dim, hidden);
            part("self_attn.o_proj", hidden, heads * head_dim);
            part("mlp.gate_proj", intermediate, hidden);
            part("mlp.up_proj", intermediate, hidden);
            part("mlp.down_proj", hidden, intermediate);
        }
        Self { config, tensors }
    }

    /// Rounds every matrix to what `dtype` can hold; norms stay f32.
    pub(crate) fn rounded(mut self, dtype: Dtype) -> Self {
        for matrix in self.tensors.values_mut().filter(|matrix| matrix.rows > 1) {
            matrix.values = decode(dtype, &encode(dtype, &matrix.values));
        }
        self
    }

    /// What a checkpoint holds, in f32.
    pub(crate) fn read(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config().clone();
        let tensor = |weight: Weight| {
            let info = checkpoint.tensor(weight);
            let (rows, cols) = (info.rows, info.cols);
            let mut bytes = Vec::new();
            checkpoint.read_rows(weight, 0..rows, 0..cols, &mut bytes).unwrap();
            let mut values = vec![0.0; rows * cols];
            dequantize(info.dtype, &bytes, &mut values);
            (hugging_face_name(weight), Matrix { rows, cols, values })
        };
        let tensors = Weight::all(&config).map(tensor).collect();
        Self { config, tensors }
    }

    /// As a Hugging Face folder; norms stay f32.
    pub(crate) fn write_folder(&self, folder: &Path, dtype: Dtype) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, matrix) in &self.tensors {
            let dtype = if matrix.rows == 1 { Dtype::F32 } else { dtype };
            let bytes = encode(dtype, &matrix.values);
            let shape = if matrix.rows == 1 { vec![matrix.cols] } else { vec![matrix.rows, matrix.cols] };
            let offsets = [data.len(), data.len() + bytes.len()];
            let dtype = dtype.to_string();
            let entry = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
            header.insert(name.clone(), entry);
            data.extend(bytes);
        }
        let mut header = serde_json::to_vec(&header).unwrap();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        fs::write(folder.join("model.safetensors"), file).unwrap();
        let config = &self.config;
        let json = serde_json::json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "vocab_size": config.vocab, "hidden_size": config.hidden, "intermediate_size": config.intermediate,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "max_position_embeddings": config.context_tokens_max,
            "tie_word_embeddings": config.tied, "sliding_window": config.window, "bos_token_id": 1, "eos_token_id": 2,
        });
        fs::write(folder.join("config.json"), json.to_string()).unwrap();
    }

    /// As a GGUF file; norms are F32, as llama.cpp writes them.
    pub(crate) fn write_gguf(&self, path: &Path, dtype: Dtype) {
        let mut table = Vec::new();
        let mut data: Vec<u8> = Vec::new();
        for (name, matrix) in &self.tensors {
            let dtype = if matrix.rows == 1 { Dtype::F32 } else { dtype };
            text(&mut table, &gguf_name(name));
            let dims: &[usize] = if matrix.rows == 1 { &[matrix.cols] } else { &[matrix.cols, matrix.rows] };
            table.extend((dims.len() as u32).to_le_bytes());
            table.extend(dims.iter().flat_map(|dim| (*dim as u64).to_le_bytes()));
            table.extend(gguf_type(dtype).to_le_bytes());
            table.extend((data.len() as u64).to_le_bytes());
            let values = match name {
                name if name.contains("q_proj") || name.contains("k_proj") => self.adjacent_pairs(matrix),
                _ => matrix.values.clone(),
            };
            data.extend(encode(dtype, &values));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        let (metadata, entries) = self.gguf_metadata();
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((entries as u64).to_le_bytes());
        file.extend(metadata);
        file.extend(table);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        fs::write(path, file).unwrap();
    }

    fn gguf_metadata(&self) -> (Vec<u8>, usize) {
        let config = &self.config;
        let sizes = [
            ("block_count", config.layers),
            ("embedding_length", config.hidden),
            ("feed_forward_length", config.intermediate),
            ("attention.head_count", config.heads),
            ("attention.head_count_kv", config.kv_heads),
            ("attention.key_length", config.head_dim),
            ("context_length", config.context_tokens_max),
            ("vocab_size", config.vocab),
        ];
        let floats = [
            ("attention.layer_norm_rms_epsilon", config.norm_eps),
            ("rope.freq_base", config.rope_theta as f32),
        ];
        let mut metadata = Vec::new();
        text(&mut metadata, "general.architecture");
        metadata.extend(8u32.to_le_bytes());
        text(&mut metadata, "llama");
        for (key, size) in sizes {
            text(&mut metadata, &format!("llama.{key}"));
            metadata.extend([4, size as u32].iter().flat_map(|number| number.to_le_bytes()));
        }
        for (key, value) in floats {
            text(&mut metadata, &format!("llama.{key}"));
            metadata.extend(6u32.to_le_bytes());
            metadata.extend(value.to_le_bytes());
        }
        (metadata, 1 + sizes.len() + floats.len())
    }

    /// Rows (i, i + head_dim/2) of each head become neighbours.
    fn adjacent_pairs(&self, matrix: &Matrix) -> Vec<f32> {
        let dim = self.config.head_dim;
        let source = |row: usize| row / dim * dim + row % dim / 2 + row % 2 * (dim / 2);
        (0..matrix.rows)
            .flat_map(|row| &matrix.values[source(row) * matrix.cols..][..matrix.cols])
            .copied()
            .collect()
    }
}

fn hugging_face_name(weight: Weight) -> String {
    let layer = |layer: usize, name: &str| format!("model.layers.{layer}.{name}.weight");
    match weight {
        Weight::Embedding => "model.embed_tokens.weight".to_owned(),
        Weight::Head => "lm_head.weight".to_owned(),
        Weight::FinalNorm => "model.norm.weight".to_owned(),
        Weight::AttnNorm(index) => layer(index, "input_layernorm"),
        Weight::MlpNorm(index) => layer(index, "post_attention_layernorm"),
        Weight::Q(index) => layer(index, "self_attn.q_proj"),
        Weight::K(index) => layer(index, "self_attn.k_proj"),
        Weight::V(index) => layer(index, "self_attn.v_proj"),
        Weight::O(index) => layer(index, "self_attn.o_proj"),
        Weight::Gate(index) => layer(index, "mlp.gate_proj"),
        Weight::Up(index) => layer(index, "mlp.up_proj"),
        Weight::Down(index) => layer(index, "mlp.down_proj"),
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

fn gguf_type(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q4_1 => 3,
        Dtype::Q8_0 => 8,
        Dtype::Q4K => 12,
        Dtype::Q6K => 14,
        Dtype::Bf16 => 30,
    }
}

pub(crate) fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Q4K | Dtype::Q6K => {
            values.chunks_exact(256).flat_map(|block| k_quants::encode(dtype, block)).collect()
        }
        _ => values.chunks_exact(32).flat_map(|block| quantize(dtype, block)).collect(),
    }
}

/// Scale, offset and integers of a block, as ggml means them.
fn quantize(dtype: Dtype, block: &[f32]) -> Vec<u8> {
    let (low, high) = block.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
    let reach = high.max(-low);
    let (scale, zero, max) = match dtype {
        Dtype::Q8_0 => (reach / 127.0, 0.0, 127.0),
        Dtype::Q4_0 => (reach / 7.0, -8.0 * reach / 7.0, 15.0),
        _ => ((high - low) / 15.0, low, 15.0),
    };
    let mut bytes = f16::from_f32(scale).to_le_bytes().to_vec();
    let quant = |x: f32| ((x - zero) / scale).round().min(max) as i32 as u8;
    match dtype {
        Dtype::Q8_0 => bytes.extend(block.iter().map(|x| quant(*x))),
        _ => {
            if dtype == Dtype::Q4_1 {
                bytes.extend(f16::from_f32(low).to_le_bytes());
            }
            bytes.extend((0..16).map(|i| quant(block[i]) | quant(block[i + 16]) << 4));
        }
    }
    bytes
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let half_at = |block: &[u8], at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let nibbles = |bytes: &[u8]| -> Vec<f32> {
        let low = bytes.iter().map(|byte| f32::from(byte & 15));
        low.chain(bytes.iter().map(|byte| f32::from(byte >> 4))).collect()
    };
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect(),
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect(),
        Dtype::Q8_0 => {
            let block = |block: &[u8]| -> Vec<f32> {
                block[2..].iter().map(|q| half_at(block, 0) * f32::from(q.cast_signed())).collect()
            };
            bytes.chunks_exact(34).flat_map(block).collect()
        }
        Dtype::Q4_0 => {
            let block = |block: &[u8]| -> Vec<f32> {
                nibbles(&block[2..]).iter().map(|q| half_at(block, 0) * (q - 8.0)).collect()
            };
            bytes.chunks_exact(18).flat_map(block).collect()
        }
        Dtype::Q4K | Dtype::Q6K => {
            let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * 256];
            dequantize(dtype, bytes, &mut values); // which is held by a golden
            values
        }
        Dtype::Q4_1 => {
            let block = |block: &[u8]| -> Vec<f32> {
                nibbles(&block[4..]).iter().map(|q| half_at(block, 0) * q + half_at(block, 2)).collect()
            };
            bytes.chunks_exact(20).flat_map(block).collect()
        }
    }
}

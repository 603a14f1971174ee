use std::path::Path;

use serde::Deserialize;

use super::{CONFIG_BYTES_MAX, Presence, refuse_present};
use crate::config::Config;
use crate::error::{CheckpointError, quote};
use crate::source::read_json;

/// All of Mistral's tokenizers begin with `<unk>`, `<s>`, `</s>`.
const BOS: u32 = 1;
const EOS: u32 = 2;
/// Mistral 7B's, whose `params.json` does not say.
const CONTEXT_TOKENS_DEFAULT: usize = 32_768;
/// Version 0.1, the one with a window, was trained with the first; the later ones with the second.
const THETA_WINDOWED_DEFAULT: f64 = 1e4;
const THETA_DEFAULT: f64 = 1e6;

#[derive(Deserialize)]
struct Fields {
    dim: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: Option<usize>,
    hidden_dim: usize,
    vocab_size: usize,
    norm_eps: f64,
    rope_theta: Option<f64>,
    sliding_window: Option<usize>,
    max_seq_len: Option<usize>,
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    tied_embeddings: bool,
    model_type: Option<String>,
    #[serde(default)]
    moe: Presence,
    #[serde(default)]
    lora: Presence,
    #[serde(default)]
    quantization: Presence,
    #[serde(default)]
    rope_scaling: Presence,
    #[serde(default)]
    yarn: Presence,
    #[serde(default)]
    llama_4_scaling: Presence,
    #[serde(default)]
    use_biases: Presence,
    #[serde(default)]
    vision_encoder: Presence,
    #[serde(default)]
    multimodal: Presence,
}

/// Reads `params.json`.
pub(super) fn read_config(path: &Path) -> Result<Config, CheckpointError> {
    let Some(fields) = read_json::<Fields>(path, CONFIG_BYTES_MAX)? else {
        return Err(CheckpointError::malformed(path, "missing, though consolidated.safetensors is there"));
    };
    refuse_present(
        path,
        &[
            ("moe", &fields.moe),
            ("lora", &fields.lora),
            ("quantization", &fields.quantization),
            ("rope_scaling", &fields.rope_scaling),
            ("yarn", &fields.yarn),
            ("llama_4_scaling", &fields.llama_4_scaling),
            ("use_biases", &fields.use_biases),
            ("vision_encoder", &fields.vision_encoder),
            ("multimodal", &fields.multimodal),
        ],
    )?;
    if let Some(kind) = fields.model_type.as_deref().filter(|kind| *kind != "transformer") {
        let problem = format!("its model_type is {}; the engine computes transformer", quote(kind));
        return Err(CheckpointError::unsupported(path, problem));
    }
    let theta_default = if fields.sliding_window.is_some() { THETA_WINDOWED_DEFAULT } else { THETA_DEFAULT };
    let context = fields.max_position_embeddings.or(fields.max_seq_len);
    let (hidden, heads) = (fields.dim, fields.n_heads);
    Ok(Config {
        layers: fields.n_layers,
        hidden,
        heads,
        kv_heads: fields.n_kv_heads,
        head_dim: fields.head_dim.map_or_else(|| Config::derive_head_dim(path, hidden, heads), Ok)?,
        intermediate: fields.hidden_dim,
        vocab: fields.vocab_size,
        rope_theta: fields.rope_theta.unwrap_or(theta_default),
        norm_eps: fields.norm_eps as f32,
        window: fields.sliding_window,
        context_tokens_max: context.unwrap_or(CONTEXT_TOKENS_DEFAULT),
        tied: fields.tied_embeddings,
        bos: Some(BOS),
        eos: vec![EOS],
    })
}

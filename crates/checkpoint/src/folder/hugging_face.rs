use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Deserializer};

use super::{CONFIG_BYTES_MAX, Presence, refuse_present};
use crate::config::Config;
use crate::error::{CheckpointError, quote};
use crate::layout::Header;
use crate::safetensors::{Unique, read_header};
use crate::source::{Source, read_json};

/// The index lists each tensor's name once.
const INDEX_BYTES_MAX: u64 = 16 << 20;
/// Files that one checkpoint is cut into at most.
const FILES_MAX: usize = 1024;

/// What the reference implementation assumes where `config.json` is silent: for both architectures, and for Mistral's.
const THETA_DEFAULT: f64 = 10_000.0;
const MISTRAL_KV_HEADS_DEFAULT: usize = 8;
const MISTRAL_WINDOW_DEFAULT: usize = 4096;

#[derive(Deserialize)]
struct Fields {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    /// Absent and null differ: absent means the architecture's default.
    #[serde(default, deserialize_with = "given")]
    sliding_window: Option<Option<usize>>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
    #[serde(default)]
    attention_bias: Presence,
    #[serde(default)]
    mlp_bias: Presence,
    #[serde(default)]
    quantization_config: Presence,
    #[serde(default)]
    num_local_experts: Presence,
    #[serde(default)]
    num_experts: Presence,
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// What `rope_type` was called before; some files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a token id or a list of token ids")]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// Reads `config.json` (and `generation_config.json` for further end tokens), and tells whether the model is
/// Mistral's.
pub(super) fn read_config(folder: &Path, path: &Path) -> Result<(Config, bool), CheckpointError> {
    let Some(fields) = read_json::<Fields>(path, CONFIG_BYTES_MAX)? else {
        return Err(CheckpointError::malformed(path, "missing, though the folder has the model's tensors"));
    };
    refuse_unsupported(&fields, path)?;
    let generation = read_json::<Generation>(&folder.join("generation_config.json"), CONFIG_BYTES_MAX)?;
    let mistral = fields.model_type == "mistral";
    let ids = [fields.eos_token_id, generation.and_then(|generation| generation.eos_token_id)];
    let eos: BTreeSet<u32> = ids.iter().flatten().flat_map(Ids::as_slice).copied().collect();
    let (hidden, heads) = (fields.hidden_size, fields.num_attention_heads);
    let kv_heads_default = if mistral { MISTRAL_KV_HEADS_DEFAULT } else { heads };
    let theta = fields.rope_parameters.and_then(|rope| rope.rope_theta).or(fields.rope_theta);
    let config = Config {
        layers: fields.num_hidden_layers,
        hidden,
        heads,
        kv_heads: fields.num_key_value_heads.unwrap_or(kv_heads_default),
        head_dim: fields.head_dim.map_or_else(|| Config::derive_head_dim(path, hidden, heads), Ok)?,
        intermediate: fields.intermediate_size,
        vocab: fields.vocab_size,
        rope_theta: theta.unwrap_or(THETA_DEFAULT),
        norm_eps: fields.rms_norm_eps as f32,
        window: fields.sliding_window.unwrap_or(mistral.then_some(MISTRAL_WINDOW_DEFAULT)),
        context_tokens_max: fields.max_position_embeddings,
        tied: fields.tie_word_embeddings,
        bos: fields.bos_token_id,
        eos: eos.into_iter().collect(),
    };
    Ok((config, mistral))
}

fn refuse_unsupported(fields: &Fields, path: &Path) -> Result<(), CheckpointError> {
    let refuse = |problem: String| Err(CheckpointError::unsupported(path, problem));
    if !["mistral", "llama"].contains(&fields.model_type.as_str()) {
        let found = quote(&fields.model_type);
        return refuse(format!("its model_type is {found}; the engine computes mistral and llama"));
    }
    refuse_present(
        path,
        &[
            ("attention_bias", &fields.attention_bias),
            ("mlp_bias", &fields.mlp_bias),
            ("quantization_config", &fields.quantization_config),
            ("num_local_experts", &fields.num_local_experts),
            ("num_experts", &fields.num_experts),
        ],
    )?;
    if let Some(act) = fields.hidden_act.as_deref().filter(|act| !["silu", "swish"].contains(act)) {
        return refuse(format!("its hidden_act is {}; the engine computes silu", quote(act)));
    }
    let ropes = [&fields.rope_parameters, &fields.rope_scaling].into_iter().flatten();
    let mut kinds = ropes.flat_map(|rope| [&rope.rope_type, &rope.old_type]).flatten();
    if let Some(kind) = kinds.find(|kind| *kind != "default") {
        return refuse(format!("its RoPE is scaled ({}); the engine computes the default one", quote(kind)));
    }
    if let Some(rope) = &fields.rope_parameters
        && rope.rope_theta.or(fields.rope_theta).is_none()
    {
        return refuse("its rope_parameters have no rope_theta that holds for every layer".to_owned());
    }
    let rotated = fields.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
    if [rotated, fields.partial_rotary_factor].into_iter().flatten().any(|factor| factor != 1.0) {
        return refuse("its partial_rotary_factor is not 1; the engine rotates whole heads".to_owned());
    }
    let windowed = |kind: &String| kind == "sliding_attention";
    let layer_types = fields.layer_types.as_deref().unwrap_or_default();
    if layer_types.iter().any(windowed) && !layer_types.iter().all(windowed) {
        return refuse(
            "its layer_types mix windows; the engine computes the same one in all layers".to_owned(),
        );
    }
    Ok(())
}

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// Opens every file of an index, and holds their headers against it.
pub(super) fn read_indexed(
    folder: &Path,
    path: &Path,
) -> Result<(Vec<Source>, Vec<Header>), CheckpointError> {
    let refuse = |problem: String| Err(CheckpointError::malformed(path, problem));
    let Some(Index { weight_map: Unique(weight_map) }) = read_json(path, INDEX_BYTES_MAX)? else {
        return refuse("missing".to_owned());
    };
    let files: BTreeSet<&String> = weight_map.values().collect();
    if files.is_empty() || files.len() > FILES_MAX {
        return refuse(format!("it names {} files; expected 1 to {FILES_MAX}", files.len()));
    }
    // An index must not reach outside its folder.
    let plain = |file: &str| !file.contains(['/', '\\', '\0']) && file.ends_with(".safetensors");
    if let Some(file) = files.iter().find(|file| !plain(file)) {
        return refuse(format!("it names the file {}; expected a .safetensors file beside it", quote(file)));
    }
    let mut sources = Vec::with_capacity(files.len());
    let mut headers = Vec::with_capacity(files.len());
    for file in files {
        let source = Source::open(&folder.join(file))?;
        let header = read_header(&source)?;
        check_listed(&source, &header, file, &weight_map)?;
        headers.push(header);
        sources.push(source);
    }
    let held: usize = headers.iter().map(|header| header.tensors.len()).sum();
    if held == weight_map.len() {
        return Ok((sources, headers));
    }
    let held: BTreeSet<&String> = headers.iter().flat_map(|h| &h.tensors).map(|found| &found.name).collect();
    match weight_map.iter().find(|(name, _)| !held.contains(name)) {
        None => refuse(format!("it lists {} tensors, its files {}", weight_map.len(), held.len())),
        Some((name, file)) => Err(CheckpointError::tensor(
            &folder.join(file),
            name,
            "it here, as the index says",
            "no such tensor",
        )),
    }
}

/// Each tensor of a file must be listed, and as being in this file.
fn check_listed(
    source: &Source,
    header: &Header,
    file: &String,
    weight_map: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    for found in &header.tensors {
        let expected = match weight_map.get(&found.name) {
            Some(listed) if listed == file => continue,
            Some(listed) => format!("it in {}, as the index says", quote(listed)),
            None => "a tensor that the index lists".to_owned(),
        };
        return Err(CheckpointError::tensor(&source.path, &found.name, expected, "it in this file"));
    }
    Ok(())
}

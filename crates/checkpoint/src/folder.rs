//! Checkpoints that are folders: Hugging Face's form, and Mistral's own.

mod hugging_face;
mod native;
mod text;

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::Parts;
use crate::error::CheckpointError;
use crate::naming::{HUGGING_FACE, NATIVE};
use crate::safetensors::read_header;
use crate::source::Source;

/// Configuration files are a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Reads Hugging Face's form where a folder holds both, as Mistral's published ones do.
pub(crate) fn read(folder: &Path) -> Result<Parts, CheckpointError> {
    let at = |name: &str| folder.join(name);
    let (single, index) = (at("model.safetensors"), at("model.safetensors.index.json"));
    let native = at("consolidated.safetensors");
    if single.exists() || index.exists() {
        let config_path = at("config.json");
        let (config, mistral) = hugging_face::read_config(folder, &config_path)?;
        let (sources, headers) = if single.exists() {
            let source = Source::open(&single)?;
            let header = read_header(&source)?;
            (vec![source], vec![header])
        } else {
            hugging_face::read_indexed(folder, &index)?
        };
        let text = text::read(folder, mistral)?;
        Ok(Parts { config, config_path, naming: &HUGGING_FACE, sources, headers, text })
    } else if native.exists() {
        let config_path = at("params.json");
        let config = native::read_config(&config_path)?;
        let source = Source::open(&native)?;
        let headers = vec![read_header(&source)?];
        Ok(Parts {
            config,
            config_path,
            naming: &NATIVE,
            sources: vec![source],
            headers,
            text: text::read(folder, true)?,
        })
    } else {
        let problem = "no model in this folder: expected config.json with model.safetensors or \
                       model.safetensors.index.json, or params.json with consolidated.safetensors; \
                       a GGUF model is named by its file";
        Err(CheckpointError::malformed(folder, problem))
    }
}

/// A value of which only the presence matters; `null`, `false` and 0 count as absent.
#[derive(Default, Deserialize)]
#[serde(from = "Value")]
struct Presence(bool);

impl From<Value> for Presence {
    fn from(value: Value) -> Self {
        Self(!matches!(value, Value::Null | Value::Bool(false)) && value.as_u64() != Some(0))
    }
}

/// Refuses the first of some features that the engine does not compute.
fn refuse_present(path: &Path, features: &[(&str, &Presence)]) -> Result<(), CheckpointError> {
    match features.iter().find(|(_, presence)| presence.0) {
        None => Ok(()),
        Some((key, _)) => {
            let problem = format!(
                "it sets `{key}`, which the engine does not compute; expected it absent, null, false or 0"
            );
            Err(CheckpointError::unsupported(path, problem))
        }
    }
}

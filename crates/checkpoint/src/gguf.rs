//! GGUF, versions 2 and 3: metadata, tensor table, vocabulary. The format is described in ggml's `docs/gguf.md`.

mod header;
mod metadata;
mod model;
mod reader;

use std::path::Path;

use crate::checkpoint::Parts;
use crate::error::CheckpointError;
use crate::naming::GGUF;
use crate::source::Source;

/// Reads and checks everything in front of the tensors.
pub(crate) fn read(path: &Path) -> Result<Parts, CheckpointError> {
    let source = Source::open(path)?;
    let (metadata, header) = header::read(&source)?;
    let config = model::config(&metadata, &header.tensors)?;
    let text = model::text(&metadata, &config)?;
    let config_path = path.to_owned();
    Ok(Parts { config, config_path, naming: &GGUF, sources: vec![source], headers: vec![header], text })
}

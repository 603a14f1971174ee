use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use galerne_types::Quantize;
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::error::CheckpointError;
use crate::folder;
use crate::gguf;
use crate::layout::Header;
use crate::naming::Naming;
use crate::quantize::{quantize, target};
use crate::rows::Pieces;
use crate::source::{Source, io_error};
use crate::table::{self, TensorInfo};
use crate::text::TextAssets;
use crate::weight::Weight;

/// Bytes from the middle of a tensor that go into the digest.
const SAMPLE_BYTES_MAX: usize = 256;
/// What is read at a time of weights that are quantized; at least one row. It stays in the processor's cache.
const BATCH_BYTES: usize = 128 << 10;

/// An open, checked checkpoint. Reading takes `&self` and is safe from several threads; share it by `Arc`.
pub struct Checkpoint {
    name: String,
    path: PathBuf,
    config: Config,
    digest: String,
    naming: &'static Naming,
    sources: Vec<Source>,
    tensors: Vec<TensorInfo>,
    text: TextAssets,
}

/// A checkpoint's parts before they have been held against each other.
pub(crate) struct Parts {
    pub(crate) config: Config,
    /// The file that the configuration is from.
    pub(crate) config_path: PathBuf,
    pub(crate) naming: &'static Naming,
    /// Never empty; `headers` has one for each.
    pub(crate) sources: Vec<Source>,
    pub(crate) headers: Vec<Header>,
    pub(crate) text: TextAssets,
}

impl Checkpoint {
    /// Opens a directory or a `.gguf` file, and checks everything but the values themselves.
    ///
    /// # Errors
    /// A sentence that names the file, and the tensor if it is about one, for whatever keeps it from being served.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let whole = fs::canonicalize(path).map_err(|source| io_error(path, "find it", source))?;
        // The name that was given rather than a link's target, except for the likes of `.`.
        let named = if path.file_name().is_some() { path } else { &whole };
        let (parts, name) = if whole.is_dir() {
            (folder::read(path)?, named.file_name())
        } else {
            (gguf::read(path)?, named.file_stem())
        };
        let Parts { config, config_path, naming, sources, headers, text } = parts;
        let name = name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
        config.check(&config_path)?;
        let (found, sha256s): (Vec<_>, Vec<_>) = headers.into_iter().map(|h| (h.tensors, h.sha256)).unzip();
        let tensors = table::build(&config, naming, &sources, found)?;
        let digest = digest(&config, &sources, &sha256s, &tensors)?;
        Ok(Self { name, path: path.to_owned(), config, digest, naming, sources, tensors, text })
    }

    /// The same with its matrices in the formats that `quantize` gives them, as if the files held these, quantized by
    /// ggml. A matrix that is quantized already, or whose rows are no whole blocks, stays as it is, and so do norms.
    pub fn quantized(mut self, quantize: Quantize) -> Self {
        for (info, weight) in self.tensors.iter_mut().zip(Weight::all(&self.config)) {
            info.dtype = target(weight, info.stored, info.cols, quantize);
        }
        self
    }

    /// Whether a matrix is quantized as it is read.
    pub fn quantizes(&self) -> bool {
        self.tensors.iter().any(|info| info.dtype != info.stored)
    }

    /// The folder's name, or the file's without `.gguf`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Hex SHA-256 over the configuration, each file's header and size, and a sample of each tensor. Ranks that agree
    /// on it may form a group; it is no proof that every byte of the files is the same.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Tokenizer and chat template.
    pub fn text(&self) -> &TextAssets {
        &self.text
    }

    /// Asks the system to have the files in its cache, so that reading them later takes no more than that.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if the system does not know how.
    pub fn warm(&self) -> Result<(), CheckpointError> {
        self.sources.iter().try_for_each(|source| source.warm(0..source.bytes))
    }

    /// Asks the same for some rows of a weight, which are going to be read soon.
    ///
    /// # Errors
    /// As [`warm`](Checkpoint::warm).
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn warm_rows(&self, weight: Weight, rows: Range<usize>) -> Result<(), CheckpointError> {
        let info = self.tensor(weight);
        let at = |row: usize| info.offset + (row.min(info.rows) * info.stored.row_bytes(info.cols)) as u64;
        self.sources[info.file].warm(at(rows.start)..at(rows.end))
    }

    /// Shape and dtype of a weight; for a tied head the embedding's.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn tensor(&self, weight: Weight) -> &TensorInfo {
        &self.tensors[weight.index(&self.config)]
    }

    /// Reads a part of a weight into `out` (resized to fit): encoded as in the file, or quantized, row after row.
    ///
    /// Rows of [`Weight::Q`] and [`Weight::K`] are in Hugging Face's order, in which RoPE turns the pair
    /// `(i, i + head_dim / 2)` of a head, whatever the file's order is.
    ///
    /// # Errors
    /// [`CheckpointError::Range`] if the tensor has no such rows or columns, or `cols` cuts through a block;
    /// [`CheckpointError::Io`] if the file cannot be read any more. `out` then holds nothing of use.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn read_rows(
        &self,
        weight: Weight,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let info = self.tensor(weight);
        let block = info.dtype.block_elems();
        let within = |range: &Range<usize>, len| range.start <= range.end && range.end <= len;
        let whole_blocks = cols.start.is_multiple_of(block) && cols.end.is_multiple_of(block);
        if !within(&rows, info.rows) || !within(&cols, info.cols) || !whole_blocks {
            return Err(CheckpointError::Range { weight, rows, cols, shape: (info.rows, info.cols), block });
        }
        let piece_bytes = info.dtype.row_bytes(cols.len());
        out.resize(rows.len() * piece_bytes, 0);
        if out.is_empty() {
            return Ok(());
        }
        let stored_bytes = info.stored.row_bytes(cols.len());
        let pieces = Pieces {
            source: &self.sources[info.file],
            offset: info.offset + info.stored.row_bytes(cols.start) as u64,
            row_bytes: info.stored.row_bytes(info.cols),
            piece_bytes: stored_bytes,
            paired_rows: (self.naming.adjacent_pairs && weight.is_rotated()).then_some(self.config.head_dim),
        };
        if info.dtype == info.stored {
            return pieces.read(rows, out);
        }
        let batch_rows = (BATCH_BYTES / stored_bytes).max(1);
        let mut stored = Vec::new();
        for (first, out) in rows.clone().step_by(batch_rows).zip(out.chunks_mut(batch_rows * piece_bytes)) {
            let batch = first..rows.end.min(first + batch_rows);
            stored.resize(batch.len() * stored_bytes, 0);
            pieces.read(batch, &mut stored)?;
            quantize(info.stored, &stored, info.dtype, out);
        }
        Ok(())
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, config, digest, .. } = self;
        f.debug_struct("Checkpoint")
            .field("path", path)
            .field("config", config)
            .field("digest", digest)
            .finish_non_exhaustive()
    }
}

/// A fine-tune has its base's configuration, headers and sizes, hence the samples.
fn digest(
    config: &Config,
    sources: &[Source],
    headers: &[[u8; 32]],
    tensors: &[TensorInfo],
) -> Result<String, CheckpointError> {
    let mut hasher = Sha256::new();
    hasher.update(config.canonical());
    for (source, header) in sources.iter().zip(headers) {
        hasher.update(header);
        hasher.update(source.bytes.to_le_bytes());
    }
    let mut sample = Vec::new();
    for info in tensors {
        sample.resize(info.bytes().min(SAMPLE_BYTES_MAX), 0);
        let before = (info.bytes() - sample.len()) / 2;
        sources[info.file].read_at(info.offset + before as u64, &mut sample)?;
        hasher.update(&sample);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

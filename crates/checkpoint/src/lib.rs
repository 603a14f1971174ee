//! Model files: finds, checks and describes the tensors, tokenizer and template of a checkpoint.
//!
//! [`Checkpoint::open`] reads headers only, and refuses whatever is truncated, mislabelled, inconsistent or beyond
//! this engine before anything is allocated for it. What it returns can be relied on: every tensor of the
//! architecture is there, has the shape that the [`Config`] asks for, and lies within its file.
//!
//! Three forms are read: Hugging Face (`config.json` with `model.safetensors` or an index of several), Mistral's own
//! (`params.json` with `consolidated.safetensors`) and GGUF. Behind [`Checkpoint::read_rows`] they look alike: rows
//! of query and key projections come in one order, whatever the file's.

mod checkpoint;
mod config;
mod dtype;
mod error;
mod folder;
mod gguf;
mod layout;
mod naming;
mod quantize;
mod rows;
mod safetensors;
mod sentencepiece;
mod source;
mod superblock;
mod table;
mod text;
mod weight;

pub use checkpoint::Checkpoint;
pub use config::Config;
pub use dtype::{Block, Dtype, dequantize};
pub use error::CheckpointError;
pub use sentencepiece::SentencePieceModel;
pub use superblock::SuperBlock;
pub use table::TensorInfo;
pub use text::{GgufVocab, MistralVersion, SentencePieceFile, TextAssets, TokenizerAsset};
pub use weight::Weight;

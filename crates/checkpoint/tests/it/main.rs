//! Checkpoints that the tests write themselves, sound and damaged, and the committed golden ones.

mod damage;
mod formats;
mod golden;
mod refusals_folder;
mod refusals_gguf;
mod sentencepiece;
mod support;
mod text;

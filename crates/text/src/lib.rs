//! Tokenizers, chat templates and streaming detokenization.
//!
//! Text exists only at the router; everything below it knows token ids. This crate is the border:
//!
//! * [`Tokenizer`]: text to ids and back, from a `tokenizer.json` or from the vocabulary of a GGUF file.
//! * [`Detokenizer`]: ids to text one at a time, in pieces that are never taken back.
//! * [`ChatFormat`]: a conversation to the prompt that its model was trained on, by Mistral's own encoding or by the
//!   model's [`ChatTemplate`].
//! * [`ToolParser`]: an answer's text, parted into what is for the user and calls of tools.
//!
//! # Special tokens in text
//!
//! [`Tokenizer::encode`] reads the spelling of a special token (`<|im_start|>`, `</s>`) as that token, as
//! Hugging Face tokenizers do and as the output of a chat template needs. It follows that a user who writes
//! such a spelling into a message writes the token itself. [`Tokenizer::encode_plain`] reads the same spelling
//! as ordinary text, for callers that assemble a prompt from trusted ids and untrusted text.

mod byte_level;
mod chat;
mod detokenizer;
mod error;
mod hugging_face;
mod merge;
mod python_json;
mod sentencepiece;
mod spellings;
mod stop;
mod template;
mod tokenizer;
mod tools;
mod vocabulary;

pub use chat::{Chat, ChatFormat, ChatFormatKind};
pub use detokenizer::{Detokenizer, Piece};
pub use error::TextError;
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use tools::{Part, ToolElse, ToolForce, ToolFormat, ToolParser};

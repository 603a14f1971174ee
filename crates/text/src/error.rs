use std::path::PathBuf;

use galerne_checkpoint::CheckpointError;

/// What can go wrong between text and token ids. No message quotes a prompt.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The checkpoint has no `tokenizer.json`, no SentencePiece model and no vocabulary of its own.
    #[error(
        "the model has no tokenizer: put its tokenizer.json or tokenizer.model beside the weights, or use a GGUF file that has one"
    )]
    NoTokenizer,
    /// A `tokenizer.json` that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why the system refused.
        source: std::io::Error,
    },
    /// A `tokenizer.json` that is not what it should be.
    #[error("{path} is not a usable tokenizer.json: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A SentencePiece model that cannot be used.
    #[error(transparent)]
    SentencePiece(#[from] CheckpointError),
    /// A vocabulary that contradicts itself or is of a kind unknown here.
    #[error("the model's vocabulary cannot be used: {0}")]
    Vocabulary(String),
    /// Text that the tokenizer refuses.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
    /// A chat format that does not go with the model's files.
    #[error("the chat format cannot be used: {0}")]
    ChatFormat(String),
    /// A conversation that the model's chat format cannot express.
    #[error("the conversation cannot be encoded: {0}")]
    Conversation(String),
    /// Tools, or a choice among them, that make no sense.
    #[error("the tools cannot be used: {0}")]
    Tools(String),
    /// The model was not taught to fill a gap between two texts.
    #[error(
        "this model cannot fill in the middle: its vocabulary has no [PREFIX] and [SUFFIX] tokens; use text completion"
    )]
    NoFim,
    /// A chat template that is not valid Jinja.
    #[error("the model's chat template is not valid Jinja at line {line}: {reason}")]
    Template {
        /// Line of the template, from 1.
        line: usize,
        /// What the parser expected.
        reason: String,
    },
    /// The template itself refused the conversation, by `raise_exception`.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the model's chat template fails at line {line} on this conversation: {reason}")]
    Render {
        /// Line of the template, from 1.
        line: usize,
        /// What failed.
        reason: String,
    },
    /// The template ran longer than any honest one would.
    #[error(
        "the model's chat template did more work on this conversation than the limit of {fuel} steps allows"
    )]
    Endless {
        /// The limit in the template engine's units of work.
        fuel: u64,
    },
}

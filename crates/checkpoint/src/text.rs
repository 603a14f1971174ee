use std::path::PathBuf;

/// What turns text into tokens and back: taken from the checkpoint, not yet interpreted.
#[derive(Clone, Debug)]
pub struct TextAssets {
    /// The tokenizer.
    pub tokenizer: TokenizerAsset,
    /// The default chat template, in Jinja.
    pub chat_template: Option<String>,
    /// The text of the token that starts a sequence.
    pub bos_token: Option<String>,
    /// The text of the token that ends an answer.
    pub eos_token: Option<String>,
    /// Whether text is encoded with the BOS token in front. For [`TokenizerAsset::Gguf`] this is the model's word.
    /// For [`TokenizerAsset::Json`] the post-processor inside `tokenizer.json` does it by itself; this only repeats
    /// what `tokenizer_config.json` says, and is `false` where it says nothing.
    pub add_bos: bool,
}

/// Where the tokenizer is.
#[derive(Clone, Debug)]
pub enum TokenizerAsset {
    /// A `tokenizer.json` that exists; its content is not checked here.
    Json(PathBuf),
    /// The vocabulary out of a GGUF file.
    Gguf(GgufVocab),
    /// The checkpoint has none that is understood: it serves token ids only.
    None,
}

/// The tokenizer inside a GGUF file. As many tokens as the model has embeddings; every id lies within.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufVocab {
    /// `gpt2` (byte-level BPE by `merges`) or `llama` (SentencePiece by `scores`).
    pub model: String,
    /// Name of the pre-tokenizer.
    pub pre: Option<String>,
    /// Token texts by id, as stored: byte-level or with `▁` for a space.
    pub tokens: Vec<String>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; as many as tokens, or none.
    pub types: Vec<i32>,
    /// Pairs `left right`, best first.
    pub merges: Vec<String>,
    /// As many as tokens, or none.
    pub scores: Vec<f32>,
    /// Token that starts a sequence.
    pub bos: Option<u32>,
    /// Token that ends an answer.
    pub eos: Option<u32>,
    /// Token for what the vocabulary cannot express.
    pub unk: Option<u32>,
    /// SentencePiece puts a space before the text.
    pub add_space_prefix: bool,
}

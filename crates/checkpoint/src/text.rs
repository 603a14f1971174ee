use std::path::PathBuf;

/// What turns text into tokens and back: taken from the checkpoint, not yet interpreted.
#[derive(Clone, Debug)]
pub struct TextAssets {
    /// The tokenizer.
    pub tokenizer: TokenizerAsset,
    /// A SentencePiece model beside the weights. Where `tokenizer` is [`TokenizerAsset::None`] it is the tokenizer;
    /// beside a `tokenizer.json` it is the reference for Mistral's own chat formats.
    pub sentencepiece: Option<SentencePieceFile>,
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

/// A SentencePiece model that exists; its content is not checked here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentencePieceFile {
    /// The file.
    pub path: PathBuf,
    /// Which of Mistral's chat formats goes with it, where the file's name tells: `tokenizer.model.v3`.
    pub version: Option<MistralVersion>,
    /// The checkpoint calls its architecture Mistral's.
    pub mistral: bool,
}

/// Mistral's chat formats on SentencePiece vocabularies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MistralVersion {
    /// Mistral 7B v0.1 and v0.2.
    V1,
    /// Control tokens and tools.
    V2,
    /// Mistral 7B v0.3: tool calls have ids.
    V3,
}

/// Where the tokenizer is.
#[derive(Clone, Debug)]
pub enum TokenizerAsset {
    /// A `tokenizer.json` that exists; its content is not checked here.
    Json(PathBuf),
    /// The vocabulary out of a GGUF file.
    Gguf(GgufVocab),
    /// The checkpoint has neither. Without [`TextAssets::sentencepiece`] too it serves token ids only.
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

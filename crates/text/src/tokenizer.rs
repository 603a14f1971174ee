use galerne_checkpoint::{TextAssets, TokenizerAsset};

use crate::error::TextError;
use crate::hugging_face::HuggingFace;
use crate::sentencepiece::{self, SentencePiece};
use crate::vocabulary::{Utf8Stream, Vocabulary};

/// The tokenizer of one model. Shared by all requests; encoding a long text blocks its thread for a while
/// (0.1 to 2 s a MiB), so do it off the threads that serve connections.
pub struct Tokenizer {
    engine: Engine,
    vocabulary: Vocabulary,
    /// Put before the text by [`encode`](Self::encode) with `add_special`; a `tokenizer.json` does it by itself.
    prefix: Option<u32>,
}

enum Engine {
    HuggingFace(Box<HuggingFace>),
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    /// Builds the tokenizer that the checkpoint brings.
    ///
    /// # Errors
    /// A sentence on what the checkpoint lacks or what in its tokenizer is not understood: nothing is guessed,
    /// because text that is cut differently than in training gives a silently worse model.
    pub fn load(assets: &TextAssets) -> Result<Self, TextError> {
        match &assets.tokenizer {
            TokenizerAsset::None => Err(TextError::NoTokenizer),
            TokenizerAsset::Json(path) => {
                let (engine, vocabulary) = HuggingFace::from_json(path)?;
                Ok(Self { engine: Engine::HuggingFace(engine.into()), vocabulary, prefix: None })
            }
            TokenizerAsset::Gguf(gguf) => {
                let (engine, vocabulary) = match gguf.model.as_str() {
                    "gpt2" => {
                        let (engine, vocabulary) = HuggingFace::from_gguf(gguf)?;
                        (Engine::HuggingFace(engine.into()), vocabulary)
                    }
                    "llama" => (
                        Engine::SentencePiece(SentencePiece::new(gguf)?.into()),
                        sentencepiece::vocabulary(gguf),
                    ),
                    other => {
                        return Err(TextError::Vocabulary(format!(
                            "its kind is `{other}`; `gpt2` and `llama` are supported, or a tokenizer.json"
                        )));
                    }
                };
                let prefix = if assets.add_bos { gguf.bos } else { None };
                Ok(Self { engine, vocabulary, prefix })
            }
        }
    }

    /// Ids of `text`, as Hugging Face's `tokenizer(text, add_special_tokens=add_special)` gives them: spellings
    /// of special tokens are read as those tokens, and `add_special` adds what the model wants around a text
    /// (BOS, for most). The output of a chat template already holds its BOS: pass `false` for it.
    ///
    /// Takes near-linear time for any text.
    ///
    /// # Errors
    /// [`TextError::Encode`] for text that the vocabulary cannot express, which byte-level and byte-fallback
    /// vocabularies always can.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = match &self.engine {
            Engine::HuggingFace(engine) => engine.encode(text, add_special)?,
            Engine::SentencePiece(engine) => engine.encode(text, true)?,
        };
        if let (true, Some(bos)) = (add_special, self.prefix) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids of `text` in which the spelling of a special token is just text, and nothing is added around it:
    /// for text that nobody vouches for, between ids that the caller sets.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        match &self.engine {
            Engine::HuggingFace(engine) => engine.encode_plain(text),
            Engine::SentencePiece(engine) => engine.encode(text, false),
        }
    }

    /// Ids of the prompt after which the model writes what stands between `prompt` and `suffix`: Mistral's
    /// format, suffix first (Bavarian et al. 2022, SPM), complete with BOS. The spelling of a special token is
    /// just text.
    ///
    /// # Errors
    /// [`TextError::NoFim`] if the model was not taught this.
    pub fn encode_fim(&self, _prompt: &str, _suffix: &str) -> Result<Vec<u32>, TextError> {
        Err(TextError::NoFim)
    }

    /// Text of `ids`, without the special tokens among them if `skip_special`. Bytes that form no character
    /// become U+FFFD, one for each maximal invalid part; an id without a token gives nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let (mut stream, mut text) = (Utf8Stream::default(), String::new());
        for &id in ids {
            stream.push(&self.vocabulary, id, skip_special, &mut text);
        }
        stream.finish(&mut text);
        text
    }

    /// The bytes that `id` stands for in the middle of a text; often not whole characters. Empty for an id
    /// without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// Whether `id` is a token that only marks structure, such as BOS or `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.is_special(id)
    }

    /// One more than the largest id that has a token; the model may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

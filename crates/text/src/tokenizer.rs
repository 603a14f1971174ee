use compact_str::CompactString;
use galerne_checkpoint::{
    GgufVocab, MistralVersion, SentencePieceFile, SentencePieceModel, TextAssets, TokenizerAsset,
};

use crate::error::TextError;
use crate::hugging_face::HuggingFace;
use crate::sentencepiece::{Pieces, SentencePiece};
use crate::vocabulary::{Utf8Stream, Vocabulary};

/// The tokenizer of one model. Shared by all requests; encoding a long text blocks its thread for a while
/// (`examples/tokenize.rs` measures up to 80 ms for a MiB, and four times that for 4 MiB), so do it off the threads
/// that serve connections.
pub struct Tokenizer {
    engine: Engine,
    vocabulary: Vocabulary,
    /// Put before the text by [`encode`](Self::encode) with `add_special`; a `tokenizer.json` does it by itself.
    prefix: Option<u32>,
    /// Mistral's own encoder beside a `tokenizer.json`.
    reference: Option<Box<SentencePiece>>,
    /// Which of Mistral's chat formats the vocabulary is made for.
    mistral: Option<MistralVersion>,
}

/// What mistral-common puts before a suffix, and its tokens: the space of a text's beginning and itself.
const FIM_MARK: char = '\u{263a}';
const FIM_MARK_TOKENS: usize = 2;

enum Engine {
    HuggingFace(Box<HuggingFace>),
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    /// Builds the tokenizer that the checkpoint brings: its `tokenizer.json`, or the vocabulary in its GGUF file,
    /// or its SentencePiece model. A SentencePiece model beside a `tokenizer.json` of the same vocabulary encodes
    /// what Mistral's own chat formats ask for, because it is what they are defined by.
    ///
    /// # Errors
    /// A sentence on what the checkpoint lacks or what in its tokenizer is not understood: nothing is guessed,
    /// because text that is cut differently than in training gives a silently worse model.
    pub fn load(assets: &TextAssets) -> Result<Self, TextError> {
        match (&assets.tokenizer, &assets.sentencepiece) {
            (TokenizerAsset::None, None) => Err(TextError::NoTokenizer),
            (TokenizerAsset::None, Some(file)) => Self::from_sentencepiece(file),
            (TokenizerAsset::Json(path), file) => {
                let (engine, vocabulary) = HuggingFace::from_json(path)?;
                let engine = Engine::HuggingFace(engine.into());
                let tokenizer = Self { engine, vocabulary, prefix: None, reference: None, mistral: None };
                match file {
                    Some(file) => tokenizer.with_reference(file),
                    None => Ok(tokenizer),
                }
            }
            (TokenizerAsset::Gguf(gguf), _) => Self::from_gguf(gguf, assets.add_bos),
        }
    }

    fn from_gguf(gguf: &GgufVocab, add_bos: bool) -> Result<Self, TextError> {
        let prefix = if add_bos { gguf.bos } else { None };
        match gguf.model.as_str() {
            "gpt2" => {
                let (engine, vocabulary) = HuggingFace::from_gguf(gguf)?;
                let engine = Engine::HuggingFace(engine.into());
                Ok(Self { engine, vocabulary, prefix, reference: None, mistral: None })
            }
            "llama" => Self::from_pieces(gguf.into(), prefix, None, false),
            other => Err(TextError::Vocabulary(format!(
                "its kind is `{other}`; `gpt2` and `llama` are supported, or a tokenizer.json"
            ))),
        }
    }

    fn from_sentencepiece(file: &SentencePieceFile) -> Result<Self, TextError> {
        let model = SentencePieceModel::read(&file.path)?;
        Self::from_pieces((&model).into(), model.bos, file.version, file.mistral)
    }

    fn from_pieces(
        pieces: Pieces<'_>,
        prefix: Option<u32>,
        version: Option<MistralVersion>,
        mistral: bool,
    ) -> Result<Self, TextError> {
        let engine = Engine::SentencePiece(SentencePiece::new(pieces)?.into());
        let vocabulary = pieces.vocabulary();
        let mistral = version.or_else(|| version_of(&vocabulary, mistral));
        Ok(Self { engine, vocabulary, prefix, reference: None, mistral })
    }

    /// A `tokenizer.model` of another vocabulary, or of a kind that is not read here, was left beside the
    /// `tokenizer.json` by whoever derived the model. With a version in its name it is there to be used.
    fn with_reference(mut self, file: &SentencePieceFile) -> Result<Self, TextError> {
        match Self::from_sentencepiece(file) {
            Ok(Self { engine: Engine::SentencePiece(reference), vocabulary, mistral, .. })
                if vocabulary.begins(&self.vocabulary) =>
            {
                (self.reference, self.mistral) = (Some(reference), mistral);
                Ok(self)
            }
            Err(error) if file.version.is_some() => Err(error),
            _ => Ok(self),
        }
    }

    /// Ids of `text`, as Hugging Face's `tokenizer(text, add_special_tokens=add_special)` gives them: spellings
    /// of special tokens are read as those tokens, and `add_special` adds what the model wants around a text
    /// (BOS, for most). The output of a chat template already holds its BOS: pass `false` for it.
    ///
    /// Takes near-linear time for any text, but for a `tokenizer.json` of an uncommon kind, which is left to the
    /// `tokenizers` crate.
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
    pub fn encode_fim(&self, prompt: &str, suffix: &str) -> Result<Vec<u32>, TextError> {
        let special = |text| self.vocabulary.special(text).ok_or(TextError::NoFim);
        let mut ids = vec![special("<s>")?, special("[SUFFIX]")?];
        if self.vocabulary.first_space_is_silent() && !suffix.is_empty() {
            // A suffix is no beginning of a text: a mark in front takes the space that one gets, and goes with it.
            let marked = self.encode_reference(&format!("{FIM_MARK}{suffix}"))?;
            ids.extend(marked.into_iter().skip(FIM_MARK_TOKENS));
        } else {
            ids.extend(self.encode_reference(suffix)?);
        }
        ids.push(special("[PREFIX]")?);
        ids.extend(self.encode_reference(prompt)?);
        Ok(ids)
    }

    /// As [`encode_plain`](Self::encode_plain), by Mistral's own vocabulary file if there is one.
    pub(crate) fn encode_reference(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.reference
            .as_ref()
            .map_or_else(|| self.encode_plain(text), |reference| reference.encode(text, false))
    }

    pub(crate) fn special_token(&self, text: &str) -> Option<u32> {
        self.vocabulary.special(text)
    }

    /// Which of Mistral's chat formats the vocabulary is made for, as far as it tells.
    pub(crate) fn mistral(&self) -> Option<MistralVersion> {
        self.mistral
    }

    /// Text of `ids`, without the special tokens among them if `skip_special`. Bytes that form no character
    /// become U+FFFD, one for each maximal invalid part; an id without a token gives nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let (mut stream, mut text) = (Utf8Stream::default(), CompactString::default());
        for &id in ids {
            stream.push(&self.vocabulary, id, skip_special, &mut text);
        }
        stream.finish(&mut text);
        text.into_string()
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

/// Mistral 7B v0.3 is published with control tokens in a `tokenizer.model` that tells no version; versions before it
/// have none, and then only the checkpoint can say that it is Mistral's.
fn version_of(vocabulary: &Vocabulary, mistral: bool) -> Option<MistralVersion> {
    if vocabulary.special("[INST]").is_some() {
        Some(MistralVersion::V3)
    } else {
        mistral.then_some(MistralVersion::V1)
    }
}

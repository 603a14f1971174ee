//! Tokenizers that the `tokenizers` crate runs: a `tokenizer.json`, and byte-level BPE out of a GGUF file.

mod shape;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use galerne_checkpoint::GgufVocab;
use serde::Deserialize;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, AddedVocabulary, Model, OffsetReferential, OffsetType, PreTokenizer, PreTokenizerWrapper,
    SplitDelimiterBehavior, Tokenizer,
};

use crate::byte_level::{self, ByteLevel as FastByteLevel};
use crate::error::TextError;
use crate::sentencepiece;
use crate::vocabulary::Vocabulary;

/// A larger file is no tokenizer.
const TOKENIZER_JSON_BYTES_MAX: u64 = 256 << 20;

/// Llama 3's way to cut text into words, from its tokenizer.json.
const LLAMA_3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type` of special tokens, and of those that are merely never cut.
const GGUF_CONTROL: i32 = 3;
const GGUF_USER_DEFINED: i32 = 4;

/// Encoder on top of the `tokenizers` crate.
pub(crate) struct HuggingFace {
    tokenizer: Tokenizer,
    /// The added tokens without the special ones.
    plain: AddedVocabulary,
    /// The same, faster, where it is of the common kind.
    byte_level: Option<FastByteLevel>,
}

impl HuggingFace {
    pub(crate) fn from_json(path: &Path) -> Result<(Self, Vocabulary), TextError> {
        let read_error = |source| TextError::Read { path: path.into(), source };
        let json_error = |reason: String| TextError::Json { path: path.into(), reason };
        let bytes = std::fs::metadata(path).map_err(read_error)?.len();
        if bytes > TOKENIZER_JSON_BYTES_MAX {
            return Err(json_error(format!(
                "{bytes} bytes, more than the limit of {TOKENIZER_JSON_BYTES_MAX}"
            )));
        }
        let json = std::fs::read(path).map_err(read_error)?;
        shape::check(&json).map_err(json_error)?;
        let mut tokenizer = unless_it_panics(|| Tokenizer::from_bytes(json)).map_err(json_error)?;
        // A file may carry the settings of a training run; a prompt is never cut or filled up.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| json_error(e.to_string()))?;
        let decoder = Decoder::of(&tokenizer).map_err(json_error)?;
        let vocabulary = decoder.vocabulary(&tokenizer);
        Ok((Self::new(tokenizer), vocabulary))
    }

    pub(crate) fn from_gguf(gguf: &GgufVocab) -> Result<(Self, Vocabulary), TextError> {
        let refuse = |e: tokenizers::Error| TextError::Vocabulary(e.to_string());
        let words = Words::of(gguf.pre.as_deref())?;
        let vocab = gguf.tokens.iter().cloned().zip(0..).collect::<Vocab>();
        let merges = gguf.merges.iter().map(|merge| {
            let (left, right) = merge.split_once(' ')?;
            Some((left.to_owned(), right.to_owned()))
        });
        let merges = merges
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| TextError::Vocabulary("a merge is not two tokens with a space between".into()))?;
        let mut model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(words == Words::Llama3);
        if let Some(unk) = gguf.unk.and_then(|id| gguf.tokens.get(id as usize)) {
            model = model.unk_token(unk.clone());
        }
        let model = unless_it_panics(|| model.build()).map_err(TextError::Vocabulary)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(words.pre_tokenizer().map_err(refuse)?));
        for (kind, special) in [(GGUF_CONTROL, true), (GGUF_USER_DEFINED, false)] {
            let tokens = gguf.tokens.iter().zip(&gguf.types).filter(|&(_, &k)| k == kind);
            let tokens = tokens.map(|(token, _)| AddedToken::from(token.clone(), special).normalized(false));
            tokenizer.add_tokens(tokens).map_err(refuse)?;
        }
        let vocabulary = Decoder::ByteLevel.vocabulary(&tokenizer);
        Ok((Self::new(tokenizer), vocabulary))
    }

    fn new(tokenizer: Tokenizer) -> Self {
        let mut plain = tokenizer.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let byte_level = FastByteLevel::of(&tokenizer);
        Self { tokenizer, plain, byte_level }
    }

    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        if let Some(byte_level) = &self.byte_level {
            return Ok(byte_level.encode(text, add_special, true));
        }
        let encoding = unless_it_panics(|| self.tokenizer.encode_fast(text, add_special));
        Ok(encoding.map_err(TextError::Encode)?.get_ids().to_vec())
    }

    pub(crate) fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TextError> {
        if let Some(byte_level) = &self.byte_level {
            return Ok(byte_level.encode(text, false, false));
        }
        unless_it_panics(|| self.encode_words(text)).map_err(TextError::Encode)
    }

    /// The crate's own way from text to ids, with `plain` in the place of all added tokens.
    fn encode_words(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let mut words = self.plain.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut words)?;
        }
        words.tokenize(|word| self.tokenizer.get_model().tokenize(word.get()))?;
        let words = words.get_splits(OffsetReferential::Original, OffsetType::None);
        Ok(words
            .iter()
            .filter_map(|(_, _, tokens)| tokens.as_ref())
            .flatten()
            .map(|token| token.id)
            .collect())
    }
}

/// What the `tokenizers` crate makes of a file that it reads, or of a text by such a file: it relies on files being as
/// its own writer makes them.
pub(crate) fn unless_it_panics<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library fails on it: it contradicts itself".to_owned()),
    }
}

/// How text is cut into words before BPE. A GGUF file only names it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    Gpt2,
    SmolLm,
    Llama3,
}

impl Words {
    fn of(pre: Option<&str>) -> Result<Self, TextError> {
        match pre {
            // What converters write, or leave out, for models that cut text as GPT-2 does.
            Some("gpt-2" | "default") | None => Ok(Self::Gpt2),
            Some("smollm") => Ok(Self::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some(other) => Err(TextError::Vocabulary(format!(
                "its pre-tokenizer is `{other}`; gpt-2, smollm and llama-bpe are supported, or use the model's tokenizer.json"
            ))),
        }
    }

    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
        Ok(match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            Self::Llama3 => {
                let words = SplitPattern::Regex(LLAMA_3_WORDS.into());
                let split = Split::new(words, SplitDelimiterBehavior::Isolated, false)?;
                Sequence::new(vec![split.into(), bytes(false)]).into()
            }
        })
    }
}

/// How tokens become text again. Only decoders that work token by token can stream exactly.
enum Decoder {
    ByteLevel,
    SentencePiece { first_space_is_silent: bool },
}

/// The fields of a decoder in a `tokenizer.json` that tell which of the two it is.
#[derive(Deserialize)]
struct DecoderJson {
    r#type: String,
    #[serde(default)]
    decoders: Vec<DecoderJson>,
    #[serde(default)]
    pattern: serde_json::Value,
    #[serde(default)]
    content: String,
    #[serde(default)]
    start: usize,
    #[serde(default)]
    stop: usize,
}

impl Decoder {
    fn of(tokenizer: &Tokenizer) -> Result<Self, String> {
        let json = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| e.to_string())?;
        let decoder = serde_json::from_value::<Option<DecoderJson>>(json).map_err(|e| e.to_string())?;
        let Some(decoder) = decoder else { return Err("it has no decoder".into()) };
        if decoder.r#type == "ByteLevel" {
            return Ok(Self::ByteLevel);
        }
        let (mut spaces, mut first_space_is_silent) = (false, false);
        for part in &decoder.decoders {
            match part.r#type.as_str() {
                "ByteLevel" if decoder.decoders.len() == 1 => return Ok(Self::ByteLevel),
                "Replace" if part.pattern["String"] == "\u{2581}" && part.content == " " => spaces = true,
                "Strip" if part.content == " " && (part.start, part.stop) == (1, 0) => {
                    first_space_is_silent = true;
                }
                "ByteFallback" | "Fuse" => {}
                other => return Err(format!("the part `{other}` of its decoder cannot be streamed")),
            }
        }
        if spaces {
            Ok(Self::SentencePiece { first_space_is_silent })
        } else {
            Err(format!("its decoder `{}` is neither ByteLevel nor SentencePiece's", decoder.r#type))
        }
    }

    fn vocabulary(&self, tokenizer: &Tokenizer) -> Vocabulary {
        let added = tokenizer.get_added_tokens_decoder();
        let silent = matches!(self, Self::SentencePiece { first_space_is_silent: true });
        let mut vocabulary = Vocabulary::new(silent);
        let ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |last| last + 1);
        for id in 0..ids {
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let (is_added, special) = added.get(&id).map_or((false, false), |token| (true, token.special));
            let bytes = match self {
                Self::ByteLevel if is_added => token.into_bytes(),
                Self::ByteLevel => byte_level::token_bytes(&token),
                Self::SentencePiece { .. } => sentencepiece::token_bytes(&token),
            };
            vocabulary.push(&bytes, special);
        }
        vocabulary
    }
}

//! SentencePiece models: protobuf messages of pieces with scores, as in SentencePiece's `sentencepiece_model.proto`.

mod message;

use std::path::Path;

use crate::error::{CheckpointError, quote};
use crate::source::read_bytes;
use message::{Field, fields};

/// Mistral's are half a megabyte.
const MODEL_BYTES_MAX: u64 = 64 << 20;
const PIECES_MAX: usize = 1 << 20;
const PIECE_BYTES_MAX: usize = 1 << 10;

/// `TrainerSpec.ModelType`: the method that the scores are for.
const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

/// Kinds of pieces.
const NORMAL: i32 = 1;
const UNUSED: i32 = 5;
const KIND_LAST: i32 = 6;

/// A vocabulary of byte-pair encoding with byte fallback, which changes nothing in a text but its spaces.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePieceModel {
    /// Pieces by id, `▁` for a space.
    pub tokens: Vec<String>,
    /// Their scores: of two merges the one with the higher comes first.
    pub scores: Vec<f32>,
    /// Their kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte.
    pub types: Vec<i32>,
    /// Token that starts a sequence.
    pub bos: Option<u32>,
    /// Token that ends an answer.
    pub eos: Option<u32>,
    /// A space is put before the text.
    pub add_space_prefix: bool,
}

/// What the trainer's and the normalizer's messages say, at first their defaults.
struct Specs {
    method: u64,
    byte_fallback: bool,
    space_is_suffix: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    add_space_prefix: bool,
    remove_extra_spaces: bool,
    escape_spaces: bool,
    rewrites: bool,
}

impl SentencePieceModel {
    /// Reads a model file.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] for a file that is damaged or contradicts itself, and
    /// [`CheckpointError::Unsupported`] for one that cuts text by another method or rewrites it: nothing is
    /// guessed.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        Self::parse(path, &read_bytes(path, MODEL_BYTES_MAX)?)
    }

    /// The model in `bytes`; `path` is for the messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |problem: String| CheckpointError::malformed(path, problem);
        let mut model = Self {
            tokens: Vec::new(),
            scores: Vec::new(),
            types: Vec::new(),
            bos: None,
            eos: None,
            add_space_prefix: true,
        };
        let mut specs = Specs::default();
        for field in fields(bytes) {
            match field.map_err(damaged)? {
                (1, Field::Bytes(piece)) => model.push(piece).map_err(damaged)?,
                (2, Field::Bytes(trainer)) => specs.read_trainer(trainer).map_err(damaged)?,
                (3, Field::Bytes(normalizer)) => specs.read_normalizer(normalizer).map_err(damaged)?,
                (5, Field::Bytes(denormalizer)) => {
                    specs.rewrites |= rewrites(denormalizer).map_err(damaged)?;
                }
                // Self-test data, and what later versions add.
                _ => {}
            }
        }
        if model.tokens.is_empty() {
            return Err(damaged("it has no pieces: expected a SentencePiece model".to_owned()));
        }
        specs.refuse_unsupported(&model).map_err(|problem| CheckpointError::unsupported(path, problem))?;
        let within = |id: &u32| (*id as usize) < model.tokens.len();
        (model.bos, model.eos) = (specs.bos.filter(within), specs.eos.filter(within));
        model.add_space_prefix = specs.add_space_prefix;
        Ok(model)
    }

    fn push(&mut self, piece: &[u8]) -> Result<(), String> {
        let id = self.tokens.len();
        let (mut token, mut score, mut kind) = (&[][..], 0.0, NORMAL);
        for field in fields(piece) {
            match field? {
                (1, Field::Bytes(bytes)) => token = bytes,
                (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
                (3, Field::Varint(number)) => kind = i32::try_from(number).unwrap_or(i32::MAX),
                _ => {}
            }
        }
        let token = str::from_utf8(token).map_err(|error| format!("piece {id} is not text: {error}"))?;
        if id == PIECES_MAX {
            return Err(format!("it has more than {PIECES_MAX} pieces"));
        }
        if token.is_empty() || token.len() > PIECE_BYTES_MAX {
            return Err(format!("piece {id} has {} bytes; expected 1 to {PIECE_BYTES_MAX}", token.len()));
        }
        if score.is_nan() || !(NORMAL..=KIND_LAST).contains(&kind) {
            return Err(format!("piece {id} has the kind {kind} and the score {score}"));
        }
        self.tokens.push(token.to_owned());
        self.scores.push(score);
        self.types.push(kind);
        Ok(())
    }
}

impl Default for Specs {
    fn default() -> Self {
        Self {
            method: UNIGRAM,
            byte_fallback: false,
            space_is_suffix: false,
            bos: Some(1),
            eos: Some(2),
            add_space_prefix: true,
            remove_extra_spaces: true,
            escape_spaces: true,
            rewrites: false,
        }
    }
}

impl Specs {
    fn read_trainer(&mut self, message: &[u8]) -> Result<(), String> {
        for field in fields(message) {
            match field? {
                (3, Field::Varint(method)) => self.method = method,
                (24, Field::Varint(flag)) => self.space_is_suffix = flag != 0,
                (35, Field::Varint(flag)) => self.byte_fallback = flag != 0,
                // -1 for none.
                (41, Field::Varint(id)) => self.bos = u32::try_from(id).ok(),
                (42, Field::Varint(id)) => self.eos = u32::try_from(id).ok(),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, message: &[u8]) -> Result<(), String> {
        for field in fields(message) {
            match field? {
                (3, Field::Varint(flag)) => self.add_space_prefix = flag != 0,
                (4, Field::Varint(flag)) => self.remove_extra_spaces = flag != 0,
                (5, Field::Varint(flag)) => self.escape_spaces = flag != 0,
                _ => {}
            }
        }
        self.rewrites |= rewrites(message)?;
        Ok(())
    }

    /// Refuses what would cut text in another way than the engine does.
    fn refuse_unsupported(&self, model: &SentencePieceModel) -> Result<(), String> {
        let first = if self.method != BPE {
            format!("its method is number {}; expected {BPE}, byte-pair encoding", self.method)
        } else if !self.byte_fallback {
            "it has no byte fallback, so some text has no tokens; expected one with it".to_owned()
        } else if self.rewrites {
            "it rewrites text before it cuts it; expected the identity".to_owned()
        } else if self.remove_extra_spaces || !self.escape_spaces || self.space_is_suffix {
            "it treats spaces unlike Mistral's; expected them all kept, as `▁` before a word".to_owned()
        } else if let Some(id) = model.types.iter().position(|&kind| kind == UNUSED) {
            format!(
                "its piece {id}, {}, is there to be cut again; expected none such",
                quote(&model.tokens[id])
            )
        } else {
            return Ok(());
        };
        Err(format!("{first}; use the model's tokenizer.json"))
    }
}

/// Whether a `NormalizerSpec` has rules.
fn rewrites(message: &[u8]) -> Result<bool, String> {
    let mut rewrites = false;
    for field in fields(message) {
        // The compiled map of characters, and the rules that it is made from.
        if let (2 | 6, Field::Bytes(rules)) = field? {
            rewrites |= !rules.is_empty();
        }
    }
    Ok(rewrites)
}

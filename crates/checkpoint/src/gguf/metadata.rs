use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::reader::Reader;
use crate::error::{CheckpointError, quote};

/// A file's key-value pairs. Arrays stay in the header's bytes until they are asked for.
pub(super) struct Metadata {
    pub(super) path: PathBuf,
    values: BTreeMap<String, Value>,
    header: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    /// Type of the elements, and where they are in the header.
    Array(u32, Range<usize>),
}

/// ggml's numbers for the types that arrays are asked for in.
const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Value {
    pub(super) fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, CheckpointError> {
        Ok(match reader.u32()? {
            0 => Self::Unsigned(u8::from_le_bytes(reader.array()?).into()),
            1 => Self::Signed(i8::from_le_bytes(reader.array()?).into()),
            2 => Self::Unsigned(u16::from_le_bytes(reader.array()?).into()),
            3 => Self::Signed(i16::from_le_bytes(reader.array()?).into()),
            4 => Self::Unsigned(reader.u32()?.into()),
            INT32 => Self::Signed(i32::from_le_bytes(reader.array()?).into()),
            FLOAT32 => Self::Float(f32::from_le_bytes(reader.array()?).into()),
            7 => match reader.array()? {
                [flag @ (0 | 1)] => Self::Flag(flag == 1),
                [other] => return Err(refuse_value(reader, key, &format!("a flag of value {other}"))),
            },
            STRING => Self::Text(reader.string()?.to_owned()),
            ARRAY => Self::read_array(reader, key)?,
            10 => Self::Unsigned(reader.u64()?),
            11 => Self::Signed(i64::from_le_bytes(reader.array()?)),
            12 => Self::Float(f64::from_le_bytes(reader.array()?)),
            other => return Err(refuse_value(reader, key, &format!("a value of unknown type {other}"))),
        })
    }

    /// Steps over the elements, so that all of them are known to be there.
    fn read_array(reader: &mut Reader<'_>, key: &str) -> Result<Self, CheckpointError> {
        let (kind, len) = (reader.u32()?, reader.u64()?);
        let element_bytes: u64 = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            STRING => {
                let start = reader.skip(0)?.start;
                for _ in 0..len {
                    let bytes = reader.u64()?;
                    reader.skip(bytes)?;
                }
                return Ok(Self::Array(kind, start..reader.skip(0)?.end));
            }
            ARRAY => return Err(refuse_value(reader, key, "an array of arrays")),
            other => return Err(refuse_value(reader, key, &format!("an array of unknown type {other}"))),
        };
        Ok(Self::Array(kind, reader.skip(len.saturating_mul(element_bytes))?))
    }

    fn describe(&self) -> String {
        match self {
            Self::Unsigned(number) => format!("{number}"),
            Self::Signed(number) => format!("{number}"),
            Self::Float(number) => format!("{number}"),
            Self::Flag(flag) => format!("{flag}"),
            Self::Text(text) => quote(text),
            Self::Array(kind, _) => format!("an array of type {kind}"),
        }
    }
}

fn refuse_value(reader: &Reader<'_>, key: &str, found: &str) -> CheckpointError {
    let problem = format!("its metadata has {found} under {}, which the engine does not read", quote(key));
    CheckpointError::malformed(&reader.source.path, problem)
}

impl Metadata {
    pub(super) fn new(path: &Path, values: BTreeMap<String, Value>, header: Vec<u8>) -> Self {
        Self { path: path.to_owned(), values, header }
    }

    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        self.get(key, "a whole number from 0", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        Ok(self.unsigned(key)?.map(|number| usize::try_from(number).unwrap_or(usize::MAX)))
    }

    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        // Beyond u32 is beyond any vocabulary, and refused as that.
        Ok(self.unsigned(key)?.map(|number| u32::try_from(number).unwrap_or(u32::MAX)))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.get(key, "a number with a fraction", |value| match value {
            Value::Float(number) => Some(*number),
            _ => None,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.get(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        self.get(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Empty if there is none.
    pub(super) fn ints(&self, key: &str) -> Result<Vec<i32>, CheckpointError> {
        let (elements, _) = self.array(key, INT32, "an array of 32-bit integers")?.as_chunks();
        Ok(elements.iter().copied().map(i32::from_le_bytes).collect())
    }

    /// Empty if there is none.
    pub(super) fn floats(&self, key: &str) -> Result<Vec<f32>, CheckpointError> {
        let (elements, _) = self.array(key, FLOAT32, "an array of 32-bit floats")?.as_chunks();
        Ok(elements.iter().copied().map(f32::from_le_bytes).collect())
    }

    /// Empty if there is none.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<String>, CheckpointError> {
        let mut rest = self.array(key, STRING, "an array of texts")?;
        let mut texts = Vec::new();
        while let Some((len, after)) = rest.split_first_chunk() {
            let len = usize::try_from(u64::from_le_bytes(*len)).unwrap_or(usize::MAX);
            let (text, after) = after.split_at(len.min(after.len()));
            let text = std::str::from_utf8(text).map_err(|_| {
                let problem = format!("element {} of {} is not UTF-8", texts.len(), quote(key));
                CheckpointError::malformed(&self.path, problem)
            })?;
            texts.push(text.to_owned());
            rest = after;
        }
        Ok(texts)
    }

    /// Fails where the model cannot do without.
    pub(super) fn require<T>(&self, key: &str, value: Option<T>) -> Result<T, CheckpointError> {
        value.ok_or_else(|| {
            CheckpointError::malformed(&self.path, format!("its metadata lacks {}", quote(key)))
        })
    }

    fn array(&self, key: &str, wanted: u32, expected: &str) -> Result<&[u8], CheckpointError> {
        let span = self.get(key, expected, |value| match value {
            Value::Array(kind, span) if *kind == wanted => Some(span.clone()),
            _ => None,
        })?;
        Ok(span.map_or(&[], |span| &self.header[span]))
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let problem =
                format!("its metadata has {} under {}; expected {expected}", value.describe(), quote(key));
            CheckpointError::malformed(&self.path, problem)
        })
    }
}

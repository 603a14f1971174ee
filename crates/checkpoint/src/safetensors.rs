//! The header of a safetensors file: eight bytes of length, then JSON. Parsed here because the format's own library
//! wants the whole file in memory, lets a later duplicate win, and names neither file nor tensor in its errors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, clip, quote};
use crate::layout::{
    Found, Header, TENSORS_MAX, check_header_bytes, check_tiling, encoded_bytes, show_shape, unknown_dtype,
};
use crate::source::{Source, parse_json};

const LENGTH_BYTES: usize = 8;
/// Some times the largest header of any model.
const HEADER_BYTES_MAX: u64 = 16 << 20;
const METADATA: &str = "__metadata__";

/// Reads and checks a file's header; the tensors are ordered by offset.
pub(crate) fn read_header(source: &Source) -> Result<Header, CheckpointError> {
    let mut length = [0; LENGTH_BYTES];
    check_header_bytes(source, LENGTH_BYTES as u64, HEADER_BYTES_MAX)?;
    source.read_at(0, &mut length)?;
    let data_start = u64::from_le_bytes(length).saturating_add(LENGTH_BYTES as u64);
    check_header_bytes(source, data_start, HEADER_BYTES_MAX)?;
    let too_long = |_| CheckpointError::malformed(&source.path, "its header does not fit into memory");
    let mut header = vec![0; usize::try_from(data_start).map_err(too_long)?];
    source.read_at(0, &mut header)?;

    // Entries stay raw at first, so that what is wrong with one can be told with its name.
    let Unique::<Box<RawValue>>(mut entries) = parse_json(&source.path, &header[LENGTH_BYTES..])?;
    entries.remove(METADATA);
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let listed: Listed = serde_json::from_str(entry.get()).map_err(|error| {
            CheckpointError::tensor(&source.path, &name, "dtype, shape and data_offsets", clip(error))
        })?;
        tensors.push(listed.check(source, name, data_start)?);
    }
    check_tiling(source, &mut tensors, data_start, 0)?;
    Ok(Header { tensors, sha256: Sha256::digest(&header).into() })
}

#[derive(Deserialize)]
struct Listed {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Listed {
    fn check(self, source: &Source, name: String, data_start: u64) -> Result<Found, CheckpointError> {
        let Self { dtype, shape, data_offsets: [start, end] } = self;
        let refuse = |expected: String, found: String| {
            Err(CheckpointError::tensor(&source.path, &name, expected, found))
        };
        let dtype = match dtype.as_str() {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            other => return Err(unknown_dtype(source, &name, other)),
        };
        let Some(bytes) = encoded_bytes(dtype, &shape) else {
            return refuse("a shape that fits into a file".to_owned(), show_shape(&shape));
        };
        if end.checked_sub(start) != Some(bytes) {
            let expected = format!("{bytes} bytes for {dtype} of shape {}", show_shape(&shape));
            return refuse(expected, format!("data_offsets {start} to {end}"));
        }
        // An offset that saturates lies beyond every file, and is refused as that.
        let offset = data_start.saturating_add(start);
        Ok(Found { name, dtype, shape, offset, bytes })
    }
}

/// A JSON object with one entry a tensor, in which a key stands once.
pub(crate) struct Unique<V>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = Unique<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry()? {
                    if map.len() == TENSORS_MAX {
                        return Err(de::Error::custom(format_args!("more than {TENSORS_MAX} entries")));
                    }
                    match map.entry(key) {
                        MapEntry::Vacant(entry) => {
                            entry.insert(value);
                        }
                        MapEntry::Occupied(entry) => {
                            return Err(de::Error::custom(format_args!(
                                "{} is listed twice",
                                quote(entry.key())
                            )));
                        }
                    }
                }
                Ok(Unique(map))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

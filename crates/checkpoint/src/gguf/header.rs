use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::metadata::{Metadata, Value};
use super::reader::{HEADER_BYTES_MAX, Reader};
use crate::dtype::Dtype;
use crate::error::{CheckpointError, quote};
use crate::layout::{
    Found, Header, TENSORS_MAX, check_header_bytes, check_tiling, encoded_bytes, show_shape, unknown_dtype,
};
use crate::source::Source;

const MAGIC: [u8; 4] = *b"GGUF";
const METADATA_ENTRIES_MAX: u64 = 1 << 16;
const DIMS_MAX: u32 = 4;
const ALIGNMENT_BYTES_DEFAULT: u64 = 32;
const ALIGNMENT_BYTES_MAX: u64 = 1 << 20;

/// Reads metadata and tensor table; the tensors are ordered by offset.
pub(super) fn read(source: &Source) -> Result<(Metadata, Header), CheckpointError> {
    let refuse = |problem: String| Err(CheckpointError::malformed(&source.path, problem));
    let mut reader = Reader::new(source);
    if source.bytes < MAGIC.len() as u64 || reader.array()? != MAGIC {
        let problem =
            "not a GGUF file: it does not begin with `GGUF`; a model of another form is named by its folder";
        return refuse(problem.to_owned());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        let hint = if (2..=3).contains(&version.swap_bytes()) { " (big-endian)" } else { "" };
        return refuse(format!("it is of GGUF version {version}{hint}; expected 2 or 3, little-endian"));
    }
    let (tensors, entries) = (reader.u64()?, reader.u64()?);
    if tensors > TENSORS_MAX as u64 {
        return refuse(format!("it claims {tensors} tensors; expected at most {TENSORS_MAX}"));
    }
    if entries > METADATA_ENTRIES_MAX {
        return refuse(format!(
            "it claims {entries} metadata entries; expected at most {METADATA_ENTRIES_MAX}"
        ));
    }
    let mut values = BTreeMap::new();
    for _ in 0..entries {
        let key = reader.string()?.to_owned();
        let value = Value::read(&mut reader, &key)?;
        match values.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(value);
            }
            Entry::Occupied(entry) => {
                return refuse(format!("its metadata lists {} twice", quote(entry.key())));
            }
        }
    }
    let mut found = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensors {
        let tensor = read_tensor(&mut reader)?;
        if !names.insert(tensor.name.clone()) {
            return Err(CheckpointError::tensor(&source.path, &tensor.name, "one of this name", "two"));
        }
        found.push(tensor);
    }
    let end = reader.position();
    let bytes = reader.into_bytes();
    let sha256 = Sha256::digest(&bytes).into();
    let metadata = Metadata::new(&source.path, values, bytes);
    place(source, &metadata, end, &mut found)?;
    Ok((metadata, Header { tensors: found, sha256 }))
}

/// One entry of the table; its offset still counts from where the tensors start.
fn read_tensor(reader: &mut Reader<'_>) -> Result<Found, CheckpointError> {
    let source = reader.source;
    let name = reader.string()?.to_owned();
    let refuse =
        |expected: &str, found: String| Err(CheckpointError::tensor(&source.path, &name, expected, found));
    let dims = reader.u32()?;
    if dims == 0 || dims > DIMS_MAX {
        return refuse("1 to 4 dimensions", dims.to_string());
    }
    let mut shape = (0..dims).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse(); // innermost first in the file
    let dtype = match reader.u32()? {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4K,
        14 => Dtype::Q6K,
        30 => Dtype::Bf16,
        other => return Err(unknown_dtype(source, &name, &dtype_name(other))),
    };
    let offset = reader.u64()?;
    match encoded_bytes(dtype, &shape) {
        Some(bytes) => Ok(Found { name, dtype, shape, offset, bytes }),
        None => refuse(
            "a shape that fits into a file, in whole blocks",
            format!("{dtype} {}", show_shape(&shape)),
        ),
    }
}

/// Turns offsets into the file's own, and checks them.
fn place(
    source: &Source,
    metadata: &Metadata,
    header_end: u64,
    tensors: &mut [Found],
) -> Result<(), CheckpointError> {
    let alignment = metadata.unsigned("general.alignment")?.unwrap_or(ALIGNMENT_BYTES_DEFAULT);
    if !alignment.is_power_of_two() || alignment > ALIGNMENT_BYTES_MAX {
        let problem = format!("its general.alignment is {alignment}; expected a power of two up to 1 MiB");
        return Err(CheckpointError::malformed(&source.path, problem));
    }
    let data_start = header_end.next_multiple_of(alignment);
    check_header_bytes(source, data_start, HEADER_BYTES_MAX)?;
    for tensor in tensors.iter_mut() {
        match data_start.checked_add(tensor.offset) {
            Some(offset) if tensor.offset.is_multiple_of(alignment) => tensor.offset = offset,
            _ => {
                let expected = format!("an offset at a multiple of {alignment}");
                let found = tensor.offset.to_string();
                return Err(CheckpointError::tensor(&source.path, &tensor.name, expected, found));
            }
        }
    }
    check_tiling(source, tensors, data_start, alignment - 1)
}

/// What ggml calls the types that are often met.
fn dtype_name(code: u32) -> String {
    let name = match code {
        6 => "Q5_0",
        7 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        _ => return format!("type {code}"),
    };
    name.to_owned()
}

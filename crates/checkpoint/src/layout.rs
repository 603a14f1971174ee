use crate::dtype::Dtype;
use crate::error::{CheckpointError, quote};
use crate::source::Source;

/// Tensors listed by one file at most; a model within the configuration's limits has fewer.
pub(crate) const TENSORS_MAX: usize = 1 << 16;

/// What a file's header says.
pub(crate) struct Header {
    pub(crate) tensors: Vec<Found>,
    pub(crate) sha256: [u8; 32],
}

/// A tensor as a header lists it, not yet known to belong to the model. Its bytes lie within the file.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Bytes of a tensor of this shape; `None` if they overflow or the innermost dimension cuts through a block.
pub(crate) fn encoded_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let block = u64::try_from(dtype.block_elems()).ok()?;
    if !shape.last().unwrap_or(&1).is_multiple_of(block) {
        return None;
    }
    let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim))?;
    (elements / block).checked_mul(u64::try_from(dtype.block_bytes()).ok()?)
}

/// Sorts tensors by offset and checks that they tile the file from `data_start` to its end, with no more than
/// `padding_bytes_max` between two or behind the last: no overlap, nothing missing, nothing left over.
pub(crate) fn check_tiling(
    source: &Source,
    tensors: &mut [Found],
    data_start: u64,
    padding_bytes_max: u64,
) -> Result<(), CheckpointError> {
    tensors.sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
    let refuse = |tensor: &Found, expected: String, found: String| {
        Err(CheckpointError::tensor(&source.path, &tensor.name, expected, found))
    };
    for tensor in tensors.iter() {
        let Found { offset, bytes, .. } = tensor;
        if offset.checked_add(*bytes).is_none_or(|end| end > source.bytes) {
            let found = format!("a file of {} bytes, cut short or with a wrong header", source.bytes);
            return refuse(tensor, format!("{bytes} bytes at offset {offset}"), found);
        }
    }
    let mut end = data_start;
    for tensor in tensors.iter() {
        let offset = tensor.offset;
        if offset < end {
            let expected = format!("its bytes at offset {end} or later, behind the tensor before it");
            return refuse(tensor, expected, format!("offset {offset}, so that they overlap"));
        }
        if offset - end > padding_bytes_max {
            let expected = format!("its bytes at offset {end}, right behind what is before it");
            let found = format!("offset {offset}, with {} bytes that belong to nothing", offset - end);
            return refuse(tensor, expected, found);
        }
        end = offset + tensor.bytes;
    }
    if source.bytes.saturating_sub(end) > padding_bytes_max {
        let problem = format!(
            "the last of its {} tensors ends at byte {end}, but the file has {}: \
             it is oversized, or its header is another file's",
            tensors.len(),
            source.bytes
        );
        return Err(CheckpointError::malformed(&source.path, problem));
    }
    Ok(())
}

/// `[2, 3]`, or what is left of it when somebody lists a million dimensions.
pub(crate) fn show_shape(shape: &[u64]) -> String {
    const SHOWN_DIMS_MAX: usize = 8;
    let more = if shape.len() > SHOWN_DIMS_MAX { " and more dimensions" } else { "" };
    format!("{:?}{more}", &shape[..shape.len().min(SHOWN_DIMS_MAX)])
}

/// Refuses a header of so many bytes, the file being shorter or no such header being that long.
pub(crate) fn check_header_bytes(source: &Source, bytes: u64, bytes_max: u64) -> Result<(), CheckpointError> {
    let problem = if bytes > source.bytes {
        format!(
            "its header would end at byte {bytes}, but the file has {}: it is cut short or damaged",
            source.bytes
        )
    } else if bytes > bytes_max {
        format!("its header would be {bytes} bytes long; expected at most {bytes_max}")
    } else {
        return Ok(());
    };
    Err(CheckpointError::malformed(&source.path, problem))
}

/// A dtype that the engine does not compute with, in the words of the file.
pub(crate) fn unknown_dtype(source: &Source, tensor: &str, found: &str) -> CheckpointError {
    let expected = "a dtype among F32, F16, BF16 and, in GGUF, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K";
    CheckpointError::tensor(&source.path, tensor, expected, quote(found))
}

use std::ops::Range;

use crate::error::{CheckpointError, clip};
use crate::layout::check_header_bytes;
use crate::source::Source;

/// Some times the largest header of any model, vocabulary included.
pub(super) const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are read to begin with; twice as many each time they do not suffice.
const FIRST_READ_BYTES: usize = 64 << 10;

/// Walks through a header of unknown length. What it holds in memory stays in proportion to what the file really has,
/// whatever lengths the file claims.
pub(super) struct Reader<'a> {
    pub(super) source: &'a Source,
    bytes: Vec<u8>,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(source: &'a Source) -> Self {
        Self { source, bytes: Vec::new(), at: 0 }
    }

    /// Where the next item begins.
    pub(super) fn position(&self) -> u64 {
        self.at as u64
    }

    /// All that was walked through.
    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        self.bytes.truncate(self.at);
        self.bytes
    }

    /// Steps over some bytes, and says where they are in [`into_bytes`](Reader::into_bytes).
    pub(super) fn skip(&mut self, len: u64) -> Result<Range<usize>, CheckpointError> {
        let end = self.position().saturating_add(len);
        check_header_bytes(self.source, end, HEADER_BYTES_MAX)?;
        let refuse = |_| CheckpointError::malformed(&self.source.path, "its header does not fit into memory");
        let end = usize::try_from(end).map_err(refuse)?;
        let have = self.bytes.len();
        if end > have {
            let most = usize::try_from(self.source.bytes.min(HEADER_BYTES_MAX)).map_err(refuse)?;
            self.bytes.resize(end.max(2 * have).max(FIRST_READ_BYTES).min(most), 0);
            self.source.read_at(have as u64, &mut self.bytes[have..])?;
        }
        let span = self.at..end;
        self.at = end;
        Ok(span)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], CheckpointError> {
        let span = self.skip(N as u64)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[span]);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Result<u32, CheckpointError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, CheckpointError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self) -> Result<&str, CheckpointError> {
        let len = self.u64()?;
        let span = self.skip(len)?;
        std::str::from_utf8(&self.bytes[span.clone()]).map_err(|error| {
            let problem = format!("the string at byte {} is not UTF-8: {}", span.start, clip(error));
            CheckpointError::malformed(&self.source.path, problem)
        })
    }
}

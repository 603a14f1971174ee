use std::ops::Range;

use crate::error::CheckpointError;
use crate::source::Source;

/// Bytes that rows are gathered through, beside what the caller holds.
const SCRATCH_BYTES_MAX: usize = 4 << 20;
/// Bytes between two pieces that are still read over: to skip fewer costs more in system calls than it saves.
const GAP_BYTES_MAX: usize = 8 << 10;

/// The same columns of all rows of one tensor.
pub(crate) struct Pieces<'a> {
    pub(crate) source: &'a Source,
    /// Of row 0's piece.
    pub(crate) offset: u64,
    pub(crate) row_bytes: usize,
    pub(crate) piece_bytes: usize,
    /// Rows of a head, if the file has them in adjacent pairs.
    pub(crate) paired_rows: Option<usize>,
}

impl Pieces<'_> {
    /// Fills `out`, which has room for exactly these rows and is not empty.
    pub(crate) fn read(&self, rows: Range<usize>, out: &mut [u8]) -> Result<(), CheckpointError> {
        let gap_bytes = self.row_bytes - self.piece_bytes;
        if self.paired_rows.is_none() && gap_bytes == 0 {
            return self.source.read_at(self.at(rows.start), out);
        }
        // Whole heads, since a head's rows lie within the head, only in another order.
        let unit = self.paired_rows.unwrap_or(1);
        let batch_rows = (SCRATCH_BYTES_MAX / self.row_bytes / unit).max(1) * unit;
        let mut scratch = Vec::new();
        let mut out = out.chunks_exact_mut(self.piece_bytes);
        let mut start = rows.start;
        while start < rows.end {
            let end = rows.end.min((start / unit * unit) + batch_rows);
            let (first, last) = self.covering(start..end);
            let cover_bytes = (last - first) * self.row_bytes + self.piece_bytes;
            let at_once = gap_bytes <= GAP_BYTES_MAX && cover_bytes <= SCRATCH_BYTES_MAX;
            if at_once {
                scratch.resize(cover_bytes, 0);
                self.source.read_at(self.at(first), &mut scratch)?;
            }
            for (row, out) in (start..end).zip(&mut out) {
                let row = self.file_row(row);
                if at_once {
                    let at = (row - first) * self.row_bytes;
                    out.copy_from_slice(&scratch[at..at + self.piece_bytes]);
                } else {
                    self.source.read_at(self.at(row), out)?;
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Where in the file a row's piece begins. The tensor was found to lie within the file, so nothing overflows.
    fn at(&self, file_row: usize) -> u64 {
        self.offset + (file_row * self.row_bytes) as u64
    }

    /// The row of the file that is this row in Hugging Face's order.
    fn file_row(&self, row: usize) -> usize {
        let Some(head_dim) = self.paired_rows else { return row };
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + 2 * pair + half
    }

    /// First and last row of the file among these.
    fn covering(&self, rows: Range<usize>) -> (usize, usize) {
        rows.map(|row| self.file_row(row))
            .fold((usize::MAX, 0), |(first, last), row| (first.min(row), last.max(row)))
    }
}

//! Rows of activations: one a token, in f32, and beside it as the dot products of bytes take it.

use std::ops::Range;

use galerne_types::Compute;

use crate::linear::Strided;
use crate::memory::{Buffer, SharedMut};
use crate::packed::{BLOCK, PANEL};
use crate::quants::{Quantize, Scale};
use crate::simd::Isa;

/// One row of activations a token, padded with zeros to whole panels.
pub(crate) struct Rows {
    pub(crate) width: usize,
    pub(crate) data: Buffer<f32>,
    quants: Option<Quants>,
}

/// The same rows, a [`Scale`] and 32 bytes a block.
struct Quants {
    values: Buffer<i8>,
    scales: Buffer<Scale>,
}

impl Rows {
    pub(crate) fn zeroed(rows: usize, width: usize) -> Self {
        let width = width.next_multiple_of(PANEL);
        Self { width, data: Buffer::zeroed(rows * width), quants: None }
    }

    /// Rows that products read: with room for the quantized form, if `compute` takes it.
    pub(crate) fn for_products(rows: usize, width: usize, compute: Compute) -> Self {
        let mut zeroed = Self::zeroed(rows, width);
        let len = zeroed.data.len();
        zeroed.quants = (compute == Compute::Int8)
            .then(|| Quants { values: Buffer::zeroed(len), scales: Buffer::zeroed(len / BLOCK) });
        zeroed
    }

    /// The rows without the columns before `column`.
    pub(crate) fn starting_at(&self, column: usize) -> Inputs {
        let block = column / BLOCK;
        // Matrices of quantized weights begin at whole blocks; those that do not are in f32.
        let quants = self.quants.as_ref().filter(|_| column.is_multiple_of(BLOCK));
        Inputs {
            rows: Strided { start: self.data[column..].as_ptr(), stride: self.width },
            quants: quants.map(|quants| QuantRows {
                values: Strided { start: quants.values[column..].as_ptr(), stride: self.width },
                scales: Strided { start: quants.scales[block..].as_ptr(), stride: self.width / BLOCK },
            }),
        }
    }

    pub(crate) fn shared(&mut self) -> RowsMut<'_> {
        let quants = self.quants.as_mut();
        let quants = quants.map(|Quants { values, scales }| (SharedMut::new(values), SharedMut::new(scales)));
        RowsMut { width: self.width, data: SharedMut::new(&mut self.data), quants }
    }

    /// Copies row `from` of `other`, which is as wide, to row `to`.
    pub(crate) fn copy_row(&mut self, to: usize, other: &Self, from: usize) {
        let width = self.width;
        self.data[to * width..][..width].copy_from_slice(&other.data[from * width..][..width]);
        if let (Some(own), Some(other)) = (&mut self.quants, &other.quants) {
            let blocks = width / BLOCK;
            own.values[to * width..][..width].copy_from_slice(&other.values[from * width..][..width]);
            own.scales[to * blocks..][..blocks].copy_from_slice(&other.scales[from * blocks..][..blocks]);
        }
    }
}

/// What a product reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    pub(crate) rows: Strided<*const f32>,
    /// There if quantized weights are to be multiplied as bytes.
    pub(crate) quants: Option<QuantRows>,
}

#[derive(Clone, Copy)]
pub(crate) struct QuantRows {
    pub(crate) values: Strided<*const i8>,
    pub(crate) scales: Strided<*const Scale>,
}

impl QuantRows {
    /// The rows from `row` on.
    #[inline(always)]
    pub(crate) fn starting_at(self, row: usize) -> Self {
        let Self { values, scales } = self;
        Self {
            values: Strided { start: values.start.wrapping_add(row * values.stride), ..values },
            scales: Strided { start: scales.start.wrapping_add(row * scales.stride), ..scales },
        }
    }
}

/// Rows that the threads of a job write, each at places of its own.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a> {
    pub(crate) width: usize,
    data: SharedMut<'a, f32>,
    quants: Option<(SharedMut<'a, i8>, SharedMut<'a, Scale>)>,
}

impl RowsMut<'_> {
    /// # Safety
    /// Nobody else touches these columns of the row while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps the threads apart")]
    pub(crate) unsafe fn row(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        let at = row * self.width;
        // SAFETY: the caller's.
        unsafe { self.data.slice(at + columns.start..at + columns.end) }
    }

    /// Quantizes the blocks of these columns, if the rows have room for that and the columns are whole blocks: where a
    /// shard's are not, its matrix is in f32.
    ///
    /// # Safety
    /// Nobody else touches these columns of the row.
    pub(crate) unsafe fn quantize(&self, isa: Isa, row: usize, columns: Range<usize>) {
        let Some((values, scales)) = &self.quants else { return };
        if !columns.start.is_multiple_of(BLOCK) || !columns.end.is_multiple_of(BLOCK) {
            return;
        }
        let (start, end) = (row * self.width + columns.start, row * self.width + columns.end);
        // SAFETY: the caller's.
        unsafe {
            let x = self.data.slice(start..end);
            let (values, scales) = (values.slice(start..end), scales.slice(start / BLOCK..end / BLOCK));
            Quantize { x, values, scales }.run_on(isa);
        }
    }

    /// The rows after the first `rows`, in f32 alone.
    pub(crate) fn skip(&self, rows: usize) -> Self {
        Self { width: self.width, data: self.data.skip(rows * self.width), quants: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn strided(&self) -> Strided<*mut f32> {
        Strided { start: self.data.as_ptr(), stride: self.width }
    }
}

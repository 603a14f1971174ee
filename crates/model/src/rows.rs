//! Rows of activations: one a token, in f32, and beside it as products of bytes or of pairs take it.

use std::ops::Range;

use galerne_types::Compute;

use crate::linear::Strided;
use crate::memory::{Buffer, SharedMut};
use crate::packed::{BLOCK, PANEL};
use crate::pairs::Round;
use crate::quants::{Quantize, Scale};
use crate::simd::Isa;

/// One row of activations a token, padded with zeros to whole panels.
pub(crate) struct Rows {
    pub(crate) width: usize,
    pub(crate) data: Buffer<f32>,
    beside: Beside,
}

/// The same rows as products take them.
enum Beside {
    Nothing,
    /// A [`Scale`] and 32 bytes a block.
    Quants {
        values: Buffer<i8>,
        scales: Buffer<Scale>,
    },
    /// In bf16.
    Halves(Buffer<u16>),
}

impl Rows {
    pub(crate) fn zeroed(rows: usize, width: usize) -> Self {
        let width = width.next_multiple_of(PANEL);
        Self { width, data: Buffer::zeroed(rows * width), beside: Beside::Nothing }
    }

    /// Rows that products read, with room for what `compute` takes.
    pub(crate) fn for_products(rows: usize, width: usize, compute: Compute) -> Self {
        let mut zeroed = Self::zeroed(rows, width);
        let len = zeroed.data.len();
        zeroed.beside = match compute {
            Compute::Int8 => {
                Beside::Quants { values: Buffer::zeroed(len), scales: Buffer::zeroed(len / BLOCK) }
            }
            Compute::Bf16 => Beside::Halves(Buffer::zeroed(len)),
            _ => Beside::Nothing,
        };
        zeroed
    }

    /// The rows without the columns before `column`.
    pub(crate) fn starting_at(&self, column: usize) -> Inputs {
        Inputs {
            rows: Strided { start: self.data[column..].as_ptr(), stride: self.width },
            form: match &self.beside {
                // Matrices of quantized weights begin at whole blocks; those that do not are in f32.
                Beside::Quants { values, scales } if column.is_multiple_of(BLOCK) => {
                    Form::Quants(QuantRows {
                        values: Strided { start: values[column..].as_ptr(), stride: self.width },
                        scales: Strided {
                            start: scales[column / BLOCK..].as_ptr(),
                            stride: self.width / BLOCK,
                        },
                    })
                }
                Beside::Halves(halves) => {
                    Form::Halves(Strided { start: halves[column..].as_ptr(), stride: self.width })
                }
                _ => Form::Plain,
            },
        }
    }

    pub(crate) fn shared(&mut self) -> RowsMut<'_> {
        let beside = match &mut self.beside {
            Beside::Nothing => BesideMut::Nothing,
            Beside::Quants { values, scales } => {
                BesideMut::Quants(SharedMut::new(values), SharedMut::new(scales))
            }
            Beside::Halves(halves) => BesideMut::Halves(SharedMut::new(halves)),
        };
        RowsMut { width: self.width, data: SharedMut::new(&mut self.data), beside }
    }

    /// Copies row `from` of `other`, which is as wide, to row `to`.
    pub(crate) fn copy_row(&mut self, to: usize, other: &Self, from: usize) {
        let width = self.width;
        self.data[to * width..][..width].copy_from_slice(&other.data[from * width..][..width]);
        match (&mut self.beside, &other.beside) {
            (Beside::Quants { values, scales }, Beside::Quants { values: values_of, scales: scales_of }) => {
                let blocks = width / BLOCK;
                values[to * width..][..width].copy_from_slice(&values_of[from * width..][..width]);
                scales[to * blocks..][..blocks].copy_from_slice(&scales_of[from * blocks..][..blocks]);
            }
            (Beside::Halves(halves), Beside::Halves(halves_of)) => {
                halves[to * width..][..width].copy_from_slice(&halves_of[from * width..][..width]);
            }
            _ => {}
        }
    }
}

/// What a product reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    pub(crate) rows: Strided<*const f32>,
    pub(crate) form: Form,
}

/// What rows are besides f32.
#[derive(Clone, Copy)]
pub(crate) enum Form {
    Plain,
    /// For quantized weights.
    Quants(QuantRows),
    /// In bf16, for weights of bf16.
    Halves(Strided<*const u16>),
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
    beside: BesideMut<'a>,
}

#[derive(Clone, Copy)]
enum BesideMut<'a> {
    Nothing,
    Quants(SharedMut<'a, i8>, SharedMut<'a, Scale>),
    Halves(SharedMut<'a, u16>),
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

    /// Rounds these columns to what products take, if the rows have room for that. Bytes have whole blocks: where a
    /// shard's columns are none, its matrix is in f32.
    ///
    /// # Safety
    /// Nobody else touches these columns of the row.
    pub(crate) unsafe fn round(&self, isa: Isa, row: usize, columns: Range<usize>) {
        let (start, end) = (row * self.width + columns.start, row * self.width + columns.end);
        // SAFETY: the caller's.
        unsafe {
            let x = self.data.slice(start..end);
            match &self.beside {
                BesideMut::Quants(values, scales)
                    if columns.start.is_multiple_of(BLOCK) && columns.end.is_multiple_of(BLOCK) =>
                {
                    let scales = scales.slice(start / BLOCK..end / BLOCK);
                    Quantize { x, values: values.slice(start..end), scales }.run_on(isa);
                }
                BesideMut::Halves(halves) => Round { x, to: halves.slice(start..end) }.run_on(isa),
                _ => {}
            }
        }
    }

    /// The rows after the first `rows`, in f32 alone.
    pub(crate) fn skip(&self, rows: usize) -> Self {
        Self { width: self.width, data: self.data.skip(rows * self.width), beside: BesideMut::Nothing }
    }

    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn strided(&self) -> Strided<*mut f32> {
        Strided { start: self.data.as_ptr(), stride: self.width }
    }
}

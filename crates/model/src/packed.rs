//! A matrix as the kernels want it: panels of 32 outputs, in each of them the inputs one after another.
//!
//! ```text
//! panel p = outputs 32p … 32p+31, cut into blocks of 32 inputs:
//!   F32, F16, BF16   32 × [value of output 0, … 31]
//!   Q8_0             [f16 d of output 0 … 31]              8 × [4 × i8 q of output 0, … 31]
//!   Q4_0             [f16 d of output 0 … 31]              4 × [4 bytes of output 0, … 31]
//!   Q4_1             [f16 d of 0 … 31] [f16 m of 0 … 31]   4 × [4 bytes of output 0, … 31]
//! ```
//! Four inputs of one output stand together as the dot products of bytes want them; byte j of a Q4 row holds input j
//! in its low half and input j + 4 in its high half. Outputs lie across SIMD lanes and inputs in sequence, so that one
//! output is one lane's chain of sums, whatever the width. Outputs beyond the matrix are zero rows. Nothing grows: each
//! weight takes the bits that it had in the file.

use std::sync::Arc;

use galerne_checkpoint::{Block, Dtype};
use half::{bf16, f16};

use crate::memory::Buffer;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 32;
/// Inputs of a block.
pub(crate) const BLOCK: usize = 32;
/// Quantized inputs of one output that stand together.
pub(crate) const QUAD: usize = 4;

/// Where the parts of a block lie, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Scales and offsets before the values.
    pub(crate) header: usize,
    /// The values of [`inputs`](Layout::inputs) inputs for 32 outputs.
    pub(crate) row: usize,
    /// Inputs of a row.
    pub(crate) inputs: usize,
}

impl Layout {
    pub(crate) const fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self { header: 0, row: 4 * PANEL, inputs: 1 },
            Dtype::F16 | Dtype::Bf16 => Self { header: 0, row: 2 * PANEL, inputs: 1 },
            Dtype::Q8_0 => Self { header: 2 * PANEL, row: QUAD * PANEL, inputs: QUAD },
            Dtype::Q4_0 => Self { header: 2 * PANEL, row: QUAD * PANEL, inputs: 2 * QUAD },
            Dtype::Q4_1 => Self { header: 4 * PANEL, row: QUAD * PANEL, inputs: 2 * QUAD },
        }
    }

    pub(crate) const fn block(self) -> usize {
        self.header + BLOCK / self.inputs * self.row
    }

    /// Where in a quantized block the byte of input `k` of output `lane` is, and by how much it is shifted.
    fn quant(self, k: usize, lane: usize) -> (usize, usize) {
        let (row, within) = (k / self.inputs, k % self.inputs);
        (self.header + row * self.row + lane * QUAD + within % QUAD, within / QUAD * 4)
    }
}

/// What a packed matrix holds: `rows` outputs by `cols` inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Shape {
    pub(crate) fn panels(self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(crate) fn panel_bytes(self) -> usize {
        let layout = Layout::of(self.dtype);
        if self.dtype.is_quantized() { self.cols / BLOCK * layout.block() } else { self.cols * layout.row }
    }

    /// A multiple of a cache line, as every panel is.
    pub(crate) fn bytes(self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Writes one row from its encoding in a file to `memory`, which is all of the matrix and began as zeros.
    pub(crate) fn set_row(self, memory: &mut [u8], row: usize, encoded: &[u8]) {
        let (dtype, lane, bytes) = (self.dtype, row % PANEL, self.panel_bytes());
        let layout = Layout::of(dtype);
        let panel = &mut memory[row / PANEL * bytes..][..bytes];
        if !dtype.is_quantized() {
            let size = dtype.block_bytes();
            for (to, from) in panel.chunks_exact_mut(layout.row).zip(encoded.chunks_exact(size)) {
                to[lane * size..][..size].copy_from_slice(from);
            }
            return;
        }
        for (to, from) in
            panel.chunks_exact_mut(layout.block()).zip(encoded.chunks_exact(dtype.block_bytes()))
        {
            to[2 * lane..][..2].copy_from_slice(&from[..2]);
            let quants = match dtype {
                Dtype::Q4_1 => {
                    to[2 * (PANEL + lane)..][..2].copy_from_slice(&from[2..4]);
                    &from[4..]
                }
                _ => &from[2..],
            };
            if dtype == Dtype::Q8_0 {
                for (k, quant) in quants.iter().enumerate() {
                    to[layout.quant(k, lane).0] = *quant;
                }
            } else {
                for (k, pair) in quants.iter().enumerate() {
                    for (k, nibble) in [(k, pair & 15), (k + BLOCK / 2, pair >> 4)] {
                        let (at, shift) = layout.quant(k, lane);
                        to[at] |= nibble << shift;
                    }
                }
            }
        }
    }
}

/// A packed matrix: a part of the memory that holds all matrices of a rank, so that they share huge pages.
pub(crate) struct Packed {
    shape: Shape,
    memory: Arc<Buffer<u8>>,
    start: usize,
}

impl Packed {
    /// The matrix whose bytes start at `start`.
    ///
    /// # Panics
    /// If they reach beyond the memory.
    pub(crate) fn new(shape: Shape, memory: Arc<Buffer<u8>>, start: usize) -> Self {
        assert!(start + shape.bytes() <= memory.len(), "{shape:?} at {start} of {}", memory.len());
        Self { shape, memory, start }
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.shape.dtype
    }

    pub(crate) fn cols(&self) -> usize {
        self.shape.cols
    }

    pub(crate) fn panels(&self) -> usize {
        self.shape.panels()
    }

    /// Outputs with those of the last panel that are always zero.
    pub(crate) fn padded_rows(&self) -> usize {
        self.panels() * PANEL
    }

    pub(crate) fn panel_bytes(&self) -> usize {
        self.shape.panel_bytes()
    }

    /// The panel's bytes, [`panel_bytes`](Packed::panel_bytes) of them.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        let bytes = self.panel_bytes();
        &self.memory[self.start + panel * bytes..][..bytes]
    }

    /// Adds 0 to row `row` and writes it to `out`, which is at least [`cols`](Packed::cols) long: a negative zero
    /// becomes a positive one, as it would in a sum with the zeros of other shards.
    pub(crate) fn gather_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.panel(row / PANEL), row % PANEL);
        let (dtype, layout) = (self.dtype(), Layout::of(self.dtype()));
        let out = &mut out[..self.cols()];
        let half_at = |bytes: &[u8], at: usize| [bytes[2 * at], bytes[2 * at + 1]];
        if !dtype.is_quantized() {
            for (out, values) in out.iter_mut().zip(panel.chunks_exact(layout.row)) {
                *out = 0.0
                    + match dtype {
                        Dtype::F16 => f16::from_le_bytes(half_at(values, lane)).to_f32(),
                        Dtype::Bf16 => bf16::from_le_bytes(half_at(values, lane)).to_f32(),
                        _ => f32::from_le_bytes(std::array::from_fn(|byte| values[4 * lane + byte])),
                    };
            }
            return;
        }
        for (out, block) in out.chunks_exact_mut(BLOCK).zip(panel.chunks_exact(layout.block())) {
            let Block { scale, offset, quants } = self.block_of(block, lane);
            for (out, quant) in out.iter_mut().zip(quants) {
                *out = 0.0 + scale.mul_add(f32::from(quant), offset);
            }
        }
    }

    /// The part of one output in a packed block.
    fn block_of(&self, block: &[u8], lane: usize) -> Block {
        let half_at = |at: usize| f16::from_le_bytes([block[2 * at], block[2 * at + 1]]).to_f32();
        let (dtype, layout) = (self.dtype(), Layout::of(self.dtype()));
        let quant = |k: usize| {
            let (at, shift) = layout.quant(k, lane);
            match dtype {
                Dtype::Q8_0 => block[at].cast_signed(),
                Dtype::Q4_0 => (block[at] >> shift & 15).cast_signed() - 8,
                _ => (block[at] >> shift & 15).cast_signed(),
            }
        };
        let offset = if dtype == Dtype::Q4_1 { half_at(PANEL + lane) } else { 0.0 };
        Block { scale: half_at(lane), offset, quants: std::array::from_fn(quant) }
    }
}

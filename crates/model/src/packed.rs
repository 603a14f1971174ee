//! A matrix as the kernels want it: panels of 32 outputs, in each of them the inputs one after another.
//!
//! ```text
//! panel p = outputs 32p … 32p+31, cut into blocks of 32 inputs:
//!   F32, F16, BF16   32 × [value of output 0, … 31]
//!   Q8_0             [f16 d of output 0 … 31]              8 × [4 × i8 q of output 0, … 31]
//!   Q4_0             [f16 d of output 0 … 31]              4 × [4 bytes of output 0, … 31]
//!   Q4_1             [f16 d of 0 … 31] [f16 m of 0 … 31]   4 × [4 bytes of output 0, … 31]
//! K-quants: groups of 8 such blocks, behind what they share
//!   Q4_K             [f16 d of 0 … 31] [f16 dmin of 0 … 31]   8 × ([i8 scale of 0 … 31] [i8 offset of 0 … 31]
//!                                                                  4 × [4 bytes of output 0, … 31])
//!   Q6_K             [f16 d of 0 … 31]   8 × (2 × [i8 scale of 0 … 31]   2 × 3 × [4 bytes of output 0, … 31])
//! ```
//! Four inputs of one output stand together as the dot products of bytes want them; byte j of a Q4 row holds input j
//! in its low half and input j + 4 in its high half. A row of Q6_K is two such rows of low halves and a third, whose
//! byte j holds the two bits above of the inputs j, j + 4, j + 8 and j + 12. Outputs lie across SIMD lanes and inputs in
//! sequence, so that one output is one lane's chain of sums, whatever the width. Outputs beyond the matrix are zero rows.
//! Nothing grows: each weight takes the bits that it had in the file, but for Q4_K's scales, which have 8 bits instead of
//! 6. All of it is read in order: with a group's scales together at its start, decoding ran at a third of the bandwidth.

use std::sync::Arc;

use galerne_checkpoint::{Block, Dtype, SuperBlock};
use half::{bf16, f16};

use crate::memory::Buffer;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 32;
/// Inputs of a block.
pub(crate) const BLOCK: usize = 32;
/// Quantized inputs of one output that stand together.
pub(crate) const QUAD: usize = 4;
/// Blocks of a group of a K-quant.
pub(crate) const GROUP_BLOCKS: usize = 8;
/// Bytes of a quad of every output.
pub(crate) const QUADS: usize = QUAD * PANEL;

/// Where the parts of a block lie, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// What the blocks of a K-quant's group share, before them; other formats have no groups.
    pub(crate) group: usize,
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
            Dtype::F32 => Self { group: 0, header: 0, row: 4 * PANEL, inputs: 1 },
            Dtype::F16 | Dtype::Bf16 => Self { group: 0, header: 0, row: 2 * PANEL, inputs: 1 },
            Dtype::Q8_0 => Self { group: 0, header: 2 * PANEL, row: QUADS, inputs: QUAD },
            Dtype::Q4_0 => Self { group: 0, header: 2 * PANEL, row: QUADS, inputs: 2 * QUAD },
            Dtype::Q4_1 => Self { group: 0, header: 4 * PANEL, row: QUADS, inputs: 2 * QUAD },
            Dtype::Q4K => Self { group: 4 * PANEL, header: 2 * PANEL, row: QUADS, inputs: 2 * QUAD },
            Dtype::Q6K => Self { group: 2 * PANEL, header: 2 * PANEL, row: 3 * QUADS, inputs: 4 * QUAD },
        }
    }

    pub(crate) const fn block(self) -> usize {
        self.header + BLOCK / self.inputs * self.row
    }

    /// Where a panel's block begins, and what its group shares.
    pub(crate) const fn block_at(self, block: usize) -> (usize, usize) {
        let group = block / GROUP_BLOCKS;
        let shared = group * (self.group + GROUP_BLOCKS * self.block());
        (shared + self.group + block % GROUP_BLOCKS * self.block(), shared)
    }

    /// Bytes of so many blocks, whole groups if there are groups.
    const fn blocks(self, count: usize) -> usize {
        count / GROUP_BLOCKS * self.group + count * self.block()
    }

    /// Where in a quantized block the byte of input `k` of output `lane` is, and by how much it is shifted.
    fn quant(self, k: usize, lane: usize) -> (usize, usize) {
        let (row, within) = (k / self.inputs, k % self.inputs);
        let quads = self.header + row * self.row + within / (2 * QUAD) * QUADS;
        (quads + lane * QUAD + within % QUAD, within / QUAD % 2 * 4)
    }

    /// The same for the two bits above, in Q6_K.
    fn pair(self, k: usize, lane: usize) -> (usize, usize) {
        let (row, within) = (k / self.inputs, k % self.inputs);
        (self.header + row * self.row + 2 * QUADS + lane * QUAD + within % QUAD, within / QUAD * 2)
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
        if self.dtype.is_quantized() { layout.blocks(self.cols / BLOCK) } else { self.cols * layout.row }
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
        if dtype.is_k_quant() {
            let blocks = encoded.chunks_exact(dtype.block_bytes());
            for (to, from) in panel.chunks_exact_mut(layout.blocks(GROUP_BLOCKS)).zip(blocks) {
                set_group(layout, to, lane, dtype, &SuperBlock::unpack(dtype, from));
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

/// Writes one output's part of a K-quant's group.
fn set_group(layout: Layout, to: &mut [u8], lane: usize, dtype: Dtype, from: &SuperBlock) {
    to[2 * lane..][..2].copy_from_slice(&from.scale.to_le_bytes());
    let six_bits = dtype == Dtype::Q6K;
    if !six_bits {
        to[2 * (PANEL + lane)..][..2].copy_from_slice(&from.offset.to_le_bytes());
    }
    let blocks = to[layout.group..].chunks_exact_mut(layout.block());
    for (at, (block, quants)) in blocks.zip(from.quants.chunks_exact(BLOCK)).enumerate() {
        block[lane] = from.scales[2 * at].cast_unsigned();
        let second = if six_bits { from.scales[2 * at + 1] } else { from.offsets[2 * at] };
        block[PANEL + lane] = second.cast_unsigned();
        for (k, quant) in quants.iter().enumerate() {
            let (at, shift) = layout.quant(k, lane);
            let value = if six_bits { quant + 32 } else { *quant }.cast_unsigned();
            block[at] |= (value & 15) << shift;
            if six_bits {
                let (at, shift) = layout.pair(k, lane);
                block[at] |= value >> 4 << shift;
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
        if dtype.is_k_quant() {
            let groups = panel.chunks_exact(layout.blocks(GROUP_BLOCKS));
            return out.chunks_exact_mut(GROUP_BLOCKS * BLOCK).zip(groups).for_each(|(out, group)| {
                self.gather_group(group, lane, out);
            });
        }
        for (out, block) in out.chunks_exact_mut(BLOCK).zip(panel.chunks_exact(layout.block())) {
            let Block { scale, offset, quants } = self.block_of(block, lane);
            for (out, quant) in out.iter_mut().zip(quants) {
                *out = 0.0 + scale.mul_add(f32::from(quant), offset);
            }
        }
    }

    /// The part of one output in a K-quant's group, as [`gather_row`](Packed::gather_row) writes it.
    fn gather_group(&self, group: &[u8], lane: usize, out: &mut [f32]) {
        let half_at = |at: usize| f16::from_le_bytes([group[2 * at], group[2 * at + 1]]).to_f32();
        let (layout, six_bits) = (Layout::of(self.dtype()), self.dtype() == Dtype::Q6K);
        let (scale, offset) = (half_at(lane), if six_bits { 0.0 } else { half_at(PANEL + lane) });
        let blocks = group[layout.group..].chunks_exact(layout.block());
        for (out, block) in out.chunks_exact_mut(BLOCK).zip(blocks) {
            let part = |at: usize| f32::from(block[at * PANEL + lane].cast_signed());
            for (k, out) in out.iter_mut().enumerate() {
                let (byte, shift) = layout.quant(k, lane);
                let low = f32::from(block[byte] >> shift & 15);
                *out = 0.0
                    + if six_bits {
                        let (byte, shift) = layout.pair(k, lane);
                        let high = f32::from(block[byte] >> shift & 3);
                        high.mul_add(16.0, low - 32.0) * (scale * part(k / 16))
                    } else {
                        (scale * part(0)).mul_add(low, -(offset * part(1)))
                    };
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

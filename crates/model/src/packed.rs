//! A matrix as the kernels want it: panels of 32 outputs, in each of them the inputs one after another.
//!
//! ```text
//! panel p = outputs 32p … 32p+31, cut into blocks of 32 inputs:
//!   F32, F16         32 × [value of output 0, … 31]
//!   BF16             16 × [2 values of output 0, … 31]
//!   Q8_0             [f16 d of output 0 … 31]              8 × [4 × i8 q of output 0, … 31]
//!   Q4_0             [f16 d of output 0 … 31]              4 × [4 bytes of output 0, … 31]
//!   Q4_1             [f16 d of 0 … 31] [f16 m of 0 … 31]   4 × [4 bytes of output 0, … 31]
//! K-quants: groups of 8 such blocks, behind what they share
//!   Q4_K             [f16 d of 0 … 31] [f16 dmin of 0 … 31]   8 × ([i8 scale of 0 … 31] [i8 offset of 0 … 31]
//!                                                                  4 × [4 bytes of output 0, … 31])
//!   Q6_K             [f16 d of 0 … 31]   8 × (2 × [i8 scale of 0 … 31]   2 × 3 × [4 bytes of output 0, … 31])
//! ```
//! Four inputs of one output stand together as the dot products of bytes want them, two of BF16 as those of pairs; byte j of a Q4 row holds input j
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
/// Inputs of BF16 that do.
pub(crate) const PAIR: usize = 2;
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
            Dtype::F16 => Self { group: 0, header: 0, row: 2 * PANEL, inputs: 1 },
            Dtype::Bf16 => Self { group: 0, header: 0, row: 2 * PAIR * PANEL, inputs: PAIR },
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
        let shared = self.blocks(block / GROUP_BLOCKS * GROUP_BLOCKS);
        (shared + self.group + block % GROUP_BLOCKS * self.block(), shared)
    }

    /// Bytes of so many blocks, whole groups if there are groups.
    pub(crate) const fn blocks(self, count: usize) -> usize {
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
        if self.dtype.is_quantized() {
            layout.blocks(self.cols / BLOCK)
        } else {
            self.cols / layout.inputs * layout.row
        }
    }

    /// A multiple of a cache line, as every panel is.
    pub(crate) fn bytes(self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Writes the rows of one panel from their encodings in a file to `memory`, which is all of the matrix and began as
    /// zeros. A few columns of all rows at a time: what is read and written of them stays in the nearest cache.
    pub(crate) fn set_panel(self, memory: &mut [u8], panel: usize, rows: &[&[u8]]) {
        let (dtype, layout) = (self.dtype, Layout::of(self.dtype));
        let panel = &mut memory[panel * self.panel_bytes()..][..self.panel_bytes()];
        match dtype {
            Dtype::F32 | Dtype::Bf16 => set_elements::<4>(panel, rows),
            Dtype::F16 => set_elements::<2>(panel, rows),
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 => {
                set_units(panel, layout.block(), rows, dtype.block_bytes(), |to, lane, from| {
                    set_block(layout, to, lane, dtype, from);
                });
            }
            Dtype::Q4K | Dtype::Q6K => {
                set_units(panel, layout.blocks(GROUP_BLOCKS), rows, dtype.block_bytes(), |to, lane, from| {
                    set_group(layout, to, lane, dtype, &SuperBlock::unpack(dtype, from));
                });
            }
        }
    }
}

/// Writes rows of numbers, or pairs of them, of `SIZE` bytes.
fn set_elements<const SIZE: usize>(panel: &mut [u8], rows: &[&[u8]]) {
    let (inputs, _) = panel.as_chunks_mut::<SIZE>();
    for (at, inputs) in inputs.chunks_mut(BLOCK * PANEL).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            let (row, _) = row[at * BLOCK * SIZE..].as_chunks::<SIZE>();
            for (outputs, element) in inputs.chunks_exact_mut(PANEL).zip(row) {
                outputs[lane] = *element;
            }
        }
    }
}

/// Calls `set` with each unit of the panel, a lane, and that row's part of `from_bytes` in it.
fn set_units(
    panel: &mut [u8],
    unit_bytes: usize,
    rows: &[&[u8]],
    from_bytes: usize,
    set: impl Fn(&mut [u8], usize, &[u8]),
) {
    for (at, unit) in panel.chunks_exact_mut(unit_bytes).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            set(unit, lane, &row[at * from_bytes..][..from_bytes]);
        }
    }
}

/// Writes one output's part of a block, four inputs or four pairs of them at a time.
fn set_block(layout: Layout, to: &mut [u8], lane: usize, dtype: Dtype, from: &[u8]) {
    const LOW: u32 = 0x0f0f_0f0f;
    let (header, values) = to.split_at_mut(layout.header);
    let (scales, quants) = from.split_at(layout.header / PANEL);
    for (to, scale) in header.chunks_exact_mut(2 * PANEL).zip(scales.chunks_exact(2)) {
        to[2 * lane..][..2].copy_from_slice(scale);
    }
    let (quads, _) = quants.as_chunks::<QUAD>();
    let quad = |at: usize| u32::from_le_bytes(quads[at]);
    for (at, row) in values.chunks_exact_mut(QUADS).enumerate() {
        let packed = match dtype {
            Dtype::Q8_0 => quad(at),
            // The file's byte i holds the inputs i and i + 16: the first two rows are of low halves.
            _ if at < 2 => quad(2 * at) & LOW | (quad(2 * at + 1) & LOW) << 4,
            _ => quad(2 * at - 4) >> 4 & LOW | quad(2 * at - 3) & !LOW,
        };
        row[lane * QUAD..][..QUAD].copy_from_slice(&packed.to_le_bytes());
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

    /// A matrix of its own memory, from its rows as a file has them.
    #[cfg(test)]
    pub(crate) fn of_rows(shape: Shape, rows: &[Vec<u8>]) -> Self {
        let mut memory = Buffer::zeroed(shape.bytes());
        for (panel, rows) in rows.chunks(PANEL).enumerate() {
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            shape.set_panel(&mut memory, panel, &rows);
        }
        Self::new(shape, Arc::new(memory), 0)
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
            for (out, values) in out.chunks_exact_mut(layout.inputs).zip(panel.chunks_exact(layout.row)) {
                for (k, out) in out.iter_mut().enumerate() {
                    *out = 0.0
                        + match dtype {
                            Dtype::F16 => f16::from_le_bytes(half_at(values, lane)).to_f32(),
                            Dtype::Bf16 => bf16::from_le_bytes(half_at(values, PAIR * lane + k)).to_f32(),
                            _ => f32::from_le_bytes(std::array::from_fn(|byte| values[4 * lane + byte])),
                        };
                }
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

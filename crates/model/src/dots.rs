//! Linear layers of quantized weights by dot products of bytes.
//!
//! Activations are bytes too, 32 to a scale ([`crate::quants`]). Every output is, over the blocks b = 0, 1, 2 … of its
//! inputs, from acc = 0, in f32:
//!
//! ```text
//! acc = fma(Σ q_w·q_x, d_w·d_x, acc)          Q4_1 and Q4_K also: acc = fma(m, d_x·Σ q_x, acc)
//! ```
//! Q6_K does so for each half of a block, which has a scale of its own.
//! The sums within a block are of integers and exact, so they come out alike in whatever order and by whatever
//! instructions; the order of the blocks is fixed. So this, like the f32 path, is one definition for every instruction
//! set, and shows neither the batch nor the chunking: few tokens use weights as they are read, many share a part of a
//! panel that is laid out once (`laid`), and no weight is ever widened into memory.
//!
//! A CPU with AVX-512 but without VNNI runs the code for AVX2. Bounds: bytes over bandwidth for few tokens, operations
//! over the peak of the integer products for many. On AVX2 a product of 8 outputs by 4 inputs is four instructions, two of
//! which multiply (`simd::avx2`): on a Zen 4, which begins four a cycle and two of these, one cycle each if nothing else
//! were to do. Nothing that is exact takes fewer: `vpmaddubsw` adds up pairs in 16 bits, so of two signed bytes one has to
//! give its sign to the other first. Scaling a block costs an output 3 more for its 8 products:
//!
//! ```text
//! laid      4 tokens × 2 vectors × (8 quads × 4 + 3) = 280 instructions, 70 cycles for 64 of products: 91%
//! as read   8 tokens × (8 quads × 4 + 4) + 8 quads × 5 for the weights = 328, 82 cycles for 64: 78%
//! ```
//! of the peak of `examples/bounds`; copies of these loops alone reach 77% and 61%. Nibbles need no sign and are added
//! up in 16 bits for a block, so that a product takes two instructions, and scaling four. With VNNI any product is one, and of 10
//! instructions in the units that multiply 8 are products: 80%, and tiles of six tokens reach 71 to 75% (`read`).

mod formats;
mod laid;
mod read;

use std::marker::PhantomData;
use std::ops::Range;

use galerne_checkpoint::Dtype;

use self::formats::{Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
use self::laid::Laid;
use self::read::{One, Read};
use crate::linear::Strided;
use crate::packed::{BLOCK, PANEL, Packed, QUAD};
use crate::quants::Scale;
use crate::rows::QuantRows;
use crate::simd::{Dots, Isa};

/// From so many tokens on it pays to lay weights out once for all of them. Fewer wait for memory, which is then read in
/// bursts.
const TOKENS_LAID_MIN: usize = 12;
const LINE_BYTES: usize = 64;

/// As [`linear`](crate::linear::linear), for quantized weights that are not empty.
///
/// # Safety
/// As [`linear`](crate::linear::linear).
pub(crate) unsafe fn dots(
    isa: Isa,
    weights: &Packed,
    panels: Range<usize>,
    tokens: usize,
    x: QuantRows,
    y: Strided<*mut f32>,
) {
    if panels.is_empty() {
        return;
    }
    let tile = Tile {
        start: weights.panel(panels.start).as_ptr(),
        panels: panels.len(),
        blocks: weights.cols() / BLOCK,
        x,
        y: Strided { start: y.start.wrapping_add(panels.start * PANEL), ..y },
    };
    // SAFETY: the caller's; each format is the one that the matrix was packed in.
    unsafe {
        match weights.dtype() {
            Dtype::Q8_0 => tiles::<Q8_0>(isa, tile, tokens),
            Dtype::Q4_0 => tiles::<Q4_0>(isa, tile, tokens),
            Dtype::Q4_1 => tiles::<Q4_1>(isa, tile, tokens),
            Dtype::Q4K => tiles::<Q4K>(isa, tile, tokens),
            Dtype::Q6K => tiles::<Q6K>(isa, tile, tokens),
            dtype => unreachable!("{dtype} is not quantized"),
        }
    }
}

/// # Safety
/// As [`dots`].
unsafe fn tiles<F: Format>(isa: Isa, tile: Tile, tokens: usize) {
    // SAFETY: the caller's.
    unsafe {
        if tokens == 1 {
            isa.run_dots(One::<F> { tile, format: PhantomData });
        } else if tokens >= TOKENS_LAID_MIN && isa.lays_out() {
            isa.run_dots(Laid::<F> { tile, tokens, format: PhantomData });
        } else {
            isa.run_dots(Read::<F> { tile, tokens, format: PhantomData });
        }
    }
}

/// Some panels and the rows that they are multiplied with.
#[derive(Clone, Copy)]
struct Tile {
    start: *const u8,
    panels: usize,
    blocks: usize,
    x: QuantRows,
    y: Strided<*mut f32>,
}

/// Memory that is asked for while there is something to multiply, evenly: what is multiplied next. Behind the last
/// panel it is asked for nothing that is there, and takes no harm.
struct Ahead {
    next: *const u8,
    end: *const u8,
    /// Bytes at a time.
    step: usize,
}

impl Ahead {
    /// So many bytes in so many steps.
    fn of(next: *const u8, bytes: usize, steps: usize) -> Self {
        Self { next, end: next.wrapping_add(bytes), step: bytes.div_ceil(steps).next_multiple_of(LINE_BYTES) }
    }

    /// # Safety
    /// As [`Dots`].
    #[inline(always)]
    unsafe fn go_on<V: Dots>(&mut self) {
        let stop = self.end.min(self.next.wrapping_add(self.step));
        while self.next < stop {
            // SAFETY: the caller's.
            unsafe { V::prefetch(self.next) };
            self.next = self.next.wrapping_add(LINE_BYTES);
        }
    }
}

impl Scale {
    /// Σq of a part of the block.
    #[inline(always)]
    fn sum_of<F: Format>(&self, part: usize) -> i32 {
        if F::PARTS == 1 { self.sum() } else { self.sums[part] }
    }
}

/// The quads of a part of a block.
#[inline(always)]
fn quads_of<F: Format>(part: usize) -> Range<usize> {
    let quads = BLOCK / QUAD / F::PARTS;
    part * quads..(part + 1) * quads
}

#[cfg(test)]
mod tests {

    use galerne_checkpoint::{Block, SuperBlock};
    use proptest::prelude::*;

    use super::*;
    use crate::linear::linear;
    use crate::packed::{GROUP_BLOCKS, Shape};
    use crate::quants::Quantize;
    use crate::rows::{Form, Inputs};

    const FORMATS: [Dtype; 5] = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K];

    /// Rows of a file: every byte that a format allows (or the largest of either sign, in turn), scales and offsets of
    /// either sign that are numbers.
    fn rows(dtype: Dtype, rows: usize, cols: usize, seed: u64, extreme: bool) -> Vec<Vec<u8>> {
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        let mut block = || {
            let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| byte()).collect();
            let highs: &[usize] = match dtype {
                Dtype::Q4_1 | Dtype::Q4K => &[1, 3],
                Dtype::Q6K => &[209],
                _ => &[1],
            };
            for &high in highs {
                block[high] = block[high] & 0x83 | 0x20; // exponents of f16 around 2^-7
            }
            if extreme {
                match dtype {
                    Dtype::Q8_0 => block[2..].fill(0x80),
                    Dtype::Q4_0 => block[2..].fill(0xff),
                    Dtype::Q4_1 | Dtype::Q4K => block[4..].fill(0xff),
                    _ => block[..208].fill(if byte() > 127 { 0x00 } else { 0xff }),
                }
            }
            block
        };
        (0..rows).map(|_| (0..cols / dtype.block_elems()).flat_map(|_| block()).collect()).collect()
    }

    /// The definition, in plain loops.
    fn expected(dtype: Dtype, row: &[u8], values: &[i8], scales: &[Scale]) -> f32 {
        if dtype.is_k_quant() {
            return expected_of_k(dtype, row, values, scales);
        }
        let mut acc = 0f32;
        let blocks = row.chunks(dtype.block_bytes()).zip(values.chunks(BLOCK)).zip(scales);
        for ((block, values), scale) in blocks {
            let Block { scale: d, offset, quants } = Block::unpack(dtype, block);
            let products = quants.iter().zip(values).map(|(w, x)| i32::from(*w) * i32::from(*x));
            acc = (products.sum::<i32>() as f32).mul_add(d * scale.scale, acc);
            if dtype == Dtype::Q4_1 {
                acc = offset.mul_add(scale.total, acc);
            }
        }
        acc
    }

    fn expected_of_k(dtype: Dtype, row: &[u8], values: &[i8], scales: &[Scale]) -> f32 {
        let (mut acc, parts) = (0f32, if dtype == Dtype::Q6K { 2 } else { 1 });
        let groups = row.chunks(dtype.block_bytes()).zip(values.chunks(GROUP_BLOCKS * BLOCK));
        for ((group, values), scales) in groups.zip(scales.chunks(GROUP_BLOCKS)) {
            let group = SuperBlock::unpack(dtype, group);
            for (block, scale) in scales.iter().enumerate() {
                for part in 0..parts {
                    let inputs =
                        block * BLOCK + part * (BLOCK / parts)..block * BLOCK + (part + 1) * (BLOCK / parts);
                    let products = group.quants[inputs.clone()].iter().zip(&values[inputs]);
                    let sum: i32 = products.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum();
                    let d = group.scale.to_f32() * f32::from(group.scales[2 * block + part]);
                    acc = (sum as f32).mul_add(d * scale.scale, acc);
                }
                if dtype == Dtype::Q4K {
                    let offset = group.offset.to_f32() * f32::from(group.offsets[2 * block]);
                    acc = (-offset).mul_add(scale.total, acc);
                }
            }
        }
        acc
    }

    fn check(dtype: Dtype, (outputs, units, tokens): (usize, usize, usize), seed: u64, extreme: bool) {
        let blocks = units * dtype.block_elems() / BLOCK;
        let weights = rows(dtype, outputs, blocks * BLOCK, seed, extreme);
        let shape = Shape { dtype, rows: outputs, cols: blocks * BLOCK };
        let packed = Packed::of_rows(shape, &weights);
        let width = blocks * BLOCK;
        let x: Vec<f32> = (0..tokens * width)
            .map(|i| {
                let noise = (i as u64 * 2_654_435_761 + seed * 97) % 1999;
                if extreme { if noise > 100 { 1.0 } else { -1.0 } } else { noise as f32 / 999.5 - 1.0 }
            })
            .collect();
        let (mut values, mut scales) = (vec![0; x.len()], vec![Scale::default(); x.len() / BLOCK]);
        Quantize { x: &x, values: &mut values, scales: &mut scales }.run_on(Isa::best());
        let quants = QuantRows {
            values: Strided { start: values.as_ptr(), stride: width },
            scales: Strided { start: scales.as_ptr(), stride: blocks },
        };
        let rows = Strided { start: x.as_ptr(), stride: width };
        let inputs = Inputs { rows, form: Form::Quants(quants) };
        for isa in Isa::available() {
            let stride = packed.padded_rows();
            let mut y = vec![f32::NAN; tokens * stride];
            let to = Strided { start: y.as_mut_ptr(), stride };
            // SAFETY: the rows are as long as the strides say.
            unsafe { linear(isa, &packed, 0..packed.panels(), tokens, inputs, to) };
            for (token, y) in y.chunks(stride).enumerate() {
                let values = &values[token * width..][..width];
                let scales = &scales[token * blocks..][..blocks];
                for (output, row) in weights.iter().enumerate() {
                    let expected = expected(dtype, row, values, scales);
                    assert_eq!(
                        y[output].to_bits(),
                        expected.to_bits(),
                        "{dtype} on {}: token {token} of {tokens}, output {output}: {} for {expected}",
                        isa.name(),
                        y[output]
                    );
                }
                assert!(y[outputs..].iter().all(|y| *y == 0.0), "the outputs that fill the last panel");
            }
        }
    }

    #[test]
    fn sums_at_their_limits_do_not_overflow() {
        for dtype in FORMATS {
            (1..=13).for_each(|tokens| check(dtype, (33, 2, tokens), 3, true));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_isa_and_batch_gives_the_bits_of_the_definition(
            format in 0..FORMATS.len(),
            shape in (1usize..80, 1usize..40, 1usize..24),
            seed in 0u64..1 << 40,
        ) {
            check(FORMATS[format], shape, seed, false);
        }
    }
}

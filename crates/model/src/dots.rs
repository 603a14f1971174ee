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
//! up in 16 bits for a block, so that a product takes two instructions, and scaling four.

mod formats;
mod laid;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use galerne_checkpoint::Dtype;

use self::formats::{At, Format, Products, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
use self::laid::Laid;
use crate::linear::Strided;
use crate::packed::{BLOCK, GROUP_BLOCKS, PANEL, Packed, QUAD};
use crate::quants::Scale;
use crate::rows::QuantRows;
use crate::simd::{DotKernel, Dots, Isa};

/// From so many tokens on it pays to lay weights out once for all of them. Fewer wait for memory, which is then read in
/// bursts.
const TOKENS_LAID_MIN: usize = 12;
/// How far ahead of its products memory is asked for; beyond the last panel it is asked for nothing that is there.
const AHEAD_BYTES: usize = 2048;
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
        panel_bytes: weights.panel_bytes(),
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
    if tokens >= TOKENS_LAID_MIN && isa.lays_out() {
        // SAFETY: the caller's.
        return unsafe { isa.run_dots(Laid::<F> { tile, tokens, format: PhantomData }) };
    }
    let mut done = 0;
    while done < tokens {
        let tile = tile.starting_at(done);
        // SAFETY: each arm takes at most the tokens that are left.
        done += unsafe {
            match tokens - done {
                8.. => run::<F, 8>(isa, tile),
                6.. => run::<F, 6>(isa, tile),
                4.. => run::<F, 4>(isa, tile),
                3 => run::<F, 3>(isa, tile),
                2 => run::<F, 2>(isa, tile),
                _ => run::<F, 1>(isa, tile),
            }
        };
    }
}

/// # Safety
/// As [`dots`], for `M` tokens. Returns `M`.
unsafe fn run<F: Format, const M: usize>(isa: Isa, tile: Tile) -> usize {
    // SAFETY: the caller's.
    unsafe { isa.run_dots(Tokens::<F, M> { tile, format: PhantomData }) };
    M
}

/// Some panels and the rows that they are multiplied with.
#[derive(Clone, Copy)]
struct Tile {
    start: *const u8,
    panel_bytes: usize,
    panels: usize,
    blocks: usize,
    x: QuantRows,
    y: Strided<*mut f32>,
}

impl Tile {
    fn starting_at(self, token: usize) -> Self {
        let y = Strided { start: self.y.start.wrapping_add(token * self.y.stride), ..self.y };
        Self { x: self.x.starting_at(token), y, ..self }
    }
}

/// The micro-kernel for few tokens: M of them by the outputs of some panels, whose weights are used as they are read.
struct Tokens<F, const M: usize> {
    tile: Tile,
    format: PhantomData<F>,
}

impl<F: Format, const M: usize> DotKernel for Tokens<F, M> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        // SAFETY: W divides the vectors of a panel: two of 16 lanes, or four of 8.
        unsafe {
            match (V::LANES, M) {
                (16, _) | (_, 2..=4) => self.panels::<V, 2>(),
                (_, 1) => self.panels::<V, 4>(),
                _ => self.panels::<V, 1>(),
            }
        }
    }
}

impl<F: Format, const M: usize> Tokens<F, M> {
    /// Goes through each panel once and in order, W vectors of outputs at a time.
    ///
    /// # Safety
    /// As [`dots`].
    #[inline(always)]
    unsafe fn panels<V: Dots, const W: usize>(&self) {
        let Tile { start, panel_bytes, panels, blocks, x, y } = self.tile;
        // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised.
        unsafe {
            for panel in 0..panels {
                let mut from = start.add(panel * panel_bytes);
                let mut group = from;
                let mut sums = [[0.0; PANEL]; M];
                for block in 0..blocks {
                    if F::LAYOUT.group > 0 && block.is_multiple_of(GROUP_BLOCKS) {
                        group = from;
                        from = from.add(F::LAYOUT.group);
                    }
                    // One token waits for memory anyway, and reads it in order.
                    if M > 1 {
                        for line in (0..F::LAYOUT.block()).step_by(LINE_BYTES) {
                            V::prefetch(from.wrapping_add(AHEAD_BYTES + line));
                        }
                    }
                    let x = QuantRows {
                        values: Strided { start: x.values.start.add(block * BLOCK), ..x.values },
                        scales: Strided { start: x.scales.start.add(block), ..x.scales },
                    };
                    for lane in (0..PANEL).step_by(W * V::LANES) {
                        for part in 0..F::PARTS {
                            Self::part::<V, W>(At { group, header: from, lane }, part, x, &mut sums);
                        }
                    }
                    from = from.add(F::LAYOUT.block());
                }
                for (m, sums) in sums.iter().enumerate() {
                    let to = y.start.add(m * y.stride + panel * PANEL);
                    to.copy_from_nonoverlapping(sums.as_ptr(), PANEL);
                }
            }
        }
    }

    /// Adds a part of a block to the sums of W vectors from lane `at.lane` on; `x` begins with the block.
    ///
    /// # Safety
    /// As [`dots`].
    #[inline(always)]
    unsafe fn part<V: Dots, const W: usize>(at: At, part: usize, x: QuantRows, sums: &mut [[f32; PANEL]; M]) {
        // Plain loops: what closures do is compiled without the CPU's features, unless it is inlined.
        // SAFETY: the caller's.
        unsafe {
            let mut inner = [[F::Products::begin::<V>(0); W]; M];
            for (m, inner) in inner.iter_mut().enumerate() {
                let scale = &*x.scales.start.add(m * x.scales.stride);
                *inner = [F::Products::begin::<V>(scale.sum_of::<F>(part)); W];
            }
            let mut of_zeros = [F::Products::begin::<V>(0); W];
            for quad in quads_of::<F>(part) {
                let mut quads = [F::Products::quads::<V>(at.quads(F::LAYOUT), quad); W];
                let mut weights = [F::Products::laid::<V>(quads[0]); W];
                for w in 0..W {
                    quads[w] = F::Products::quads::<V>(at.right(w * V::LANES).quads(F::LAYOUT), quad);
                    weights[w] = F::Products::laid::<V>(quads[w]);
                    if M > 1 {
                        of_zeros[w] = F::Products::of_zeros::<V>(of_zeros[w], weights[w]);
                    }
                }
                for (m, inner) in inner.iter_mut().enumerate() {
                    let x =
                        x.values.start.add(m * x.values.stride + quad * QUAD).cast::<i32>().read_unaligned();
                    for w in 0..W {
                        inner[w] = if M > 1 {
                            F::Products::dot::<V>(inner[w], weights[w], x)
                        } else {
                            F::Products::dot_once::<V>(inner[w], quads[w], x)
                        };
                    }
                }
            }
            if M > 1 {
                // Registers hold the sums of a block; those of the blocks before wait in memory, and nowhere else.
                compiler_fence(Ordering::SeqCst);
            }
            for w in 0..W {
                let at = at.right(w * V::LANES);
                let d = F::scale::<V>(at, part);
                for m in 0..M {
                    let scale = &*x.scales.start.add(m * x.scales.stride);
                    let sum = sums[m].as_mut_ptr().add(at.lane);
                    let inner = F::Products::end::<V>(F::Products::less::<V>(inner[m][w], of_zeros[w]));
                    let mut acc = inner.mul_add(d.mul(V::splat(scale.scale)), V::load(sum));
                    if F::OFFSET {
                        acc = F::offset::<V>(at).mul_add(V::splat(scale.total), acc);
                    }
                    acc.store(sum);
                }
            }
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
    use crate::packed::Shape;
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
            shape in (1usize..80, 1usize..20, 1usize..20),
            seed in 0u64..1 << 40,
        ) {
            check(FORMATS[format], shape, seed, false);
        }
    }
}

//! Linear layers of bf16 weights by products of pairs.
//!
//! Activations are rounded to bf16. Every output is, over the pairs i = 0, 1, 2 … of its inputs, from acc = 0, in f32:
//!
//! ```text
//! acc = fma(w_2i, x_2i, fma(w_2i+1, x_2i+1, acc))        what is below 2^-126 counts as zero
//! ```
//! which is one instruction where the CPU has AVX-512 BF16 ([`Pairs`]) and the same bits elsewhere. The order is the
//! same for one token and for a thousand, so neither the batch nor the prefill's chunking shows.
//!
//! Bounds: bytes over bandwidth for few tokens, operations over the peak of the instruction for many (`examples/bounds`).
//! A tile of 12 tokens by 32 outputs takes 24 of them for 2 loads of weights and 12 of activations; its part of a panel
//! stays in the first-level cache.

use std::ops::Range;

use crate::linear::Strided;
use crate::packed::{PAIR, PANEL, Packed};
use crate::simd::{Isa, PairKernel, Pairs};

/// Inputs of a panel that all tokens are multiplied with before the next: half a first-level cache of 32 KiB.
const INPUTS_TOGETHER: usize = 256;
/// How far ahead of its products memory is asked for; beyond the last panel it is asked for nothing that is there.
const AHEAD_BYTES: usize = 4096;
/// Tokens of the widest tile, and what there is for those that are left.
const TOKENS_TOGETHER: usize = 12;

/// As [`linear`](crate::linear::linear), for weights of bf16 that are not empty.
///
/// # Safety
/// As [`linear`](crate::linear::linear).
pub(crate) unsafe fn pairs(
    isa: Isa,
    weights: &Packed,
    panels: Range<usize>,
    tokens: usize,
    x: Strided<*const u16>,
    y: Strided<*mut f32>,
) {
    if panels.is_empty() {
        return;
    }
    let y = Strided { start: y.start.wrapping_add(panels.start * PANEL), ..y };
    let (start, inputs) = (weights.panel(panels.start).as_ptr(), weights.cols());
    // SAFETY: the caller's.
    unsafe { isa.run_pairs(Panels { start: start.cast(), panels: panels.len(), inputs, tokens, x, y }) };
}

/// Consecutive panels, and the rows that they are multiplied with.
struct Panels {
    start: *const [u16; PAIR],
    panels: usize,
    inputs: usize,
    tokens: usize,
    x: Strided<*const u16>,
    y: Strided<*mut f32>,
}

impl PairKernel for Panels {
    #[inline(always)]
    unsafe fn run<V: Pairs>(self) {
        let Self { start, panels, inputs, tokens, x, y } = self;
        // One tile reads a panel in one go.
        let together = if tokens > TOKENS_TOGETHER { INPUTS_TOGETHER } else { inputs };
        let mut from = start;
        for panel in 0..panels {
            let mut first = 0;
            while first < inputs {
                let inputs = together.min(inputs - first);
                let mut token = 0;
                while token < tokens {
                    // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised.
                    unsafe {
                        let part = Part {
                            from,
                            inputs,
                            x: Strided { start: x.start.add(token * x.stride + first), ..x },
                            y: Strided { start: y.start.add(token * y.stride + panel * PANEL), ..y },
                            goes_on: first > 0,
                        };
                        token += match tokens - token {
                            TOKENS_TOGETHER.. => part.tile::<V, TOKENS_TOGETHER>(),
                            8.. => part.tile::<V, 8>(),
                            6.. => part.tile::<V, 6>(),
                            4.. => part.tile::<V, 4>(),
                            3 => part.tile::<V, 3>(),
                            2 => part.tile::<V, 2>(),
                            _ => part.tile::<V, 1>(),
                        };
                    }
                }
                from = from.wrapping_add(inputs / PAIR * PANEL);
                first += inputs;
            }
        }
    }
}

/// A part of a panel's inputs, and the tokens from one on.
#[derive(Clone, Copy)]
struct Part {
    from: *const [u16; PAIR],
    inputs: usize,
    x: Strided<*const u16>,
    y: Strided<*mut f32>,
    /// The sums begin with what stands in `y`, not with 0.
    goes_on: bool,
}

impl Part {
    /// M tokens by the panel's outputs, two vectors of them at a time. Returns M.
    ///
    /// # Safety
    /// As [`pairs`], for M tokens.
    #[inline(always)]
    unsafe fn tile<V: Pairs, const M: usize>(self) -> usize {
        // SAFETY: the caller's.
        unsafe {
            for lane in (0..PANEL).step_by(2 * V::LANES) {
                self.vectors::<V, M>(lane);
            }
        }
        M
    }

    /// Outputs `lane …` of the panel.
    ///
    /// # Safety
    /// As [`tile`](Self::tile).
    #[inline(always)]
    unsafe fn vectors<V: Pairs, const M: usize>(self, lane: usize) {
        // SAFETY: the caller's.
        unsafe {
            let (mut from, y) = (self.from.add(lane), self.y.start.add(lane));
            let mut sums = [[V::splat(0.0); 2]; M];
            if self.goes_on {
                for (m, sums) in sums.iter_mut().enumerate() {
                    let y = y.add(m * self.y.stride);
                    *sums = [V::load(y), V::load(y.add(V::LANES))];
                }
            }
            let mut x = self.x.start;
            for _ in 0..self.inputs / PAIR {
                V::prefetch(from.cast::<u8>().wrapping_add(AHEAD_BYTES));
                V::prefetch(from.add(V::LANES).cast::<u8>().wrapping_add(AHEAD_BYTES));
                let weights = [V::load_weights(from), V::load_weights(from.add(V::LANES))];
                for (m, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(m * self.x.stride).cast::<[u16; PAIR]>().read_unaligned();
                    sums[0] = sums[0].add_pair(weights[0], x);
                    sums[1] = sums[1].add_pair(weights[1], x);
                }
                from = from.add(PANEL);
                x = x.add(PAIR);
            }
            for (m, sums) in sums.into_iter().enumerate() {
                let y = y.add(m * self.y.stride);
                sums[0].store(y);
                sums[1].store(y.add(V::LANES));
            }
        }
    }
}

/// Rounds activations to bf16, to the nearest even; what is below 2^-126 becomes zero.
pub(crate) struct Round<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) to: &'a mut [u16],
}

impl Round<'_> {
    pub(crate) fn run_on(self, isa: Isa) {
        assert_eq!(self.x.len(), self.to.len());
        // SAFETY: the kernel moves as many elements as both slices have.
        unsafe { isa.run_pairs(self) }
    }
}

impl PairKernel for Round<'_> {
    #[inline(always)]
    unsafe fn run<V: Pairs>(self) {
        let Self { x, to } = self;
        let whole = x.len() / V::LANES * V::LANES;
        for at in (0..whole).step_by(V::LANES) {
            // SAFETY: within both slices.
            unsafe { V::load(x.as_ptr().add(at)).store_bf16(to.as_mut_ptr().add(at)) };
        }
        let (mut last, mut rounded) = ([0.0; 16], [0; 16]);
        last[..x.len() - whole].copy_from_slice(&x[whole..]);
        // SAFETY: both arrays have room for the widest vector.
        unsafe { V::load(last.as_ptr()).store_bf16(rounded.as_mut_ptr()) };
        to[whole..].copy_from_slice(&rounded[..x.len() - whole]);
    }
}

#[cfg(test)]
mod tests {
    use galerne_checkpoint::Dtype;
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::linear::linear;
    use crate::packed::Shape;
    use crate::rows::{Form, Inputs};

    /// The definition, in plain loops.
    fn expected(weights: &[bf16], x: &[bf16]) -> f32 {
        weights.chunks(PAIR).zip(x.chunks(PAIR)).fold(0.0, |acc, (w, x)| {
            let second = w[1].to_f32().mul_add(x[1].to_f32(), acc);
            w[0].to_f32().mul_add(x[0].to_f32(), second)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn every_isa_and_batch_gives_the_bits_of_the_definition(
            outputs in 1usize..70,
            pairs in 1usize..300,
            tokens in 1usize..30,
            seed in 1u64..1 << 40,
        ) {
            let cols = pairs * PAIR;
            let number = |i: usize| {
                let noise = (i as u64 + 1).wrapping_mul(2_654_435_761).wrapping_mul(seed | 1) >> 20 & 0xfff;
                bf16::from_f32(noise as f32 / 2048.0 - 1.0)
            };
            let weights: Vec<Vec<bf16>> =
                (0..outputs).map(|row| (0..cols).map(|k| number(row * 977 + k)).collect()).collect();
            let encoded: Vec<Vec<u8>> = weights
                .iter()
                .map(|row| row.iter().flat_map(|weight| weight.to_le_bytes()).collect())
                .collect();
            let packed = Packed::of_rows(Shape { dtype: Dtype::Bf16, rows: outputs, cols }, &encoded);
            let x: Vec<f32> = (0..tokens * cols).map(|i| number(i * 31 + 7).to_f32() * 1.01).collect();
            let stride = packed.padded_rows();
            for isa in Isa::available() {
                let mut halves = vec![0; x.len()];
                Round { x: &x, to: &mut halves }.run_on(isa);
                let rounded: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
                assert!(halves.iter().zip(&rounded).all(|(bits, x)| *bits == x.to_bits()));
                let form = Form::Halves(Strided { start: halves.as_ptr(), stride: cols });
                let inputs = Inputs { rows: Strided { start: x.as_ptr(), stride: cols }, form };
                let mut y = vec![f32::NAN; tokens * stride];
                let to = Strided { start: y.as_mut_ptr(), stride };
                // SAFETY: the rows are as long as the strides say.
                unsafe { linear(isa, &packed, 0..packed.panels(), tokens, inputs, to) };
                for (token, y) in y.chunks(stride).enumerate() {
                    for (output, row) in weights.iter().enumerate() {
                        let expected = expected(row, &rounded[token * cols..][..cols]);
                        let found = y[output];
                        assert_eq!(
                            found.to_bits(),
                            expected.to_bits(),
                            "{}: token {token}, output {output}: {found} for {expected}",
                            isa.name()
                        );
                    }
                    assert!(y[outputs..].iter().all(|y| *y == 0.0), "the outputs that fill the last panel");
                }
            }
        }
    }
}

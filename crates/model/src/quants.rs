//! Activations as bytes: every 32 of a row share a scale.
//!
//! ```text
//! d = max |x| / 127      q = x · (127 / max |x|), rounded to the nearest even      x ≈ d · q
//! ```
//! The largest of a block is off by nothing and the others by d/2 at most, as in ggml's Q8_0 and Q8_1, whose d is
//! rounded to f16 besides. A block depends on its own 32 values only, and blocks begin where shards do: so neither the
//! batch nor the number of ranks shows.

use crate::memory::Number;
use crate::packed::BLOCK;
use crate::simd::{DotKernel, Dots, Isa};

/// Largest value of a byte, of either sign.
pub(crate) const QUANT_MAX: f32 = 127.0;
/// A block whose values are all smaller counts as zeros, so that neither d nor 1/d is beyond what f32 holds.
const MAX_MIN: f32 = 1e-30;
/// Adding it to |n| < 2^22 rounds n to the nearest integer and leaves it in the lowest bits.
pub(crate) const ROUNDING_SHIFT: f32 = 12_582_912.0;

/// What a block's values share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Scale {
    /// d.
    pub(crate) scale: f32,
    /// d · Σq: what an offset of the weights is multiplied by.
    pub(crate) total: f32,
    /// Σq of the first half and of the second.
    pub(crate) sums: [i32; 2],
}

impl Scale {
    /// Σq.
    pub(crate) fn sum(&self) -> i32 {
        self.sums[0] + self.sums[1]
    }
}

impl Number for Scale {}

/// Quantizes some blocks.
pub(crate) struct Quantize<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) values: &'a mut [i8],
    pub(crate) scales: &'a mut [Scale],
}

impl Quantize<'_> {
    pub(crate) fn run_on(self, isa: Isa) {
        assert!(self.x.len() == self.scales.len() * BLOCK && self.values.len() == self.x.len());
        // SAFETY: the kernel moves whole blocks within slices of the lengths just checked.
        unsafe { isa.run_dots(self) }
    }
}

impl DotKernel for Quantize<'_> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        let Self { x, values, scales } = self;
        for (block, scale) in scales.iter_mut().enumerate() {
            // SAFETY: every block has 32 values, a multiple of LANES.
            unsafe {
                let x = x.as_ptr().add(block * BLOCK);
                let values = values.as_mut_ptr().add(block * BLOCK);
                let mut max = V::splat(0.0);
                for lane in (0..BLOCK).step_by(V::LANES) {
                    let x = V::load(x.add(lane));
                    max = max.where_below(x, x, max);
                    let negative = V::splat(0.0).sub(x);
                    max = max.where_below(negative, negative, max);
                }
                let max = max.largest_lane();
                if max < MAX_MIN {
                    values.write_bytes(0, BLOCK);
                    *scale = Scale::default();
                    continue;
                }
                let (inverse, shift) = (V::splat(QUANT_MAX / max), V::splat(ROUNDING_SHIFT));
                let mut sums = [V::splat(0.0); 2];
                for lane in (0..BLOCK).step_by(V::LANES) {
                    let shifted = V::load(x.add(lane)).mul_add(inverse, shift);
                    shifted.store_low_bytes(values.add(lane));
                    sums[lane / (BLOCK / 2)] = sums[lane / (BLOCK / 2)].add(shifted.sub(shift));
                }
                // Sums of 32 bytes are exact in f32, in any order.
                let sums = [sums[0].sum_of_lanes(), sums[1].sum_of_lanes()];
                let d = max / QUANT_MAX;
                let total = d * (sums[0] + sums[1]);
                *scale = Scale { scale: d, total, sums: [sums[0] as i32, sums[1] as i32] };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// As ggml quantizes what it multiplies by Q8_0, Q4_0 and Q4_1.
    fn ggml(x: &[f32]) -> Vec<f32> {
        let max = x.iter().fold(0f32, |max, x| max.max(x.abs()));
        let d = f16::from_f32(max / QUANT_MAX).to_f32();
        x.iter().map(|x| d * (x * (QUANT_MAX / max)).round()).collect()
    }

    #[test]
    fn the_error_is_no_larger_than_ggmls() {
        let x: Vec<f32> = (0..1000 * BLOCK).map(|i| (i as f32 * 0.731).sin() * (1 + i % 97) as f32).collect();
        let (mut values, mut scales) = (vec![0; x.len()], vec![Scale::default(); 1000]);
        Quantize { x: &x, values: &mut values, scales: &mut scales }.run_on(Isa::best());
        let (mut own, mut other) = (0f64, 0f64);
        for ((x, values), scale) in x.chunks(BLOCK).zip(values.chunks(BLOCK)).zip(scales) {
            for ((x, q), ggml) in x.iter().zip(values).zip(ggml(x)) {
                own += f64::from(x - scale.scale * f32::from(*q)).powi(2);
                other += f64::from(x - ggml).powi(2);
            }
        }
        assert!(own <= other, "{own} and {other}");
    }

    #[test]
    fn a_block_is_off_by_half_a_step_at_most_and_alike_on_every_isa() {
        let mut x: Vec<f32> = (0..4 * BLOCK).map(|i| ((i * 37 % 101) as f32 - 50.3) * 0.07).collect();
        x[BLOCK..2 * BLOCK].fill(0.0);
        x[2 * BLOCK..3 * BLOCK].iter_mut().for_each(|x| *x *= 1e-33);
        x[3 * BLOCK] = -40.0;
        let quantized = |isa: Isa| {
            let (mut values, mut scales) = (vec![1; x.len()], vec![Scale::default(); 4]);
            Quantize { x: &x, values: &mut values, scales: &mut scales }.run_on(isa);
            (values, scales)
        };
        let (values, scales) = quantized(Isa::best());
        for ((x, values), scale) in x.chunks(BLOCK).zip(values.chunks(BLOCK)).zip(&scales) {
            for (x, q) in x.iter().zip(values) {
                assert!(
                    (x - scale.scale * f32::from(*q)).abs() <= scale.scale * 0.500_01 + MAX_MIN,
                    "{x}: {q}"
                );
            }
            let sum = |half: usize| values[half * 16..][..16].iter().map(|q| i32::from(*q)).sum::<i32>();
            assert_eq!(scale.sums, [sum(0), sum(1)]);
            assert_eq!(scale.total, scale.scale * scale.sum() as f32);
        }
        assert_eq!(scales[1..3], [Scale::default(); 2]);
        assert_eq!((values[3 * BLOCK], scales[3].scale), (-127, 40.0 / 127.0));
        for isa in Isa::available() {
            assert_eq!(quantized(isa), (values.clone(), scales.clone()), "{}", isa.name());
        }
    }
}

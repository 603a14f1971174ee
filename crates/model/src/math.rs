//! The elementwise parts of the forward pass, with bits that do not depend on the instruction set: own exp, fixed
//! orders of summation.

use crate::linear::Strided;
use crate::simd::{Isa, Kernel, Vector};

/// Lanes in which a norm sums; also what rows of activations are padded to.
pub(crate) const SUM_LANES: usize = 32;

/// exp below this is 0, which spares the subnormal numbers: e^-87 = 1.6e-38.
const EXP_MIN: f32 = -87.0;
/// exp above this is that of this: e^88 = 1.7e38.
const EXP_MAX: f32 = 88.0;
/// Adding it to |n| < 2^22 rounds n to the nearest integer and leaves it in the lowest bits.
const ROUNDING_SHIFT: f32 = 12_582_912.0;
/// ln 2 = LN2_HIGH + LN2_LOW, the first with so few bits that its products with n are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// (e^r - 1 - r) / r² on |r| ≤ ln(2)/2, highest power first: the minimax polynomial of Cephes' expf.
const EXP_POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// e^x to within 2 ulp for x in -87 … 88; 0 below, e^88 above; exactly 1 at 0.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
pub(crate) unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: no memory is touched.
    unsafe {
        let clamped = V::splat(EXP_MAX).min(x);
        let shifted = clamped.mul_add(V::splat(std::f32::consts::LOG2_E), V::splat(ROUNDING_SHIFT));
        let n = shifted.sub(V::splat(ROUNDING_SHIFT));
        let rest = n.mul_add(V::splat(-LN2_HIGH), clamped);
        let rest = n.mul_add(V::splat(-LN2_LOW), rest);
        let mut sum = V::splat(EXP_POLYNOMIAL[0]);
        let mut i = 1;
        while i < EXP_POLYNOMIAL.len() {
            sum = sum.mul_add(rest, V::splat(EXP_POLYNOMIAL[i]));
            i += 1;
        }
        let power = sum.mul_add(rest.mul(rest), rest).add(V::splat(1.0)).mul(shifted.pow2_of_shifted());
        x.where_below(V::splat(EXP_MIN), V::splat(0.0), power)
    }
}

/// The sum of 32 numbers: halves onto each other, 16, 8, 4, 2, 1.
#[inline(always)]
pub(crate) fn sum_of_lanes(mut lanes: [f32; SUM_LANES]) -> f32 {
    let mut width = SUM_LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds `delta` (same length) to `row` and writes `row · weight / rms(row)` to `normed`. Lengths are multiples of
/// [`SUM_LANES`]; `width` is the number of elements before the zeros that pad the row.
pub(crate) struct AddNorm<'a> {
    pub(crate) row: &'a mut [f32],
    pub(crate) delta: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) width: usize,
    pub(crate) eps: f32,
    pub(crate) normed: &'a mut [f32],
}

impl AddNorm<'_> {
    pub(crate) fn run_on(self, isa: Isa) {
        let len = self.row.len();
        assert!(len.is_multiple_of(SUM_LANES) && self.weight.len() == len && self.normed.len() == len);
        assert!(self.delta.len() == len);
        // SAFETY: the kernel moves whole vectors within slices of the lengths just checked.
        unsafe { isa.run(self) }
    }
}

impl Kernel for AddNorm<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let len = self.row.len();
        let (row, normed) = (self.row.as_mut_ptr(), self.normed.as_mut_ptr());
        let mut squares = [0.0; SUM_LANES];
        // SAFETY: all slices have `len` elements, a multiple of 32 and so of LANES.
        unsafe {
            for at in (0..len).step_by(V::LANES) {
                V::load(row.add(at)).add(V::load(self.delta.as_ptr().add(at))).store(row.add(at));
            }
            for lane in (0..SUM_LANES).step_by(V::LANES) {
                let mut sum = V::splat(0.0);
                for at in (lane..len).step_by(SUM_LANES) {
                    let x = V::load(row.add(at));
                    sum = x.mul_add(x, sum);
                }
                sum.store(squares.as_mut_ptr().add(lane));
            }
            let mean = sum_of_lanes(squares) / self.width as f32;
            let scale = V::splat(1.0 / (mean + self.eps).sqrt());
            for at in (0..len).step_by(V::LANES) {
                let weight = V::load(self.weight.as_ptr().add(at));
                V::load(row.add(at)).mul(scale).mul(weight).store(normed.add(at));
            }
        }
    }
}

/// `gate = silu(gate) · up` for `width` elements (a multiple of 32) of some rows, silu(g) = g / (1 + e^-g).
pub(crate) struct Swiglu {
    pub(crate) gate: Strided<*mut f32>,
    pub(crate) up: Strided<*const f32>,
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

impl Kernel for Swiglu {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        for row in 0..self.rows {
            for at in (0..self.width).step_by(V::LANES) {
                // SAFETY: `rows` rows of `width` elements are the caller's promise.
                unsafe {
                    let gate_at = self.gate.start.add(row * self.gate.stride + at);
                    let gate = V::load(gate_at);
                    let up = V::load(self.up.start.add(row * self.up.stride + at));
                    let one = V::splat(1.0);
                    gate.div(one.add(exp(V::splat(0.0).sub(gate)))).mul(up).store(gate_at);
                }
            }
        }
    }
}

/// cos and sin of every position and pair of dimensions, from f64, so that all machines agree.
pub(crate) struct RopeTable {
    pairs: usize,
    /// [position][cos of pair 0 …, sin of pair 0 …]
    pub(crate) turns: Vec<f32>,
}

impl RopeTable {
    /// Pair i of a head turns by `position · theta^(-2i / head_dim)`.
    pub(crate) fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let pairs = head_dim / 2;
        let rates: Vec<f64> =
            (0..pairs).map(|pair| libm::pow(theta, -2.0 * pair as f64 / head_dim as f64)).collect();
        let mut turns = Vec::with_capacity(positions * head_dim);
        for position in 0..positions {
            turns.extend(rates.iter().map(|rate| libm::cos(position as f64 * rate) as f32));
            turns.extend(rates.iter().map(|rate| libm::sin(position as f64 * rate) as f32));
        }
        Self { pairs, turns }
    }

    /// Turns the pairs (i, i + head_dim/2) of one head and multiplies it by `scale`.
    pub(crate) fn turn(&self, position: usize, scale: f32, head: &mut [f32]) {
        let (cos, sin) = self.turns[position * 2 * self.pairs..][..2 * self.pairs].split_at(self.pairs);
        let (first, second) = head.split_at_mut(self.pairs);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let turned = (*a * cos - *b * sin, *b * cos + *a * sin);
            (*a, *b) = (turned.0 * scale, turned.1 * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a> {
        x: &'a [f32],
        out: &'a mut [f32],
    }

    impl Kernel for Exp<'_> {
        #[inline(always)]
        unsafe fn run<V: Vector>(self) {
            for at in (0..self.x.len()).step_by(V::LANES) {
                // SAFETY: both slices hold the same number of elements, a multiple of 16.
                unsafe { exp(V::load(self.x.as_ptr().add(at))).store(self.out.as_mut_ptr().add(at)) };
            }
        }
    }

    fn exp_on(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        assert!(x.len().is_multiple_of(16));
        // SAFETY: lengths as the kernel asks.
        unsafe { isa.run(Exp { x, out: &mut out }) };
        out
    }

    #[test]
    fn exp_is_within_two_ulp_on_every_isa() {
        let x: Vec<f32> = (0..176_000).map(|i| -87.0 + i as f32 * 1e-3 - (i % 7) as f32 * 1e-5).collect();
        for isa in Isa::available() {
            for (x, y) in x.iter().zip(exp_on(isa, &x)) {
                if *x < -87.0 || *x > 88.0 {
                    continue;
                }
                let exact = libm::exp(f64::from(*x));
                let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
                assert!(
                    (f64::from(y) - exact).abs() <= 2.0 * ulp,
                    "{}: exp({x}) = {y}, not {exact}",
                    isa.name()
                );
            }
        }
    }

    #[test]
    fn exp_at_the_edges() {
        let mut x = [0.0; 16];
        x[1] = f32::NEG_INFINITY;
        x[2] = -87.1;
        x[3] = 1000.0;
        x[4] = -0.0;
        for isa in Isa::available() {
            let y = exp_on(isa, &x);
            assert_eq!((y[0], y[1], y[2], y[4]), (1.0, 0.0, 0.0, 1.0), "{}", isa.name());
            assert!(y[3] > 1e38 && y[3].is_finite());
        }
    }
}

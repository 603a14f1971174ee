use std::ops::Range;

use super::*;

/// Applies every operation to all lanes of 16 inputs and writes 16 results each.
struct Probe<'a> {
    a: &'a [f32; 16],
    b: &'a [f32; 16],
    bytes: &'a [u8; 64],
    out: &'a mut [[f32; 16]; 16],
}

impl Kernel for Probe<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        for lane in (0..16).step_by(V::LANES) {
            // SAFETY: 16 is a multiple of LANES, and every array holds 16 elements of its type.
            unsafe {
                let (a, b) = (V::load(self.a.as_ptr().add(lane)), V::load(self.b.as_ptr().add(lane)));
                let halves = self.bytes.as_ptr().cast::<u16>().add(lane);
                let quads = self.bytes.as_ptr().cast::<[u8; 4]>().add(lane);
                let shifted = V::load_i8(quads, 2).mul(V::splat(0.9)).add(V::splat(12_582_912.0));
                let results = [
                    a.add(b),
                    a.sub(b),
                    a.mul(b),
                    a.div(b),
                    a.mul_add(b, b),
                    a.min(b),
                    a.where_below(b, V::splat(1.0), a),
                    shifted.pow2_of_shifted(),
                    V::load_f16(halves),
                    V::load_bf16(halves),
                    V::load_i8(quads, 3),
                    V::load_nibble(quads, 1),
                    V::load_nibble(quads, 6),
                    V::load_pair(quads, 2),
                    V::load_pair(quads, 13),
                    V::load_bytes(self.bytes.as_ptr().cast::<i8>().add(lane)),
                ];
                for (out, result) in self.out.iter_mut().zip(results) {
                    result.store(out.as_mut_ptr().add(lane));
                }
            }
        }
    }
}

/// Rounds 16 numbers to bf16, and adds products of pairs to them.
struct PairsOf<'a> {
    from: &'a [f32; 16],
    weights: &'a [[u16; 2]; 16],
    x: [u16; 2],
    rounded: &'a mut [u16; 16],
    sums: &'a mut [f32; 16],
}

impl PairKernel for PairsOf<'_> {
    #[inline(always)]
    unsafe fn run<V: Pairs>(self) {
        for lane in (0..16).step_by(V::LANES) {
            // SAFETY: as in `Probe`.
            unsafe {
                let from = V::load(self.from.as_ptr().add(lane));
                from.store_bf16(self.rounded.as_mut_ptr().add(lane));
                let sums = from.add_pair(V::load_weights(self.weights.as_ptr().add(lane)), self.x);
                sums.store(self.sums.as_mut_ptr().add(lane));
            }
        }
    }
}

/// Stores the lowest bytes of all lanes of 16 inputs.
struct LowBytes<'a> {
    from: &'a [f32; 16],
    to: &'a mut [i8; 16],
}

impl DotKernel for LowBytes<'_> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        for lane in (0..16).step_by(V::LANES) {
            // SAFETY: as in `Probe`.
            unsafe {
                V::load(self.from.as_ptr().add(lane)).store_low_bytes(self.to.as_mut_ptr().add(lane));
            }
        }
    }
}

#[test]
fn every_operation_means_the_same_on_every_isa() {
    let a = std::array::from_fn(|i| (i as f32 - 7.3) * 1.7e-3);
    let b = std::array::from_fn(|i| (i as f32 * 0.77).sin() + 0.01);
    let bytes = std::array::from_fn(|i| (i * 37 + 11) as u8 & 0xfb);
    let probe = |isa: Isa| {
        let (mut out, mut low) = ([[0.0; 16]; 16], [0; 16]);
        // SAFETY: the probe's pointers come from references to whole arrays.
        unsafe {
            isa.run(Probe { a: &a, b: &b, bytes: &bytes, out: &mut out });
            isa.run_dots(LowBytes { from: &a, to: &mut low });
        }
        (out.map(|row| row.map(f32::to_bits)), low)
    };
    let expected = probe(Isa::portable());
    for isa in Isa::available() {
        assert_eq!(probe(isa), expected, "{}", isa.name());
    }
}

#[test]
fn pairs_mean_the_same_on_every_isa_numbers_near_zero_included() {
    let mut state = 1u64;
    let mut bits = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    // Exponents around 1, over the whole range, and around the least.
    for exponents in [120..132, 1..254, 0..40] {
        let mut number = |exponents: &Range<u32>| {
            let exponent = exponents.start + bits() % exponents.len() as u32;
            bits() & 0x807f_ffff | exponent << 23
        };
        for _ in 0..2000 {
            let mut half = || (number(&exponents) >> 16) as u16;
            let weights = std::array::from_fn(|_| [half(), half()]);
            let x = [half(), half()];
            let from = std::array::from_fn(|_| f32::from_bits(number(&exponents)));
            let probe = |isa: Isa| {
                let (mut rounded, mut sums) = ([0; 16], [0.0; 16]);
                // SAFETY: the probe's pointers come from references to whole arrays.
                unsafe {
                    isa.run_pairs(PairsOf {
                        from: &from,
                        weights: &weights,
                        x,
                        rounded: &mut rounded,
                        sums: &mut sums,
                    });
                }
                // Which NaN it is depends on the order of factors.
                (rounded, sums.map(|sum| if sum.is_nan() { u32::MAX } else { sum.to_bits() }))
            };
            let expected = probe(Isa::portable());
            for isa in Isa::available() {
                assert_eq!(probe(isa), expected, "{}: {from:?} {weights:?} {x:?}", isa.name());
            }
        }
    }
}

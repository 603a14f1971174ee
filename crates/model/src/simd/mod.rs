//! Vectors of f32 in the widths that this CPU has, behind one trait, with one meaning.
//!
//! Every operation of [`Vector`] is exactly defined by IEEE 754 (fused multiply-add above all), lane by lane, so a
//! [`Kernel`] gives the same bits on every [`Isa`]; only the speed differs. A kernel fixes the order of its sums
//! itself and never lets it follow from the number of lanes.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod emulated;
mod portable;

/// The instruction set that kernels run on. Holding one is the proof that this CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// All that this CPU has, best last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                found.push(Self(Level::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avx512f") {
                found.push(Self(Level::Avx512));
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
                    found.push(Self(Level::Avx512Vnni));
                    if is_x86_feature_detected!("avx512bf16") {
                        found.push(Self(Level::Avx512Bf16));
                    }
                }
            }
        }
        found
    }

    /// The fastest that this CPU has.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Level::Portable))
    }

    /// For logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2 + FMA",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512 F",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "AVX-512 VNNI + BF16",
        }
    }

    /// Whether it has an instruction for [`Pairs`]; others come to the same bits, slowly.
    pub(crate) fn multiplies_pairs(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// Most tokens whose sums fit the registers beside one pair of weight vectors.
    pub(crate) fn tokens_in_registers_max(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => 12,
            _ => 6,
        }
    }

    /// Whether products of bytes take weights apart first, so that it pays to do so once for many tokens.
    pub(crate) fn lays_out(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni | Level::Avx512Bf16 => false,
            _ => true,
        }
    }

    /// Runs a kernel in code compiled for this instruction set.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) {
        // SAFETY: an `Isa` is made by `available` alone, which has asked the CPU; the rest is the caller's.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => avx512::run(kernel),
            }
        }
    }

    /// As [`run`](Isa::run). AVX-512 F alone has no products of bytes, so that AVX2 serves.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run_dots<K: DotKernel>(self, kernel: K) {
        // SAFETY: as in `run`; whoever has AVX-512 has AVX2.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::Avx512 => avx2::run_dots(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Vnni | Level::Avx512Bf16 => avx512::run_dots(kernel),
            }
        }
    }

    /// As [`run`](Isa::run). Without an instruction for pairs they are emulated, eight lanes at a time.
    ///
    /// # Safety
    /// What the kernel asks for.
    pub(crate) unsafe fn run_pairs<K: PairKernel>(self, kernel: K) {
        // SAFETY: as in `run_dots`.
        unsafe {
            match self.0 {
                Level::Portable => kernel.run::<portable::F32x8>(),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::Avx512 | Level::Avx512Vnni => avx2::run_pairs(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512Bf16 => avx512::run_pairs(kernel),
            }
        }
    }
}

/// A computation written once for every width. `run` and all that it calls must be `#[inline(always)]`, so that it
/// is compiled as a part of a function which has the CPU's features switched on.
pub(crate) trait Kernel {
    /// # Safety
    /// The CPU has `V`'s features, and the pointers in `self` are valid as the kernel's docs say.
    unsafe fn run<V: Vector>(self);
}

/// As [`Kernel`], with products of bytes.
pub(crate) trait DotKernel {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run<V: Dots>(self);
}

/// As [`Kernel`], with products of pairs of bf16.
pub(crate) trait PairKernel {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run<V: Pairs>(self);
}

/// [`LANES`](Vector::LANES) numbers of f32.
///
/// # Safety
/// All functions: the CPU has the features, and a pointer is valid for as many elements as the function moves;
/// no alignment is asked for.
pub(crate) trait Vector: Copy {
    /// 8 or 16: divides half a panel.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self · factor + term`, rounded once.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The smaller, or `other` if either is not a number.
    unsafe fn min(self, other: Self) -> Self;
    /// `yes` where `self < limit`, `no` elsewhere.
    unsafe fn where_below(self, limit: Self, yes: Self, no: Self) -> Self;
    /// 2ⁿ, where `self` is n + 1.5 · 2²³ with n in -126 … 127.
    unsafe fn pow2_of_shifted(self) -> Self;
    /// Widens IEEE binary16.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Widens bfloat16.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Widens of every two bfloat16 the first or the second, by `which`.
    unsafe fn load_bf16_of(from: *const [u16; 2], which: usize) -> Self;
    /// Converts byte `byte` of every four, as a signed number.
    unsafe fn load_i8(from: *const [u8; 4], byte: usize) -> Self;
    /// Converts bytes, as signed numbers.
    unsafe fn load_bytes(from: *const i8) -> Self;
    /// Converts of every four bytes the low half of byte `nibble`, or from 4 on the high half of byte `nibble - 4`.
    unsafe fn load_nibble(from: *const [u8; 4], nibble: usize) -> Self;
    /// Converts two bits of byte `pair % 4` of every four bytes, the `pair / 4`-th from the lowest.
    unsafe fn load_pair(from: *const [u8; 4], pair: usize) -> Self;
    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(from: *const u8);
}

/// Sums over one block of 32 inputs of weights times activations, for [`LANES`](Vector::LANES) outputs: integers, and
/// exact. Activations are bytes of -127 … 127; four of them, in the order of memory, are an `i32`.
///
/// # Safety
/// As [`Vector`].
pub(crate) trait Dots: Vector {
    /// Four bytes of weights for every lane.
    type Quads: Copy;
    /// The same as signed bytes are multiplied.
    type Signed: Copy;
    /// Sums where weights are signed bytes.
    type Bytes: Copy;
    /// Sums where weights are 0 … 15.
    type Nibbles: Copy;
    /// Sums where weights are 0 … 63.
    type Sixes: Copy;

    unsafe fn load_quads(from: *const [u8; 4]) -> Self::Quads;
    /// Of every byte the low half.
    unsafe fn low_halves(quads: Self::Quads) -> Self::Quads;
    /// Of every byte the high half.
    unsafe fn high_halves(quads: Self::Quads) -> Self::Quads;

    /// Above every byte, which is 0 … 15, two bits of the same byte of `pairs`, the `at`-th from the lowest.
    unsafe fn with_pairs(low: Self::Quads, pairs: Self::Quads, at: usize) -> Self::Quads;

    /// Zeros, for a block whose activations sum to `sum`.
    unsafe fn bytes_begin(sum: i32) -> Self::Bytes;
    unsafe fn signed(quads: Self::Quads) -> Self::Signed;
    unsafe fn dot_bytes(sums: Self::Bytes, weights: Self::Signed, x: i32) -> Self::Bytes;
    /// The same of several vectors by the quad at `x`, in the order in which they are called where that matters.
    #[inline(always)]
    unsafe fn dot_bytes_of<const W: usize>(
        sums: &mut [Self::Bytes; W],
        weights: [Self::Signed; W],
        x: *const i32,
    ) {
        // SAFETY: the caller's.
        let x = unsafe { x.read_unaligned() };
        for w in 0..W {
            // SAFETY: the caller's.
            sums[w] = unsafe { Self::dot_bytes(sums[w], weights[w], x) };
        }
    }
    /// The same at once for weights that one token alone is multiplied with: zeros come to nothing.
    unsafe fn dot_bytes_once(sums: Self::Bytes, weights: Self::Quads, x: i32) -> Self::Bytes;
    /// [`dot_bytes`](Dots::dot_bytes) of activations of zero, where that is not nothing.
    unsafe fn bytes_of_zeros(sums: Self::Bytes, weights: Self::Signed) -> Self::Bytes;
    /// Takes off what the same weights come to with zeros.
    unsafe fn bytes_less(sums: Self::Bytes, of_zeros: Self::Bytes) -> Self::Bytes;
    /// As [`bytes_begin`](Dots::bytes_begin), if that has been taken off zeros before.
    unsafe fn bytes_begin_less(sum: i32, less: Self::Bytes) -> Self::Bytes;
    unsafe fn bytes_end(sums: Self::Bytes) -> Self;

    /// `first`, an even number, in all lanes.
    unsafe fn nibbles_begin(first: i32) -> Self::Nibbles;
    unsafe fn dot_nibbles(sums: Self::Nibbles, weights: Self::Quads, x: i32) -> Self::Nibbles;
    /// As [`dot_bytes_of`](Dots::dot_bytes_of).
    #[inline(always)]
    unsafe fn dot_nibbles_of<const W: usize>(
        sums: &mut [Self::Nibbles; W],
        weights: [Self::Quads; W],
        x: *const i32,
    ) {
        // SAFETY: the caller's.
        let x = unsafe { x.read_unaligned() };
        for w in 0..W {
            // SAFETY: the caller's.
            sums[w] = unsafe { Self::dot_nibbles(sums[w], weights[w], x) };
        }
    }
    unsafe fn nibbles_end(sums: Self::Nibbles) -> Self;

    /// `first` in all lanes.
    unsafe fn sixes_begin(first: i32) -> Self::Sixes;
    unsafe fn dot_sixes(sums: Self::Sixes, weights: Self::Quads, x: i32) -> Self::Sixes;
    /// As [`dot_bytes_of`](Dots::dot_bytes_of).
    #[inline(always)]
    unsafe fn dot_sixes_of<const W: usize>(
        sums: &mut [Self::Sixes; W],
        weights: [Self::Quads; W],
        x: *const i32,
    ) {
        // SAFETY: the caller's.
        let x = unsafe { x.read_unaligned() };
        for w in 0..W {
            // SAFETY: the caller's.
            sums[w] = unsafe { Self::dot_sixes(sums[w], weights[w], x) };
        }
    }
    unsafe fn sixes_end(sums: Self::Sixes) -> Self;

    /// The largest lane; none is negative or NaN.
    #[inline(always)]
    unsafe fn largest_lane(self) -> f32 {
        // SAFETY: the caller's.
        unsafe { lanes(self) }.into_iter().fold(0.0, |max, x| if x > max { x } else { max })
    }
    /// The sum of all lanes, in any order.
    #[inline(always)]
    unsafe fn sum_of_lanes(self) -> f32 {
        // SAFETY: the caller's.
        unsafe { lanes(self) }.into_iter().sum()
    }

    /// Stores the lowest byte of every number's bits.
    unsafe fn store_low_bytes(self, to: *mut i8);
}

/// The lanes of a vector, and zeros.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn lanes<V: Vector>(x: V) -> [f32; 16] {
    let mut lanes = [0.0; 16];
    // SAFETY: room for the widest vector.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes
}

/// Sums of products of bf16, two at a time, for [`LANES`](Vector::LANES) outputs, as `VDPBF16PS` defines them (Intel's
/// Software Developer's Manual, volume 2):
///
/// ```text
/// sum = fma(w₀, x₀, fma(w₁, x₁, sum))
/// ```
/// in f32, where every operand and every result below 2⁻¹²⁶ counts as zero.
///
/// # Safety
/// As [`Vector`].
pub(crate) trait Pairs: Vector {
    /// Two weights for every lane.
    type Weights: Copy;

    unsafe fn load_weights(from: *const [u16; 2]) -> Self::Weights;
    unsafe fn add_pair(self, weights: Self::Weights, x: [u16; 2]) -> Self;
    /// Rounds to bfloat16, to the nearest even; below 2⁻¹²⁶ to zero.
    unsafe fn store_bf16(self, to: *mut u16);
}

#[cfg(test)]
mod tests {
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
        let expected = probe(Isa(Level::Portable));
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
                let expected = probe(Isa(Level::Portable));
                for isa in Isa::available() {
                    assert_eq!(probe(isa), expected, "{}: {from:?} {weights:?} {x:?}", isa.name());
                }
            }
        }
    }
}

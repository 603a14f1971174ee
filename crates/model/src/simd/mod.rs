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
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub use self::isa::Isa;

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
mod tests;

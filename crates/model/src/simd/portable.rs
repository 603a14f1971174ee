//! What the operations mean, in plain Rust; also the path for CPUs without the features below.

use half::f16;

use super::{Dots, Pairs, Vector, emulated};

const LANES: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct F32x8([f32; LANES]);

impl F32x8 {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| f(self.0[lane], other.0[lane])))
    }

    /// # Safety
    /// `from` is valid for [`LANES`] elements.
    #[inline(always)]
    unsafe fn convert<T: Copy>(from: *const T, f: impl Fn(T) -> f32) -> Self {
        // SAFETY: the caller's.
        Self(std::array::from_fn(|lane| f(unsafe { from.add(lane).read_unaligned() })))
    }
}

impl Vector for F32x8 {
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |x| x) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane].mul_add(factor.0[lane], term.0[lane])))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn where_below(self, limit: Self, yes: Self, no: Self) -> Self {
        Self(std::array::from_fn(|lane| if self.0[lane] < limit.0[lane] { yes.0[lane] } else { no.0[lane] }))
    }

    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23)))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |bits| f16::from_bits(bits).to_f32()) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |bits| f32::from_bits(u32::from(bits) << 16)) }
    }

    #[inline(always)]
    unsafe fn load_bf16_of(from: *const [u16; 2], which: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |pair| f32::from_bits(u32::from(pair[which]) << 16)) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const [u8; 4], byte: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |quad| f32::from(quad[byte].cast_signed())) }
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, f32::from) }
    }

    #[inline(always)]
    unsafe fn load_nibble(from: *const [u8; 4], nibble: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |quad| f32::from(quad[nibble % 4] >> (nibble / 4 * 4) & 15)) }
    }

    #[inline(always)]
    unsafe fn load_pair(from: *const [u8; 4], pair: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self::convert(from, |quad| f32::from(quad[pair % 4] >> (pair / 4 * 2) & 3)) }
    }

    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}

impl Dots for F32x8 {
    type Quads = [[u8; 4]; LANES];
    type Signed = Self::Quads;
    type Bytes = [i32; LANES];
    type Nibbles = [i32; LANES];
    type Sixes = [i32; LANES];

    #[inline(always)]
    unsafe fn load_quads(from: *const [u8; 4]) -> Self::Quads {
        // SAFETY: the caller's.
        unsafe { from.cast::<Self::Quads>().read() }
    }

    #[inline(always)]
    unsafe fn low_halves(quads: Self::Quads) -> Self::Quads {
        quads.map(|quad| quad.map(|byte| byte & 15))
    }

    #[inline(always)]
    unsafe fn high_halves(quads: Self::Quads) -> Self::Quads {
        quads.map(|quad| quad.map(|byte| byte >> 4))
    }

    #[inline(always)]
    unsafe fn with_pairs(low: Self::Quads, pairs: Self::Quads, at: usize) -> Self::Quads {
        std::array::from_fn(|lane| {
            std::array::from_fn(|byte| low[lane][byte] | (pairs[lane][byte] >> (2 * at) & 3) << 4)
        })
    }

    #[inline(always)]
    unsafe fn bytes_begin(_sum: i32) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn signed(quads: Self::Quads) -> Self::Quads {
        quads
    }

    #[inline(always)]
    unsafe fn dot_bytes(sums: [i32; LANES], weights: Self::Quads, x: i32) -> [i32; LANES] {
        dot(sums, weights, x, |byte| byte.cast_signed().into())
    }

    #[inline(always)]
    unsafe fn dot_bytes_once(sums: [i32; LANES], weights: Self::Quads, x: i32) -> [i32; LANES] {
        // SAFETY: the caller's.
        unsafe { Self::dot_bytes(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn bytes_of_zeros(sums: [i32; LANES], _weights: Self::Quads) -> [i32; LANES] {
        sums
    }

    #[inline(always)]
    unsafe fn bytes_less(sums: [i32; LANES], _of_zeros: [i32; LANES]) -> [i32; LANES] {
        sums
    }

    #[inline(always)]
    unsafe fn bytes_begin_less(_sum: i32, _less: [i32; LANES]) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn bytes_end(sums: [i32; LANES]) -> Self {
        Self(sums.map(|sum| sum as f32))
    }

    #[inline(always)]
    unsafe fn nibbles_begin(first: i32) -> [i32; LANES] {
        [first; LANES]
    }

    #[inline(always)]
    unsafe fn dot_nibbles(sums: [i32; LANES], weights: Self::Quads, x: i32) -> [i32; LANES] {
        dot(sums, weights, x, i32::from)
    }

    #[inline(always)]
    unsafe fn nibbles_end(sums: [i32; LANES]) -> Self {
        Self(sums.map(|sum| sum as f32))
    }

    #[inline(always)]
    unsafe fn sixes_begin(first: i32) -> [i32; LANES] {
        [first; LANES]
    }

    #[inline(always)]
    unsafe fn dot_sixes(sums: [i32; LANES], weights: Self::Quads, x: i32) -> [i32; LANES] {
        dot(sums, weights, x, i32::from)
    }

    #[inline(always)]
    unsafe fn sixes_end(sums: [i32; LANES]) -> Self {
        Self(sums.map(|sum| sum as f32))
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut i8) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(self.0.map(|x| x.to_bits() as i8)) };
    }
}

#[inline(always)]
fn dot(sums: [i32; LANES], weights: [[u8; 4]; LANES], x: i32, weight: impl Fn(u8) -> i32) -> [i32; LANES] {
    let x = x.to_ne_bytes().map(|byte| i32::from(byte.cast_signed()));
    std::array::from_fn(|lane| {
        let products = weights[lane].iter().zip(x).map(|(byte, x)| weight(*byte) * x);
        sums[lane] + products.sum::<i32>()
    })
}

impl Pairs for F32x8 {
    type Weights = [Self; 2];

    #[inline(always)]
    unsafe fn load_weights(from: *const [u16; 2]) -> [Self; 2] {
        // SAFETY: the caller's.
        unsafe { emulated::load_weights(from) }
    }

    #[inline(always)]
    unsafe fn add_pair(self, weights: [Self; 2], x: [u16; 2]) -> Self {
        // SAFETY: the caller's.
        unsafe { emulated::add_pair(self, weights, x) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the caller's.
        unsafe { emulated::store_bf16(self, to) }
    }
}

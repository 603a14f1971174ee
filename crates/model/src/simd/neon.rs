//! Eight lanes, in two registers: NEON, which every 64-bit ARM has; for products of bytes, its dot products (`sdot`, from
//! ARMv8.2 on).

use std::arch::aarch64::*;
use std::arch::asm;

use super::{DotKernel, Dots, Pairs, Vector, emulated};

/// # Safety
/// The CPU has NEON and its dot products; the rest is as the kernel asks.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run_dots<K: DotKernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<F32x8>() }
}

/// The first four lanes, and the others.
#[derive(Clone, Copy)]
pub(super) struct F32x8([float32x4_t; 2]);

/// As many lanes of four bytes.
#[derive(Clone, Copy)]
pub(crate) struct Quads([uint32x4_t; 2]);

impl F32x8 {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self([f(self.0[0], other.0[0]), f(self.0[1], other.0[1])])
    }

    /// Of signed integers.
    #[inline(always)]
    fn converted(integers: [int32x4_t; 2]) -> Self {
        // SAFETY: every CPU of this architecture has NEON.
        Self(integers.map(|four| unsafe { vcvtq_f32_s32(four) }))
    }

    #[inline(always)]
    fn of_bits(bits: [uint32x4_t; 2]) -> Self {
        // SAFETY: as in `converted`.
        Self(bits.map(|four| unsafe { vreinterpretq_f32_u32(four) }))
    }

    #[inline(always)]
    fn bits(self) -> [uint32x4_t; 2] {
        // SAFETY: as in `converted`.
        self.0.map(|four| unsafe { vreinterpretq_u32_f32(four) })
    }
}

impl Quads {
    /// # Safety
    /// `from` is valid for eight.
    #[inline(always)]
    unsafe fn load(from: *const [u8; 4]) -> Self {
        // SAFETY: the caller's.
        unsafe { Self([vld1q_u32(from.cast()), vld1q_u32(from.add(4).cast())]) }
    }

    /// Of each lane's `bits` bits from bit `first` on, the number.
    #[inline(always)]
    fn field(self, first: usize, bits: u32) -> F32x8 {
        // SAFETY: as in `F32x8::converted`.
        let of = |four| unsafe {
            let moved = vshlq_u32(four, vdupq_n_s32(-(first as i32)));
            vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32((1 << bits) - 1)))
        };
        F32x8::converted(self.0.map(of))
    }

    #[inline(always)]
    fn bytes(self) -> [uint8x16_t; 2] {
        // SAFETY: as in `F32x8::converted`.
        self.0.map(|four| unsafe { vreinterpretq_u8_u32(four) })
    }

    #[inline(always)]
    fn of_bytes(bytes: [uint8x16_t; 2]) -> Self {
        // SAFETY: as in `F32x8::converted`.
        Self(bytes.map(|sixteen| unsafe { vreinterpretq_u32_u8(sixteen) }))
    }
}

impl Vector for F32x8 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: as in `converted`; so is what follows.
        Self([unsafe { vdupq_n_f32(x) }; 2])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { Self([vld1q_f32(from), vld1q_f32(from.add(4))]) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            vst1q_f32(to, self.0[0]);
            vst1q_f32(to.add(4), self.0[1]);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vaddq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vsubq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vmulq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vdivq_f32(a, b) })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(std::array::from_fn(|i| unsafe { vfmaq_f32(term.0[i], self.0[i], factor.0[i]) }))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }

    #[inline(always)]
    unsafe fn where_below(self, limit: Self, yes: Self, no: Self) -> Self {
        let of = |i: usize| unsafe { vbslq_f32(vcltq_f32(self.0[i], limit.0[i]), yes.0[i], no.0[i]) };
        Self(std::array::from_fn(of))
    }

    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        Self::of_bits(self.bits().map(|four| unsafe { vshlq_n_u32::<23>(vaddq_u32(four, vdupq_n_u32(127))) }))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        let of = |i: usize| {
            let widened: float32x4_t;
            // SAFETY: the caller's; 4 × 2 bytes. The instruction is part of NEON.
            unsafe {
                asm!(
                    "fcvtl {widened:v}.4s, {halves:v}.4h",
                    halves = in(vreg) vld1_u16(from.add(4 * i)),
                    widened = lateout(vreg) widened,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            widened
        };
        Self(std::array::from_fn(of))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's; 8 × 2 bytes.
        Self::of_bits([0, 4].map(|first| unsafe { vshll_n_u16::<16>(vld1_u16(from.add(first))) }))
    }

    #[inline(always)]
    unsafe fn load_bf16_of(from: *const [u16; 2], which: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        let pairs = unsafe { Quads::load(from.cast()) };
        Self::of_bits(pairs.0.map(|four| match which {
            0 => unsafe { vshlq_n_u32::<16>(four) },
            _ => unsafe { vandq_u32(four, vdupq_n_u32(0xffff_0000)) },
        }))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const [u8; 4], byte: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        let quads = unsafe { Quads::load(from) };
        let of = |four| unsafe {
            let highest = vshlq_u32(four, vdupq_n_s32(24 - 8 * byte as i32));
            vshrq_n_s32::<24>(vreinterpretq_s32_u32(highest))
        };
        Self::converted(quads.0.map(of))
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self {
        // SAFETY: the caller's; 8 bytes.
        unsafe {
            let halves = vmovl_s8(vld1_s8(from));
            Self::converted([vmovl_s16(vget_low_s16(halves)), vmovl_s16(vget_high_s16(halves))])
        }
    }

    #[inline(always)]
    unsafe fn load_nibble(from: *const [u8; 4], nibble: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        unsafe { Quads::load(from) }.field(nibble % 4 * 8 + nibble / 4 * 4, 4)
    }

    #[inline(always)]
    unsafe fn load_pair(from: *const [u8; 4], pair: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        unsafe { Quads::load(from) }.field(pair % 4 * 8 + pair / 4 * 2, 2)
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: a hint, which no address makes fail.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) from, options(nostack, preserves_flags, readonly)) };
    }
}

/// Sums of four products of bytes, which are exact; weights of 0 … 63 are signed bytes, too.
impl Dots for F32x8 {
    type Quads = Quads;
    type Signed = Quads;
    type Bytes = [int32x4_t; 2];
    type Nibbles = [int32x4_t; 2];
    type Sixes = [int32x4_t; 2];

    #[inline(always)]
    unsafe fn load_quads(from: *const [u8; 4]) -> Quads {
        // SAFETY: the caller's.
        unsafe { Quads::load(from) }
    }

    #[inline(always)]
    unsafe fn low_halves(quads: Quads) -> Quads {
        Quads::of_bytes(quads.bytes().map(|sixteen| unsafe { vandq_u8(sixteen, vdupq_n_u8(15)) }))
    }

    #[inline(always)]
    unsafe fn high_halves(quads: Quads) -> Quads {
        Quads::of_bytes(quads.bytes().map(|sixteen| unsafe { vshrq_n_u8::<4>(sixteen) }))
    }

    #[inline(always)]
    unsafe fn with_pairs(low: Quads, pairs: Quads, at: usize) -> Quads {
        let by = unsafe { vdupq_n_s8(4 - 2 * at as i8) };
        let of = |sixteen| unsafe { vandq_u8(vshlq_u8(sixteen, by), vdupq_n_u8(0x30)) };
        let (low, above) = (low.bytes(), pairs.bytes().map(of));
        Quads::of_bytes(std::array::from_fn(|i| unsafe { vorrq_u8(low[i], above[i]) }))
    }

    #[inline(always)]
    unsafe fn bytes_begin(_sum: i32) -> [int32x4_t; 2] {
        // SAFETY: as in `sixes_begin`.
        unsafe { Self::sixes_begin(0) }
    }

    #[inline(always)]
    unsafe fn signed(quads: Quads) -> Quads {
        quads
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot_bytes(sums: [int32x4_t; 2], weights: Quads, x: i32) -> [int32x4_t; 2] {
        dot(sums, weights, x)
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot_bytes_once(sums: [int32x4_t; 2], weights: Quads, x: i32) -> [int32x4_t; 2] {
        dot(sums, weights, x)
    }

    #[inline(always)]
    unsafe fn bytes_of_zeros(sums: [int32x4_t; 2], _weights: Quads) -> [int32x4_t; 2] {
        sums
    }

    #[inline(always)]
    unsafe fn bytes_less(sums: [int32x4_t; 2], _of_zeros: [int32x4_t; 2]) -> [int32x4_t; 2] {
        sums
    }

    #[inline(always)]
    unsafe fn bytes_begin_less(sum: i32, _less: [int32x4_t; 2]) -> [int32x4_t; 2] {
        // SAFETY: the caller's.
        unsafe { Self::bytes_begin(sum) }
    }

    #[inline(always)]
    unsafe fn bytes_end(sums: [int32x4_t; 2]) -> Self {
        Self::converted(sums)
    }

    #[inline(always)]
    unsafe fn nibbles_begin(first: i32) -> [int32x4_t; 2] {
        // SAFETY: the caller's.
        unsafe { Self::sixes_begin(first) }
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot_nibbles(sums: [int32x4_t; 2], weights: Quads, x: i32) -> [int32x4_t; 2] {
        dot(sums, weights, x)
    }

    #[inline(always)]
    unsafe fn nibbles_end(sums: [int32x4_t; 2]) -> Self {
        Self::converted(sums)
    }

    #[inline(always)]
    unsafe fn sixes_begin(first: i32) -> [int32x4_t; 2] {
        [unsafe { vdupq_n_s32(first) }; 2]
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn dot_sixes(sums: [int32x4_t; 2], weights: Quads, x: i32) -> [int32x4_t; 2] {
        dot(sums, weights, x)
    }

    #[inline(always)]
    unsafe fn sixes_end(sums: [int32x4_t; 2]) -> Self {
        Self::converted(sums)
    }

    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut i8) {
        let [low, high] = self.bits();
        // SAFETY: the caller's; 8 bytes.
        unsafe {
            let halves = vcombine_u16(vmovn_u32(low), vmovn_u32(high));
            vst1_s8(to, vreinterpret_s8_u8(vmovn_u16(halves)));
        }
    }
}

/// Adds four products to each lane's sum. The compiler's own name for `sdot` is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(sums: [int32x4_t; 2], weights: Quads, x: i32) -> [int32x4_t; 2] {
    let x = vdupq_n_s32(x);
    std::array::from_fn(|i| {
        let mut sum = sums[i];
        // SAFETY: the function asks for the instruction.
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {weights:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum,
                weights = in(vreg) weights.0[i],
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
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

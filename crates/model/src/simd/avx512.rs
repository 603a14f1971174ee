//! Sixteen lanes: AVX-512 F, for products of bytes VNNI, and for those of pairs BF16.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::transmute;

use super::{DotKernel, Dots, Kernel, PairKernel, Pairs, Vector};

/// # Safety
/// The CPU has AVX-512 F; the rest is as the kernel asks.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m512>() }
}

/// # Safety
/// The CPU has AVX-512 F, BW and VNNI; the rest is as the kernel asks.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn run_dots<K: DotKernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m512>() }
}

/// # Safety
/// The CPU has AVX-512 F and BF16; the rest is as the kernel asks.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn run_pairs<K: PairKernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m512>() }
}

impl Vector for __m512 {
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn splat(x: f32) -> Self {
        _mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(self, other: Self) -> Self {
        _mm512_add_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn sub(self, other: Self) -> Self {
        _mm512_sub_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul(self, other: Self) -> Self {
        _mm512_mul_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn div(self, other: Self) -> Self {
        _mm512_div_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        _mm512_fmadd_ps(self, factor, term)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn min(self, other: Self) -> Self {
        _mm512_min_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn where_below(self, limit: Self, yes: Self, no: Self) -> Self {
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self, limit), no, yes)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn pow2_of_shifted(self) -> Self {
        let exponent = _mm512_add_epi32(_mm512_castps_si512(self), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's; 16 × 2 bytes.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's; 16 × 2 bytes.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bf16_of(from: *const [u16; 2], which: usize) -> Self {
        // SAFETY: the caller's; 16 × 4 bytes.
        let pairs = unsafe { _mm512_loadu_si512(from.cast()) };
        _mm512_castsi512_ps(match which {
            0 => _mm512_slli_epi32::<16>(pairs),
            _ => _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed())),
        })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_i8(from: *const [u8; 4], byte: usize) -> Self {
        // SAFETY: the caller's; 16 × 4 bytes.
        let quads = unsafe { _mm512_loadu_si512(from.cast()) };
        let left = _mm_cvtsi32_si128(24 - 8 * byte as i32);
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_sll_epi32(quads, left)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bytes(from: *const i8) -> Self {
        // SAFETY: the caller's; 16 bytes.
        let bytes = unsafe { _mm_loadu_si128(from.cast()) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_nibble(from: *const [u8; 4], nibble: usize) -> Self {
        // A permutation of the sixteen possible values converts faster than mask and convert: it reads only the
        // four lowest bits of each index.
        let values = _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        );
        // SAFETY: the caller's; 16 × 4 bytes.
        let quads = unsafe { _mm512_loadu_si512(from.cast()) };
        let right = _mm_cvtsi32_si128((nibble % 4 * 8 + nibble / 4 * 4) as i32);
        _mm512_permutexvar_ps(_mm512_srl_epi32(quads, right), values)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_pair(from: *const [u8; 4], pair: usize) -> Self {
        // SAFETY: the caller's; 16 × 4 bytes.
        let quads = unsafe { _mm512_loadu_si512(from.cast()) };
        let right = _mm_cvtsi32_si128((pair % 4 * 8 + pair / 4 * 2) as i32);
        _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(quads, right), _mm512_set1_epi32(3)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
}

/// Pairs of vectors by the quad at `x`. The compiler does not move what it cannot see: left to itself it loads
/// activations long before their turn, and then there are no registers for the sums.
///
/// # Safety
/// The CPU has VNNI, and `x` is valid for four bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dots_in_order<const W: usize>(sums: &mut [__m512i; W], weights: [__m512i; W], x: *const i32) {
    let (pairs, odd) = sums.as_chunks_mut::<2>();
    for (at, [low, high]) in pairs.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            asm!(
                "vpbroadcastd {x}, dword ptr [{from}]",
                "vpdpbusd {low}, {first}, {x}",
                "vpdpbusd {high}, {second}, {x}",
                x = out(zmm_reg) _,
                from = in(reg) x,
                low = inout(zmm_reg) *low,
                high = inout(zmm_reg) *high,
                first = in(zmm_reg) weights[2 * at],
                second = in(zmm_reg) weights[2 * at + 1],
                options(nostack, readonly, preserves_flags),
            );
        }
    }
    for sum in odd {
        // SAFETY: the caller's.
        *sum = unsafe { _mm512_dpbusd_epi32(*sum, weights[W - 1], _mm512_set1_epi32(x.read_unaligned())) };
    }
}

/// `vpdpbusd` multiplies unsigned bytes by signed ones: weights are moved up by 128, and the sums begin 128 Σx lower.
impl Dots for __m512 {
    type Quads = __m512i;
    type Signed = __m512i;
    type Bytes = __m512i;
    type Nibbles = __m512i;
    type Sixes = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn load_quads(from: *const [u8; 4]) -> __m512i {
        // SAFETY: the caller's; 16 × 4 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn low_halves(quads: __m512i) -> __m512i {
        _mm512_and_si512(quads, _mm512_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn high_halves(quads: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srli_epi16::<4>(quads), _mm512_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn with_pairs(low: __m512i, pairs: __m512i, at: usize) -> __m512i {
        let by = |bits: usize| _mm_cvtsi32_si128(bits as i32);
        let moved = match 2 * at {
            at @ ..4 => _mm512_sll_epi16(pairs, by(4 - at)),
            at => _mm512_srl_epi16(pairs, by(at - 4)),
        };
        _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn bytes_begin(sum: i32) -> __m512i {
        _mm512_set1_epi32(-128 * sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn signed(quads: __m512i) -> __m512i {
        _mm512_xor_si512(quads, _mm512_set1_epi8(-128))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_bytes(sums: __m512i, weights: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_bytes_of<const W: usize>(sums: &mut [__m512i; W], weights: [__m512i; W], x: *const i32) {
        // SAFETY: the caller's.
        unsafe { dots_in_order(sums, weights, x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_bytes_once(sums: __m512i, weights: __m512i, x: i32) -> __m512i {
        // SAFETY: the caller's.
        unsafe { Self::dot_bytes(sums, Self::signed(weights), x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn bytes_of_zeros(sums: __m512i, _weights: __m512i) -> __m512i {
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn bytes_less(sums: __m512i, _of_zeros: __m512i) -> __m512i {
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn bytes_begin_less(sum: i32, _less: __m512i) -> __m512i {
        // SAFETY: the caller's.
        unsafe { Self::bytes_begin(sum) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn bytes_end(sums: __m512i) -> Self {
        _mm512_cvtepi32_ps(sums)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn nibbles_begin(first: i32) -> __m512i {
        _mm512_set1_epi32(first)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_nibbles(sums: __m512i, weights: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_nibbles_of<const W: usize>(sums: &mut [__m512i; W], weights: [__m512i; W], x: *const i32) {
        // SAFETY: the caller's.
        unsafe { dots_in_order(sums, weights, x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn nibbles_end(sums: __m512i) -> Self {
        _mm512_cvtepi32_ps(sums)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn sixes_begin(first: i32) -> __m512i {
        _mm512_set1_epi32(first)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_sixes(sums: __m512i, weights: __m512i, x: i32) -> __m512i {
        _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_sixes_of<const W: usize>(sums: &mut [__m512i; W], weights: [__m512i; W], x: *const i32) {
        // SAFETY: the caller's.
        unsafe { dots_in_order(sums, weights, x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn sixes_end(sums: __m512i) -> Self {
        _mm512_cvtepi32_ps(sums)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn largest_lane(self) -> f32 {
        _mm512_reduce_max_ps(self)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn sum_of_lanes(self) -> f32 {
        _mm512_reduce_add_ps(self)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn store_low_bytes(self, to: *mut i8) {
        // SAFETY: the caller's; 16 bytes.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(self))) };
    }
}

impl Pairs for __m512 {
    type Weights = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load_weights(from: *const [u16; 2]) -> __m512i {
        // SAFETY: the caller's; 16 × 4 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn add_pair(self, weights: __m512i, [first, second]: [u16; 2]) -> Self {
        let x = _mm512_set1_epi32((u32::from(first) | u32::from(second) << 16).cast_signed());
        // SAFETY: both are 64 bytes, of whatever bits.
        let (weights, x) =
            unsafe { (transmute::<__m512i, __m512bh>(weights), transmute::<__m512i, __m512bh>(x)) };
        _mm512_dpbf16_ps(self, weights, x)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: both are 32 bytes; the caller's.
        unsafe { _mm256_storeu_si256(to.cast(), transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self))) };
    }
}

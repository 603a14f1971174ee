//! Eight lanes: AVX2, FMA, F16C.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{DotKernel, Dots, Kernel, PairKernel, Pairs, Vector, emulated};

/// # Safety
/// The CPU has AVX2, FMA and F16C; the rest is as the kernel asks.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m256>() }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_dots<K: DotKernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m256>() }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_pairs<K: PairKernel>(kernel: K) {
    // SAFETY: the caller's.
    unsafe { kernel.run::<__m256>() }
}

impl Vector for __m256 {
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(x: f32) -> Self {
        _mm256_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(self, other: Self) -> Self {
        _mm256_add_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sub(self, other: Self) -> Self {
        _mm256_sub_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul(self, other: Self) -> Self {
        _mm256_mul_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn div(self, other: Self) -> Self {
        _mm256_div_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        _mm256_fmadd_ps(self, factor, term)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn min(self, other: Self) -> Self {
        _mm256_min_ps(self, other)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn where_below(self, limit: Self, yes: Self, no: Self) -> Self {
        _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(self, limit))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn pow2_of_shifted(self) -> Self {
        let exponent = _mm256_add_epi32(_mm256_castps_si256(self), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller's; 8 × 2 bytes.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's; 8 × 2 bytes.
        let bits = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bf16_of(from: *const [u16; 2], which: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes. The second is masked as it is loaded: sixteen registers have no room for both.
        unsafe {
            if which == 0 {
                return _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(from.cast())));
            }
            let mask = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let second: __m256;
            asm!(
                "vpand {second}, {mask}, ymmword ptr [{from}]",
                second = lateout(ymm_reg) second,
                mask = in(ymm_reg) mask,
                from = in(reg) from,
                options(pure, readonly, nostack, preserves_flags),
            );
            second
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_i8(from: *const [u8; 4], byte: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        let quads = unsafe { _mm256_loadu_si256(from.cast()) };
        let left = _mm_cvtsi32_si128(24 - 8 * byte as i32);
        _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_sll_epi32(quads, left)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bytes(from: *const i8) -> Self {
        // SAFETY: the caller's; 8 bytes.
        let bytes = unsafe { _mm_loadl_epi64(from.cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_nibble(from: *const [u8; 4], nibble: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        let quads = unsafe { _mm256_loadu_si256(from.cast()) };
        let right = _mm_cvtsi32_si128((nibble % 4 * 8 + nibble / 4 * 4) as i32);
        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(quads, right), _mm256_set1_epi32(15)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_pair(from: *const [u8; 4], pair: usize) -> Self {
        // SAFETY: the caller's; 8 × 4 bytes.
        let quads = unsafe { _mm256_loadu_si256(from.cast()) };
        let right = _mm_cvtsi32_si128((pair % 4 * 8 + pair / 4 * 2) as i32);
        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(quads, right), _mm256_set1_epi32(3)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
}

/// Bytes as `vpmaddubsw` takes them, unsigned by signed: the size of a weight, and its sign, which is all ones or zeros.
#[derive(Clone, Copy)]
pub(crate) struct Signed {
    sizes: __m256i,
    signs: __m256i,
}

/// Keeps the compiler from adding up a sum's terms in another order, for which it takes more registers than there are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(mut sums: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) sums, options(nomem, nostack, preserves_flags));
    }
    sums
}

/// Products of bytes are added up in pairs to 16 bits, which saturate: so weights may have seven bits and a sign.
impl Dots for __m256 {
    type Quads = __m256i;
    type Signed = Signed;
    type Bytes = __m256i;
    /// Two numbers of 16 bits a lane: 16 products of 15 · 127 fit, so a block needs no wider ones.
    type Nibbles = __m256i;
    type Sixes = __m256i;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_quads(from: *const [u8; 4]) -> __m256i {
        // SAFETY: the caller's; 8 × 4 bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn low_halves(quads: __m256i) -> __m256i {
        _mm256_and_si256(quads, _mm256_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn high_halves(quads: __m256i) -> __m256i {
        _mm256_and_si256(_mm256_srli_epi16::<4>(quads), _mm256_set1_epi8(15))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn with_pairs(low: __m256i, pairs: __m256i, at: usize) -> __m256i {
        let by = |bits: usize| _mm_cvtsi32_si128(bits as i32);
        let moved = match 2 * at {
            at @ ..4 => _mm256_sll_epi16(pairs, by(4 - at)),
            at => _mm256_srl_epi16(pairs, by(at - 4)),
        };
        _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes_begin(_sum: i32) -> __m256i {
        _mm256_setzero_si256()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn signed(quads: __m256i) -> Signed {
        let signs = _mm256_cmpgt_epi8(_mm256_setzero_si256(), quads);
        Signed { sizes: _mm256_abs_epi8(quads), signs }
    }

    /// Where a weight w is negative, x becomes −1 − x instead of −x: that is |w| too little, whatever x is, so the sums of
    /// zeros tell by how much.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_bytes(sums: __m256i, weights: Signed, x: i32) -> __m256i {
        let signed = _mm256_xor_si256(_mm256_set1_epi32(x), weights.signs);
        let pairs = _mm256_maddubs_epi16(weights.sizes, signed); // two of them, 128 · 128 at most each, fit 16 bits
        in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
    }

    /// `vpsignb` is right at once, but takes the two units that multiply, which have most to do.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_bytes_once(sums: __m256i, weights: __m256i, x: i32) -> __m256i {
        let signed = _mm256_sign_epi8(_mm256_set1_epi32(x), weights);
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes_of_zeros(sums: __m256i, weights: Signed) -> __m256i {
        // SAFETY: the caller's.
        unsafe { Self::dot_bytes(sums, weights, 0) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes_less(sums: __m256i, of_zeros: __m256i) -> __m256i {
        _mm256_sub_epi32(sums, of_zeros)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes_begin_less(_sum: i32, less: __m256i) -> __m256i {
        less
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn bytes_end(sums: __m256i) -> Self {
        _mm256_cvtepi32_ps(sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn nibbles_begin(first: i32) -> __m256i {
        // Half of it in either number of a lane; what the products add brings neither beyond 16 · 15 · 127.
        _mm256_set1_epi16((first / 2) as i16)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_nibbles(sums: __m256i, weights: __m256i, x: i32) -> __m256i {
        in_order(_mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, _mm256_set1_epi32(x))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn nibbles_end(sums: __m256i) -> Self {
        _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sixes_begin(first: i32) -> __m256i {
        _mm256_set1_epi32(first)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_sixes(sums: __m256i, weights: __m256i, x: i32) -> __m256i {
        let pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(x)); // 2 · 63 · 127 fit 16 bits
        in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sixes_end(sums: __m256i) -> Self {
        _mm256_cvtepi32_ps(sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_low_bytes(self, to: *mut i8) {
        let lowest = _mm256_setr_epi8(
            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, //
            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
        );
        let bytes = _mm256_shuffle_epi8(_mm256_castps_si256(self), lowest);
        let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
        // SAFETY: the caller's; 8 bytes.
        unsafe { _mm_storel_epi64(to.cast(), _mm_unpacklo_epi32(low, high)) };
    }
}

impl Pairs for __m256 {
    type Weights = [Self; 2];

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_weights(from: *const [u16; 2]) -> [Self; 2] {
        // SAFETY: the caller's.
        unsafe { emulated::load_weights(from) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_pair(self, weights: [Self; 2], x: [u16; 2]) -> Self {
        // SAFETY: the caller's.
        unsafe { emulated::add_pair(self, weights, x) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: the caller's.
        unsafe { emulated::store_bf16(self, to) }
    }
}

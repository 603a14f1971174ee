//! What stands in a packed block, for products of bytes.

use galerne_checkpoint::Dtype;

use crate::packed::{Layout, PANEL, QUAD};
use crate::simd::Dots;

/// A block for outputs `lane …` of a panel.
#[derive(Clone, Copy)]
pub(super) struct At {
    /// What the group shares, if the format has groups.
    pub(super) group: *const u8,
    pub(super) header: *const u8,
    pub(super) lane: usize,
}

impl At {
    /// So many outputs further.
    #[inline(always)]
    pub(super) fn right(self, lanes: usize) -> Self {
        Self { lane: self.lane + lanes, ..self }
    }

    /// The first quad.
    #[inline(always)]
    pub(super) fn quads(self, layout: Layout) -> *const [u8; QUAD] {
        self.header.wrapping_add(layout.header).cast::<[u8; QUAD]>().wrapping_add(self.lane)
    }

    /// The `at`-th byte of every output in the header of a block of a K-quant.
    ///
    /// # Safety
    /// The header holds so many.
    #[inline(always)]
    unsafe fn part<V: Dots>(self, at: usize) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bytes(self.header.cast::<i8>().add(at * PANEL + self.lane)) }
    }
}

/// The `at`-th f16 of outputs `lane …`.
///
/// # Safety
/// `from` holds so many for 32 outputs.
#[inline(always)]
unsafe fn f16s<V: Dots>(from: *const u8, at: usize, lane: usize) -> V {
    // SAFETY: the caller's.
    unsafe { V::load_f16(from.cast::<u16>().add(at * PANEL + lane)) }
}

/// How bytes of weights are multiplied, whatever they are scaled by.
///
/// # Safety
/// As [`Dots`].
pub(super) trait Products {
    /// A quad of every lane as several tokens are multiplied with it.
    type Laid<V: Dots>: Copy;
    type Sums<V: Dots>: Copy;

    /// The `quad`-th quad of a block; `first` is its first.
    unsafe fn quads<V: Dots>(first: *const [u8; QUAD], quad: usize) -> V::Quads;
    unsafe fn laid<V: Dots>(quads: V::Quads) -> Self::Laid<V>;

    /// The sum of a part whose activations sum to `sum`, before any product.
    unsafe fn begin<V: Dots>(sum: i32) -> Self::Sums<V>;
    /// [`dot`](Self::dot) of activations of zero, where that is not nothing.
    #[inline(always)]
    unsafe fn of_zeros<V: Dots>(sums: Self::Sums<V>, _weights: Self::Laid<V>) -> Self::Sums<V> {
        sums
    }
    /// Takes off what the same weights come to with zeros.
    #[inline(always)]
    unsafe fn less<V: Dots>(sums: Self::Sums<V>, _of_zeros: Self::Sums<V>) -> Self::Sums<V> {
        sums
    }
    /// As [`begin`](Self::begin), if that has been taken off zeros before.
    #[inline(always)]
    unsafe fn begin_less<V: Dots>(sum: i32, _less: Self::Sums<V>) -> Self::Sums<V> {
        // SAFETY: the caller's.
        unsafe { Self::begin::<V>(sum) }
    }
    unsafe fn dot<V: Dots>(sums: Self::Sums<V>, weights: Self::Laid<V>, x: i32) -> Self::Sums<V>;
    /// The same of several vectors by the quad at `x`.
    unsafe fn dots<V: Dots, const W: usize>(
        sums: &mut [Self::Sums<V>; W],
        weights: [Self::Laid<V>; W],
        x: *const i32,
    );
    /// As [`dot`](Self::dot) at once; activations of zero come to nothing.
    #[inline(always)]
    unsafe fn dot_once<V: Dots>(sums: Self::Sums<V>, quads: V::Quads, x: i32) -> Self::Sums<V> {
        // SAFETY: the caller's.
        unsafe { Self::dot::<V>(sums, Self::laid::<V>(quads), x) }
    }
    unsafe fn end<V: Dots>(sums: Self::Sums<V>) -> V;
}

/// Signed bytes.
pub(super) struct Bytes;
/// Nibbles minus ZERO.
pub(super) struct Nibbles<const ZERO: i32>;
/// Six bits, which are stored 32 higher.
pub(super) struct Sixes;

impl Products for Bytes {
    type Laid<V: Dots> = V::Signed;
    type Sums<V: Dots> = V::Bytes;

    #[inline(always)]
    unsafe fn quads<V: Dots>(first: *const [u8; QUAD], quad: usize) -> V::Quads {
        // SAFETY: the caller's.
        unsafe { V::load_quads(first.add(quad * PANEL)) }
    }

    #[inline(always)]
    unsafe fn laid<V: Dots>(quads: V::Quads) -> V::Signed {
        // SAFETY: the caller's.
        unsafe { V::signed(quads) }
    }

    #[inline(always)]
    unsafe fn begin<V: Dots>(sum: i32) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::bytes_begin(sum) }
    }

    #[inline(always)]
    unsafe fn of_zeros<V: Dots>(sums: V::Bytes, weights: V::Signed) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::bytes_of_zeros(sums, weights) }
    }

    #[inline(always)]
    unsafe fn less<V: Dots>(sums: V::Bytes, of_zeros: V::Bytes) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::bytes_less(sums, of_zeros) }
    }

    #[inline(always)]
    unsafe fn begin_less<V: Dots>(sum: i32, less: V::Bytes) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::bytes_begin_less(sum, less) }
    }

    #[inline(always)]
    unsafe fn dot<V: Dots>(sums: V::Bytes, weights: V::Signed, x: i32) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::dot_bytes(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn dots<V: Dots, const W: usize>(
        sums: &mut [V::Bytes; W],
        weights: [V::Signed; W],
        x: *const i32,
    ) {
        // SAFETY: the caller's.
        unsafe { V::dot_bytes_of(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn dot_once<V: Dots>(sums: V::Bytes, quads: V::Quads, x: i32) -> V::Bytes {
        // SAFETY: the caller's.
        unsafe { V::dot_bytes_once(sums, quads, x) }
    }

    #[inline(always)]
    unsafe fn end<V: Dots>(sums: V::Bytes) -> V {
        // SAFETY: the caller's.
        unsafe { V::bytes_end(sums) }
    }
}

impl<const ZERO: i32> Products for Nibbles<ZERO> {
    type Laid<V: Dots> = V::Quads;
    type Sums<V: Dots> = V::Nibbles;

    #[inline(always)]
    unsafe fn quads<V: Dots>(first: *const [u8; QUAD], quad: usize) -> V::Quads {
        // SAFETY: the caller's.
        unsafe {
            let quads = V::load_quads(first.add(quad / 2 * PANEL));
            if quad.is_multiple_of(2) { V::low_halves(quads) } else { V::high_halves(quads) }
        }
    }

    #[inline(always)]
    unsafe fn laid<V: Dots>(quads: V::Quads) -> V::Quads {
        quads
    }

    #[inline(always)]
    unsafe fn begin<V: Dots>(sum: i32) -> V::Nibbles {
        // SAFETY: the caller's.
        unsafe { V::nibbles_begin(-ZERO * sum) }
    }

    #[inline(always)]
    unsafe fn dot<V: Dots>(sums: V::Nibbles, weights: V::Quads, x: i32) -> V::Nibbles {
        // SAFETY: the caller's.
        unsafe { V::dot_nibbles(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn dots<V: Dots, const W: usize>(
        sums: &mut [V::Nibbles; W],
        weights: [V::Quads; W],
        x: *const i32,
    ) {
        // SAFETY: the caller's.
        unsafe { V::dot_nibbles_of(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn end<V: Dots>(sums: V::Nibbles) -> V {
        // SAFETY: the caller's.
        unsafe { V::nibbles_end(sums) }
    }
}

impl Products for Sixes {
    type Laid<V: Dots> = V::Quads;
    type Sums<V: Dots> = V::Sixes;

    #[inline(always)]
    unsafe fn quads<V: Dots>(first: *const [u8; QUAD], quad: usize) -> V::Quads {
        // SAFETY: the caller's; a row has two rows of nibbles, and one of the bits above.
        unsafe {
            let row = first.add(quad / QUAD * 3 * PANEL);
            let low = Nibbles::<0>::quads::<V>(row, quad % QUAD);
            V::with_pairs(low, V::load_quads(row.add(2 * PANEL)), quad % QUAD)
        }
    }

    #[inline(always)]
    unsafe fn laid<V: Dots>(quads: V::Quads) -> V::Quads {
        quads
    }

    #[inline(always)]
    unsafe fn begin<V: Dots>(sum: i32) -> V::Sixes {
        // SAFETY: the caller's.
        unsafe { V::sixes_begin(-32 * sum) }
    }

    #[inline(always)]
    unsafe fn dot<V: Dots>(sums: V::Sixes, weights: V::Quads, x: i32) -> V::Sixes {
        // SAFETY: the caller's.
        unsafe { V::dot_sixes(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn dots<V: Dots, const W: usize>(sums: &mut [V::Sixes; W], weights: [V::Quads; W], x: *const i32) {
        // SAFETY: the caller's.
        unsafe { V::dot_sixes_of(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn end<V: Dots>(sums: V::Sixes) -> V {
        // SAFETY: the caller's.
        unsafe { V::sixes_end(sums) }
    }
}

/// What a packed block holds, and how its products are scaled: by f16 in its header, if nothing else is said.
///
/// # Safety
/// As [`Dots`].
pub(super) trait Format {
    const LAYOUT: Layout;
    /// Parts of a block with a scale of their own.
    const PARTS: usize = 1;
    /// Whether there are offsets, of whole blocks.
    const OFFSET: bool = false;
    type Products: Products;

    #[inline(always)]
    unsafe fn scale<V: Dots>(at: At, _part: usize) -> V {
        // SAFETY: the caller's.
        unsafe { f16s(at.header, 0, at.lane) }
    }

    #[inline(always)]
    unsafe fn offset<V: Dots>(at: At) -> V {
        // SAFETY: the caller's.
        unsafe { f16s(at.header, 1, at.lane) }
    }
}

pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Format for Q8_0 {
    const LAYOUT: Layout = Layout::of(Dtype::Q8_0);
    type Products = Bytes;
}

impl Format for Q4_0 {
    const LAYOUT: Layout = Layout::of(Dtype::Q4_0);
    type Products = Nibbles<8>;
}

impl Format for Q4_1 {
    const LAYOUT: Layout = Layout::of(Dtype::Q4_1);
    const OFFSET: bool = true;
    type Products = Nibbles<0>;
}

impl Format for Q4K {
    const LAYOUT: Layout = Layout::of(Dtype::Q4K);
    const OFFSET: bool = true;
    type Products = Nibbles<0>;

    #[inline(always)]
    unsafe fn scale<V: Dots>(at: At, _part: usize) -> V {
        // SAFETY: the caller's.
        unsafe { f16s::<V>(at.group, 0, at.lane).mul(at.part(0)) }
    }

    #[inline(always)]
    unsafe fn offset<V: Dots>(at: At) -> V {
        // SAFETY: the caller's.
        unsafe { V::splat(0.0).sub(f16s(at.group, 1, at.lane)).mul(at.part(1)) }
    }
}

impl Format for Q6K {
    const LAYOUT: Layout = Layout::of(Dtype::Q6K);
    const PARTS: usize = 2;
    type Products = Sixes;

    #[inline(always)]
    unsafe fn scale<V: Dots>(at: At, part: usize) -> V {
        // SAFETY: the caller's.
        unsafe { f16s::<V>(at.group, 0, at.lane).mul(at.part(part)) }
    }
}

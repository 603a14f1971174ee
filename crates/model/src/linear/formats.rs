//! What stands in a packed block, as f32.

use galerne_checkpoint::Dtype;

use super::TOKENS_DIRECT_MAX;
use crate::packed::{Layout, PAIR, PANEL, QUAD};
use crate::simd::Vector;

/// How packed values become f32, [`Packed`](crate::packed::Packed)'s layout.
///
/// # Safety
/// The functions read what a group shares and the header of a block, or the row that input `k` of a block is in, for
/// outputs `lane …` and `lane + 16 …`.
pub(super) trait Format {
    const LAYOUT: Layout;
    /// Up to this many tokens widen weights in registers; more share a widened panel.
    const TOKENS_DIRECT_MAX: usize = TOKENS_DIRECT_MAX;

    /// `[d, d', m, m']` of the two vectors, as far as the format has them; in Q6_K `d, d'` of the one half of the inputs
    /// and of the other.
    #[inline(always)]
    unsafe fn scales<V: Vector>(_group: *const u8, _header: *const u8, _lane: usize) -> [V; 4] {
        // SAFETY: moves no memory.
        unsafe { [V::splat(0.0); 4] }
    }

    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2];
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Q8_0;
pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q4K;
pub(super) struct Q6K;

impl Format for F32 {
    const LAYOUT: Layout = Layout::of(Dtype::F32);

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, _: usize, _: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let values = row.cast::<f32>().add(lane);
            [V::load(values), V::load(values.add(PANEL / 2))]
        }
    }
}

impl Format for F16 {
    const LAYOUT: Layout = Layout::of(Dtype::F16);

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, _: usize, _: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { f16_pair(row, lane) }
    }
}

/// A shift or a mask widens them beside the multiply-adds: only many tokens gain by a panel that stays in the
/// first-level cache.
impl Format for Bf16 {
    const LAYOUT: Layout = Layout::of(Dtype::Bf16);
    const TOKENS_DIRECT_MAX: usize = 16;

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, _: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let pairs = row.cast::<[u16; PAIR]>().add(lane);
            [V::load_bf16_of(pairs, k % PAIR), V::load_bf16_of(pairs.add(PANEL / 2), k % PAIR)]
        }
    }
}

impl Format for Q8_0 {
    const LAYOUT: Layout = Layout::of(Dtype::Q8_0);

    #[inline(always)]
    unsafe fn scales<V: Vector>(_: *const u8, header: *const u8, lane: usize) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let [low, high] = f16_pair::<V>(header, lane);
            [low, high, low, high]
        }
    }

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let quads = row.cast::<[u8; QUAD]>().add(lane);
            let k = k % QUAD;
            [V::load_i8(quads, k).mul(scales[0]), V::load_i8(quads.add(PANEL / 2), k).mul(scales[1])]
        }
    }
}

impl Format for Q4_0 {
    const LAYOUT: Layout = Layout::of(Dtype::Q4_0);

    /// d·(q − 8) = d·q − 8·d, where all three are exact in f32, so that one multiply-add serves as in Q4_1.
    #[inline(always)]
    unsafe fn scales<V: Vector>(_: *const u8, header: *const u8, lane: usize) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let [low, high] = f16_pair::<V>(header, lane);
            [low, high, low.mul(V::splat(-8.0)), high.mul(V::splat(-8.0))]
        }
    }

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { scaled_nibbles(row, lane, k, scales) }
    }
}

impl Format for Q4_1 {
    const LAYOUT: Layout = Layout::of(Dtype::Q4_1);

    #[inline(always)]
    unsafe fn scales<V: Vector>(_: *const u8, header: *const u8, lane: usize) -> [V; 4] {
        // SAFETY: the caller's; the offsets follow the scales.
        unsafe {
            let [low, high] = f16_pair::<V>(header, lane);
            let [low_offset, high_offset] = f16_pair::<V>(header.add(2 * PANEL), lane);
            [low, high, low_offset, high_offset]
        }
    }

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { scaled_nibbles(row, lane, k, scales) }
    }
}

impl Format for Q4K {
    const LAYOUT: Layout = Layout::of(Dtype::Q4K);

    /// Both products are exact in f32.
    #[inline(always)]
    unsafe fn scales<V: Vector>(group: *const u8, header: *const u8, lane: usize) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let [d, d_high] = f16_pair::<V>(group, lane);
            let [m, m_high] = f16_pair::<V>(group.add(2 * PANEL), lane);
            let [scale, scale_high] = part_pair::<V>(header, 0, lane);
            let [offset, offset_high] = part_pair::<V>(header, 1, lane);
            let zero = V::splat(0.0);
            [d.mul(scale), d_high.mul(scale_high), zero.sub(m.mul(offset)), zero.sub(m_high.mul(offset_high))]
        }
    }

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { scaled_nibbles(row, lane, k, scales) }
    }
}

impl Format for Q6K {
    const LAYOUT: Layout = Layout::of(Dtype::Q6K);

    #[inline(always)]
    unsafe fn scales<V: Vector>(group: *const u8, header: *const u8, lane: usize) -> [V; 4] {
        // SAFETY: the caller's.
        unsafe {
            let [d, d_high] = f16_pair::<V>(group, lane);
            let [first, first_high] = part_pair::<V>(header, 0, lane);
            let [second, second_high] = part_pair::<V>(header, 1, lane);
            [d.mul(first), d_high.mul(first_high), d.mul(second), d_high.mul(second_high)]
        }
    }

    #[inline(always)]
    unsafe fn weights<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
        let (part, k) = (k / Self::LAYOUT.inputs, k % Self::LAYOUT.inputs);
        // SAFETY: the caller's; two rows of low halves, and one of the two bits above.
        unsafe {
            let quads = row.cast::<[u8; QUAD]>().add(lane);
            let (lows, highs) = (quads.add(k / (2 * QUAD) * PANEL), quads.add(2 * PANEL));
            [
                six_bits::<V>(lows, highs, k).mul(scales[2 * part]),
                six_bits::<V>(lows.add(PANEL / 2), highs.add(PANEL / 2), k).mul(scales[2 * part + 1]),
            ]
        }
    }
}

/// -32 … 31.
///
/// # Safety
/// The quads hold the low halves and the two bits above.
#[inline(always)]
unsafe fn six_bits<V: Vector>(lows: *const [u8; QUAD], highs: *const [u8; QUAD], k: usize) -> V {
    // SAFETY: the caller's.
    unsafe {
        let low = V::load_nibble(lows, k % (2 * QUAD)).sub(V::splat(32.0));
        V::load_pair(highs, k).mul_add(V::splat(16.0), low)
    }
}

/// The `at`-th byte of every output in the header of a block of a K-quant.
///
/// # Safety
/// `header` holds so many for 32 outputs.
#[inline(always)]
unsafe fn part_pair<V: Vector>(header: *const u8, at: usize, lane: usize) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe {
        let bytes = header.cast::<i8>().add(at * PANEL + lane);
        [V::load_bytes(bytes), V::load_bytes(bytes.add(PANEL / 2))]
    }
}

/// # Safety
/// `values` holds 32 f16.
#[inline(always)]
unsafe fn f16_pair<V: Vector>(values: *const u8, lane: usize) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe {
        let values = values.cast::<u16>().add(lane);
        [V::load_f16(values), V::load_f16(values.add(PANEL / 2))]
    }
}

/// # Safety
/// `row` holds a row of nibbles.
#[inline(always)]
unsafe fn scaled_nibbles<V: Vector>(row: *const u8, lane: usize, k: usize, scales: [V; 4]) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe {
        let quads = row.cast::<[u8; QUAD]>().add(lane);
        let k = k % (2 * QUAD);
        let [low, high] = [V::load_nibble(quads, k), V::load_nibble(quads.add(PANEL / 2), k)];
        [low.mul_add(scales[0], scales[2]), high.mul_add(scales[1], scales[3])]
    }
}

//! Attention of one token, piece by piece.
//!
//! A piece is one KV block: 32 keys, cut by absolute position. Each has its own maximum m, sum l of exp(s - m) and
//! output o = Σ exp(s - m)·v, summed in the order of positions; pieces merge in order by
//!
//! ```text
//! m' = max(m, mᵢ)   a = exp(m - m')   b = exp(mᵢ - m')   l = fma(l, a, lᵢ·b)   o = fma(o, a, oᵢ·b)
//! ```
//!
//! from m = -∞, l = 0, o = 0. A piece wholly outside the window would merge as the identity and is skipped. All
//! this depends on the token's position and on nothing else, so prefill and decode agree to the last bit.

use galerne_types::BlockId;
use galerne_types::limits::KV_BLOCK_TOKENS;

use crate::kv::Tile;
use crate::math::{SUM_LANES, exp, sum_of_lanes};
use crate::simd::{Kernel, Vector};

/// Widest head that the kernel has room for.
pub(crate) const HEAD_DIM_MAX: usize = 256;

const _: () = assert!(KV_BLOCK_TOKENS == SUM_LANES, "a piece's sum runs over all lanes");

/// The query heads of one token that read one KV head.
pub(crate) struct Attend<'a> {
    /// `[heads][head_dim]`, turned, scaled by 1/√head_dim.
    pub(crate) queries: *const f32,
    pub(crate) heads: usize,
    /// The KV head's tile in block 0.
    pub(crate) tiles: *const f32,
    /// Numbers from a block's tile to the next one's.
    pub(crate) stride: usize,
    pub(crate) tile: Tile,
    /// The sequence's blocks, in order of positions.
    pub(crate) blocks: &'a [BlockId],
    /// First and last position that the token sees; the last is its own.
    pub(crate) first: usize,
    pub(crate) last: usize,
    /// `[heads][head_dim]`.
    pub(crate) out: *mut f32,
}

/// # Safety
/// Of `run`: `queries` and `out` hold what they say, `blocks` reaches to `last`, and every block has a tile whose
/// positions up to `last` are stored.
impl Kernel for Attend<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let mut head = 0;
        while head < self.heads {
            // SAFETY: as many heads as are left.
            head += unsafe {
                match self.heads - head {
                    1 => self.heads_at::<V, 1>(head),
                    2 => self.heads_at::<V, 2>(head),
                    3 => self.heads_at::<V, 3>(head),
                    _ => self.heads_at::<V, 4>(head),
                }
            };
        }
    }
}

/// What has been merged so far, for H heads.
struct Merged<const H: usize> {
    max: [f32; H],
    sum: [f32; H],
    out: [[f32; HEAD_DIM_MAX]; H],
}

impl Attend<'_> {
    /// H heads together, so that keys and values are read once for them. Returns H.
    ///
    /// # Safety
    /// As [`Attend`]; heads `head … head + H` exist.
    #[inline(always)]
    unsafe fn heads_at<V: Vector, const H: usize>(&self, head: usize) -> usize {
        let dim = self.tile.head_dim;
        let mut merged = Merged { max: [f32::NEG_INFINITY; H], sum: [0.0; H], out: [[0.0; HEAD_DIM_MAX]; H] };
        // SAFETY: the caller's.
        unsafe {
            let queries = self.queries.add(head * dim);
            for piece in self.first / KV_BLOCK_TOKENS..=self.last / KV_BLOCK_TOKENS {
                let keys = self.tiles.add(self.blocks[piece] as usize * self.stride);
                let start = piece * KV_BLOCK_TOKENS;
                let from = self.first.saturating_sub(start);
                let to = KV_BLOCK_TOKENS.min(self.last + 1 - start);
                let mut scores = self.scores::<V, H>(queries, keys);
                self.merge::<V, H>(&mut scores, from, to, keys.add(self.tile.keys()), &mut merged);
            }
            for h in 0..H {
                let out = std::slice::from_raw_parts_mut(self.out.add((head + h) * dim), dim);
                for (out, sum) in out.iter_mut().zip(&merged.out[h]) {
                    *out = sum / merged.sum[h];
                }
            }
        }
        H
    }

    /// q · k for the 32 positions of a block, dimension after dimension.
    ///
    /// # Safety
    /// `queries` holds H heads, `keys` a tile's keys.
    #[inline(always)]
    unsafe fn scores<V: Vector, const H: usize>(
        &self,
        queries: *const f32,
        keys: *const f32,
    ) -> [[f32; KV_BLOCK_TOKENS]; H] {
        const HALF: usize = KV_BLOCK_TOKENS / 2;
        let dim = self.tile.head_dim;
        let mut scores = [[0.0; KV_BLOCK_TOKENS]; H];
        for lane in (0..HALF).step_by(V::LANES) {
            // SAFETY: the caller's; lanes stay within a row of 32.
            unsafe {
                let mut sums = [[V::splat(0.0); 2]; H];
                for d in 0..dim {
                    let row = keys.add(d * KV_BLOCK_TOKENS + lane);
                    let pair = [V::load(row), V::load(row.add(HALF))];
                    for (h, sums) in sums.iter_mut().enumerate() {
                        let query = V::splat(*queries.add(h * dim + d));
                        sums[0] = pair[0].mul_add(query, sums[0]);
                        sums[1] = pair[1].mul_add(query, sums[1]);
                    }
                }
                for h in 0..H {
                    sums[h][0].store(scores[h].as_mut_ptr().add(lane));
                    sums[h][1].store(scores[h].as_mut_ptr().add(lane + HALF));
                }
            }
        }
        scores
    }

    /// Merges a piece of which the positions `from..to` are seen.
    ///
    /// # Safety
    /// `values` holds a tile's values.
    #[inline(always)]
    unsafe fn merge<V: Vector, const H: usize>(
        &self,
        scores: &mut [[f32; KV_BLOCK_TOKENS]; H],
        from: usize,
        to: usize,
        values: *const f32,
        merged: &mut Merged<H>,
    ) {
        let mut old = [0.0; H];
        let mut new = [0.0; H];
        for h in 0..H {
            let row = &mut scores[h];
            row[..from].fill(f32::NEG_INFINITY);
            row[to..].fill(f32::NEG_INFINITY);
            let piece_max = max_of_lanes(*row);
            let max = if merged.max[h] > piece_max { merged.max[h] } else { piece_max };
            // SAFETY: rows of 32 elements.
            unsafe {
                old[h] = exp_of::<V>(merged.max[h] - max);
                new[h] = exp_of::<V>(piece_max - max);
                for lane in (0..KV_BLOCK_TOKENS).step_by(V::LANES) {
                    let at = row.as_mut_ptr().add(lane);
                    exp(V::load(at).sub(V::splat(piece_max))).store(at);
                }
            }
            merged.sum[h] = merged.sum[h].mul_add(old[h], sum_of_lanes(*row) * new[h]);
            merged.max[h] = max;
        }
        let padded = self.tile.padded_dim;
        for d in (0..padded).step_by(2 * V::LANES) {
            // SAFETY: value rows are padded to a multiple of 32, at most HEAD_DIM_MAX.
            unsafe {
                let mut sums = [[V::splat(0.0); 2]; H];
                for position in from..to {
                    let row = values.add(position * padded + d);
                    let pair = [V::load(row), V::load(row.add(V::LANES))];
                    for h in 0..H {
                        let weight = V::splat(*scores[h].get_unchecked(position));
                        sums[h][0] = pair[0].mul_add(weight, sums[h][0]);
                        sums[h][1] = pair[1].mul_add(weight, sums[h][1]);
                    }
                }
                for h in 0..H {
                    for (half, sum) in sums[h].into_iter().enumerate() {
                        let out = merged.out[h].as_mut_ptr().add(d + half * V::LANES);
                        let piece = sum.mul(V::splat(new[h]));
                        V::load(out).mul_add(V::splat(old[h]), piece).store(out);
                    }
                }
            }
        }
    }
}

/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn exp_of<V: Vector>(x: f32) -> f32 {
    let mut lanes = [0.0; 16];
    // SAFETY: room for the widest vector.
    unsafe { exp(V::splat(x)).store(lanes.as_mut_ptr()) };
    lanes[0]
}

#[inline(always)]
fn max_of_lanes(mut lanes: [f32; SUM_LANES]) -> f32 {
    let mut width = SUM_LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let (a, b) = (lanes[lane], lanes[lane + width]);
            lanes[lane] = if a > b { a } else { b };
        }
        width /= 2;
    }
    lanes[0]
}

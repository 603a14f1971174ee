//! Attention, piece by piece.
//!
//! A piece is one KV block: 32 keys, cut by absolute position. Each has its own maximum m, sum l of exp(s - m) and
//! output o = Σ exp(s - m)·v, summed in the order of positions; pieces merge in order by
//!
//! ```text
//! m' = max(m, mᵢ)   a = exp(m - m')   b = exp(mᵢ - m')   l = fma(l, a, lᵢ·b)   o = fma(o, a, oᵢ·b)
//! ```
//!
//! from m = -∞, l = 0, o = 0. Where keys and values have scales, a key's multiplies the finished dot product, and a
//! value's the weight exp(s - m) in o, not in l. A piece wholly outside the window would merge as the identity and is
//! skipped. All this depends on the token's position and on nothing else, so prefill and decode agree to the last bit.

use std::marker::PhantomData;

use galerne_types::BlockId;
use galerne_types::limits::KV_BLOCK_TOKENS;

use crate::kv::{Bf16, F32, Format, Int8, Kept, Parts, Tile};
use crate::linear::Strided;
use crate::math::{SUM_LANES, exp, sum_of_lanes};
use crate::simd::{Isa, Kernel, Vector};

/// Widest head that the kernel has room for.
pub(crate) const HEAD_DIM_MAX: usize = 256;
/// Tokens of one sequence that attend together: their rows are a multiple of the six that the kernel takes at once.
pub(crate) const TOKENS_TOGETHER: usize = 6;
/// Room for a number a row, in whole vectors.
const FACTORS: usize = 16;

const _: () = assert!(KV_BLOCK_TOKENS == SUM_LANES, "a piece's sum runs over all lanes");

/// The query heads that read one KV head, of some tokens that follow each other in a sequence: all of them see most of
/// the same pieces, so that a piece is read once for several.
pub(crate) struct Attend<'a> {
    /// A row a token: `[heads][head_dim]`, turned, scaled by 1/√head_dim.
    pub(crate) queries: Strided<*const f32>,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    /// The KV head's tile in block 0.
    pub(crate) tiles: *const u8,
    /// Bytes from a block's tile to the next one's.
    pub(crate) stride: usize,
    pub(crate) tile: Tile,
    /// The sequence's blocks, in order of positions.
    pub(crate) blocks: &'a [BlockId],
    /// Of the first token, and the last that it sees.
    pub(crate) position: usize,
    /// Positions that a token sees, its own included.
    pub(crate) window: Option<usize>,
    /// As the queries.
    pub(crate) out: Strided<*mut f32>,
}

impl Attend<'_> {
    /// # Safety
    /// `queries` and `out` hold what they say, `blocks` reaches to the last token, and every block has a tile whose
    /// positions up to that are stored.
    pub(crate) unsafe fn run_on(self, isa: Isa) {
        // SAFETY: the caller's.
        unsafe {
            match self.tile.kept {
                Kept::F32 => isa.run(Over::<F32> { attend: self, format: PhantomData }),
                Kept::Bf16 => isa.run(Over::<Bf16> { attend: self, format: PhantomData }),
                Kept::Int8 => isa.run(Over::<Int8> { attend: self, format: PhantomData }),
            }
        }
    }
}

/// Attention over tiles of one format.
struct Over<'a, F> {
    attend: Attend<'a>,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Over<'_, F> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let (rows, mut row) = (self.attend.tokens * self.attend.heads, 0);
        while row < rows {
            // SAFETY: as many rows as are left.
            row += unsafe {
                match rows - row {
                    1 => self.attend.rows_at::<V, F, 1>(row),
                    2 => self.attend.rows_at::<V, F, 2>(row),
                    3 => self.attend.rows_at::<V, F, 3>(row),
                    4 | 5 => self.attend.rows_at::<V, F, 4>(row),
                    _ => self.attend.rows_at::<V, F, 6>(row),
                }
            };
        }
    }
}

/// What has been merged so far, for R rows: heads of tokens.
struct Merged<const R: usize> {
    max: [f32; R],
    sum: [f32; R],
    out: [[f32; HEAD_DIM_MAX]; R],
}

/// What R rows see of a piece: positions `from..to`, nothing if they are equal.
struct Seen<const R: usize> {
    from: [usize; R],
    to: [usize; R],
}

impl Attend<'_> {
    /// R rows together, so that keys and values are read once for them. Returns R.
    ///
    /// # Safety
    /// As [`Attend`]; rows `first … first + R` exist.
    #[inline(always)]
    unsafe fn rows_at<V: Vector, F: Format, const R: usize>(&self, first: usize) -> usize {
        let dim = self.tile.head_dim;
        let mut merged = Merged { max: [f32::NEG_INFINITY; R], sum: [0.0; R], out: [[0.0; HEAD_DIM_MAX]; R] };
        let (mut queries, mut outs) = ([self.queries.start; R], [self.out.start; R]);
        let (mut begin, mut end) = ([0; R], [0; R]);
        for r in 0..R {
            let (token, head) = ((first + r) / self.heads, (first + r) % self.heads);
            queries[r] = queries[r].wrapping_add(token * self.queries.stride + head * dim);
            outs[r] = outs[r].wrapping_add(token * self.out.stride + head * dim);
            end[r] = self.position + token + 1;
            if let Some(window) = self.window {
                begin[r] = end[r].saturating_sub(window);
            }
        }
        // SAFETY: the caller's; what the first row sees begins first, and what the last one sees ends last.
        unsafe {
            for piece in begin[0] / KV_BLOCK_TOKENS..end[R - 1].div_ceil(KV_BLOCK_TOKENS) {
                let tile = self.tiles.add(self.blocks[piece] as usize * self.stride);
                let parts = self.tile.parts::<F>(tile.cast_mut());
                let start = piece * KV_BLOCK_TOKENS;
                let mut seen = Seen { from: [0; R], to: [0; R] };
                for r in 0..R {
                    seen.to[r] = end[r].saturating_sub(start).min(KV_BLOCK_TOKENS);
                    seen.from[r] = begin[r].saturating_sub(start).min(seen.to[r]);
                }
                let mut scores = self.scores::<V, F, R>(&queries, parts);
                self.merge::<V, F, R>(&mut scores, &seen, parts, &mut merged);
            }
            for (r, out) in outs.into_iter().enumerate() {
                let out = std::slice::from_raw_parts_mut(out, dim);
                for (out, sum) in out.iter_mut().zip(&merged.out[r]) {
                    *out = sum / merged.sum[r];
                }
            }
        }
        R
    }

    /// q · k for the 32 positions of a block, dimension after dimension.
    ///
    /// # Safety
    /// `queries` are R heads, `tile` is one.
    #[inline(always)]
    unsafe fn scores<V: Vector, F: Format, const R: usize>(
        &self,
        queries: &[*const f32; R],
        tile: Parts<F::Number>,
    ) -> [[f32; KV_BLOCK_TOKENS]; R] {
        const HALF: usize = KV_BLOCK_TOKENS / 2;
        let dim = self.tile.head_dim;
        let mut scores = [[0.0; KV_BLOCK_TOKENS]; R];
        for lane in (0..HALF).step_by(V::LANES) {
            // SAFETY: the caller's; lanes stay within a row of 32.
            unsafe {
                let mut sums = [[V::splat(0.0); 2]; R];
                for d in 0..dim {
                    let row = tile.keys.add(d * KV_BLOCK_TOKENS + lane);
                    let pair = [F::load::<V>(row), F::load::<V>(row.add(HALF))];
                    for r in 0..R {
                        let query = V::splat(*queries[r].add(d));
                        sums[r][0] = pair[0].mul_add(query, sums[r][0]);
                        sums[r][1] = pair[1].mul_add(query, sums[r][1]);
                    }
                }
                if F::SCALED {
                    let scales = [V::load(tile.scales.add(lane)), V::load(tile.scales.add(lane + HALF))];
                    for sums in &mut sums {
                        *sums = [sums[0].mul(scales[0]), sums[1].mul(scales[1])];
                    }
                }
                for r in 0..R {
                    sums[r][0].store(scores[r].as_mut_ptr().add(lane));
                    sums[r][1].store(scores[r].as_mut_ptr().add(lane + HALF));
                }
            }
        }
        scores
    }

    /// Merges what is seen of a piece. Rows that see nothing of it stay as they are.
    ///
    /// # Safety
    /// `tile` is one.
    #[inline(always)]
    unsafe fn merge<V: Vector, F: Format, const R: usize>(
        &self,
        scores: &mut [[f32; KV_BLOCK_TOKENS]; R],
        seen: &Seen<R>,
        tile: Parts<F::Number>,
        merged: &mut Merged<R>,
    ) {
        // exp of it: by what the old and the new part are multiplied.
        let mut factors = [[0.0; FACTORS]; 2];
        for r in 0..R {
            if seen.from[r] == seen.to[r] {
                continue;
            }
            let row = &mut scores[r];
            row[..seen.from[r]].fill(f32::NEG_INFINITY);
            row[seen.to[r]..].fill(f32::NEG_INFINITY);
            let piece_max = max_of_lanes(*row);
            let max = if merged.max[r] > piece_max { merged.max[r] } else { piece_max };
            (factors[0][r], factors[1][r]) = (merged.max[r] - max, piece_max - max);
            merged.max[r] = max;
            for lane in (0..KV_BLOCK_TOKENS).step_by(V::LANES) {
                // SAFETY: a row of 32 elements.
                unsafe {
                    let at = row.as_mut_ptr().add(lane);
                    exp(V::load(at).sub(V::splat(piece_max))).store(at);
                }
            }
        }
        for factors in &mut factors {
            // SAFETY: room for whole vectors.
            unsafe {
                for lane in (0..R).step_by(V::LANES) {
                    exp(V::load(factors.as_ptr().add(lane))).store(factors.as_mut_ptr().add(lane));
                }
            }
        }
        let [old, new] = factors;
        for r in 0..R {
            if seen.from[r] < seen.to[r] {
                merged.sum[r] = merged.sum[r].mul_add(old[r], sum_of_lanes(scores[r]) * new[r]);
            }
        }
        if F::SCALED {
            // SAFETY: the scales of 32 values stand behind those of the keys.
            unsafe { scale::<V, R>(scores, tile.scales.add(KV_BLOCK_TOKENS)) };
        }
        for d in (0..self.tile.padded_dim).step_by(2 * V::LANES) {
            // SAFETY: value rows are padded to a multiple of 32, at most HEAD_DIM_MAX.
            unsafe {
                let sums = self.weighted::<V, F, R>(scores, seen, tile.values.add(d));
                for r in 0..R {
                    if seen.from[r] == seen.to[r] {
                        continue;
                    }
                    for (half, sum) in sums[r].into_iter().enumerate() {
                        let out = merged.out[r].as_mut_ptr().add(d + half * V::LANES);
                        let piece = sum.mul(V::splat(new[r]));
                        V::load(out).mul_add(V::splat(old[r]), piece).store(out);
                    }
                }
            }
        }
    }

    /// Σ exp(s - m)·v of two vectors of dimensions, position after position: those that all rows see are read for all
    /// at once, and the few before and behind for each row that sees them.
    ///
    /// # Safety
    /// `values` are those dimensions of a tile's values.
    #[inline(always)]
    unsafe fn weighted<V: Vector, F: Format, const R: usize>(
        &self,
        scores: &[[f32; KV_BLOCK_TOKENS]; R],
        seen: &Seen<R>,
        values: *const F::Number,
    ) -> [[V; 2]; R] {
        let (mut start, mut end) = (0, KV_BLOCK_TOKENS);
        for r in 0..R {
            start = start.max(seen.from[r]);
            end = end.min(seen.to[r]);
        }
        end = end.max(start);
        // SAFETY: positions are below 32, as `seen` is.
        unsafe {
            let mut sums = [[V::splat(0.0); 2]; R];
            for r in 0..R {
                for position in seen.from[r]..start.min(seen.to[r]) {
                    self.weigh::<V, F>(&mut sums[r], *scores[r].get_unchecked(position), values, position);
                }
            }
            for position in start..end {
                for r in 0..R {
                    self.weigh::<V, F>(&mut sums[r], *scores[r].get_unchecked(position), values, position);
                }
            }
            for r in 0..R {
                for position in end.max(seen.from[r])..seen.to[r] {
                    self.weigh::<V, F>(&mut sums[r], *scores[r].get_unchecked(position), values, position);
                }
            }
            sums
        }
    }

    /// # Safety
    /// As [`weighted`](Attend::weighted).
    #[inline(always)]
    unsafe fn weigh<V: Vector, F: Format>(
        &self,
        sums: &mut [V; 2],
        weight: f32,
        values: *const F::Number,
        position: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let row = values.add(position * self.tile.padded_dim);
            sums[0] = F::load::<V>(row).mul_add(V::splat(weight), sums[0]);
            sums[1] = F::load::<V>(row.add(V::LANES)).mul_add(V::splat(weight), sums[1]);
        }
    }
}

/// Multiplies the weights of 32 positions by the scales of their values.
///
/// # Safety
/// `scales` holds 32.
#[inline(always)]
unsafe fn scale<V: Vector, const R: usize>(rows: &mut [[f32; KV_BLOCK_TOKENS]; R], scales: *const f32) {
    for lane in (0..KV_BLOCK_TOKENS).step_by(V::LANES) {
        // SAFETY: lanes stay within 32.
        unsafe {
            let scale = V::load(scales.add(lane));
            for row in rows.iter_mut() {
                let at = row.as_mut_ptr().add(lane);
                V::load(at).mul(scale).store(at);
            }
        }
    }
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

#[cfg(test)]
mod tests;

//! Products of bytes whose weights are used as they are read: for few tokens, and for all where nothing is to be done to
//! weights first.

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, compiler_fence};

use super::formats::{At, Format, Products};
use super::{Ahead, Tile, quads_of};
use crate::linear::{Strided, tokens_together};
use crate::packed::{BLOCK, GROUP_BLOCKS, PANEL, QUAD};
use crate::rows::QuantRows;
use crate::simd::{DotKernel, Dots};

/// How far ahead of its products memory is asked for; beyond the last panel it is asked for nothing that is there.
const AHEAD_BYTES: usize = 8192;
/// Blocks that all tokens are multiplied with before the next, so that the nearest cache holds them and those that are
/// asked for meanwhile: memory and products take the time of the longer, not of both.
const BLOCKS_TOGETHER: usize = GROUP_BLOCKS;
/// Tokens whose sums fit the registers, beside weights and a scale, by a panel's two vectors of 16 lanes.
const TOKENS_IN_REGISTERS: usize = 6;
/// Tokens of the largest tile of narrower vectors, which takes one at a time.
const TOKENS_OF_NARROW: usize = 8;

/// The micro-kernel for one token, which is compiled by itself: what others need of registers is not kept for them.
pub(super) struct One<F> {
    pub(super) tile: Tile,
    pub(super) format: PhantomData<F>,
}

impl<F: Format> DotKernel for One<F> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        let Self { tile: Tile { start, panels, blocks, x, y }, format } = self;
        for panel in 0..panels {
            // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised.
            unsafe {
                let from = start.add(panel * F::LAYOUT.blocks(blocks));
                let y = Strided { start: y.start.add(panel * PANEL), ..y };
                Part::<F> { from, blocks, x, y, goes_on: false, format }
                    .tile::<V, 1>(&mut Ahead::of(from, 0, 1));
            }
        }
    }
}

/// The micro-kernel for more.
pub(super) struct Read<F> {
    pub(super) tile: Tile,
    pub(super) tokens: usize,
    pub(super) format: PhantomData<F>,
}

impl<F: Format> DotKernel for Read<F> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        let Self { tile: Tile { start, panels, blocks, x, y }, tokens, format } = self;
        let wide = V::LANES == 16;
        let most = if wide { TOKENS_IN_REGISTERS } else { TOKENS_OF_NARROW };
        let tiles = tokens.div_ceil(most);
        let together = if tiles == 1 { blocks } else { BLOCKS_TOGETHER };
        // Panels follow each other without a gap.
        let mut from = start;
        for panel in 0..panels {
            for first in (0..blocks).step_by(together) {
                let blocks = together.min(blocks - first);
                let bytes = F::LAYOUT.blocks(blocks);
                let mut ahead = Ahead::of(from.wrapping_add(AHEAD_BYTES), bytes, blocks * tiles);
                let mut token = 0;
                while token < tokens {
                    // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised; each arm
                    // takes at most the tokens that are left.
                    unsafe {
                        let x = x.starting_at(token);
                        let x = QuantRows {
                            values: Strided { start: x.values.start.add(first * BLOCK), ..x.values },
                            scales: Strided { start: x.scales.start.add(first), ..x.scales },
                        };
                        let y = Strided { start: y.start.add(token * y.stride + panel * PANEL), ..y };
                        let part = Part::<F> { from, blocks, x, y, goes_on: first > 0, format };
                        let left = tokens - token;
                        token += match if wide { tokens_together(left, most) } else { left } {
                            8.. if !wide => part.tile::<V, 8>(&mut ahead),
                            6.. => part.tile::<V, 6>(&mut ahead),
                            4.. => part.tile::<V, 4>(&mut ahead),
                            3 => part.tile::<V, 3>(&mut ahead),
                            2 => part.tile::<V, 2>(&mut ahead),
                            _ => part.tile::<V, 1>(&mut ahead),
                        };
                    }
                }
                from = from.wrapping_add(bytes);
            }
        }
    }
}

/// Some blocks of a panel, and the tokens from one on.
struct Part<F> {
    from: *const u8,
    blocks: usize,
    x: QuantRows,
    y: Strided<*mut f32>,
    /// The sums begin with what stands in `y`, not with 0.
    goes_on: bool,
    format: PhantomData<F>,
}

impl<F: Format> Part<F> {
    /// M tokens by the outputs of the panel. Returns M.
    ///
    /// # Safety
    /// As [`dots`](super::dots), for M tokens.
    #[inline(always)]
    unsafe fn tile<V: Dots, const M: usize>(self, ahead: &mut Ahead) -> usize {
        // SAFETY: W divides the vectors of a panel: two of 16 lanes, or four of 8.
        unsafe {
            match (V::LANES, M) {
                (16, _) => self.blocks::<V, M, 2, true>(ahead),
                (_, 2..=4) => self.blocks::<V, M, 2, false>(ahead),
                (_, 1) => self.blocks::<V, M, 4, false>(ahead),
                _ => self.blocks::<V, M, 1, false>(ahead),
            }
        }
        M
    }

    /// W vectors of outputs at a time. IN_REGISTERS sums of all blocks stay there, of which W vectors are then all; else
    /// only those of a block do, and the others wait in memory.
    ///
    /// # Safety
    /// As [`tile`](Self::tile).
    #[inline(always)]
    unsafe fn blocks<V: Dots, const M: usize, const W: usize, const IN_REGISTERS: bool>(
        self,
        ahead: &mut Ahead,
    ) {
        let Self { mut from, blocks, x, y, goes_on, format: _ } = self;
        // SAFETY: the caller's.
        unsafe {
            let mut group = from;
            let mut waiting = [[0.0; PANEL]; M];
            let mut sums = [[V::splat(0.0); W]; M];
            if goes_on {
                for (m, sums) in waiting.iter_mut().enumerate() {
                    y.start.add(m * y.stride).copy_to_nonoverlapping(sums.as_mut_ptr(), PANEL);
                }
                load(&waiting, 0, &mut sums);
            }
            for block in 0..blocks {
                if F::LAYOUT.group > 0 && block.is_multiple_of(GROUP_BLOCKS) {
                    group = from;
                    from = from.add(F::LAYOUT.group);
                }
                ahead.go_on::<V>();
                let x = QuantRows {
                    values: Strided { start: x.values.start.add(block * BLOCK), ..x.values },
                    scales: Strided { start: x.scales.start.add(block), ..x.scales },
                };
                for lane in (0..PANEL).step_by(W * V::LANES) {
                    for part in 0..F::PARTS {
                        let at = At { group, header: from, lane };
                        let products = products::<F, V, M, W>(at, part, x);
                        if !IN_REGISTERS {
                            if M > 1 {
                                // Loaded no sooner than the products are done.
                                compiler_fence(Ordering::SeqCst);
                            }
                            load(&waiting, lane, &mut sums);
                        }
                        add::<F, V, M, W>(at, part, x, products, &mut sums);
                        if !IN_REGISTERS {
                            store(&sums, &mut waiting, lane);
                        }
                    }
                }
                from = from.add(F::LAYOUT.block());
            }
            if IN_REGISTERS {
                store(&sums, &mut waiting, 0);
            }
            for (m, sums) in waiting.iter().enumerate() {
                y.start.add(m * y.stride).copy_from_nonoverlapping(sums.as_ptr(), PANEL);
            }
        }
    }
}

/// What a part of a block comes to for W vectors from lane `at.lane` on, before it is scaled; `x` begins with the
/// block.
///
/// # Safety
/// As [`dots`](super::dots), for M tokens.
#[inline(always)]
unsafe fn products<F: Format, V: Dots, const M: usize, const W: usize>(
    at: At,
    part: usize,
    x: QuantRows,
) -> [[V; W]; M] {
    // Plain loops: what closures do is compiled without the CPU's features, unless it is inlined.
    // SAFETY: the caller's.
    unsafe {
        let mut inner = [[F::Products::begin::<V>(0); W]; M];
        for (m, inner) in inner.iter_mut().enumerate() {
            let scale = &*x.scales.start.add(m * x.scales.stride);
            *inner = [F::Products::begin::<V>(scale.sum_of::<F>(part)); W];
        }
        let mut of_zeros = [F::Products::begin::<V>(0); W];
        for quad in quads_of::<F>(part) {
            let mut quads = [F::Products::quads::<V>(at.quads(F::LAYOUT), quad); W];
            let mut weights = [F::Products::laid::<V>(quads[0]); W];
            for w in 0..W {
                quads[w] = F::Products::quads::<V>(at.right(w * V::LANES).quads(F::LAYOUT), quad);
                weights[w] = F::Products::laid::<V>(quads[w]);
                if M > 1 {
                    of_zeros[w] = F::Products::of_zeros::<V>(of_zeros[w], weights[w]);
                }
            }
            for (m, inner) in inner.iter_mut().enumerate() {
                let x = x.values.start.add(m * x.values.stride + quad * QUAD).cast::<i32>();
                if M > 1 {
                    F::Products::dots::<V, W>(inner, weights, x);
                } else {
                    for w in 0..W {
                        inner[w] = F::Products::dot_once::<V>(inner[w], quads[w], x.read_unaligned());
                    }
                }
            }
        }
        let mut ended = [[V::splat(0.0); W]; M];
        for m in 0..M {
            for w in 0..W {
                ended[m][w] = F::Products::end::<V>(F::Products::less::<V>(inner[m][w], of_zeros[w]));
            }
        }
        ended
    }
}

/// Adds a part of a block, scaled, to the sums of W vectors.
///
/// # Safety
/// As [`products`].
#[inline(always)]
unsafe fn add<F: Format, V: Dots, const M: usize, const W: usize>(
    at: At,
    part: usize,
    x: QuantRows,
    products: [[V; W]; M],
    sums: &mut [[V; W]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        for w in 0..W {
            let at = at.right(w * V::LANES);
            let d = F::scale::<V>(at, part);
            for m in 0..M {
                let scale = &*x.scales.start.add(m * x.scales.stride);
                let sum = &mut sums[m][w];
                *sum = products[m][w].mul_add(d.mul(V::splat(scale.scale)), *sum);
                if F::OFFSET {
                    *sum = F::offset::<V>(at).mul_add(V::splat(scale.total), *sum);
                }
            }
        }
    }
}

/// # Safety
/// As [`Vector`](crate::simd::Vector); W vectors from `lane` on are within the row.
#[inline(always)]
unsafe fn load<V: Dots, const W: usize, const M: usize>(
    rows: &[[f32; PANEL]; M],
    lane: usize,
    sums: &mut [[V; W]; M],
) {
    for (row, sums) in rows.iter().zip(sums) {
        for (w, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *sum = unsafe { V::load(row.as_ptr().add(lane + w * V::LANES)) };
        }
    }
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn store<V: Dots, const W: usize, const M: usize>(
    sums: &[[V; W]; M],
    rows: &mut [[f32; PANEL]; M],
    lane: usize,
) {
    for (row, sums) in rows.iter_mut().zip(sums) {
        for (w, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { sum.store(row.as_mut_ptr().add(lane + w * V::LANES)) };
        }
    }
}

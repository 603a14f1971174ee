//! Products of bytes for many tokens: a part of a panel is laid out once as they take it, in a scratch that stays in the
//! first-level cache. Its integers, and the order in which blocks are added up, are those of few tokens.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::formats::{At, Format, Products};
use super::{Ahead, Tile, quads_of};
use crate::linear::Strided;
use crate::packed::{BLOCK, GROUP_BLOCKS, PANEL, QUAD};
use crate::rows::QuantRows;
use crate::simd::{DotKernel, Dots};

/// Blocks that are laid out at a time, a group of a K-quant: half a first-level cache of 32 KiB where signs stand apart.
const LAID_BLOCKS: usize = GROUP_BLOCKS;
const QUADS_OF_BLOCK: usize = BLOCK / QUAD;
/// Vectors of a panel, of the narrowest.
const VECTORS_MAX: usize = PANEL / 8;
/// Parts of a block with a scale of their own.
const PARTS_MAX: usize = 2;
/// What registers have room for: sums of so many tokens by so many vectors of outputs, beside the weights.
const TOKENS_TOGETHER: usize = 4;
const VECTORS_TOGETHER: usize = 2;

/// The micro-kernel for many tokens.
pub(super) struct Laid<F> {
    pub(super) tile: Tile,
    pub(super) tokens: usize,
    pub(super) format: PhantomData<F>,
}

impl<F: Format> DotKernel for Laid<F> {
    #[inline(always)]
    unsafe fn run<V: Dots>(self) {
        // SAFETY: the caller's; a panel is two vectors of 16 lanes, or four of 8.
        unsafe {
            match V::LANES {
                16 => self.panels::<V, 2>(),
                _ => self.panels::<V, 4>(),
            }
        }
    }
}

impl<F: Format> Laid<F> {
    /// Goes through the panels in order; each has VECTORS vectors of outputs.
    ///
    /// # Safety
    /// As [`dots`](super::dots).
    #[inline(always)]
    unsafe fn panels<V: Dots, const VECTORS: usize>(&self) {
        let Tile { start, panels, blocks, x, y } = self.tile;
        let mut laid = Scratch::<V, F>::new();
        // Panels follow each other without a gap.
        let mut from = start;
        // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised.
        unsafe {
            for panel in 0..panels {
                for first in (0..blocks).step_by(LAID_BLOCKS) {
                    let count = LAID_BLOCKS.min(blocks - first);
                    let before = from;
                    from = laid.lay::<VECTORS>(from, count);
                    let steps = self.tokens.div_ceil(TOKENS_TOGETHER) * (VECTORS / VECTORS_TOGETHER) * count;
                    let mut ahead = Ahead::of(from, from.offset_from_unsigned(before), steps);
                    let x = QuantRows {
                        values: Strided { start: x.values.start.add(first * BLOCK), ..x.values },
                        scales: Strided { start: x.scales.start.add(first), ..x.scales },
                    };
                    let y = Strided { start: y.start.add(panel * PANEL), ..y };
                    let mut token = 0;
                    while token < self.tokens {
                        let part = Part {
                            blocks: count,
                            x: x.starting_at(token),
                            y: Strided { start: y.start.add(token * y.stride), ..y },
                            goes_on: first > 0,
                        };
                        token += match self.tokens - token {
                            TOKENS_TOGETHER.. => laid.tile::<TOKENS_TOGETHER>(part, &mut ahead),
                            2.. => laid.tile::<2>(part, &mut ahead),
                            _ => laid.tile::<1>(part, &mut ahead),
                        };
                    }
                }
            }
        }
    }
}

/// Tokens and outputs that some laid blocks are multiplied for.
#[derive(Clone, Copy)]
struct Part {
    blocks: usize,
    /// From the first of the blocks on.
    x: QuantRows,
    y: Strided<*mut f32>,
    /// The sums begin with what stands in `y`, not with 0.
    goes_on: bool,
}

/// Some blocks of a panel: of every block, part and quad the vectors of outputs one after another.
struct Scratch<V: Dots, F: Format> {
    quads: [MaybeUninit<<F::Products as Products>::Laid<V>>; LAID_BLOCKS * QUADS_OF_BLOCK * VECTORS_MAX],
    less: [MaybeUninit<<F::Products as Products>::Sums<V>>; LAID_BLOCKS * PARTS_MAX * VECTORS_MAX],
    scales: [MaybeUninit<V>; LAID_BLOCKS * PARTS_MAX * VECTORS_MAX],
    offsets: [MaybeUninit<V>; LAID_BLOCKS * VECTORS_MAX],
}

impl<V: Dots, F: Format> Scratch<V, F> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            quads: [MaybeUninit::uninit(); _],
            less: [MaybeUninit::uninit(); _],
            scales: [MaybeUninit::uninit(); _],
            offsets: [MaybeUninit::uninit(); _],
        }
    }

    /// Lays out blocks from `from` on, where a group begins if there are groups; returns where they end.
    ///
    /// # Safety
    /// There are so many.
    #[inline(always)]
    unsafe fn lay<const VECTORS: usize>(&mut self, from: *const u8, blocks: usize) -> *const u8 {
        let group = from;
        // SAFETY: the caller's.
        unsafe {
            let mut from = from.add(F::LAYOUT.group);
            for block in 0..blocks {
                let at = At { group, header: from, lane: 0 };
                for part in 0..F::PARTS {
                    let zeros = F::Products::begin::<V>(0);
                    let mut of_zeros = [zeros; VECTORS];
                    for quad in quads_of::<F>(part) {
                        let to = &mut self.quads[(block * QUADS_OF_BLOCK + quad) * VECTORS..][..VECTORS];
                        for vector in 0..VECTORS {
                            let from = at.right(vector * V::LANES).quads(F::LAYOUT);
                            let quads = F::Products::laid::<V>(F::Products::quads::<V>(from, quad));
                            to[vector].write(quads);
                            of_zeros[vector] = F::Products::of_zeros::<V>(of_zeros[vector], quads);
                        }
                    }
                    let index = (block * F::PARTS + part) * VECTORS;
                    for (vector, of_zeros) in of_zeros.into_iter().enumerate() {
                        self.less[index + vector].write(F::Products::less::<V>(zeros, of_zeros));
                        let scale = F::scale::<V>(at.right(vector * V::LANES), part);
                        self.scales[index + vector].write(scale);
                    }
                }
                if F::OFFSET {
                    for vector in 0..VECTORS {
                        let offset = F::offset::<V>(at.right(vector * V::LANES));
                        self.offsets[block * VECTORS + vector].write(offset);
                    }
                }
                from = from.add(F::LAYOUT.block());
            }
            from
        }
    }

    /// Multiplies all outputs of the panel, some vectors at a time. Returns M.
    ///
    /// # Safety
    /// So many blocks were laid, and `part` has M rows.
    #[inline(always)]
    unsafe fn tile<const M: usize>(&self, part: Part, ahead: &mut Ahead) -> usize {
        const W: usize = VECTORS_TOGETHER;
        let Part { blocks, x, y, goes_on } = part;
        // SAFETY: the caller's.
        unsafe {
            for first in (0..PANEL / V::LANES).step_by(W) {
                let y = Strided { start: y.start.add(first * V::LANES), ..y };
                let mut sums = [[V::splat(0.0); W]; M];
                for (m, sums) in sums.iter_mut().enumerate() {
                    for (w, sum) in sums.iter_mut().enumerate() {
                        if goes_on {
                            *sum = V::load(y.start.add(m * y.stride + w * V::LANES));
                        }
                    }
                }
                for block in 0..blocks {
                    let x = QuantRows {
                        values: Strided { start: x.values.start.add(block * BLOCK), ..x.values },
                        scales: Strided { start: x.scales.start.add(block), ..x.scales },
                    };
                    for part in 0..F::PARTS {
                        self.part::<M, W>(block, part, first, x, &mut sums);
                    }
                    ahead.go_on::<V>();
                }
                for (m, sums) in sums.into_iter().enumerate() {
                    for (w, sum) in sums.into_iter().enumerate() {
                        sum.store(y.start.add(m * y.stride + w * V::LANES));
                    }
                }
            }
        }
        M
    }

    /// Adds a part of a block to the sums of W vectors; `x` begins with the block.
    ///
    /// # Safety
    /// As [`tile`](Self::tile).
    #[inline(always)]
    unsafe fn part<const M: usize, const W: usize>(
        &self,
        block: usize,
        part: usize,
        first: usize,
        x: QuantRows,
        sums: &mut [[V; W]; M],
    ) {
        let vectors = PANEL / V::LANES;
        let index = (block * F::PARTS + part) * vectors + first;
        // SAFETY: the caller's.
        unsafe {
            let mut inner = [[F::Products::begin::<V>(0); W]; M];
            for (m, inner) in inner.iter_mut().enumerate() {
                let sum = (&*x.scales.start.add(m * x.scales.stride)).sum_of::<F>(part);
                for (w, inner) in inner.iter_mut().enumerate() {
                    let less = self.less.as_ptr().add(index + w).read().assume_init();
                    *inner = F::Products::begin_less::<V>(sum, less);
                }
            }
            let quads = self.quads.as_ptr().add(block * QUADS_OF_BLOCK * vectors + first);
            // Four in a row: counting them one by one takes a twentieth more time.
            for quad in quads_of::<F>(part).step_by(4) {
                for quad in quad..quad + 4 {
                    let quads = quads.add(quad * vectors);
                    for (m, inner) in inner.iter_mut().enumerate() {
                        let x = x.values.start.add(m * x.values.stride + quad * QUAD);
                        let x = x.cast::<i32>().read_unaligned();
                        for (w, inner) in inner.iter_mut().enumerate() {
                            *inner = F::Products::dot::<V>(*inner, quads.add(w).read().assume_init(), x);
                        }
                    }
                }
            }
            for (m, (inner, sums)) in inner.into_iter().zip(sums).enumerate() {
                let scale = &*x.scales.start.add(m * x.scales.stride);
                for (w, (inner, sum)) in inner.into_iter().zip(sums).enumerate() {
                    let d = self.scales.as_ptr().add(index + w).read().assume_init();
                    *sum = F::Products::end::<V>(inner).mul_add(d.mul(V::splat(scale.scale)), *sum);
                    if F::OFFSET {
                        let offset =
                            self.offsets.as_ptr().add(block * vectors + first + w).read().assume_init();
                        *sum = offset.mul_add(V::splat(scale.total), *sum);
                    }
                }
            }
        }
    }
}

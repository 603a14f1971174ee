//! Matrix products as jobs of the team: rows of activations in, rows out, panels handed out to threads.

use std::ops::Range;

use crate::linear::{Strided, linear};
use crate::math::Swiglu;
use crate::packed::{PANEL, Packed};
use crate::rows::{Rows, RowsMut};
use crate::simd::Isa;
use crate::team::Team;

/// With few tokens a panel is quick, and memory is read in order: hand out two at least, as the kernel runs two at once,
/// and not too many.
const FEW_TOKENS: usize = 16;
const FEW_TOKENS_PANELS: (usize, usize) = (2, 16);
/// Ranges that a thread should find, so that all end at about the same time.
const RANGES_PER_THREAD: usize = 8;

/// The threads, and what their kernels are compiled for.
pub(crate) struct Engine {
    pub(crate) isa: Isa,
    pub(crate) team: Team,
}

impl Engine {
    pub(crate) fn new(isa: Isa, team: Team) -> Self {
        Self { isa, team }
    }

    /// `y = x · wᵀ` for several matrices with the same input; each `y` is as wide as its matrix has outputs.
    pub(crate) fn products<const P: usize>(
        &mut self,
        tokens: usize,
        x: &Rows,
        products: [(&Packed, RowsMut<'_>); P],
    ) {
        let isa = self.isa;
        let panels = products.iter().map(|(weights, _)| weights.panels()).sum();
        self.panels(panels, tokens, &|range| {
            let mut first = 0;
            for (weights, y) in &products {
                let end = first + weights.panels();
                let own = range.start.clamp(first, end) - first..range.end.clamp(first, end) - first;
                check(weights, tokens, x, 0, y);
                // SAFETY: shapes were checked; the columns of a panel are written by the range that it is in.
                unsafe { linear(isa, weights, own, tokens, x.starting_at(0), y.strided()) };
                first = end;
            }
        });
    }

    /// `gate = silu(x · gateᵀ) · (x · upᵀ)`, panel by panel.
    pub(crate) fn gate_up(
        &mut self,
        tokens: usize,
        x: &Rows,
        (gate_weights, gate): (&Packed, RowsMut<'_>),
        (up_weights, up): (&Packed, RowsMut<'_>),
    ) {
        let isa = self.isa;
        self.panels(gate_weights.panels(), tokens, &|range| {
            check(gate_weights, tokens, x, 0, &gate);
            check(up_weights, tokens, x, 0, &up);
            let width = range.len() * PANEL;
            let column = range.start * PANEL;
            // SAFETY: shapes were checked; the columns of a panel, in both, are touched by the range that it is in.
            unsafe {
                linear(isa, gate_weights, range.clone(), tokens, x.starting_at(0), gate.strided());
                linear(isa, up_weights, range, tokens, x.starting_at(0), up.strided());
                let up = Strided { start: up.strided().start.add(column).cast_const(), stride: up.width };
                let both = Strided { start: gate.strided().start.add(column), stride: gate.width };
                isa.run(Swiglu { gate: both, up, rows: tokens, width });
                for token in 0..tokens {
                    gate.round(isa, token, column..column + width);
                }
            }
        });
    }

    /// Products whose inputs are cut: `shards[i]` takes the columns of `x` that follow those of the shards before.
    /// `partials` is `[shard][token]`; in the end its first `[piece][token]` rows are the sums over the shards of
    /// each of `pieces`, in the tree's order.
    pub(crate) fn partial_products(
        &mut self,
        tokens: usize,
        x: &Rows,
        shards: &[Packed],
        pieces: &[Range<usize>],
        partials: RowsMut<'_>,
    ) {
        let isa = self.isa;
        self.panels(shards[0].panels(), tokens, &|range| {
            let mut column = 0;
            for (shard, weights) in shards.iter().enumerate() {
                let y = partials.skip(shard * tokens);
                check(weights, tokens, x, column, &y);
                // SAFETY: shapes were checked; the columns of a panel, in all shards' partials, belong to one range.
                unsafe {
                    linear(isa, weights, range.clone(), tokens, x.starting_at(column), y.strided());
                };
                column += weights.cols();
            }
            let columns = range.start * PANEL..range.end * PANEL;
            for (slot, piece) in pieces.iter().enumerate() {
                // SAFETY: as above.
                unsafe { sum_piece(&partials, tokens, columns.clone(), piece.clone(), slot) };
            }
        });
    }

    /// A job over panels.
    fn panels(&mut self, panels: usize, tokens: usize, run: &(dyn Fn(Range<usize>) + Sync)) {
        let grain = if tokens > FEW_TOKENS {
            1
        } else {
            let (least, most) = FEW_TOKENS_PANELS;
            (panels / (self.team.threads() * RANGES_PER_THREAD)).clamp(least, most)
        };
        self.team.each(panels, grain, &|_, range| run(range));
    }
}

/// What [`linear`] must be able to rely on.
fn check(weights: &Packed, tokens: usize, x: &Rows, column: usize, y: &RowsMut<'_>) {
    assert!(weights.cols() <= x.width - column && tokens * x.width <= x.data.len(), "the inputs fit");
    assert!(weights.padded_rows() <= y.width && tokens * y.width <= y.len(), "the outputs fit");
}

/// Sums the partials of the shards in `piece` onto slot `slot`, which is none of a later piece: neighbours pair up
/// level by level, as in [`galerne_collective::tree`].
///
/// # Safety
/// Nobody else touches these columns of the partials.
unsafe fn sum_piece(
    partials: &RowsMut<'_>,
    tokens: usize,
    columns: Range<usize>,
    piece: Range<usize>,
    slot: usize,
) {
    for token in 0..tokens {
        // SAFETY: the caller's; rows of different shards do not overlap.
        let row = |shard: usize| unsafe { partials.row(shard * tokens + token, columns.clone()) };
        let mut step = 1;
        while step < piece.len() {
            for left in piece.clone().step_by(2 * step) {
                if left + step < piece.end {
                    for (sum, right) in row(left).iter_mut().zip(row(left + step)) {
                        *sum += *right;
                    }
                }
            }
            step *= 2;
        }
        if slot != piece.start {
            row(slot).copy_from_slice(row(piece.start));
        }
    }
}

#[cfg(test)]
mod tests {
    use galerne_collective::tree;

    use super::*;

    #[test]
    fn pieces_are_summed_as_the_tree_sums_leaves() {
        for (leaves, range) in
            [(3, 0..3), (8, 0..8), (12, 0..3), (12, 3..6), (12, 9..12), (7, 2..7), (5, 4..5)]
        {
            let value = |leaf: usize, column: usize| 1.0 / (leaf * 7 + column + 3) as f32;
            let mut partials = Rows::zeroed(range.len(), PANEL);
            for (row, leaf) in partials.data.chunks_exact_mut(PANEL).zip(range.clone()) {
                row.iter_mut().enumerate().for_each(|(column, x)| *x = value(leaf, column));
            }
            let pieces = tree::pieces(leaves, range.clone());
            for (slot, piece) in pieces.iter().enumerate() {
                let own = piece.start - range.start..piece.end - range.start;
                // SAFETY: one thread.
                unsafe { sum_piece(&partials.shared(), 1, 0..PANEL, own, slot) };
                let singles: Vec<Range<usize>> = piece.clone().map(|leaf| leaf..leaf + 1).collect();
                let rows: Vec<Vec<f32>> = piece
                    .clone()
                    .map(|leaf| (0..PANEL).map(|column| value(leaf, column)).collect())
                    .collect();
                let mut expected = [0.0; PANEL];
                tree::sum_into(&singles, |i| &rows[i], &mut expected);
                assert_eq!(
                    partials.data[slot * PANEL..][..PANEL],
                    expected,
                    "{piece:?} of {range:?} of {leaves}"
                );
            }
        }
    }
}

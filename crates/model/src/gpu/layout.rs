//! How a model lies in a GPU's memory: the fragments in which kernels read weights, and the tree of sums as they walk it.

use std::ops::Range;

use galerne_collective::nccl::Gathered;
use half::bf16;

use super::kernels::{PAIR, TILE_PAIR_BYTES, TILE_ROWS, Tree};

/// Leaves of the tree that fit into a kernel's argument.
pub(super) const LEAVES_MAX: usize = 32;

/// The tree over `pieces`, nodes in leaf order that make up one node together ([`galerne_collective::tree`]), which stand in
/// slots one after another.
pub(super) fn tree(pieces: &[Range<usize>]) -> Tree {
    let mut walk = Walk { merges: 0, bits: 0, left: pieces };
    if let (Some(first), Some(last)) = (pieces.first(), pieces.last()) {
        walk.node(first.start..last.end);
    }
    Tree { merges: walk.merges, present: u64::MAX >> (64 - pieces.len()) }
}

/// The tree over so many leaves.
pub(super) fn tree_of(leaves: usize) -> Tree {
    tree(&(0..leaves).map(|leaf| leaf..leaf + 1).collect::<Vec<_>>())
}

/// The tree over the pieces of all ranks, in their slots.
pub(super) fn tree_of_ranks(gathered: &Gathered) -> Tree {
    let (pieces, slots): (Vec<_>, Vec<_>) = gathered.pieces().unzip();
    Tree { present: slots.into_iter().fold(0, |all, slot| all | 1 << slot), ..tree(&pieces) }
}

/// For each leaf, a 1 for each merge after it and a 0.
struct Walk<'a> {
    merges: u64,
    bits: u32,
    left: &'a [Range<usize>],
}

impl Walk<'_> {
    fn node(&mut self, node: Range<usize>) {
        if self.left.first() == Some(&node) {
            self.left = &self.left[1..];
            self.bits += 1; // a 0: the merges that follow stand before it
            return;
        }
        let middle = node.start + (node.len().next_power_of_two() >> 1);
        self.node(node.start..middle);
        self.node(middle..node.end);
        // The 0 of the last leaf moves up for a 1.
        self.merges |= 1 << (self.bits - 1);
        self.bits += 1;
    }
}

/// Heads as wide as the kernels take them: whole pairs of k-tiles.
pub(super) fn padded_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(PAIR)
}

/// Puts row `r` of a tile's 16, `values` from input `start` on, where a warp's lanes find them. `tile` holds all inputs.
pub(super) fn put_row(tile: &mut [u8], r: usize, start: usize, values: &[bf16]) {
    debug_assert!(r < TILE_ROWS);
    for (k, value) in (start..).zip(values) {
        let (lane, word) = (r % 8 * 4 + k % 8 / 2, r / 8 + k % 16 / 8 * 2);
        let at = k / 16 * (TILE_PAIR_BYTES / 2) + lane * 16 + word * 4 + k % 2 * 2;
        tile[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use galerne_collective::tree::sum_into;

    use super::*;

    /// What `tree_sum` of `cuda/rows.cu` does.
    fn walk(mut tree: Tree, leaf: impl Fn(usize) -> f32) -> f32 {
        let mut stack = Vec::new();
        for slot in (0..64).filter(|slot| tree.present >> slot & 1 == 1) {
            let mut x = leaf(slot);
            while tree.merges % 2 == 1 {
                x += stack.pop().unwrap();
                tree.merges /= 2;
            }
            tree.merges /= 2;
            stack.push(x);
        }
        assert_eq!(stack.len(), 1);
        stack[0]
    }

    #[test]
    fn kernels_sum_as_the_tree_does_for_every_cut() {
        let value = |leaf: usize| 1.0 / (leaf * 7 + 3) as f32;
        for leaves in 1..=LEAVES_MAX {
            for ranks in (1..=leaves).filter(|ranks| leaves.is_multiple_of(*ranks)) {
                let singles: Vec<_> = (0..leaves).map(|leaf| leaf..leaf + 1).collect();
                let mut expected = [0.0];
                let values: Vec<[f32; 1]> = (0..leaves).map(|leaf| [value(leaf)]).collect();
                sum_into(&singles, |i| &values[i], &mut expected);
                let each = leaves / ranks;
                let parts: Vec<_> = (0..ranks).map(|rank| rank * each..(rank + 1) * each).collect();
                let gathered = Gathered::new(&parts);
                let piece = |slot: usize| {
                    let (piece, _) = gathered.pieces().find(|(_, at)| *at == slot).unwrap();
                    walk(tree_of(piece.len()), |i| value(piece.start + i))
                };
                let sum = walk(tree_of_ranks(&gathered), piece);
                assert_eq!(sum, expected[0], "{leaves} leaves, {ranks} ranks");
            }
        }
    }

    #[test]
    fn every_number_of_a_tile_has_a_place_of_its_own() {
        let mut tile = vec![0; 2 * TILE_PAIR_BYTES];
        for r in 0..TILE_ROWS {
            put_row(&mut tile, r, 32, &[bf16::ONE; 32]);
        }
        assert!(tile[..TILE_PAIR_BYTES].iter().all(|byte| *byte == 0));
        assert!(tile[TILE_PAIR_BYTES..].chunks(2).all(|value| value == bf16::ONE.to_le_bytes()));
    }
}

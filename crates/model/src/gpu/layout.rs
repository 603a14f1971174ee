//! How a model lies in a GPU's memory: the fragments in which kernels read weights, and the tree of sums as they walk it.

use std::ops::Range;

use galerne_collective::nccl::Gathered;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{KvDtype, Quantize};
use half::bf16;

use super::kernels::{PAIR, TILE_PAIR_BYTES, TILE_ROWS, Tree};
use crate::error::ModelError;

/// Leaves of the tree that fit into a kernel's argument.
pub(super) const LEAVES_MAX: usize = 32;

/// The tree over `pieces`, nodes in leaf order that make up one node together ([`galerne_collective::tree`]), which stand in
/// slots one after another.
pub(super) fn tree(pieces: &[Range<usize>]) -> Tree {
    /// Above these, leaves are read one after the other.
    const PERFECT_MAX: usize = 8;
    let (merges, count) = (merges(pieces), pieces.len());
    let perfect = count.is_power_of_two() && count <= PERFECT_MAX && merges == self::merges(&leaves(count));
    Tree { merges, present: u64::MAX >> (64 - count), perfect: if perfect { count as u32 } else { 0 } }
}

fn leaves(count: usize) -> Vec<Range<usize>> {
    (0..count).map(|leaf| leaf..leaf + 1).collect()
}

fn merges(pieces: &[Range<usize>]) -> u64 {
    let mut walk = Walk { merges: 0, bits: 0, left: pieces };
    if let (Some(first), Some(last)) = (pieces.first(), pieces.last()) {
        walk.node(first.start..last.end);
    }
    walk.merges
}

/// The tree over so many leaves.
pub(super) fn tree_of(leaves: usize) -> Tree {
    tree(&self::leaves(leaves))
}

/// The tree over the pieces of all ranks, in their slots.
pub(super) fn tree_of_ranks(gathered: &Gathered) -> Tree {
    let (pieces, slots): (Vec<_>, Vec<_>) = gathered.pieces().unzip();
    let all = tree(&pieces);
    let present = slots.into_iter().fold(0, |all, slot| all | 1 << slot);
    Tree { present, perfect: if present == all.present { all.perfect } else { 0 }, ..all }
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

/// The format of a matrix, as kernels read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Bf16,
    /// e4m3 with a scale for each row of a shard.
    Fp8,
}

impl Packing {
    pub(super) fn of(quantize: Option<Quantize>) -> Result<Self, ModelError> {
        match quantize {
            None => Ok(Self::Bf16),
            Some(Quantize::Fp8) => Ok(Self::Fp8),
            Some(quantize) => Err(ModelError::GpuQuantize { quantize }),
        }
    }

    /// Bytes of a tile of 16 rows over so many pairs of k-tiles.
    pub(super) fn tile_bytes(self, pairs: usize) -> usize {
        match self {
            Self::Bf16 => pairs * TILE_PAIR_BYTES,
            Self::Fp8 => pairs * TILE_PAIR_BYTES / 2 + TILE_ROWS * size_of::<f32>(),
        }
    }

    /// Puts row `r` of a tile's 16, in runs from some input on, where a warp's lanes find it. `tile` holds all inputs.
    pub(super) fn put_row<'a>(
        self,
        tile: &mut [u8],
        r: usize,
        runs: &(impl Iterator<Item = (usize, &'a [bf16])> + Clone),
    ) {
        let numbers = || runs.clone().flat_map(|(start, run)| (start..).zip(run));
        match self {
            Self::Bf16 => {
                for (k, value) in numbers() {
                    let (lane, word) = place(r, k);
                    let at = k / 16 * (TILE_PAIR_BYTES / 2) + lane * 16 + word * 4 + k % 2 * 2;
                    tile[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
            Self::Fp8 => {
                let largest = numbers().map(|(_, value)| value.to_f32().abs()).fold(0.0, f32::max);
                let scale = if largest > 0.0 { largest / E4M3_MAX } else { 1.0 };
                let scales = tile.len() - TILE_ROWS * size_of::<f32>();
                tile[scales + r * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                for (k, value) in numbers() {
                    // Bytes 1 and 3 of a word are its first pair, 0 and 2 its second.
                    let (lane, word) = place(r, k);
                    let byte = (1 - word % 2) + k % 2 * 2;
                    let at = k / PAIR * (TILE_PAIR_BYTES / 2)
                        + lane * 16
                        + k % PAIR / 16 * 8
                        + word / 2 * 4
                        + byte;
                    tile[at] = e4m3(value.to_f32() / scale);
                }
            }
        }
    }
}

/// How keys and values stand in memory, as kernels write and read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvPacking {
    Bf16,
    /// e4m3 with a power of two for each 16 numbers of a key or value (`cuda/kv.cuh`).
    Fp8,
}

impl KvPacking {
    pub(crate) fn of(dtype: KvDtype) -> Result<Self, ModelError> {
        match dtype {
            KvDtype::Bf16 => Ok(Self::Bf16),
            KvDtype::Fp8 => Ok(Self::Fp8),
            dtype => Err(ModelError::KvDtype { device: "GPU", ways: "bf16 or fp8", dtype }),
        }
    }

    /// Bytes of one layer and KV head in a block, whose heads are so wide.
    pub(super) fn head_bytes(self, dim: usize) -> usize {
        let numbers = 2 * KV_BLOCK_TOKENS * dim;
        match self {
            Self::Bf16 => numbers * size_of::<bf16>(),
            Self::Fp8 => numbers + numbers / SHARING,
        }
    }
}

/// Numbers of a key or value that share a scale.
const SHARING: usize = 16;

/// The lane that has input k of row r, and which of its four words of a k-tile holds it.
fn place(r: usize, k: usize) -> (usize, usize) {
    (r % 8 * 4 + k % 8 / 2, r / 8 + k % 16 / 8 * 2)
}

/// The largest number of e4m3.
const E4M3_MAX: f32 = 448.0;

/// The nearest number of e4m3 (arXiv 2209.05433: sign, four bits of exponent with a bias of 7, three of mantissa), of two as
/// near the even one; what is larger than all is the largest.
fn e4m3(x: f32) -> u8 {
    /// The least that is no subnormal number.
    const LEAST: f32 = 0.015625;
    /// From here on a step of an f32 is one of the subnormal numbers.
    const ALIKE: f32 = 16384.0;
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let magnitude = x.abs().min(E4M3_MAX);
    let bits = magnitude.to_bits();
    let steps = if magnitude < LEAST {
        (magnitude + ALIKE).to_bits() - ALIKE.to_bits()
    } else {
        // What is rounded up beyond a binade is the next one's first number.
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - 120 * 8
    };
    sign | steps as u8
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
    fn a_power_of_two_is_summed_at_once_where_it_fills_the_first_slots() {
        for (leaves, perfect) in [(1, 1), (2, 2), (3, 0), (4, 4), (6, 0), (8, 8), (16, 0)] {
            assert_eq!(tree_of(leaves).perfect, perfect, "{leaves} leaves");
        }
        assert_eq!(tree(&[0..2, 2..4, 4..6, 6..8]).perfect, 4);
        assert_eq!(tree(&[0..4, 4..5, 5..6, 6..8]).perfect, 0, "pieces of different sizes");
    }

    #[test]
    fn every_number_of_a_tile_has_a_place_of_its_own() {
        for (packing, number) in [(Packing::Bf16, &[0x80, 0x3f][..]), (Packing::Fp8, &[0x7e])] {
            let mut tile = vec![0; packing.tile_bytes(2)];
            for r in 0..TILE_ROWS {
                let runs = [(32, &[bf16::ONE; 20][..]), (52, &[bf16::ONE; 12])];
                packing.put_row(&mut tile, r, &runs.into_iter());
            }
            let (numbers, _) = tile.split_at(2 * TILE_ROWS * PAIR * number.len());
            let (first, second) = numbers.split_at(numbers.len() / 2);
            assert!(first.iter().all(|byte| *byte == 0));
            assert!(second.chunks(number.len()).all(|found| found == number), "{packing:?}");
        }
    }

    /// What the bits stand for.
    fn value(bits: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
        let magnitude = if exponent == 0 {
            mantissa * 2f32.powi(-9)
        } else {
            (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
        };
        if bits >> 7 == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn numbers_become_the_nearest_of_e4m3() {
        for bits in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!(e4m3(value(bits)), bits, "{}", value(bits));
        }
        for (low, high) in (0..0x7e).map(|bits| (bits, bits + 1)) {
            let (a, b) = (value(low), value(high));
            let even = if low % 2 == 0 { low } else { high };
            assert_eq!(e4m3((a + b) / 2.0), even, "between {a} and {b}");
            assert_eq!(e4m3(a + (b - a) * 0.49), low);
            assert_eq!(e4m3(-(a + (b - a) * 0.51)), high | 0x80);
        }
        assert_eq!((e4m3(1e9), e4m3(-460.0), e4m3(0.0)), (0x7e, 0xfe, 0));
    }
}

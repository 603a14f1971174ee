//! The fixed shape in which values of the virtual shards are summed.
//!
//! The S leaves pair up level by level: neighbours are added, left + right, and an odd one at the end is carried
//! up unchanged. A **node** is what stands at one place of one level; it covers consecutive leaves. Seen from
//! above, a node over more than one leaf splits after the largest power of two below its leaf count, and that
//! rule is all that the functions here need. Sharing one tree between the product inside a rank and the sum
//! across ranks is the idea of TBIK (arXiv 2511.17826).

use std::ops::Range;

/// Elements that are summed at a time, so that every intermediate value stays in the first-level cache.
const BLOCK_ELEMS: usize = 1024;

/// The maximal nodes of the tree over `leaves` leaves that lie inside `range`, in leaf order. They cover `range`
/// exactly: these are the partial sums that a rank which hosts the leaves `range` can and may form alone. One
/// piece if `range` is a node, as it is when S/N is a power of two.
///
/// # Panics
/// If `range` is empty or ends beyond `leaves`.
pub fn pieces(leaves: usize, range: Range<usize>) -> Vec<Range<usize>> {
    assert!(range.start < range.end && range.end <= leaves, "leaves {range:?} of {leaves}");
    let mut found = Vec::new();
    collect(0..leaves, &range, &mut found);
    found
}

fn collect(node: Range<usize>, range: &Range<usize>, found: &mut Vec<Range<usize>>) {
    if node.end <= range.start || range.end <= node.start {
        return;
    }
    if range.start <= node.start && node.end <= range.end {
        found.push(node);
        return;
    }
    let middle = middle(&node);
    collect(node.start..middle, range, found);
    collect(middle..node.end, range, found);
}

/// Where the right child of a node over two or more leaves begins.
fn middle(node: &Range<usize>) -> usize {
    node.start + (node.len().next_power_of_two() >> 1)
}

/// Sums nodes into the node that they make up: `pieces` are nodes in leaf order, together exactly one node (the
/// root, or a piece of one rank); `source(i)` holds the values of `pieces[i]`, as many as `out`. Element by
/// element the additions are those of the tree, whatever the pieces.
///
/// # Panics
/// If the pieces do not make up one node, or a source is shorter than `out`.
pub fn sum_into<'a>(pieces: &[Range<usize>], source: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
        panic!("a sum of no pieces");
    };
    let node = first.start..last.end;
    for (index, block) in out.chunks_mut(BLOCK_ELEMS).enumerate() {
        let start = index * BLOCK_ELEMS;
        let end = start + block.len();
        sum_node(node.clone(), pieces, &|piece| &source(piece)[start..end], block);
    }
}

/// `out` = the value of `node`, a block at most.
fn sum_node<'a>(
    node: Range<usize>,
    pieces: &[Range<usize>],
    source: &impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
) {
    if let Some(values) = piece_of(&node, pieces, source) {
        out.copy_from_slice(values);
        return;
    }
    assert!(node.len() > 1, "leaf {} is in no piece of {pieces:?}", node.start);
    let middle = middle(&node);
    let (left, right) = (node.start..middle, middle..node.end);
    match (piece_of(&left, pieces, source), piece_of(&right, pieces, source)) {
        (Some(left), Some(right)) => {
            for ((sum, left), right) in out.iter_mut().zip(left).zip(right) {
                *sum = left + right;
            }
        }
        (None, Some(right)) => {
            sum_node(left, pieces, source, out);
            add(out, right);
        }
        (_, None) => {
            let mut right_sum = [0.0; BLOCK_ELEMS];
            let right_sum = &mut right_sum[..out.len()];
            sum_node(left, pieces, source, out);
            sum_node(right, pieces, source, right_sum);
            add(out, right_sum);
        }
    }
}

fn piece_of<'a>(
    node: &Range<usize>,
    pieces: &[Range<usize>],
    source: &impl Fn(usize) -> &'a [f32],
) -> Option<&'a [f32]> {
    pieces.iter().position(|piece| piece == node).map(source)
}

fn add(sum: &mut [f32], right: &[f32]) {
    for (sum, right) in sum.iter_mut().zip(right) {
        *sum += right;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAVES_MAX: usize = 16;

    /// The definition, level by level.
    fn by_levels(mut level: Vec<f32>) -> f32 {
        while level.len() > 1 {
            level = level.chunks(2).map(|pair| pair.iter().copied().reduce(|a, b| a + b).unwrap()).collect();
        }
        level[0]
    }

    /// The sum as N ranks with S/N leaves each compute it: each its pieces, then all of them.
    fn by_ranks(values: &[Vec<f32>], ranks: usize) -> Vec<f32> {
        let leaves = values.len();
        let len = values[0].len();
        let mut all_pieces = Vec::new();
        let mut partials = Vec::new();
        for rank in 0..ranks {
            let own = rank * leaves / ranks..(rank + 1) * leaves / ranks;
            for piece in pieces(leaves, own) {
                let singles: Vec<_> = piece.clone().map(|leaf| leaf..leaf + 1).collect();
                let mut sum = vec![0.0; len];
                sum_into(&singles, |leaf| &values[piece.start + leaf], &mut sum);
                partials.push(sum);
                all_pieces.push(piece);
            }
        }
        let mut out = vec![0.0; len];
        sum_into(&all_pieces, |piece| &partials[piece], &mut out);
        out
    }

    proptest! {
        #[test]
        fn the_sum_is_the_same_for_any_number_of_ranks(
            leaves in 1..=LEAVES_MAX,
            len in prop_oneof![1usize..20, BLOCK_ELEMS - 1..BLOCK_ELEMS + 2, Just(2 * BLOCK_ELEMS + 3)],
            seed in any::<u32>(),
        ) {
            let values: Vec<Vec<f32>> = (0..leaves)
                .map(|leaf| (0..len).map(|index| value(seed, leaf, index)).collect())
                .collect();
            let expected: Vec<u32> = (0..len)
                .map(|index| by_levels(values.iter().map(|leaf| leaf[index]).collect()).to_bits())
                .collect();
            // Every cut into consecutive parts, even or not.
            for ranks in 1..=leaves {
                let sum: Vec<u32> = by_ranks(&values, ranks).into_iter().map(f32::to_bits).collect();
                prop_assert_eq!(&sum, &expected, "{} ranks", ranks);
            }
        }
    }

    /// Magnitudes so different that the order of additions shows.
    fn value(seed: u32, leaf: usize, index: usize) -> f32 {
        let mixed = (seed ^ ((leaf * LEAVES_MAX + 1) * (index + 17)) as u32).wrapping_mul(2_654_435_761);
        (f32::from((mixed >> 16) as u16) - 32_768.0) * 2f32.powi((mixed % 40) as i32 - 20)
    }

    #[test]
    fn pieces_of_well_known_cuts() {
        for (leaves, range, expected) in [
            (8, 4..8, &[(4, 8)][..]),
            (3, 0..3, &[(0, 3)]),
            (7, 4..7, &[(4, 7)]),
            (12, 0..3, &[(0, 2), (2, 3)]),
            (12, 3..6, &[(3, 4), (4, 6)]),
            (6, 2..6, &[(2, 4), (4, 6)]),
            (5, 1..5, &[(1, 2), (2, 4), (4, 5)]),
        ] {
            let found: Vec<_> = pieces(leaves, range).iter().map(|piece| (piece.start, piece.end)).collect();
            assert_eq!(found, expected);
        }
    }
}

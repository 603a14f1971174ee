//! Byte-pair encoding (Sennrich et al. 2016): of all neighbours that a vocabulary can join, the pair of the best rank
//! is joined first, of equal ones the leftmost, until no two can be joined.
//!
//! Long words are merged a window at a time. That is exact, because whether a border between two pieces stays depends
//! on these two alone: up to the first merge across any border, each merge in the two pieces is the one that would
//! come if they stood alone. So pieces whose borders each stay between their two neighbours are what the whole word
//! becomes; and neighbours within one window have such a border already. A cut between windows is checked by the
//! piece that follows it in both; where that differs, the windows are merged anew as one.
//!
//! Time is near-linear for the vocabularies of language models, in which a piece is short and so is what it depends on.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

const NONE: u32 = u32::MAX;
/// Symbols that are merged at once: few enough for the nearest cache.
const WINDOW_SYMBOLS: usize = 512;
/// What a window's last symbols become is left to the next window, which knows how they go on: a fraction of it.
const MARGIN_DIVISOR: usize = 8;

/// What a vocabulary can join. Symbols are numbers: tokens, and characters that are none.
pub(crate) struct Merges {
    /// For two neighbours the rank of joining them, and what they become.
    pairs: HashMap<u64, (u32, u32), BuildHasherDefault<PairHasher>>,
    window: usize,
}

/// Memory of merging, kept from one word to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    nodes: Vec<Node>,
    /// Possible merges, each its rank and its place in one number.
    heap: BinaryHeap<Reverse<u64>>,
    cuts: Vec<Cut>,
    /// Symbols in all windows so far.
    #[cfg(test)]
    work: usize,
}

/// A symbol in its chain, and what it could become with the next one.
#[derive(Clone, Copy)]
struct Node {
    id: u32,
    prev: u32,
    next: u32,
    rank: u32,
    joined: u32,
}

/// The border behind a window's pieces that were taken.
struct Cut {
    /// Where the window began, in the word and in what was written.
    from: usize,
    written: usize,
    /// Symbols in that window.
    size: usize,
    /// The piece behind the border: itself and its symbols.
    follower: (u32, u32),
}

impl Merges {
    /// `merges`: left, right, rank, result.
    pub(crate) fn new(merges: impl Iterator<Item = (u32, u32, u32, u32)>) -> Self {
        let pairs = merges.map(|(left, right, rank, joined)| (pair(left, right), (rank, joined)));
        Self { pairs: pairs.collect(), window: WINDOW_SYMBOLS }
    }

    /// Appends what `symbols` become.
    pub(crate) fn merge(&self, symbols: &[u32], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let (mut from, mut size) = (0, self.window);
        scratch.cuts.clear();
        while let Some(rest) = symbols.get(from..).filter(|rest| !rest.is_empty()) {
            let window = &rest[..size.min(rest.len())];
            self.merge_window(window, scratch);
            let nodes = &scratch.nodes;
            if let Some(cut) = scratch.cuts.pop_if(|cut| cut.follower != piece(nodes, 0)) {
                // More than either, so that this ends, however little of a window was taken.
                size = 2 * cut.size.max(from - cut.from + size);
                from = cut.from;
                out.truncate(cut.written);
                continue;
            }
            let (written, whole) = (out.len(), window.len() == rest.len());
            let taken = if whole { window.len() } else { window.len() - window.len() / MARGIN_DIVISOR };
            let mut at = 0;
            while let Some(node) = nodes.get(at as usize).filter(|node| whole || node.next as usize <= taken)
            {
                out.push(node.id);
                at = node.next;
            }
            if whole {
                return;
            }
            if at == 0 {
                size *= 2;
                continue;
            }
            scratch.cuts.push(Cut { from, written, size, follower: piece(nodes, at) });
            from += at as usize;
            size = self.window;
        }
    }

    /// Leaves in `scratch` what a window's symbols become, as a chain from the first node on.
    fn merge_window(&self, window: &[u32], scratch: &mut Scratch) {
        let Scratch { nodes, heap, .. } = scratch;
        #[cfg(test)]
        (scratch.work += window.len());
        nodes.clear();
        nodes.extend(window.iter().zip(0u32..).map(|(&id, at)| Node {
            id,
            prev: at.wrapping_sub(1),
            next: at + 1,
            rank: NONE,
            joined: NONE,
        }));
        for at in 0..index(nodes.len()) {
            self.propose(nodes, at, heap);
        }
        while let Some(Reverse(merge)) = heap.pop() {
            let (rank, at) = ((merge >> 32) as u32, merge as u32);
            let node = nodes[at as usize];
            // Stale: what stood here, or what followed, has since become part of something longer.
            if node.rank != rank {
                continue;
            }
            let right = &mut nodes[node.next as usize];
            right.rank = NONE;
            let next = right.next;
            (nodes[at as usize].id, nodes[at as usize].next) = (node.joined, next);
            if let Some(next) = nodes.get_mut(next as usize) {
                next.prev = at;
            }
            self.propose(nodes, at, heap);
            self.propose(nodes, node.prev, heap);
        }
    }

    /// Looks up what the symbol at `at` can become with the next one.
    fn propose(&self, nodes: &mut [Node], at: u32, heap: &mut BinaryHeap<Reverse<u64>>) {
        let Some(&node) = nodes.get(at as usize) else { return };
        let next = nodes.get(node.next as usize);
        let found = next.and_then(|next| self.pairs.get(&pair(node.id, next.id)));
        let &(rank, joined) = found.unwrap_or(&(NONE, NONE));
        (nodes[at as usize].rank, nodes[at as usize].joined) = (rank, joined);
        if rank != NONE {
            heap.push(Reverse(pair(rank, at)));
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// What stands at `at`, and of how many symbols.
fn piece(nodes: &[Node], at: u32) -> (u32, u32) {
    nodes.get(at as usize).map_or((NONE, 0), |node| (node.id, node.next - at))
}

/// Symbols are fewer than the bytes of a text, which the tokenizer limits.
fn index(n: usize) -> u32 {
    u32::try_from(n).expect("a text is limited to 32-bit offsets")
}

/// A hasher of one 64-bit number (a folded multiplication): keys come from the model's file, not from a client.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, key: u64) {
        let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * u128::from(0xa076_1d64_78bd_642f_u64);
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By definition: the pair of the best rank, of equal ones the leftmost, again and again.
    fn plain(merges: &Merges, symbols: &[u32]) -> Vec<u32> {
        let mut symbols = symbols.to_vec();
        loop {
            let places = symbols.windows(2).zip(0..);
            let found = places.filter_map(|(two, at)| Some((merges.pairs.get(&pair(two[0], two[1]))?, at)));
            let Some((&(_, joined), at)) = found.min_by_key(|((rank, _), at)| (*rank, *at)) else {
                return symbols;
            };
            symbols.splice(at..at + 2, [joined]);
        }
    }

    proptest! {
        /// Any rules at all, such that a cut may matter from afar.
        #[test]
        fn windows_change_nothing(
            rules in prop::collection::vec((0..6u32, 0..6u32, 0..8u32, 2..9u32), 0..12),
            symbols in prop::collection::vec(0..3u32, 0..200),
            times in 1usize..4,
            window in 2usize..24,
        ) {
            let merges = Merges { window, ..Merges::new(rules.into_iter()) };
            let (symbols, mut scratch, mut out) = (symbols.repeat(times), Scratch::default(), vec![7]);
            merges.merge(&symbols, &mut scratch, &mut out);
            prop_assert_eq!(&out[1..], plain(&merges, &symbols));
        }
    }

    /// A long piece leaves little of a window to be taken before it.
    #[test]
    fn a_piece_longer_than_a_window_is_merged() {
        let rules = (1..60).map(|n| (n, 1, n, n + 1));
        for window in 2..70 {
            let merges = Merges { window, ..Merges::new(rules.clone().chain([(0, 1, 0, 1), (1, 0, 70, 1)])) };
            let symbols = [vec![0, 0], vec![1; 200], vec![0], vec![1; 99]].concat();
            let (mut scratch, mut out) = (Scratch::default(), Vec::new());
            merges.merge(&symbols, &mut scratch, &mut out);
            assert_eq!(out, plain(&merges, &symbols), "{window}");
        }
    }

    /// One symbol, and pieces of 2, 3, 4 … of it: nothing in a word tells one place from another.
    #[test]
    fn work_grows_with_the_word() {
        for longest in [2, 16, 100] {
            let rules =
                (1..longest).map(|n| (n, 1, n, n + 1)).chain((1..longest / 2).map(|n| (n, n, n, 2 * n)));
            let merges = Merges::new(rules);
            let work = |symbols: usize| {
                let (mut scratch, mut out) = (Scratch::default(), Vec::new());
                merges.merge(&vec![1; symbols], &mut scratch, &mut out);
                assert_eq!(out.iter().sum::<u32>() as usize, symbols);
                scratch.work
            };
            assert!(work(1 << 18) < 2 << 18, "{longest}: {}", work(1 << 18));
        }
    }
}

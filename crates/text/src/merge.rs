//! Byte-pair encoding (Sennrich et al. 2016): of all neighbours that a vocabulary can join, the pair of the best rank
//! is joined first, of equal ones the leftmost, until no two can be joined. Takes near-linear time for any input.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

const NONE: u32 = u32::MAX;
/// Up to here a heap stays in the nearest cache, and needs no place for each rank.
const HEAP_SYMBOLS_MAX: usize = 1024;

/// What a vocabulary can join. Symbols are numbers: tokens, and characters that are none.
pub(crate) struct Merges {
    /// For two neighbours the rank of joining them, and what they become.
    pairs: HashMap<u64, (u32, u32), BuildHasherDefault<PairHasher>>,
    /// First symbols that stand side by side in something longer; no merge crosses any other border.
    neighbours: HashSet<u64, BuildHasherDefault<PairHasher>>,
    ranks: usize,
    /// Two pieces share a rank.
    ties: bool,
}

/// Memory of merging, kept from one word to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    nodes: Vec<Node>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
    buckets: Buckets,
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

impl Merges {
    /// `merges`: left, right, rank below `ranks`, result. `edges`: the first and the last of the symbols that a symbol
    /// is made of. `ties`: whether different results share a rank.
    pub(crate) fn new(
        merges: impl Iterator<Item = (u32, u32, u32, u32)>,
        ranks: usize,
        ties: bool,
        edges: impl Fn(u32) -> (u32, u32),
    ) -> Self {
        let (mut pairs, mut neighbours) = (HashMap::default(), HashSet::default());
        for (left, right, rank, joined) in merges {
            pairs.insert(pair(left, right), (rank, joined));
            neighbours.insert(pair(edges(left).1, edges(right).0));
        }
        Self { pairs, neighbours, ranks, ties }
    }

    /// Appends what `symbols` become.
    pub(crate) fn merge(&self, mut symbols: &[u32], scratch: &mut Scratch, out: &mut Vec<u32>) {
        while !symbols.is_empty() {
            let border = symbols.windows(2).position(|two| !self.neighbours.contains(&pair(two[0], two[1])));
            let (word, rest) = symbols.split_at(border.map_or(symbols.len(), |at| at + 1));
            match word {
                [alone] => out.push(*alone),
                word if self.ties || word.len() <= HEAP_SYMBOLS_MAX => {
                    let Scratch { nodes, heap, .. } = scratch;
                    self.merge_word(word, nodes, heap, out);
                }
                word => {
                    let Scratch { nodes, buckets, .. } = scratch;
                    buckets.make_room(self.ranks);
                    self.merge_word(word, nodes, buckets, out);
                }
            }
            symbols = rest;
        }
    }

    fn merge_word(&self, word: &[u32], nodes: &mut Vec<Node>, queue: &mut impl Queue, out: &mut Vec<u32>) {
        nodes.clear();
        nodes.extend(word.iter().zip(0u32..).map(|(&id, at)| Node {
            id,
            prev: at.wrapping_sub(1),
            next: at + 1,
            rank: NONE,
            joined: NONE,
        }));
        if let Some(last) = nodes.last_mut() {
            last.next = NONE;
        }
        for at in 0..index(nodes.len()) {
            self.propose(nodes, at, queue);
        }
        while let Some((rank, at)) = queue.pop() {
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
            self.propose(nodes, at, queue);
            self.propose(nodes, node.prev, queue);
        }
        let mut at = 0;
        while let Some(node) = nodes.get(at as usize) {
            out.push(node.id);
            at = node.next;
        }
    }

    /// Looks up what the symbol at `at` can become with the next one.
    fn propose(&self, nodes: &mut [Node], at: u32, queue: &mut impl Queue) {
        let Some(&node) = nodes.get(at as usize) else { return };
        let next = nodes.get(node.next as usize);
        let found = next.and_then(|next| self.pairs.get(&pair(node.id, next.id)));
        let &(rank, joined) = found.unwrap_or(&(NONE, NONE));
        (nodes[at as usize].rank, nodes[at as usize].joined) = (rank, joined);
        if rank != NONE {
            queue.push(rank, at);
        }
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Symbols are fewer than the bytes of a text, which the tokenizer limits.
fn index(n: usize) -> u32 {
    u32::try_from(n).expect("a text is limited to 32-bit offsets")
}

/// Possible merges, by rank and place.
trait Queue {
    fn push(&mut self, rank: u32, at: u32);
    /// The best rank, and its leftmost place.
    fn pop(&mut self) -> Option<(u32, u32)>;
}

impl Queue for BinaryHeap<Reverse<(u32, u32)>> {
    fn push(&mut self, rank: u32, at: u32) {
        self.push(Reverse((rank, at)));
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        self.pop().map(|Reverse(merge)| merge)
    }
}

/// A list of places for each rank.
///
/// Once the merges of a rank have begun, no place comes to it any more: what they make is longer than the rank's
/// piece, and all that follows from it is longer still. So each list is sorted once.
#[derive(Default)]
struct Buckets {
    lists: Vec<List>,
    /// Bit i of level 0 stands for list i, bit i of the next level for word i of this one, up to a single word.
    levels: Vec<Vec<u64>>,
}

#[derive(Default)]
struct List {
    places: Vec<u32>,
    /// The leftmost place is the last.
    sorted: bool,
}

impl Buckets {
    fn make_room(&mut self, ranks: usize) {
        if self.lists.len() >= ranks {
            return;
        }
        self.lists.resize_with(ranks, List::default);
        let mut bits = ranks;
        self.levels.clear();
        while self.levels.last().is_none_or(|level| level.len() > 1) {
            bits = bits.div_ceil(64);
            self.levels.push(vec![0; bits]);
        }
    }
}

impl Queue for Buckets {
    fn push(&mut self, rank: u32, at: u32) {
        let list = &mut self.lists[rank as usize];
        list.places.push(at);
        list.sorted = false;
        let mut bit = rank as usize;
        for level in &mut self.levels {
            level[bit / 64] |= 1 << (bit % 64);
            bit /= 64;
        }
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        let mut best = 0;
        for level in self.levels.iter().rev() {
            let word = level[best];
            if word == 0 {
                return None;
            }
            best = best * 64 + word.trailing_zeros() as usize;
        }
        let list = &mut self.lists[best];
        if !list.sorted {
            list.places.sort_unstable_by_key(|&at| Reverse(at));
            list.sorted = true;
        }
        let at = list.places.pop()?;
        if list.places.is_empty() {
            let mut bit = best;
            for level in &mut self.levels {
                level[bit / 64] &= !(1 << (bit % 64));
                if level[bit / 64] != 0 {
                    break;
                }
                bit /= 64;
            }
        }
        Some((index(best), at))
    }
}

/// A hasher of one 64-bit number (the finalizer of MurmurHash3): keys come from the model's file, not from a client.
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
        let mut hash = key;
        hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        self.0 = hash ^ hash >> 33;
    }
}

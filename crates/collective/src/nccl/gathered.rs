use std::ops::Range;

use crate::nccl::{Exchange, Transfer};
use crate::tree;

/// Where the partial sums of all ranks lie in one buffer, `[N][pieces_max][len]` f32, so that one kernel can add them
/// up in the tree's order. Rank r brings its [pieces](tree::pieces) in leaf order; if these are fewer than the most, the
/// rest of its place is never read. A **slot** is one `[len]` of the buffer, counted from its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gathered {
    pieces: Vec<Range<usize>>,
    pieces_of: Vec<Range<usize>>,
    pieces_max: usize,
}

const FLOAT_BYTES: usize = size_of::<f32>();

impl Gathered {
    /// For ranks that host these leaves, in order.
    pub fn new(parts: &[Range<usize>]) -> Self {
        let leaves = parts.last().map_or(0, |part| part.end);
        let (mut pieces, mut pieces_of) = (Vec::new(), Vec::with_capacity(parts.len()));
        for part in parts {
            let first = pieces.len();
            pieces.extend(tree::pieces(leaves, part.clone()));
            pieces_of.push(first..pieces.len());
        }
        let pieces_max = pieces_of.iter().map(ExactSizeIterator::len).max().unwrap_or(1);
        Self { pieces, pieces_of, pieces_max }
    }

    /// N.
    pub fn world_size(&self) -> usize {
        self.pieces_of.len()
    }

    /// The pieces of all ranks in leaf order, and the slot of each: their sum is what [`tree::sum_into`] makes of them.
    /// The rest of a sum over S leaves has been made inside the ranks.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let slots = self.pieces_of.iter().enumerate().flat_map(|(rank, pieces)| {
            let first = rank * self.pieces_max;
            first..first + pieces.len()
        });
        self.pieces.iter().cloned().zip(slots)
    }

    /// The pieces of `rank`.
    pub fn of_rank(&self, rank: usize) -> &[Range<usize>] {
        &self.pieces[self.pieces_of[rank].clone()]
    }

    /// Pieces for which each rank has room: an all-gather moves `pieces_max · len` numbers of each.
    pub fn pieces_max(&self) -> usize {
        self.pieces_max
    }

    /// Slots of the whole buffer.
    pub fn slots(&self) -> usize {
        self.pieces_of.len() * self.pieces_max
    }

    /// The numbers out of `len` that `rank` sums for all, where every rank sums a slice.
    pub fn slice(&self, rank: usize, len: usize) -> Range<usize> {
        let world_size = self.pieces_of.len();
        len * rank / world_size..len * (rank + 1) / world_size
    }

    /// Brings the pieces of all ranks' [slice](Self::slice) `rank` to `rank`, from `partials`, `[pieces][len]` at each
    /// rank, to `gathered`, whose slots are as long as the slice. Of a long message that is an N-th of what an
    /// all-gather brings.
    pub fn scatter(&self, rank: usize, len: usize, partials: u64, gathered: u64) -> Exchange {
        let mut exchange = Exchange::default();
        let own = self.slice(rank, len);
        for (peer, pieces) in self.pieces_of.iter().enumerate() {
            let slice = self.slice(peer, len);
            for index in 0..self.pieces_of[rank].len() {
                exchange.sends.extend(transfer(peer, partials, index * len + slice.start, slice.len()));
            }
            for index in 0..pieces.len() {
                let slot = peer * self.pieces_max + index;
                exchange.receives.extend(transfer(peer, gathered, slot * own.len(), own.len()));
            }
        }
        exchange
    }

    /// Brings the sums of all slices to `rank`, into `sums`, `[len]`, in which its own slice stands already.
    pub fn collect(&self, rank: usize, len: usize, sums: u64) -> Exchange {
        let mut exchange = Exchange::default();
        let own = self.slice(rank, len);
        for peer in (0..self.pieces_of.len()).filter(|peer| *peer != rank) {
            let slice = self.slice(peer, len);
            exchange.sends.extend(transfer(peer, sums, own.start, own.len()));
            exchange.receives.extend(transfer(peer, sums, slice.start, slice.len()));
        }
        exchange
    }
}

/// `len` numbers from number `start` of a buffer; no message at all if there are none.
fn transfer(peer: usize, buffer: u64, start: usize, len: usize) -> Option<Transfer> {
    let address = buffer + (start * FLOAT_BYTES) as u64;
    (len > 0).then_some(Transfer { peer, address, bytes: len * FLOAT_BYTES })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Memory of one rank, from address 0.
    type Memory = Vec<f32>;

    /// What [`super::super::Communicator::exchange`] does to the memories of all ranks.
    fn exchange(memories: &mut [Memory], exchanges: &[Exchange]) {
        let ranks = memories.len();
        let mut under_way = vec![VecDeque::new(); ranks * ranks];
        let range = |transfer: &Transfer| {
            let start = transfer.address as usize / FLOAT_BYTES;
            start..start + transfer.bytes / FLOAT_BYTES
        };
        for (rank, exchange) in exchanges.iter().enumerate() {
            for send in &exchange.sends {
                under_way[rank * ranks + send.peer].push_back(memories[rank][range(send)].to_vec());
            }
        }
        for (rank, exchange) in exchanges.iter().enumerate() {
            for receive in &exchange.receives {
                let sent = under_way[receive.peer * ranks + rank].pop_front().unwrap();
                memories[rank][range(receive)].copy_from_slice(&sent);
            }
        }
        assert!(under_way.iter().all(VecDeque::is_empty), "something was sent that nobody receives");
    }

    /// The kernel: adds up slots of `len` numbers.
    fn add_up(gathered: &Gathered, buffer: &[f32], len: usize) -> Vec<f32> {
        let (pieces, slots): (Vec<_>, Vec<_>) = gathered.pieces().unzip();
        let mut sum = vec![0.0; len];
        tree::sum_into(&pieces, |piece| &buffer[slots[piece] * len..][..len], &mut sum);
        sum
    }

    /// Magnitudes so different that the order of additions shows.
    fn value(seed: u32, piece: usize, index: usize) -> f32 {
        let mixed = (seed ^ ((piece * 16 + 1) * (index + 17)) as u32).wrapping_mul(2_654_435_761);
        (f32::from((mixed >> 16) as u16) - 32_768.0) * 2f32.powi((mixed % 40) as i32 - 20)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    proptest! {
        #[test]
        fn gathered_pieces_add_up_to_the_trees_sum(
            leaves in 1usize..=16,
            cuts in any::<u16>(),
            len in 1usize..40,
            seed in any::<u32>(),
        ) {
            // Every cut into consecutive parts, even or not.
            let mut starts: Vec<usize> = (1..leaves).filter(|leaf| cuts >> leaf & 1 == 1).collect();
            starts.insert(0, 0);
            let ends = starts.iter().skip(1).copied().chain([leaves]);
            let ranges: Vec<_> = starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect();
            let gathered = Gathered::new(&ranges);
            let (pieces, pieces_of) = (gathered.pieces.clone(), gathered.pieces_of.clone());
            let values: Vec<Vec<f32>> = (0..pieces.len())
                .map(|piece| (0..len).map(|index| value(seed, piece, index)).collect())
                .collect();
            let mut expected = vec![0.0; len];
            tree::sum_into(&pieces, |piece| &values[piece], &mut expected);

            // Whole: an all-gather of all that there is room for. What is not filled would spoil the sum.
            let part = gathered.pieces_max() * len;
            let mut buffer = vec![f32::NAN; gathered.slots() * len];
            for (rank, pieces) in pieces_of.iter().enumerate() {
                buffer[rank * part..][..pieces.len() * len].copy_from_slice(&values[pieces.clone()].concat());
            }
            prop_assert_eq!(bits(&add_up(&gathered, &buffer, len)), bits(&expected));

            // By slices. A rank's memory: its partials, the gathered slices, the sums.
            let ranks = pieces_of.len();
            let partials_floats = part;
            let slice_floats = |rank| gathered.slice(rank, len).len();
            let slots_floats = gathered.slots() * len.div_ceil(ranks);
            let sums_at = partials_floats + slots_floats;
            let address = |floats: usize| (floats * FLOAT_BYTES) as u64;
            let mut memories: Vec<Memory> = pieces_of
                .iter()
                .map(|pieces| {
                    let mut memory = values[pieces.clone()].concat();
                    memory.resize(sums_at + len, f32::NAN);
                    memory
                })
                .collect();
            let scatters: Vec<_> =
                (0..ranks).map(|rank| gathered.scatter(rank, len, 0, address(partials_floats))).collect();
            exchange(&mut memories, &scatters);
            for (rank, memory) in memories.iter_mut().enumerate() {
                let slots = &memory[partials_floats..][..gathered.slots() * slice_floats(rank)];
                let sum = add_up(&gathered, slots, slice_floats(rank));
                memory[sums_at..][gathered.slice(rank, len)].copy_from_slice(&sum);
            }
            let collects: Vec<_> =
                (0..ranks).map(|rank| gathered.collect(rank, len, address(sums_at))).collect();
            exchange(&mut memories, &collects);
            for memory in &memories {
                prop_assert_eq!(bits(&memory[sums_at..]), bits(&expected));
            }
        }
    }

    #[test]
    fn slots_of_well_known_groups() {
        let slots = |gathered: &Gathered| gathered.pieces().map(|(_, slot)| slot).collect::<Vec<_>>();
        let even = Gathered::new(&[0..2, 2..4, 4..6, 6..8]);
        assert_eq!((even.pieces_max(), even.slots()), (1, 4));
        assert_eq!(slots(&even), [0, 1, 2, 3]);
        // Pieces 0..2 | 2..4 4..6 | 6..8.
        let uneven = Gathered::new(&[0..2, 2..6, 6..8]);
        assert_eq!((uneven.pieces_max(), uneven.slots()), (2, 6));
        assert_eq!(slots(&uneven), [0, 2, 3, 4]);
    }
}

//! A collective between threads of one process: everything lies in one place, and a barrier stands between.

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex};

use galerne_collective::{AbortHandle, Collective, CollectiveError, tree};

/// One rank's end.
pub(crate) struct Local {
    rank: usize,
    leaves: usize,
    table: Arc<Table>,
    abort: AbortHandle,
}

struct Table {
    values: Vec<Mutex<Vec<f32>>>,
    bytes: Mutex<Vec<u8>>,
    barrier: Barrier,
}

impl Local {
    /// The ends of all ranks.
    pub(crate) fn group(leaves: usize, world_size: usize) -> Vec<Self> {
        let table = Arc::new(Table {
            values: (0..world_size).map(|_| Mutex::default()).collect(),
            bytes: Mutex::default(),
            barrier: Barrier::new(world_size),
        });
        let of = |rank| Self { rank, leaves, table: Arc::clone(&table), abort: AbortHandle::new() };
        (0..world_size).map(of).collect()
    }

    /// Shows `mine` to all and gives all ranks' values to `read`.
    fn exchange(&self, mine: &[f32], read: impl FnOnce(&[Vec<f32>])) {
        *self.table.values[self.rank].lock().unwrap() = mine.to_vec();
        self.table.barrier.wait();
        let all: Vec<Vec<f32>> =
            self.table.values.iter().map(|values| values.lock().unwrap().clone()).collect();
        read(&all);
        self.table.barrier.wait();
    }
}

impl Collective for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.table.values.len()
    }

    fn all_reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        let (world_size, len) = (self.world_size(), out.len());
        let per_rank = self.leaves / world_size;
        let mut pieces: Vec<Range<usize>> = Vec::new();
        let mut places = Vec::new();
        for rank in 0..world_size {
            let own = tree::pieces(self.leaves, rank * per_rank..(rank + 1) * per_rank);
            places.extend((0..own.len()).map(|piece| (rank, piece * len)));
            pieces.extend(own);
        }
        self.exchange(partials, |all| {
            let source = |piece: usize| {
                let (rank, start): (usize, usize) = places[piece];
                &all[rank][start..start + len]
            };
            tree::sum_into(&pieces, source, out);
        });
        Ok(())
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        assert_eq!(mine.len(), counts[self.rank]);
        self.exchange(mine, |all| out.copy_from_slice(&all.concat()));
        Ok(())
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        assert_eq!(mine.len(), counts[self.rank]);
        let is_root = root == self.rank;
        self.exchange(mine, |all| {
            if is_root {
                out.copy_from_slice(&all.concat());
            }
        });
        Ok(())
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        if root == self.rank {
            *self.table.bytes.lock().unwrap() = data.to_vec();
        }
        self.table.barrier.wait();
        data.copy_from_slice(&self.table.bytes.lock().unwrap());
        self.table.barrier.wait();
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.table.barrier.wait();
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

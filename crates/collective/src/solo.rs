use std::ops::Range;

use crate::error::expect_length;
use crate::message::Operation;
use crate::{AbortHandle, Collective, CollectiveError, tree};

/// A group of one rank: the same tree, no peers.
#[derive(Debug)]
pub struct Solo {
    pieces: Vec<Range<usize>>,
    abort: AbortHandle,
}

impl Solo {
    /// A rank that hosts all `leaves` virtual shards. Its only piece is the tree's root.
    ///
    /// # Panics
    /// If `leaves` is 0.
    pub fn new(leaves: usize) -> Self {
        Self { pieces: tree::pieces(leaves, 0..leaves), abort: AbortHandle::new() }
    }

    fn root(&self, operation: Operation, root: usize) -> Result<(), CollectiveError> {
        if root != 0 {
            return Err(CollectiveError::Root { operation, root, world_size: 1 });
        }
        self.abort.check()
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.abort.check()?;
        expect_length(Operation::AllReduce, "partials", partials.len(), out.len())?;
        tree::sum_into(&self.pieces, |_| partials, out);
        Ok(())
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.gather(0, mine, counts, out)
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.root(Operation::Gather, root)?;
        expect_length(Operation::Gather, "counts", counts.len(), 1)?;
        expect_length(Operation::Gather, "mine", mine.len(), counts[0])?;
        expect_length(Operation::Gather, "out", out.len(), counts[0])?;
        out.copy_from_slice(mine);
        Ok(())
    }

    fn broadcast(&mut self, root: usize, _data: &mut [u8]) -> Result<(), CollectiveError> {
        self.root(Operation::Broadcast, root)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.abort.check()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

use crate::{AbortHandle, CollectiveError};

/// All ranks of one group, one epoch. Every rank makes the same calls in the same order; a call returns when
/// this rank's part is done.
///
/// After an error the collective is spent: every later call returns the same error, and the peers are told.
/// Meet again in a newer epoch.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// N, the number of ranks.
    fn world_size(&self) -> usize;

    /// Sums over all S leaves in the tree's shape. `partials` holds this rank's pieces ([`crate::tree::pieces`])
    /// one after another, `[pieces][len]`; `out` is `[len]` and equal to the last bit on every rank. `len` may
    /// differ from call to call and is the same on all ranks.
    fn all_reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError>;

    /// Gives every rank the concatenation of all ranks' values in rank order. Rank r brings `counts[r]` values
    /// in `mine`; `out` holds the sum of the counts. `counts` is the same on all ranks.
    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError>;

    /// As [`Collective::all_gather`], at `root` alone. The other ranks do not wait, and pass an empty `out`.
    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Gives every rank the bytes of `root`. `data` has the same length on all ranks. The root does not wait.
    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Ends this epoch from any thread.
    fn abort_handle(&self) -> AbortHandle;
}

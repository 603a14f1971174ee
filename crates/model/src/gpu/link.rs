//! How the pieces of a sum come from rank to rank.

use std::ops::Range;

use galerne_collective::Collective;
use galerne_collective::nccl::{Communicator, Gathered};
use galerne_types::Shards;

use super::device::{Address, Buffer, Device};
use super::inputs::{bytes_of, bytes_of_mut};
use super::kernels::{Tree, sum_slots};
use super::layout;
use crate::error::ModelError;

/// Up to so many numbers every rank gets all pieces and sums them; of more, each sums a part for all. Both add up in the
/// tree's order, so it is a matter of speed alone: an all-gather is one exchange and not two, and moves N times as much.
const GATHER_LEN_MAX: usize = 64 * 4096;

/// What a GPU's partial sums travel by.
pub enum Link {
    /// Through the processes' own collective: for one rank, and where there is no NCCL.
    Host,
    /// From GPU to GPU.
    Nccl(Communicator),
}

/// The ranks of a group as the sums see them.
pub(super) struct Ranks {
    rank: usize,
    gathered: Gathered,
    /// The tree over the pieces of all.
    all: Tree,
}

/// Where the numbers of a sum are: this rank's pieces `[pieces_max][len]`, those of all ranks behind each other, and the sum.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub(super) pieces: &'a Buffer,
    pub(super) gathered: &'a Buffer,
    pub(super) sum: &'a Buffer,
}

const FLOAT_BYTES: usize = size_of::<f32>();

impl Ranks {
    pub(super) fn new(shards: Shards, rank: usize) -> Self {
        let parts: Vec<_> = (0..shards.world_size()).map(|rank| shards.of_rank(rank)).collect();
        let gathered = Gathered::new(&parts);
        let all = layout::tree_of_ranks(&gathered);
        Self { rank, gathered, all }
    }

    pub(super) fn alone(&self) -> bool {
        self.gathered.world_size() == 1
    }

    /// Pieces for which each rank has room.
    pub(super) fn pieces_max(&self) -> usize {
        self.gathered.pieces_max()
    }

    /// Pieces for which there is room of all ranks.
    pub(super) fn slots(&self) -> usize {
        self.gathered.slots()
    }

    /// This rank's pieces, as ranges of its own shards.
    pub(super) fn own(&self) -> impl Iterator<Item = Range<usize>> {
        let pieces = self.gathered.of_rank(self.rank);
        let first = pieces[0].start;
        pieces.iter().map(move |piece| piece.start - first..piece.end - first)
    }
}

impl Link {
    /// Whether all that it does is put on the device's stream.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(self, Self::Nccl(_))
    }

    /// Sums `len` numbers over all ranks. The sum's leaves are where the answer says, in its tree.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost, [`ModelError::Device`].
    pub(super) fn sum<'a>(
        &mut self,
        device: &dyn Device,
        ranks: &Ranks,
        places: Places<'a>,
        len: usize,
        collective: &mut dyn Collective,
    ) -> Result<(&'a Buffer, Tree), ModelError> {
        let mine = ranks.pieces_max() * len;
        match self {
            Self::Host => {
                let (mut sent, mut all) = (vec![0.0f32; mine], vec![0.0f32; ranks.slots() * len]);
                places.pieces.download(bytes_of_mut(&mut sent))?;
                collective.all_gather(&sent, &vec![mine; ranks.gathered.world_size()], &mut all)?;
                places.gathered.upload(0, bytes_of(&all))?;
                Ok((places.gathered, ranks.all))
            }
            Self::Nccl(nccl) if len <= GATHER_LEN_MAX => {
                let (from, to) = (places.pieces.address(), places.gathered.address());
                // SAFETY: both are memory of the device until the stream is done, and the room is as long.
                unsafe { nccl.all_gather(from, to, mine * FLOAT_BYTES, device.stream())? };
                Ok((places.gathered, ranks.all))
            }
            Self::Nccl(nccl) => {
                sum_in_parts(nccl, device, ranks, places, len)?;
                Ok((places.sum, layout::tree_of(1)))
            }
        }
    }

    /// Waits until the device has done all that it was given.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the epoch ends meanwhile, or the wait takes too long.
    pub(super) fn wait(&self, device: &dyn Device) -> Result<(), ModelError> {
        match self {
            Self::Host => Ok(()), // whoever reads what was computed waits
            Self::Nccl(nccl) => nccl.wait("a step", || Ok(device.is_idle()?)),
        }
    }
}

/// Each rank sums a slice of all ranks' pieces, and gives it to all.
fn sum_in_parts(
    nccl: &mut Communicator,
    device: &dyn Device,
    Ranks { rank, gathered, all, .. }: &Ranks,
    places: Places<'_>,
    len: usize,
) -> Result<(), ModelError> {
    let [from, slots, sum] = [places.pieces, places.gathered, places.sum].map(Buffer::address);
    let own = gathered.slice(*rank, len);
    // SAFETY: buffers that hold `len` numbers a piece, and nobody else's until the stream is done.
    unsafe {
        nccl.exchange(&gathered.scatter(*rank, len, from, slots), device.stream())?;
        let at = sum + (own.start * FLOAT_BYTES) as Address;
        sum_slots(device, [slots, at], [own.len(), own.len()], *all)?;
        Ok(nccl.exchange(&gathered.collect(*rank, len, sum), device.stream())?)
    }
}

//! How the pieces of a sum come from rank to rank.

use std::ops::Range;

use galerne_collective::Collective;
use galerne_collective::nccl::{Communicator, Gathered};
use galerne_types::Shards;

use super::device::{Address, Buffer, Device, DeviceError};
use super::inputs::{bytes_of, bytes_of_mut};
use super::kernels::{Tree, sum_slots};
use super::layout;
use super::peers::{Peers, Turn};
use crate::error::ModelError;

/// Up to so many numbers every rank gets all pieces and sums them; of more, each sums a part for all. Both add up in the
/// tree's order, so it is a matter of speed alone: an all-gather is one exchange and not two, and moves N times as much.
const GATHER_LEN_MAX: usize = 64 * 4096;

/// What a GPU's partial sums travel by.
pub struct Link {
    far: Far,
    /// For short sums, where all ranks are on one host.
    near: Option<Peers>,
}

/// What there always is.
enum Far {
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

/// Where the numbers of a sum can be: this rank's pieces `[pieces_max][len]`, those of all ranks behind each other, and the sum.
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
        self.world_size() == 1
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn world_size(&self) -> usize {
        self.gathered.world_size()
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
    /// Through the processes' own collective.
    pub fn host() -> Self {
        Self { far: Far::Host, near: None }
    }

    /// From GPU to GPU.
    pub fn nccl(communicator: Communicator) -> Self {
        Self { far: Far::Nccl(communicator), near: None }
    }

    /// The same, with short sums by each other's memory.
    pub fn beside(self, peers: Option<Peers>) -> Self {
        Self { near: peers, ..self }
    }

    /// Whether all that it does for sums of `len` numbers, and to bring rows of so many logits, is put on the device's stream.
    pub(super) fn is_on_device(&self, len: usize, row: usize) -> bool {
        matches!(self.far, Far::Nccl(_)) || self.near_for(row).is_some_and(|peers| peers.take(len))
    }

    /// The memory of all ranks' GPUs, if there is room in it for a row of so many logits.
    fn near_for(&self, row: usize) -> Option<&Peers> {
        self.near.as_ref().filter(|peers| peers.room() >= row)
    }

    /// Rows of so many logits that are brought at once.
    pub(super) fn rows_max(&self, row: usize) -> usize {
        self.near_for(row).map_or(usize::MAX, |peers| peers.room() / row)
    }

    /// Brings a range of `from` to all ranks, as part of a round whose rows have so many logits; where those of all ranks are then,
    /// `[N][range]`, until the turn after the next.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost, [`ModelError::Device`].
    pub(super) fn bring(
        &mut self,
        row: usize,
        (from, range): (&Buffer, Range<usize>),
        turn: Turn,
        gathered: &Buffer,
        (device, collective): (&dyn Device, &mut dyn Collective),
    ) -> Result<Address, ModelError> {
        if let Some(peers) = self.near_for(row) {
            return Ok(peers.bring(from, range, turn)?);
        }
        let (start, world_size) = (range.start * FLOAT_BYTES, collective.world_size());
        assert!(world_size * range.len() * FLOAT_BYTES <= gathered.bytes(), "room for those of all");
        match &mut self.far {
            Far::Host => {
                let (mut sent, mut all) = (vec![0.0f32; range.len()], vec![0.0f32; world_size * range.len()]);
                from.download_at(start, bytes_of_mut(&mut sent))?;
                collective.all_gather(&sent, &vec![sent.len(); world_size], &mut all)?;
                gathered.upload(0, bytes_of(&all))?;
            }
            Far::Nccl(nccl) => {
                let mine = from.address() + start as Address;
                // SAFETY: both are memory of the device until the stream is done, and the room is as long.
                unsafe {
                    nccl.all_gather(mine, gathered.address(), range.len() * FLOAT_BYTES, device.stream())?;
                }
            }
        }
        Ok(gathered.address())
    }

    /// Sums `len` numbers over all ranks. The sum's leaves are where the answer says, in its tree, until the turn after the next.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost, [`ModelError::Device`].
    pub(super) fn sum(
        &mut self,
        device: &dyn Device,
        ranks: &Ranks,
        places: Places<'_>,
        (len, turn): (usize, Turn),
        collective: &mut dyn Collective,
    ) -> Result<(Address, Tree), ModelError> {
        if let Some(peers) = self.near.as_ref().filter(|peers| peers.take(len)) {
            return Ok((peers.share(places.pieces, len, turn)?, ranks.all));
        }
        let (mine, gathered) = (ranks.pieces_max() * len, places.gathered.address());
        match &mut self.far {
            Far::Host => {
                let (mut sent, mut all) = (vec![0.0f32; mine], vec![0.0f32; ranks.slots() * len]);
                places.pieces.download(bytes_of_mut(&mut sent))?;
                collective.all_gather(&sent, &vec![mine; ranks.world_size()], &mut all)?;
                places.gathered.upload(0, bytes_of(&all))?;
                Ok((gathered, ranks.all))
            }
            Far::Nccl(nccl) if len <= GATHER_LEN_MAX => {
                let from = places.pieces.address();
                // SAFETY: both are memory of the device until the stream is done, and the room is as long.
                unsafe { nccl.all_gather(from, gathered, mine * FLOAT_BYTES, device.stream())? };
                Ok((gathered, ranks.all))
            }
            Far::Nccl(nccl) => {
                sum_in_parts(nccl, device, ranks, places, len)?;
                Ok((places.sum.address(), layout::tree_of(1)))
            }
        }
    }

    /// Waits until the device has done all that it was given.
    ///
    /// # Errors
    /// As [`wait_until`](Self::wait_until).
    pub(super) fn wait(&self, device: &dyn Device) -> Result<(), ModelError> {
        self.wait_until(|| device.is_idle())
    }

    /// Waits until the device has come to what `done` asks for.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the epoch ends meanwhile, or the wait takes too long.
    pub(super) fn wait_until(
        &self,
        mut done: impl FnMut() -> Result<bool, DeviceError>,
    ) -> Result<(), ModelError> {
        match (&self.far, &self.near) {
            (Far::Nccl(nccl), _) => nccl.wait("a step", || Ok(done()?)),
            (Far::Host, Some(peers)) => peers.wait(|| Ok(done()?)),
            (Far::Host, None) => Ok(()), // whoever reads what was computed waits
        }
    }

    /// Leaves the other ranks.
    ///
    /// # Errors
    /// As [`Communicator::close`]: then what kernels may still write to stays as it is.
    pub(super) fn close(self) -> Result<(), ModelError> {
        let Self { far: Far::Nccl(nccl), near } = self else { return Ok(()) };
        nccl.close().map_err(|error| {
            std::mem::forget(near);
            error.into()
        })
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

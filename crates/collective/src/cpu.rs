use std::ops::Range;

use crate::error::expect_length;
use crate::mesh::{Call, Mesh, Route};
use crate::message::Operation;
use crate::monitor::Monitor;
use crate::segment::PAYLOAD_BYTES;
use crate::{AbortHandle, Collective, CollectiveError, Config, bytes, tree};

/// The longest message of one call, counted at the rank that holds most of it.
pub const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// From this length on, more than two ranks sum a slice each instead of everything each (`latency` example: over
/// TCP it takes half the time, in shared memory it is no worse).
const SLICED_BYTES_MIN: usize = 128 << 10;

const PAYLOAD_FLOATS: usize = PAYLOAD_BYTES / size_of::<f32>();

/// The ranks of one epoch, met. Dropping it closes everything; peers that still wait for this rank are told.
#[derive(Debug)]
pub struct CpuCollective {
    rank: usize,
    /// The pieces of all ranks in leaf order, and which of them are each rank's.
    pieces: Vec<Range<usize>>,
    pieces_of: Vec<Range<usize>>,
    abort: AbortHandle,
    /// Dropped before `mesh`: the peers are told before their connections end.
    _monitor: Monitor,
    mesh: Mesh,
}

impl Drop for CpuCollective {
    fn drop(&mut self) {
        self.abort.raise(CollectiveError::Closed);
        self.abort.detach();
    }
}

impl Collective for CpuCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.pieces_of.len()
    }

    fn all_reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.reduce(partials, out).map_err(|cause| self.abort.raise(cause))
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.collect(Operation::AllGather, None, mine, counts, out).map_err(|cause| self.abort.raise(cause))
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.collect(Operation::Gather, Some(root), mine, counts, out)
            .map_err(|cause| self.abort.raise(cause))
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.spread(root, data).map_err(|cause| self.abort.raise(cause))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.meet_all().map_err(|cause| self.abort.raise(cause))
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl CpuCollective {
    pub(crate) fn new(config: &Config, mesh: Mesh, abort: AbortHandle, monitor: Monitor) -> Self {
        let (pieces, pieces_of) = config.pieces();
        Self { rank: config.rank, pieces, pieces_of, abort, _monitor: monitor, mesh }
    }

    fn reduce(&mut self, partials: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        let operation = Operation::AllReduce;
        let own_pieces = self.pieces_of[self.rank].len();
        expect_length(operation, "partials", partials.len(), own_pieces * out.len())?;
        let pieces_max = self.pieces_of.iter().map(ExactSizeIterator::len).max().unwrap_or(1);
        expect_size(operation, out.len() * pieces_max * size_of::<f32>())?;
        let call = Call { operation, root: 0, message_bytes: size_of_val(out) };
        let len = out.len();
        let sliced = self.world_size() > 2 && size_of_val(out) >= SLICED_BYTES_MIN;
        for start in (0..len).step_by(PAYLOAD_FLOATS / pieces_max) {
            let chunk = start..len.min(start + PAYLOAD_FLOATS / pieces_max);
            if sliced {
                self.reduce_sliced(call, partials, chunk, out)?;
            } else {
                self.reduce_whole(call, partials, chunk, out)?;
            }
        }
        Ok(())
    }

    /// Every rank shows all its pieces to all ranks, and each sums for itself.
    fn reduce_whole(
        &mut self,
        call: Call,
        partials: &[f32],
        chunk: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.mesh.begin(call)?;
        for (index, piece) in partials.chunks_exact(out.len()).enumerate() {
            self.mesh.write(index * chunk.len(), &piece[chunk.clone()]);
        }
        let bytes_of = |rank: usize| 0..self.pieces_of[rank].len() * chunk.len() * size_of::<f32>();
        let route = Route { send: |_| Some(bytes_of(self.rank)), receive: |rank| Some(bytes_of(rank)) };
        self.mesh.exchange(call, &route)?;
        self.sum(|_| 0, chunk.len(), &mut out[chunk]);
        self.mesh.finish();
        Ok(())
    }

    /// Every rank sums a slice of its own for all ranks (reduce-scatter), then all show their sums (all-gather):
    /// each element is added up once instead of N times, by the same additions.
    fn reduce_sliced(
        &mut self,
        call: Call,
        partials: &[f32],
        chunk: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let world_size = self.world_size();
        let slice = |rank: usize| chunk.len() * rank / world_size..chunk.len() * (rank + 1) / world_size;
        let own = slice(self.rank);
        // In a payload, the pieces of one slice lie together.
        let in_bytes = |numbers: Range<usize>, pieces: usize| {
            let bytes = pieces * size_of::<f32>();
            numbers.start * bytes..numbers.end * bytes
        };
        self.mesh.begin(call)?;
        let pieces = self.pieces_of[self.rank].len();
        for slice in (0..world_size).map(slice) {
            for (index, piece) in partials.chunks_exact(out.len()).enumerate() {
                let at = slice.start * pieces + index * slice.len();
                self.mesh.write(at, &piece[chunk.start + slice.start..chunk.start + slice.end]);
            }
        }
        let route = Route {
            send: |rank| Some(in_bytes(slice(rank), pieces)),
            receive: |rank: usize| Some(in_bytes(own.clone(), self.pieces_of[rank].len())),
        };
        self.mesh.exchange(call, &route)?;
        let out = &mut out[chunk.clone()];
        self.sum(|pieces| own.start * pieces, own.len(), &mut out[own.clone()]);
        self.mesh.finish();

        self.mesh.begin(call)?;
        self.mesh.write(own.start, &out[own.clone()]);
        let route = Route {
            send: |_| Some(in_bytes(own.clone(), 1)),
            receive: |rank| Some(in_bytes(slice(rank), 1)),
        };
        self.mesh.exchange(call, &route)?;
        for rank in (0..world_size).filter(|rank| *rank != self.rank) {
            let sums = bytes::floats(&self.mesh.payload(rank)[in_bytes(slice(rank), 1)]);
            out[slice(rank)].copy_from_slice(sums);
        }
        self.mesh.finish();
        Ok(())
    }

    /// Sums what the ranks show. In the payload of a rank with so many pieces, the first begins at number
    /// `first(pieces)`, and they lie `stride` numbers apart.
    fn sum(&self, first: impl Fn(usize) -> usize, stride: usize, out: &mut [f32]) {
        let len = out.len();
        let values = |piece: usize| {
            let rank = self.pieces_of.partition_point(|pieces| pieces.end <= piece);
            let pieces = &self.pieces_of[rank];
            let start = first(pieces.len()) + (piece - pieces.start) * stride;
            &bytes::floats(self.mesh.payload(rank))[start..start + len]
        };
        tree::sum_into(&self.pieces, values, out);
    }

    /// All-gather, or gather at `root`.
    fn collect(
        &mut self,
        operation: Operation,
        root: Option<usize>,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.expect_root(operation, root.unwrap_or(0))?;
        let is_root = |rank: usize| root.is_none_or(|root| root == rank);
        let total = counts.iter().sum();
        expect_length(operation, "counts", counts.len(), self.world_size())?;
        expect_length(operation, "mine", mine.len(), counts[self.rank])?;
        expect_length(operation, "out", out.len(), if is_root(self.rank) { total } else { 0 })?;
        expect_size(operation, total * size_of::<f32>())?;
        let call = Call { operation, root: root.unwrap_or(0), message_bytes: total * size_of::<f32>() };
        let longest = counts.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(PAYLOAD_FLOATS) {
            // Of a rank that has no more to give, the chunk is empty.
            let chunk = |rank: usize| start.min(counts[rank])..counts[rank].min(start + PAYLOAD_FLOATS);
            let bytes_of = |rank: usize| 0..chunk(rank).len() * size_of::<f32>();
            self.mesh.begin(call)?;
            self.mesh.write(0, &mine[chunk(self.rank)]);
            let route = Route {
                send: |rank| is_root(rank).then(|| bytes_of(self.rank)),
                receive: |rank| is_root(self.rank).then(|| bytes_of(rank)),
            };
            self.mesh.exchange(call, &route)?;
            let mut offset = 0;
            for rank in (0..counts.len()).filter(|_| is_root(self.rank)) {
                let shown = bytes::floats(&self.mesh.payload(rank)[bytes_of(rank)]);
                let chunk = chunk(rank);
                out[offset + chunk.start..offset + chunk.end].copy_from_slice(shown);
                offset += counts[rank];
            }
            self.mesh.finish();
        }
        Ok(())
    }

    fn spread(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        let operation = Operation::Broadcast;
        self.expect_root(operation, root)?;
        expect_size(operation, data.len())?;
        let call = Call { operation, root, message_bytes: data.len() };
        for chunk in data.chunks_mut(PAYLOAD_BYTES) {
            let whole = 0..chunk.len();
            self.mesh.begin(call)?;
            if self.rank == root {
                self.mesh.write_bytes(0, chunk);
            }
            let route = Route {
                send: |_| (self.rank == root).then(|| whole.clone()),
                receive: |rank| (rank == root).then(|| whole.clone()),
            };
            self.mesh.exchange(call, &route)?;
            if self.rank != root {
                chunk.copy_from_slice(&self.mesh.payload(root)[whole]);
            }
            self.mesh.finish();
        }
        Ok(())
    }

    fn meet_all(&mut self) -> Result<(), CollectiveError> {
        let call = Call { operation: Operation::Barrier, root: 0, message_bytes: 0 };
        self.mesh.begin(call)?;
        self.mesh.exchange(call, &Route { send: |_| Some(0..0), receive: |_| Some(0..0) })?;
        self.mesh.finish();
        Ok(())
    }

    fn expect_root(&self, operation: Operation, root: usize) -> Result<(), CollectiveError> {
        if root < self.world_size() {
            return Ok(());
        }
        Err(CollectiveError::Root { operation, root, world_size: self.world_size() })
    }
}

fn expect_size(operation: Operation, bytes: usize) -> Result<(), CollectiveError> {
    if bytes <= MESSAGE_BYTES_MAX {
        return Ok(());
    }
    Err(CollectiveError::TooLarge { operation, bytes, bytes_max: MESSAGE_BYTES_MAX })
}

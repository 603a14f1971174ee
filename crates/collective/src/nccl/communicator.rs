use std::ffi::{c_int, c_void};
use std::fmt::{self, Display};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::nccl::library::{BYTES, Code, Functions, IN_PROGRESS, SUCCESS};
use crate::nccl::life::{Life, State};
use crate::nccl::{Library, UniqueId};
use crate::{AbortHandle, CollectiveError, Config};

/// How long NCCL may take to let go of the device when an epoch is over: with what it takes to notice the end, a rank
/// is out within half a second.
pub const ABORT_TIMEOUT: Duration = Duration::from_millis(400);

/// The devices of one epoch's ranks, met in NCCL. It enqueues on the caller's stream and never waits for the device,
/// but for [`Self::wait`]. All ranks make the same calls in the same order.
///
/// It shares the [`AbortHandle`] of the epoch's collective between processes: whoever ends the epoch, for whatever
/// reason, ends both. Then NCCL's kernels quit, [`Self::wait`] returns, and [`Self::close`] tells whether the process
/// may go on. An abort waits for captured graphs that contain calls of this communicator, **so destroy these first**,
/// and for whatever else runs on the device, so a kernel that waits for a peer by itself must not do so for ever.
/// Dropping it instead ends the epoch, at every rank.
pub struct Communicator {
    life: Arc<Life>,
    rank: usize,
    world_size: usize,
    timeout: Duration,
    /// Whether its end was waited for.
    closed: bool,
}

/// A message to or from one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// The other rank, or this one.
    pub peer: usize,
    /// Where in the device's memory it comes from or goes to.
    pub address: u64,
    /// How long it is.
    pub bytes: usize,
}

/// What one rank sends and receives, all at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// In the order in which each receiver expects them.
    pub sends: Vec<Transfer>,
    /// In the order in which each sender sends them.
    pub receives: Vec<Transfer>,
}

/// Meets all ranks of the epoch in NCCL, or fails within `config.meet_timeout`. `config` and `abort` are those of the
/// epoch's collective between processes, over which `id` was [shared](UniqueId::share). `bind` makes this rank's
/// device the current one of the thread that it is called on, and holds it until NCCL has left it.
pub fn connect<E: Display>(
    config: &Config,
    library: &Arc<Library>,
    id: UniqueId,
    abort: &AbortHandle,
    bind: impl Fn() -> Result<(), E> + Send + 'static,
) -> Result<Communicator, CollectiveError> {
    config.check()?;
    let UniqueId { epoch, raw } = id;
    if epoch != config.epoch || !library.begin(epoch) {
        return Err(abort.raise(CollectiveError::StaleId { of: epoch, epoch: config.epoch }));
    }
    let life = Arc::new(Life::new(Arc::clone(library), abort.clone()));
    let (rank, world_size) = (config.rank, config.peers.len());
    let body = {
        let life = Arc::clone(&life);
        move || life.run(raw, rank, world_size, bind)
    };
    thread::Builder::new()
        .name("nccl".to_owned())
        .spawn(body)
        .map_err(|error| abort.raise(CollectiveError::system("start a thread for NCCL")(error)))?;
    let communicator = Communicator { life, rank, world_size, timeout: config.timeout, closed: false };
    if communicator.life.reach(|state| !matches!(state, State::Forming), config.meet_timeout)
        && abort.cause().is_none()
    {
        return Ok(communicator);
    }
    let cause = abort.raise(CollectiveError::NcclNotMet { epoch: config.epoch, waited: config.meet_timeout });
    communicator.close()?;
    Err(cause)
}

impl Communicator {
    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// N, the number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Gives every rank the bytes of all, `[N][bytes]` in rank order, at `all`. This rank's are at `mine`, which may be
    /// their place in `all`.
    ///
    /// # Safety
    /// `stream` is a `CUstream` of the communicator's device. Until it has come past this call, or the communicator
    /// has [closed](Self::close), `mine` stays memory of the device that can be read, and `all` such that nothing else
    /// reads or writes. If the stream is being captured, that holds whenever the graph runs.
    pub unsafe fn all_gather(
        &mut self,
        mine: u64,
        all: u64,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError> {
        self.call("ncclAllGather", |nccl, comm| {
            // SAFETY: the communicator is ready; memory and stream are as the caller says.
            unsafe { (nccl.all_gather)(device(mine), device(all), bytes, BYTES, comm, stream) }
        })
    }

    /// Gives every rank the bytes that `root` has at `data`, at `data`.
    ///
    /// # Safety
    /// As for [`Self::all_gather`], with `data` for `all`.
    pub unsafe fn broadcast(
        &mut self,
        root: usize,
        data: u64,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError> {
        self.call("ncclBroadcast", |nccl, comm| {
            // SAFETY: as in `all_gather`.
            unsafe { (nccl.broadcast)(device(data), device(data), bytes, BYTES, place(root), comm, stream) }
        })
    }

    /// Sends and receives between any ranks. What one sends to another is received there in the same order, with the
    /// same lengths.
    ///
    /// # Safety
    /// As for [`Self::all_gather`], with what is sent for `mine` and what is received for `all`.
    pub unsafe fn exchange(
        &mut self,
        exchange: &Exchange,
        stream: *mut c_void,
    ) -> Result<(), CollectiveError> {
        self.call("ncclGroupEnd", |nccl, comm| {
            // SAFETY: it has no arguments.
            let begun = unsafe { (nccl.group_start)() };
            if begun != SUCCESS {
                return begun;
            }
            let sent = exchange.sends.iter().map(|Transfer { peer, address, bytes }| {
                // SAFETY: as in `all_gather`.
                unsafe { (nccl.send)(device(*address), *bytes, BYTES, place(*peer), comm, stream) }
            });
            let received = exchange.receives.iter().map(|Transfer { peer, address, bytes }| {
                // SAFETY: as in `all_gather`.
                unsafe { (nccl.recv)(device(*address), *bytes, BYTES, place(*peer), comm, stream) }
            });
            let failed = sent.chain(received).find(|code| !matches!(*code, SUCCESS | IN_PROGRESS));
            // SAFETY: the group was begun on this thread.
            let ended = unsafe { (nccl.group_end)() };
            failed.unwrap_or(ended)
        })
    }

    /// As [`AbortHandle::wait_for_device`], with the epoch's timeout.
    pub fn wait<E: From<CollectiveError>>(
        &self,
        what: &'static str,
        done: impl FnMut() -> Result<bool, E>,
    ) -> Result<(), E> {
        self.life.abort.wait_for_device(what, self.timeout, done)
    }

    /// Leaves. While the epoch lives, all ranks do, and what was enqueued is done first; if it is over, waits until
    /// NCCL has let go of the device. The one error means that it does not: then the device's memory is not safe, and
    /// the process must exit.
    pub fn close(mut self) -> Result<(), CollectiveError> {
        self.closed = true;
        let mut state = self.life.lock();
        if let State::Ready(_) = *state {
            *state = State::Leaving;
        }
        drop(state);
        if !self.life.reach(|state| matches!(state, State::Ended), self.timeout) {
            let waited = self.timeout;
            self.life.abort.raise(CollectiveError::NcclTimeout { call: "ncclCommFinalize", waited });
        }
        self.ended()
    }

    fn ended(&self) -> Result<(), CollectiveError> {
        if self.life.reach_end(ABORT_TIMEOUT) {
            return Ok(());
        }
        Err(CollectiveError::NcclStuck { waited: ABORT_TIMEOUT })
    }

    /// A non-blocking communicator takes up a call on a thread of NCCL's; until it has, nothing is on the stream and no
    /// other call may follow.
    fn call(
        &mut self,
        name: &'static str,
        enqueue: impl FnOnce(&Functions, *mut c_void) -> Code,
    ) -> Result<(), CollectiveError> {
        let Life { library, abort, .. } = &*self.life;
        abort.check()?;
        let code = match *self.life.lock() {
            State::Ready(comm) => enqueue(&library.functions, comm.0),
            // It has left because the epoch is over.
            _ => return Err(abort.raise(CollectiveError::Closed)),
        };
        match code {
            SUCCESS => Ok(()),
            IN_PROGRESS => self.wait(name, || self.life.is_settled(name)).map_err(|cause| abort.raise(cause)),
            code => Err(abort.raise(library.functions.error(name, code))),
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        self.life.abort.abort();
        if let Err(error) = self.ended() {
            tracing::error!(%error, "a communicator was dropped");
        }
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} in {:?}", self.rank, self.world_size, self.life.library)
    }
}

/// An address of the device. NCCL's functions take it as a pointer, which nobody follows on the host.
fn device(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// NCCL refuses what is no rank.
fn place(rank: usize) -> c_int {
    c_int::try_from(rank).unwrap_or(c_int::MAX)
}

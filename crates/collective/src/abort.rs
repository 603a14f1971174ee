use std::hint::spin_loop;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::CollectiveError;
use crate::segment::Segment;

/// How long a wait for a device keeps its core busy: as long as a call takes to get onto a stream.
const SPIN: Duration = Duration::from_micros(50);

/// How long it then sleeps between two looks.
const SLEEP: Duration = Duration::from_micros(50);

/// Ends one epoch's collective from any thread: every call that waits returns at once, here and, told by this
/// rank, at the peers. Made before [`crate::connect`], so that the meeting can be ended too; used for one epoch.
#[derive(Debug, Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Mirrors `state.cause.is_some()` for the hot path.
    raised: AtomicBool,
    /// One bit for each peer that closed in peace.
    closed: AtomicU64,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    cause: Option<CollectiveError>,
    bell: Option<Arc<Bell>>,
}

/// Wakes the threads of one epoch, whatever they wait on.
#[derive(Debug)]
pub(crate) struct Bell {
    /// Readable for ever once the epoch is over: for those who poll sockets.
    pub(crate) over: OwnedFd,
    /// Where the compute thread sleeps when it waits for shared memory.
    pub(crate) segment: Arc<Segment>,
}

impl Bell {
    pub(crate) fn new(segment: Arc<Segment>) -> io::Result<Self> {
        Ok(Self { over: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, segment })
    }

    fn ring(&self) {
        // Cannot fail: the counter is far from full.
        let _ = rustix::io::write(&self.over, &1u64.to_ne_bytes());
        self.segment.wake();
    }
}

impl AbortHandle {
    /// A handle for an epoch yet to come.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the epoch. The calls return [`CollectiveError::Aborted`], unless the epoch had failed before.
    pub fn abort(&self) {
        self.raise(CollectiveError::Aborted);
    }

    /// Why the epoch ended; `None` while it lives. A lost peer shows here without any call being made.
    pub fn cause(&self) -> Option<CollectiveError> {
        if self.shared.raised.load(Ordering::Acquire) { self.lock().cause.clone() } else { None }
    }

    /// As [`Self::cause`], and waits up to `timeout` for one: for a thread that watches over an idle epoch.
    pub fn wait(&self, timeout: Duration) -> Option<CollectiveError> {
        let waited =
            self.shared.ended.wait_timeout_while(self.lock(), timeout, |state| state.cause.is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.cause.clone()
    }

    /// Waits until `done` says that the device has come to the end of `what`. Fails when the epoch ends, and ends it
    /// when that takes longer than `timeout`. `done` asks without waiting, as `cuEventQuery` does.
    pub fn wait_for_device<E: From<CollectiveError>>(
        &self,
        what: &'static str,
        timeout: Duration,
        mut done: impl FnMut() -> Result<bool, E>,
    ) -> Result<(), E> {
        let started = Instant::now();
        while !done()? {
            let elapsed = started.elapsed();
            if elapsed < SPIN {
                self.check()?;
                spin_loop();
            } else if let Some(cause) = self.wait(SLEEP) {
                return Err(cause.into());
            } else if elapsed > timeout {
                return Err(self.raise(CollectiveError::NcclTimeout { call: what, waited: timeout }).into());
            }
        }
        // Kernels that quit for an abort end as others do, with whatever they have left in memory.
        Ok(self.check()?)
    }

    /// Ends the epoch for a reason. The first one wins; it is returned.
    pub fn raise(&self, cause: CollectiveError) -> CollectiveError {
        let mut state = self.lock();
        let cause = state.cause.get_or_insert(cause).clone();
        // Before the bell: whoever it wakes looks here.
        self.shared.raised.store(true, Ordering::Release);
        let bell = state.bell.clone();
        drop(state);
        self.shared.ended.notify_all();
        if let Some(bell) = bell {
            bell.ring();
        }
        cause
    }

    /// From now on raising rings `bell`.
    pub(crate) fn attach(&self, bell: Arc<Bell>) {
        let mut state = self.lock();
        if state.cause.is_some() {
            bell.ring();
        }
        state.bell = Some(bell);
    }

    /// Lets go of the epoch's memory: handles may outlive it.
    pub(crate) fn detach(&self) {
        self.lock().bell = None;
    }

    pub(crate) fn check(&self) -> Result<(), CollectiveError> {
        self.cause().map_or(Ok(()), Err)
    }

    /// `rank` closed in peace: an error only for those who still wait for it.
    pub(crate) fn close(&self, rank: usize) {
        self.shared.closed.fetch_or(1 << rank, Ordering::Release);
        let bell = self.lock().bell.clone();
        if let Some(bell) = bell {
            bell.segment.wake();
        }
    }

    /// Whether `rank` will send nothing more, because it has closed or the epoch is over.
    pub(crate) fn is_over(&self, rank: usize) -> bool {
        self.shared.raised.load(Ordering::Acquire)
            || self.shared.closed.load(Ordering::Acquire) & 1 << rank != 0
    }

    /// As [`Self::is_over`], with the reason.
    pub(crate) fn cause_for(&self, rank: usize) -> Option<CollectiveError> {
        if !self.is_over(rank) {
            return None;
        }
        Some(self.cause().unwrap_or(CollectiveError::AbortedBy { rank }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under the lock can leave the state half changed.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! The life of a communicator, on a thread of its own: every call of NCCL that may hang is made there, so that nobody
//! else hangs with it, and everybody else waits with a deadline.

use std::ffi::c_int;
use std::fmt::Display;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::nccl::Library;
use crate::nccl::library::{IN_PROGRESS, RawComm, RawId, SUCCESS, Settings};
use crate::{AbortHandle, CollectiveError};

/// How often something is looked at that NCCL brings about and does not tell.
const POLL: Duration = Duration::from_millis(2);

/// How often the communicator is asked for errors that came about by themselves.
const WATCH: Duration = Duration::from_millis(10);

/// A communicator that lives.
#[derive(Clone, Copy)]
pub(crate) struct Comm(pub(crate) RawComm);

// SAFETY: NCCL ties a communicator to no thread; calls on it are made one at a time, under the lock of the state.
unsafe impl Send for Comm {}

/// Forming → Ready → Leaving → Ended. Why it left, unless in peace, is the cause in the epoch's [`AbortHandle`].
pub(crate) enum State {
    /// Not all ranks are there, as far as NCCL has told.
    Forming,
    /// Whoever holds the lock may use it.
    Ready(Comm),
    /// It is finalized, or aborted if the epoch is over: its own thread has it alone.
    Leaving,
    /// NCCL has let go of it: nothing of it runs on the device or touches memory.
    Ended,
}

/// What the owner of a communicator and its thread share.
pub(crate) struct Life {
    pub(crate) library: Arc<Library>,
    pub(crate) abort: AbortHandle,
    state: Mutex<State>,
    ended: Condvar,
}

impl Life {
    pub(crate) fn new(library: Arc<Library>, abort: AbortHandle) -> Self {
        Self { library, abort, state: Mutex::new(State::Forming), ended: Condvar::new() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the state is `wanted`, at most `timeout`, and no longer than the epoch lives.
    pub(crate) fn reach(&self, wanted: impl Fn(&State) -> bool, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if wanted(&self.lock()) {
                return true;
            }
            if left.is_zero() || self.abort.wait(left.min(POLL)).is_some() {
                return wanted(&self.lock());
            }
        }
    }

    /// Waits for the end, whatever the epoch does.
    pub(crate) fn reach_end(&self, timeout: Duration) -> bool {
        let living = |state: &mut State| !matches!(state, State::Ended);
        let waited = self.ended.wait_timeout_while(self.lock(), timeout, living);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        matches!(*state, State::Ended)
    }

    /// The thread's body. `bind` makes the device that the communicator is for the thread's current one, and holds it: NCCL may still work
    /// on it when nobody else has it any more.
    pub(crate) fn run<E: Display>(
        &self,
        id: RawId,
        rank: usize,
        world_size: usize,
        bind: impl Fn() -> Result<(), E>,
    ) {
        // NCCL may write the handle once more when the communicator has formed.
        let place = AtomicPtr::new(ptr::null_mut());
        if let Err(cause) = bind_device(&bind).and_then(|()| self.begin(id, rank, world_size, &place)) {
            self.abort.raise(cause);
        }
        let comm = Comm(place.load(Ordering::Acquire));
        if comm.0.is_null() {
            return self.end();
        }
        let in_peace = self.form(comm) && self.watch(comm) && self.finalize(comm);
        *self.lock() = State::Leaving;
        let functions = &self.library.functions;
        let (call, leave) = if in_peace {
            ("ncclCommDestroy", functions.comm_destroy)
        } else {
            ("ncclCommAbort", functions.comm_abort)
        };
        // SAFETY: the communicator lives, and as it is leaving nobody else uses it; nor will it be used again.
        if let Err(error) = functions.check(call, unsafe { leave(comm.0) }) {
            tracing::warn!(%error, "NCCL has left an epoch with an error");
        }
        self.end();
    }

    fn end(&self) {
        *self.lock() = State::Ended;
        self.ended.notify_all();
    }

    fn begin(
        &self,
        id: RawId,
        rank: usize,
        world_size: usize,
        place: &AtomicPtr<std::ffi::c_void>,
    ) -> Result<(), CollectiveError> {
        self.abort.check()?;
        // Far below the limit: at most RANKS_MAX.
        let (rank, world_size) = (rank as c_int, world_size as c_int);
        let functions = &self.library.functions;
        let mut settings = Settings::non_blocking();
        // SAFETY: the settings are read during the call; `place` lives until the communicator has ended.
        let code = unsafe {
            (functions.comm_init_rank_config)(place.as_ptr(), world_size, id, rank, &raw mut settings)
        };
        functions.check("ncclCommInitRankConfig", code)
    }

    /// Waits until all ranks are there. Whoever set the deadline ends the epoch when it is over.
    fn form(&self, comm: Comm) -> bool {
        if !self.settles(comm, "ncclCommInitRankConfig") {
            return false;
        }
        *self.lock() = State::Ready(comm);
        true
    }

    /// Waits until the owner leaves, in peace, or the epoch ends, also by an error that NCCL noticed by itself.
    fn watch(&self, comm: Comm) -> bool {
        loop {
            if self.abort.wait(WATCH).is_some() {
                return false;
            }
            let state = self.lock();
            if matches!(*state, State::Leaving) {
                return true;
            }
            let asked = self.ask(comm, "a call of NCCL");
            drop(state);
            if let Err(cause) = asked {
                self.abort.raise(cause);
                return false;
            }
        }
    }

    fn finalize(&self, comm: Comm) -> bool {
        let functions = &self.library.functions;
        // SAFETY: the communicator lives, and as it is leaving nobody else uses it.
        let code = unsafe { (functions.comm_finalize)(comm.0) };
        match functions.check("ncclCommFinalize", code) {
            Ok(()) => self.settles(comm, "ncclCommFinalize"),
            Err(cause) => {
                self.abort.raise(cause);
                false
            }
        }
    }

    /// Waits until `call` is done; false if the epoch ends instead.
    fn settles(&self, comm: Comm, call: &'static str) -> bool {
        loop {
            if self.abort.wait(POLL).is_some() {
                return false;
            }
            match self.ask(comm, call) {
                Ok(true) => return true,
                Ok(false) => {}
                Err(cause) => {
                    self.abort.raise(cause);
                    return false;
                }
            }
        }
    }

    /// Whether the communicator has done what it was told, or what became of `call` instead. Whoever calls it is alone
    /// with the communicator, which lives.
    fn ask(&self, comm: Comm, call: &'static str) -> Result<bool, CollectiveError> {
        let functions = &self.library.functions;
        let mut told = SUCCESS;
        // SAFETY: as the caller says; it writes one code.
        let code = unsafe { (functions.comm_get_async_error)(comm.0, &raw mut told) };
        functions.check("ncclCommGetAsyncError", code)?;
        functions.check(call, told)?;
        Ok(told != IN_PROGRESS)
    }

    /// The same for its owner: false while NCCL still works on `call`.
    pub(crate) fn is_settled(&self, call: &'static str) -> Result<bool, CollectiveError> {
        match *self.lock() {
            State::Ready(comm) => self.ask(comm, call),
            // It leaves because the epoch is over.
            _ => self.abort.check().map(|()| false),
        }
    }
}

fn bind_device<E: Display>(bind: impl Fn() -> Result<(), E>) -> Result<(), CollectiveError> {
    bind().map_err(|error| CollectiveError::Nccl { call: "binding the device", reason: error.to_string() })
}

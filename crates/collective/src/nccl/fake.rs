//! A NCCL that does what a test wants: functions of the same types, and behind each communicator a [`Fake`].

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::nccl::library::{Code, Functions, IN_PROGRESS, RawComm, RawId, SUCCESS, Settings};
use crate::nccl::{Library, UniqueId};
use crate::{Config, Peer};

/// `ncclSystemError`, which `ncclGetUniqueId` gives where there is no network.
pub(crate) const SYSTEM_ERROR: Code = 2;
/// `ncclRemoteError`.
pub(crate) const REMOTE_ERROR: Code = 6;

/// The epoch of all groups here.
pub(crate) const EPOCH: u64 = 42;

/// One communicator and what is known of it. It is never freed: a thread may outlive its test.
pub(crate) struct Fake {
    /// What the init call gives; a refusal gives no communicator.
    pub(crate) init: AtomicI32,
    /// What an asynchronous question is told.
    pub(crate) told: AtomicI32,
    /// What a call that enqueues gives.
    pub(crate) enqueued: AtomicI32,
    log: Mutex<Log>,
    changed: Condvar,
}

#[derive(Default)]
struct Log {
    /// The function that hangs until [`Fake::release`].
    hangs: Option<&'static str>,
    /// Every call, but the questions.
    calls: Vec<String>,
}

/// What a test holds.
pub(crate) struct Group {
    pub(crate) library: Arc<Library>,
    pub(crate) config: Config,
    pub(crate) fake: &'static Fake,
}

impl Group {
    /// Rank 1 of 2, of which NCCL has not told yet that they are there.
    pub(crate) fn new() -> Self {
        let fake = Box::leak(Box::new(Fake {
            init: AtomicI32::new(IN_PROGRESS),
            told: AtomicI32::new(IN_PROGRESS),
            enqueued: AtomicI32::new(SUCCESS),
            log: Mutex::default(),
            changed: Condvar::new(),
        }));
        let mut config = config(&[0..4, 4..8]);
        config.rank = 1;
        Self { library: library(), config, fake }
    }

    /// The same, and they are there.
    pub(crate) fn formed() -> Self {
        let group = Self::new();
        group.fake.told.store(SUCCESS, Ordering::SeqCst);
        group
    }

    /// An id that leads to this group's [`Fake`].
    pub(crate) fn id(&self, epoch: u64) -> UniqueId {
        let mut raw = RawId([0; 128]);
        let address = ptr::from_ref(self.fake).expose_provenance();
        raw.0[..size_of::<usize>()].copy_from_slice(&address.to_le_bytes());
        UniqueId { epoch, raw }
    }

    /// All calls since this was last asked.
    pub(crate) fn called(&self) -> Vec<String> {
        self.wait_for_calls(0)
    }

    /// The same, once there are `calls`.
    pub(crate) fn wait_for_calls(&self, calls: usize) -> Vec<String> {
        let log = self.fake.log.lock().unwrap();
        let mut log = self.fake.changed.wait_while(log, |log| log.calls.len() < calls).unwrap();
        std::mem::take(&mut log.calls)
    }
}

impl Fake {
    pub(crate) fn hang(&self, call: &'static str) {
        self.log.lock().unwrap().hangs = Some(call);
    }

    pub(crate) fn release(&self) {
        self.log.lock().unwrap().hangs = None;
        self.changed.notify_all();
    }

    fn called(&self, call: &'static str, arguments: &str) {
        let mut log = self.log.lock().unwrap();
        log.calls.push(format!("{call}{arguments}"));
        self.changed.notify_all();
        drop(self.changed.wait_while(log, |log| log.hangs == Some(call)).unwrap());
    }
}

/// Ranks that host these leaves; this one is rank 0.
pub(crate) fn config(ranges: &[Range<usize>]) -> Config {
    let peer = |leaves: &Range<usize>| Peer {
        host: "a".to_owned(),
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        leaves: leaves.clone(),
    };
    Config {
        rank: 0,
        leaves: ranges.last().map_or(0, |leaves| leaves.end),
        peers: ranges.iter().map(peer).collect(),
        secret: [7; 32].into(),
        epoch: EPOCH,
        threads: 1,
        meet_timeout: Duration::from_secs(20),
        timeout: Duration::from_secs(20),
    }
}

pub(crate) fn library() -> Arc<Library> {
    Arc::new(Library::new(FUNCTIONS).unwrap())
}

/// One whose ranks have no network in common.
pub(crate) fn library_without_network() -> Arc<Library> {
    unsafe extern "C" fn get_unique_id(_: *mut RawId) -> Code {
        SYSTEM_ERROR
    }
    Arc::new(Library::new(Functions { get_unique_id, ..FUNCTIONS }).unwrap())
}

const FUNCTIONS: Functions = Functions {
    get_version,
    get_unique_id,
    get_error_string,
    get_last_error,
    comm_init_rank_config,
    comm_get_async_error,
    comm_finalize,
    comm_destroy,
    comm_abort,
    group_start,
    group_end,
    all_gather,
    broadcast,
    send,
    recv,
};

fn fake_of(address: usize) -> &'static Fake {
    // SAFETY: every communicator and id of these tests holds the address of a leaked `Fake`.
    unsafe { &*ptr::with_exposed_provenance(address) }
}

fn fake(comm: RawComm) -> &'static Fake {
    fake_of(comm.expose_provenance())
}

unsafe extern "C" fn get_version(version: *mut c_int) -> Code {
    // SAFETY: the caller gives room for one.
    unsafe { *version = 23_003 };
    SUCCESS
}

unsafe extern "C" fn get_unique_id(id: *mut RawId) -> Code {
    static MADE: AtomicUsize = AtomicUsize::new(1);
    let number = u8::try_from(MADE.fetch_add(1, Ordering::SeqCst)).unwrap();
    // SAFETY: the caller gives room for one.
    unsafe { *id = RawId([number; 128]) };
    SUCCESS
}

unsafe extern "C" fn get_error_string(code: Code) -> *const c_char {
    match code {
        SYSTEM_ERROR => c"unhandled system error (run with NCCL_DEBUG=INFO for details)".as_ptr(),
        REMOTE_ERROR => c"remote process exited or there was a network error".as_ptr(),
        _ => c"some error".as_ptr(),
    }
}

unsafe extern "C" fn get_last_error(_: RawComm) -> *const c_char {
    c"what had happened".as_ptr()
}

unsafe extern "C" fn comm_init_rank_config(
    comm: *mut RawComm,
    ranks: c_int,
    id: RawId,
    rank: c_int,
    settings: *mut Settings,
) -> Code {
    let mut address = [0; size_of::<usize>()];
    address.copy_from_slice(&id.0[..size_of::<usize>()]);
    let fake = fake_of(usize::from_le_bytes(address));
    // SAFETY: the caller gives them.
    let blocking = unsafe { (*settings).blocking };
    fake.called("init", &format!(" rank {rank} of {ranks}, blocking {blocking}"));
    let code = fake.init.load(Ordering::SeqCst);
    if matches!(code, SUCCESS | IN_PROGRESS) {
        // SAFETY: the caller gives room for one.
        unsafe { *comm = ptr::from_ref(fake).cast_mut().cast() };
    }
    code
}

unsafe extern "C" fn comm_get_async_error(comm: RawComm, told: *mut Code) -> Code {
    // SAFETY: the caller gives room for one.
    unsafe { *told = fake(comm).told.load(Ordering::SeqCst) };
    SUCCESS
}

unsafe extern "C" fn comm_finalize(comm: RawComm) -> Code {
    fake(comm).called("finalize", "");
    IN_PROGRESS
}

unsafe extern "C" fn comm_destroy(comm: RawComm) -> Code {
    fake(comm).called("destroy", "");
    SUCCESS
}

unsafe extern "C" fn comm_abort(comm: RawComm) -> Code {
    fake(comm).called("abort", "");
    SUCCESS
}

thread_local! {
    /// Groups that this thread has begun and not ended.
    pub(crate) static GROUPS: Cell<i32> = const { Cell::new(0) };
}

unsafe extern "C" fn group_start() -> Code {
    GROUPS.set(GROUPS.get() + 1);
    SUCCESS
}

unsafe extern "C" fn group_end() -> Code {
    GROUPS.set(GROUPS.get() - 1);
    SUCCESS
}

fn enqueue(comm: RawComm, call: &'static str, arguments: &str) -> Code {
    let fake = fake(comm);
    fake.called(call, arguments);
    fake.enqueued.load(Ordering::SeqCst)
}

unsafe extern "C" fn all_gather(
    mine: *const c_void,
    all: *mut c_void,
    bytes: usize,
    _: c_int,
    comm: RawComm,
    _: *mut c_void,
) -> Code {
    enqueue(comm, "all_gather", &format!(" {mine:?} {all:?} {bytes}"))
}

unsafe extern "C" fn broadcast(
    from: *const c_void,
    to: *mut c_void,
    bytes: usize,
    _: c_int,
    root: c_int,
    comm: RawComm,
    _: *mut c_void,
) -> Code {
    enqueue(comm, "broadcast", &format!(" {from:?} {to:?} {bytes} root {root}"))
}

unsafe extern "C" fn send(
    from: *const c_void,
    bytes: usize,
    _: c_int,
    peer: c_int,
    comm: RawComm,
    _: *mut c_void,
) -> Code {
    enqueue(comm, "send", &format!(" {from:?} {bytes} to {peer}"))
}

unsafe extern "C" fn recv(
    to: *mut c_void,
    bytes: usize,
    _: c_int,
    peer: c_int,
    comm: RawComm,
    _: *mut c_void,
) -> Code {
    enqueue(comm, "recv", &format!(" {to:?} {bytes} from {peer}"))
}

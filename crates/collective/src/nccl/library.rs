use std::error::Error as _;
use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::CollectiveError;

/// The file that packages and containers bring.
pub const LIBRARY_FILE: &str = "libnccl.so.2";

/// `ncclResult_t`.
pub(crate) type Code = c_int;
pub(crate) const SUCCESS: Code = 0;
pub(crate) const IN_PROGRESS: Code = 7;

/// `ncclUint8`: what is moved here are bytes, whatever they mean.
pub(crate) const BYTES: c_int = 1;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(PartialEq, Eq)]
pub(crate) struct RawId(pub(crate) [u8; 128]);

/// `ncclConfig_t` as it was in NCCL 2.14. It has grown since, by its end: newer versions take what is missing to be
/// left to them, as its size and version say.
#[repr(C)]
pub(crate) struct Settings {
    size: usize,
    magic: c_uint,
    version: c_uint,
    pub(crate) blocking: c_int,
}

impl Settings {
    pub(crate) fn non_blocking() -> Self {
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 21_400, blocking: 0 }
    }
}

/// `ncclComm_t`, not null.
pub(crate) type RawComm = *mut c_void;

/// NCCL's functions, of those that are used here, as `nccl.h` declares them; tests put others in their place.
#[derive(Clone, Copy)]
pub(crate) struct Functions {
    pub(crate) get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut RawId) -> Code,
    pub(crate) get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    pub(crate) get_last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
    pub(crate) comm_init_rank_config:
        unsafe extern "C" fn(*mut RawComm, c_int, RawId, c_int, *mut Settings) -> Code,
    pub(crate) comm_get_async_error: unsafe extern "C" fn(RawComm, *mut Code) -> Code,
    pub(crate) comm_finalize: unsafe extern "C" fn(RawComm) -> Code,
    pub(crate) comm_destroy: unsafe extern "C" fn(RawComm) -> Code,
    pub(crate) comm_abort: unsafe extern "C" fn(RawComm) -> Code,
    pub(crate) group_start: unsafe extern "C" fn() -> Code,
    pub(crate) group_end: unsafe extern "C" fn() -> Code,
    pub(crate) all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> Code,
    pub(crate) broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Code,
    pub(crate) send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Code,
    pub(crate) recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> Code,
}

impl Functions {
    fn load(file: &OsStr) -> Result<Self, libloading::Error> {
        // SAFETY: NCCL's initializers do nothing that could disturb this process.
        let library = unsafe { libloading::Library::new(file) }?;
        // SAFETY: each name is declared in nccl.h with the type of the field that takes it.
        let functions = unsafe {
            Self {
                get_version: *library.get("ncclGetVersion")?,
                get_unique_id: *library.get("ncclGetUniqueId")?,
                get_error_string: *library.get("ncclGetErrorString")?,
                get_last_error: *library.get("ncclGetLastError")?,
                comm_init_rank_config: *library.get("ncclCommInitRankConfig")?,
                comm_get_async_error: *library.get("ncclCommGetAsyncError")?,
                comm_finalize: *library.get("ncclCommFinalize")?,
                comm_destroy: *library.get("ncclCommDestroy")?,
                comm_abort: *library.get("ncclCommAbort")?,
                group_start: *library.get("ncclGroupStart")?,
                group_end: *library.get("ncclGroupEnd")?,
                all_gather: *library.get("ncclAllGather")?,
                broadcast: *library.get("ncclBroadcast")?,
                send: *library.get("ncclSend")?,
                recv: *library.get("ncclRecv")?,
            }
        };
        // Never unloaded: it has threads of its own that may outlive every communicator.
        std::mem::forget(library);
        Ok(functions)
    }

    /// A call went well, or goes on by itself.
    pub(crate) fn check(&self, call: &'static str, code: Code) -> Result<(), CollectiveError> {
        if matches!(code, SUCCESS | IN_PROGRESS) { Ok(()) } else { Err(self.error(call, code)) }
    }

    pub(crate) fn error(&self, call: &'static str, code: Code) -> CollectiveError {
        // SAFETY: any code has a text, and the communicator may be null; both give static strings or null.
        let (general, last) = unsafe {
            (text((self.get_error_string)(code)), text((self.get_last_error)(std::ptr::null_mut())))
        };
        // What it advises is in our own words already.
        let general = general.split(" (run with").next().unwrap_or_default();
        let reason = if last.is_empty() { general.to_owned() } else { format!("{general}: {last}") };
        CollectiveError::Nccl { call, reason }
    }
}

/// # Safety
/// `words` is null or a string that ends with a zero.
unsafe fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().trim().to_owned()
}

/// NCCL, loaded at run time. One process opens it once and keeps it from epoch to epoch.
pub struct Library {
    pub(crate) functions: Functions,
    version: Version,
    /// The newest epoch for which an id was used; 0, which is no epoch, if none was.
    newest: AtomicU64,
}

impl Library {
    /// Loads NCCL from `file`: [`LIBRARY_FILE`], for which the system's loader searches, or a path.
    pub fn open(file: impl AsRef<OsStr>) -> Result<Self, CollectiveError> {
        let functions = Functions::load(file.as_ref()).map_err(|error| {
            // The loader's own words, which name the file that is wrong.
            let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            CollectiveError::NcclMissing { reason }
        })?;
        Self::new(functions)
    }

    pub(crate) fn new(functions: Functions) -> Result<Self, CollectiveError> {
        let mut code = 0;
        // SAFETY: it writes one int.
        functions.check("ncclGetVersion", unsafe { (functions.get_version)(&raw mut code) })?;
        let version = Version { major: code / 10_000, minor: code / 100 % 100, patch: code % 100 };
        Ok(Self { functions, version, newest: AtomicU64::new(0) })
    }

    /// The library's own version.
    pub fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn unique_id(&self) -> Result<RawId, CollectiveError> {
        let mut id = RawId([0; 128]);
        // SAFETY: it writes one id.
        let code = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.functions.check("ncclGetUniqueId", code)?;
        Ok(id)
    }

    /// From now on no id of `epoch` or of an older one is used here. Tells whether none was so far: epochs only grow,
    /// so an id that comes a second time is one of these.
    pub(crate) fn begin(&self, epoch: u64) -> bool {
        self.newest.fetch_max(epoch, Ordering::Relaxed) < epoch
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL {}", self.version)
    }
}

/// A version of NCCL, such as 2.30.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: i32,
    /// The second one.
    pub minor: i32,
    /// The third one.
    pub patch: i32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

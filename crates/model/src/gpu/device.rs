//! What the backend asks of a device.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A place in a device's memory.
pub type Address = u64;

/// A GPU, or what stands for one. Work is done in the order in which it is given, behind the caller's back; only
/// [`download`](Self::download) waits. Any thread may call.
pub trait Device: Send + Sync {
    /// Its name, as a person knows it.
    fn name(&self) -> &str;

    /// Its compute capability, major and minor digit: 90 is 9.0. What it computes differs from another's.
    fn architecture(&self) -> u16;

    /// Dynamic shared memory that a block may have, in bytes.
    fn shared_bytes_max(&self) -> u32;

    /// Makes it the calling thread's own, for libraries that ask for that.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    fn bind(&self) -> Result<(), DeviceError>;

    /// The stream that all work is put on, for libraries that put something there: a `CUstream`.
    fn stream(&self) -> *mut c_void;

    /// Whether all work so far is done.
    ///
    /// # Errors
    /// [`DeviceError::Call`], also for whatever went wrong in a kernel before.
    fn is_idle(&self) -> Result<bool, DeviceError>;

    /// Its memory.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    fn memory(&self) -> Result<DeviceMemory, DeviceError>;

    /// So many bytes, all zero, at a multiple of 256. [`Buffer`] gives them back.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] if there are not as many.
    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError>;

    /// Gives memory back that was allocated, once all work so far is done.
    fn free(&self, address: Address);

    /// What the other ranks of this host need to reach memory that was allocated here.
    ///
    /// # Errors
    /// [`DeviceError::Call`] if that is not possible.
    fn share(&self, address: Address) -> Result<Shared, DeviceError>;

    /// Where this device reaches what another rank shares, from its beginning on, until it is [let go](Self::unmap).
    ///
    /// # Errors
    /// [`DeviceError::Call`] if it does not, as between GPUs that nothing connects and containers that are kept apart.
    fn map(&self, shared: &Shared) -> Result<Address, DeviceError>;

    /// Lets memory go that was mapped, and that no work so far uses.
    fn unmap(&self, shared: &Shared, address: Address);

    /// A word of the host's memory, 0, that kernels read at the same address. [`Word`] gives it back.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    fn word(&self) -> Result<NonNull<AtomicU32>, DeviceError>;

    /// Gives a word back that no work reads any more.
    ///
    /// # Safety
    /// It is this device's, and nobody looks at it afterwards.
    unsafe fn free_word(&self, word: NonNull<AtomicU32>);

    /// Copies `bytes` to the device; they may be changed as soon as this returns.
    ///
    /// # Safety
    /// So many bytes stand allocated at `to`.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Waits for all work so far, and fills `bytes` from the device.
    ///
    /// # Safety
    /// So many bytes stand allocated at `from`.
    ///
    /// # Errors
    /// [`DeviceError::Call`], also for whatever went wrong in a kernel before.
    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Host memory of so many bytes to copy from, and to.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    fn stage(self: Arc<Self>, bytes: usize) -> Result<Box<dyn Stage>, DeviceError>;

    /// Opens the library that [multiplies](Self::multiply), if that was not done before.
    ///
    /// # Errors
    /// [`DeviceError::Library`], [`DeviceError::Call`].
    fn open_library(&self) -> Result<(), DeviceError>;

    /// Multiplies by a library, which adds up in whatever order is quick.
    ///
    /// # Safety
    /// The matrices are as long as the product says.
    ///
    /// # Errors
    /// As [`open_library`](Self::open_library).
    unsafe fn multiply(&self, product: &Gemm) -> Result<(), DeviceError>;

    /// Runs a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and point to memory that holds what it takes from there.
    ///
    /// # Errors
    /// [`DeviceError::Kernel`] if there is none of this name, [`DeviceError::Call`].
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), DeviceError>;

    /// Runs `work`, which puts kernels on the stream and does nothing else. What has the same `key` launches the same kernels with the
    /// same arguments: a device may have kept them and launch them at once.
    ///
    /// # Errors
    /// As `work`; [`DeviceError::Call`].
    fn replay(&self, key: u64, work: &mut dyn FnMut() -> Result<(), DeviceError>) -> Result<(), DeviceError>;

    /// Forgets all that was kept to be replayed.
    fn forget(&self);
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not taken by anybody.
    pub free: u64,
    /// All.
    pub total: u64,
}

/// Memory of the host that a device reads and writes behind the caller's back, in order with its work: whoever has sent something, or
/// will receive it, keeps off these bytes until that is done. Dropping it waits.
pub trait Stage: Send {
    /// All of it.
    fn bytes(&mut self) -> &mut [u8];

    /// Copies so many bytes from `at` on to the device.
    ///
    /// # Safety
    /// As many stand allocated at `to`.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    ///
    /// # Panics
    /// If they end behind it.
    unsafe fn send(&mut self, at: usize, to: Address, len: usize) -> Result<(), DeviceError>;

    /// Copies so many bytes from the device to `at`.
    ///
    /// # Safety
    /// As many stand allocated at `from`.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    ///
    /// # Panics
    /// If they end behind it.
    unsafe fn receive(&mut self, at: usize, from: Address, len: usize) -> Result<(), DeviceError>;

    /// Whether all copies are done.
    ///
    /// # Errors
    /// [`DeviceError::Call`], also for whatever went wrong before.
    fn is_done(&self) -> Result<bool, DeviceError>;

    /// Returns when all copies are done.
    ///
    /// # Errors
    /// As [`is_done`](Self::is_done).
    fn wait(&self) -> Result<(), DeviceError>;
}

/// A product of matrices of bf16, whose sums are f32: `out[token][row] = Σ weights[row][k] · x[token][k]`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `[rows][stride]`.
    pub weights: Address,
    /// `[tokens][stride]`.
    pub x: Address,
    /// `[tokens][rows]`, f32.
    pub out: Address,
    /// Outputs.
    pub rows: usize,
    /// Tokens.
    pub tokens: usize,
    /// Inputs.
    pub inputs: usize,
    /// Numbers from a row of either matrix to the next.
    pub stride: usize,
    /// Memory that the library may work in, and its bytes.
    pub scratch: (Address, usize),
}

/// A kernel, its grid and its arguments.
pub struct Launch<'a> {
    /// Its name.
    pub kernel: &'a CStr,
    /// Blocks in each direction.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    arguments: *const c_void,
    argument_bytes: usize,
    borrowed: PhantomData<&'a ()>,
}

impl<'a> Launch<'a> {
    /// A launch with one argument, a structure that is laid out as in C.
    pub fn new<A>(
        kernel: &'a CStr,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &'a A,
    ) -> Self {
        let argument_bytes = size_of::<A>();
        let arguments = std::ptr::from_ref(arguments).cast();
        Self { kernel, grid, threads, shared_bytes, arguments, argument_bytes, borrowed: PhantomData }
    }

    /// Where the argument is, and its size in bytes.
    pub fn arguments(&self) -> (*const c_void, usize) {
        (self.arguments, self.argument_bytes)
    }
}

/// Memory of a device, until it is dropped.
pub struct Buffer {
    device: Arc<dyn Device>,
    address: Address,
    bytes: usize,
}

impl Buffer {
    /// So many bytes, all zero.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn zeroed(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let address = device.allocate(bytes)?;
        Ok(Self { device: Arc::clone(device), address, bytes })
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `bytes` into it, `offset` bytes behind its beginning.
    ///
    /// # Errors
    /// As [`Device::upload`].
    ///
    /// # Panics
    /// If they end behind it.
    pub fn upload(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        assert!(
            bytes.len() <= self.bytes && offset <= self.bytes - bytes.len(),
            "an upload within the buffer"
        );
        // SAFETY: the buffer holds them.
        unsafe { self.device.upload(self.address + offset as u64, bytes) }
    }

    /// Host memory of so many bytes for its device.
    ///
    /// # Errors
    /// As [`Device::stage`].
    pub fn stage(&self, bytes: usize) -> Result<Box<dyn Stage>, DeviceError> {
        Arc::clone(&self.device).stage(bytes)
    }

    /// As [`upload`](Self::upload), from `stage`.
    ///
    /// # Errors
    /// As [`Stage::send`].
    ///
    /// # Panics
    /// If they end behind it.
    pub fn take(&self, offset: usize, stage: &mut dyn Stage, from: Range<usize>) -> Result<(), DeviceError> {
        let len = from.len();
        assert!(len <= self.bytes && offset <= self.bytes - len, "an upload within the buffer");
        // SAFETY: the buffer holds them.
        unsafe { stage.send(from.start, self.address + offset as u64, len) }
    }

    /// As [`download`](Self::download), to `stage`, so many bytes.
    ///
    /// # Errors
    /// As [`Stage::receive`].
    ///
    /// # Panics
    /// If they end behind it.
    pub fn give(&self, stage: &mut dyn Stage, to: Range<usize>) -> Result<(), DeviceError> {
        assert!(to.len() <= self.bytes, "a download within the buffer");
        // SAFETY: the buffer holds them.
        unsafe { stage.receive(to.start, self.address, to.len()) }
    }

    /// Fills `bytes` from its beginning on.
    ///
    /// # Errors
    /// As [`Device::download`].
    ///
    /// # Panics
    /// If they end behind it.
    pub fn download(&self, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.download_at(0, bytes)
    }

    /// The same from `offset` bytes behind its beginning on.
    ///
    /// # Errors
    /// As [`Device::download`].
    ///
    /// # Panics
    /// If they end behind it.
    pub fn download_at(&self, offset: usize, bytes: &mut [u8]) -> Result<(), DeviceError> {
        assert!(
            bytes.len() <= self.bytes && offset <= self.bytes - bytes.len(),
            "a download within the buffer"
        );
        // SAFETY: the buffer holds them.
        unsafe { self.device.download(self.address + offset as u64, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.free(self.address);
    }
}

/// Memory of a device as other ranks of its host can name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// A number that no other process has.
    pub process: u64,
    /// A number that no other device has.
    pub device: u128,
    /// Where it is in that process.
    pub address: Address,
    /// What the driver calls it between processes.
    pub handle: [u8; 64],
}

impl Shared {
    /// Bytes of one that is sent.
    pub(super) const BYTES: usize = 8 + 16 + 8 + 64;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let Self { process, device, address, handle } = self;
        let parts = [&process.to_le_bytes()[..], &device.to_le_bytes(), &address.to_le_bytes(), &handle];
        parts.concat().try_into().expect("as many bytes")
    }

    pub(super) fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let (process, rest) = bytes.split_first_chunk().expect("8 bytes");
        let (device, rest) = rest.split_first_chunk().expect("16 bytes");
        let (address, handle) = rest.split_first_chunk().expect("8 bytes");
        Self {
            process: u64::from_le_bytes(*process),
            device: u128::from_le_bytes(*device),
            address: Address::from_le_bytes(*address),
            handle: handle.try_into().expect("what is left"),
        }
    }
}

/// A word that the host tells kernels, until it is dropped.
pub(super) struct Word {
    device: Arc<dyn Device>,
    at: NonNull<AtomicU32>,
}

// SAFETY: any thread may call a device, and an atomic is there for all.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

impl Word {
    pub(super) fn zero(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        Ok(Self { device: Arc::clone(device), at: device.word()? })
    }

    pub(super) fn address(&self) -> Address {
        self.at.as_ptr().expose_provenance() as Address
    }

    pub(super) fn set(&self) {
        // SAFETY: the word is the device's until it is given back.
        unsafe { self.at.as_ref() }.store(1, Ordering::Release);
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        // SAFETY: the device's, and nobody else has it.
        unsafe { self.device.free_word(self.at) };
    }
}

/// Why a device does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A library is not there.
    #[error("{library} was not found: {needs}")]
    Library {
        /// Its file's name.
        library: &'static str,
        /// What brings it.
        needs: &'static str,
    },
    /// This binary was built without the kernels.
    #[error(
        "this binary holds no CUDA kernels: build it with CUDA_HOME set to a CUDA toolkit of version 13 (`make cuda` brings one)"
    )]
    NotBuilt,
    /// No such GPU.
    #[error("there is no GPU {index}: {count} can be seen (CUDA_VISIBLE_DEVICES decides which)")]
    Absent {
        /// The one that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// Too small for the kernels.
    #[error(
        "{name} gives a block {shared_bytes} bytes of shared memory, the kernels need {needed}: A100, Hopper, Blackwell data-centre GPUs and newer have it"
    )]
    Small {
        /// The GPU.
        name: String,
        /// What it has.
        shared_bytes: u32,
        /// What is needed.
        needed: u32,
    },
    /// Too little memory.
    #[error(
        "{asked} bytes of GPU memory were asked for, {free} of {total} are free: leave more to it (a smaller KV memory, fewer \
             tokens a step, more ranks), or end what holds the rest"
    )]
    Memory {
        /// Bytes.
        asked: u64,
        /// Bytes.
        free: u64,
        /// Bytes.
        total: u64,
    },
    /// No kernel of this name.
    #[error("the kernel {0} is not there: kernels and binary are of different builds")]
    Kernel(String),
    /// Something else ended a sequence of launches; whoever launched knows what.
    #[error("a sequence of launches was given up")]
    GivenUp,
    /// A call of the driver failed.
    #[error("{call} failed: {says}")]
    Call {
        /// Which.
        call: &'static str,
        /// The driver's words.
        says: String,
    },
}

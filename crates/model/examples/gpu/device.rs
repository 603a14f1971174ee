//! The GPU, or what stands for one; and one that is watched.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use galerne_emulator::Emulator;
use galerne_model::gpu::{Address, Cuda, Device, DeviceError, DeviceMemory, Gemm, Launch, Shared, Stage};
use galerne_types::{Compute, Quantize};

use crate::Outcome;

/// Memory of an emulated GPU in bytes.
const EMULATED_BYTES: u64 = 4 << 30;

/// Where devices come from, and how they hold weights.
pub(crate) struct Gpus {
    pub(crate) emulate: bool,
    pub(crate) quantize: Option<Quantize>,
    /// Whether many tokens are a library's.
    pub(crate) fast: bool,
}

impl Gpus {
    /// How GPUs compute with a library for many tokens, or without.
    pub(crate) fn compute(fast: bool) -> Compute {
        const HOPPER: u16 = 90;
        if fast { Compute::Fast(HOPPER) } else { Compute::Tensor(HOPPER) }
    }

    /// The first GPU, anew: each has a stream of its own.
    pub(crate) fn open(&self) -> Outcome<Arc<dyn Device>> {
        Ok(if self.emulate { Arc::new(Emulator::new(EMULATED_BYTES)) } else { Arc::new(Cuda::open(0)?) })
    }
}

/// A GPU that does work several times over, or tells how long each kernel takes.
///
/// A graph leaves the same behind if it runs twice, and so does each kernel outside of one. A step that does its work k times takes
/// what the GPU needs k times, and what it waits for the host but once: so the one is told from the other.
pub(crate) struct Watched {
    inner: Arc<dyn Device>,
    times: AtomicU32,
    in_graph: AtomicBool,
    /// For each kernel, launches and seconds, while that is asked for.
    kernels: Mutex<Option<Kernels>>,
    /// Some memory, to wait for.
    probe: Address,
}

/// Launches and seconds by kernel.
pub(crate) type Kernels = BTreeMap<CString, (usize, f64)>;

impl Watched {
    pub(crate) fn new(inner: Arc<dyn Device>) -> Outcome<Self> {
        let probe = inner.allocate(1)?;
        Ok(Self {
            inner,
            times: AtomicU32::new(1),
            in_graph: AtomicBool::new(false),
            kernels: Mutex::default(),
            probe,
        })
    }

    /// From now on all work is done so many times.
    pub(crate) fn repeat(&self, times: u32) {
        self.times.store(times, Ordering::Relaxed);
    }

    /// Runs `work` kernel by kernel, without graphs, and tells how long each took; with the time to launch one and to wait for
    /// it, which is 5 to 10 µs.
    pub(crate) fn by_kernel(&self, work: impl FnOnce() -> Outcome<()>) -> Outcome<Kernels> {
        *self.locked() = Some(Kernels::new());
        let worked = work();
        let kernels = self.locked().take().unwrap_or_default();
        worked.map(|()| kernels)
    }

    /// Returns when all work so far is done.
    pub(crate) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: a byte stands allocated there.
        unsafe { self.inner.download(self.probe, &mut [0]) }
    }

    /// Does what a kernel does: so often, or telling how long it takes.
    fn work(&self, kernel: &CStr, work: impl Fn() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        if let Some(kernels) = &mut *self.locked() {
            self.wait()?;
            let start = Instant::now();
            work()?;
            self.wait()?;
            let (launches, seconds) = kernels.entry(kernel.to_owned()).or_default();
            *launches += 1;
            *seconds += start.elapsed().as_secs_f64();
            return Ok(());
        }
        let times =
            if self.in_graph.load(Ordering::Relaxed) { 1 } else { self.times.load(Ordering::Relaxed) };
        (0..times).try_for_each(|_| work())
    }

    fn locked(&self) -> MutexGuard<'_, Option<Kernels>> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.inner.free(self.probe);
    }
}

impl Device for Watched {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn architecture(&self) -> u16 {
        self.inner.architecture()
    }

    fn shared_bytes_max(&self) -> u32 {
        self.inner.shared_bytes_max()
    }

    fn bind(&self) -> Result<(), DeviceError> {
        self.inner.bind()
    }

    fn stream(&self) -> *mut c_void {
        self.inner.stream()
    }

    fn is_idle(&self) -> Result<bool, DeviceError> {
        self.inner.is_idle()
    }

    fn forget(&self) {
        self.inner.forget();
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.inner.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.inner.allocate(bytes)
    }

    fn free(&self, address: Address) {
        self.inner.free(address);
    }

    fn share(&self, address: Address) -> Result<Shared, DeviceError> {
        self.inner.share(address)
    }

    fn map(&self, shared: &Shared) -> Result<Address, DeviceError> {
        self.inner.map(shared)
    }

    fn unmap(&self, shared: &Shared, address: Address) {
        self.inner.unmap(shared, address);
    }

    fn word(&self) -> Result<NonNull<AtomicU32>, DeviceError> {
        self.inner.word()
    }

    unsafe fn free_word(&self, word: NonNull<AtomicU32>) {
        // SAFETY: the caller's.
        unsafe { self.inner.free_word(word) }
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        unsafe { self.inner.upload(to, bytes) }
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        unsafe { self.inner.download(from, bytes) }
    }

    fn stage(self: Arc<Self>, bytes: usize) -> Result<Box<dyn Stage>, DeviceError> {
        Arc::clone(&self.inner).stage(bytes)
    }

    fn open_library(&self) -> Result<(), DeviceError> {
        self.inner.open_library()
    }

    unsafe fn multiply(&self, product: &Gemm) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        self.work(c"cublasLtMatmul", || unsafe { self.inner.multiply(product) })
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        self.work(launch.kernel, || unsafe { self.inner.launch(launch) })
    }

    fn replay(&self, key: u64, work: &mut dyn FnMut() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        if self.locked().is_some() {
            return work();
        }
        self.in_graph.store(true, Ordering::Relaxed);
        let replayed =
            (0..self.times.load(Ordering::Relaxed)).try_for_each(|_| self.inner.replay(key, &mut *work));
        self.in_graph.store(false, Ordering::Relaxed);
        replayed
    }
}

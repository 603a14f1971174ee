//! An NVIDIA GPU by its driver, which is looked for when it is asked for.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys;

use super::device::{Address, Device, DeviceError, DeviceMemory, Gemm, Launch, Shared, Stage};
use super::kernels::SHARED_BYTES_NEEDED;
use super::library::Library;

/// All kernels, compiled for several architectures (`build.rs`); empty if there was no compiler.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Shared memory that every block may have; for more a kernel must ask.
const SHARED_BYTES_FREE: u32 = 48 << 10;
/// Sequences of launches that are kept to be launched at once.
const GRAPHS_MAX: usize = 256;
/// Bytes of a GPU's name.
const NAME_BYTES: usize = 256;

/// One GPU: its primary context and one stream.
pub struct Cuda {
    name: String,
    architecture: u16,
    shared_bytes_max: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    stream: sys::CUstream,
    known: Mutex<Known>,
    /// Once it is asked for.
    library: Mutex<Option<Library>>,
}

/// What was looked up or made once.
#[derive(Default)]
struct Known {
    /// Kernels, and the shared memory that each was given leave for.
    kernels: BTreeMap<CString, (sys::CUfunction, u32)>,
    graphs: BTreeMap<u64, sys::CUgraphExec>,
}

// SAFETY: the driver may be called from any thread, once the context is that thread's current one.
unsafe impl Send for Cuda {}
// SAFETY: as above; what is ours is behind a lock.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Opens GPU `index` of those that the driver shows.
    ///
    /// # Errors
    /// [`DeviceError::NotBuilt`], [`DeviceError::Library`] without a driver, [`DeviceError::Absent`],
    /// [`DeviceError::Call`].
    pub fn open(index: usize) -> Result<Self, DeviceError> {
        if KERNELS.is_empty() {
            return Err(DeviceError::NotBuilt);
        }
        // SAFETY: it only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            let needs = "it comes with NVIDIA's driver; in a container the runtime must bring it in (`--gpus`, or the device plugin)";
            return Err(DeviceError::Library { library: "libcuda.so.1", needs });
        }
        let (mut count, mut device, mut context) = (0, 0, ptr::null_mut());
        let (mut module, mut stream) = (ptr::null_mut(), ptr::null_mut());
        let mut name = [0 as std::ffi::c_char; NAME_BYTES];
        // SAFETY: each out-pointer is to a variable of its type, and the fatbin is as nvcc made it.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            let absent = DeviceError::Absent { index, count: count.max(0) as usize };
            let ordinal = c_int::try_from(index).ok().filter(|ordinal| *ordinal < count).ok_or(absent)?;
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))?;
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), NAME_BYTES as c_int, device))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            check("cuModuleLoadData", sys::cuModuleLoadData(&mut module, KERNELS.as_ptr().cast()))?;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, NON_BLOCKING))?;
        }
        // SAFETY: the driver ends the name with a zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the value is a variable of its type.
            let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
            check("cuDeviceGetAttribute", result).map(|()| value as u32)
        };
        use sys::CUdevice_attribute as Attribute;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let architecture = (major * 10 + minor) as u16;
        let shared_bytes_max = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if shared_bytes_max < SHARED_BYTES_NEEDED {
            return Err(DeviceError::Small {
                name,
                shared_bytes: shared_bytes_max,
                needed: SHARED_BYTES_NEEDED,
            });
        }
        Ok(Self {
            name,
            architecture,
            shared_bytes_max,
            device,
            context,
            module,
            stream,
            known: Mutex::default(),
            library: Mutex::default(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the library, which is opened if it is not open.
    fn with_library<T>(
        &self,
        work: impl FnOnce(&mut Library) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        self.bind()?;
        let mut library = self.library.lock().unwrap_or_else(PoisonError::into_inner);
        let library = match &mut *library {
            Some(library) => library,
            none => none.insert(Library::open()?),
        };
        work(library)
    }

    /// A kernel that may have so much dynamic shared memory.
    fn kernel(&self, name: &CStr, shared_bytes: u32) -> Result<sys::CUfunction, DeviceError> {
        let mut known = self.known();
        let (mut function, mut allowed) = (ptr::null_mut(), SHARED_BYTES_FREE);
        if let Some(kernel) = known.kernels.get(name) {
            (function, allowed) = *kernel;
        } else {
            // SAFETY: the module is loaded.
            let result = unsafe { sys::cuModuleGetFunction(&mut function, self.module, name.as_ptr()) };
            if result == sys::CUresult::CUDA_ERROR_NOT_FOUND {
                return Err(DeviceError::Kernel(name.to_string_lossy().into_owned()));
            }
            check("cuModuleGetFunction", result)?;
        }
        if shared_bytes > allowed {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is the module's.
            let result = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as c_int) };
            check("cuFuncSetAttribute", result)?;
            allowed = shared_bytes;
        }
        known.kernels.insert(name.to_owned(), (function, allowed));
        Ok(function)
    }

    /// A number that no other GPU has.
    fn uuid(&self) -> Result<u128, DeviceError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the number is a variable.
        unsafe { check("cuDeviceGetUuid", sys::cuDeviceGetUuid_v2(&mut uuid, self.device))? };
        Ok(u128::from_le_bytes(uuid.bytes.map(|byte| byte as u8)))
    }

    /// Runs `work` while the stream only writes down what it is given.
    fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<sys::CUgraphExec, DeviceError> {
        let (mut graph, mut launched) = (ptr::null_mut(), ptr::null_mut());
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours, and each graph is destroyed once.
        unsafe {
            check("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(self.stream, mode))?;
            let worked = work();
            let ended = check("cuStreamEndCapture", sys::cuStreamEndCapture(self.stream, &mut graph));
            worked.and(ended)?;
            let made = check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut launched, graph, 0));
            check("cuGraphDestroy", sys::cuGraphDestroy(graph))?;
            made?;
        }
        Ok(launched)
    }
}

/// A number that no other process has, in whatever container.
fn process() -> u64 {
    static OWN: OnceLock<u64> = OnceLock::new();
    *OWN.get_or_init(|| RandomState::new().hash_one(std::process::id()))
}

/// The stream does not wait for the legacy default stream.
const NON_BLOCKING: u32 = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
/// Nobody asks events when they were.
const WITHOUT_TIMES: u32 = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;

/// Memory that stays where it is, so that the device reaches it by itself.
struct Pinned {
    cuda: Arc<Cuda>,
    at: NonNull<u8>,
    bytes: usize,
    /// Behind the last copy on the stream; null until it is made.
    copied: sys::CUevent,
}

// SAFETY: the memory is this one's, and the driver may be called from any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Puts a copy of `bytes` on the stream, and the event behind it.
    fn copy(
        &self,
        bytes: Range<usize>,
        copy: impl FnOnce(*mut c_void, sys::CUstream) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.bytes, "a copy within the memory");
        self.cuda.bind()?;
        // SAFETY: within the memory.
        copy(unsafe { self.at.add(bytes.start) }.as_ptr().cast(), self.cuda.stream)?;
        // SAFETY: both are ours.
        unsafe { check("cuEventRecord", sys::cuEventRecord(self.copied, self.cuda.stream)) }
    }
}

impl Stage for Pinned {
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes, all written once, and nobody else's but the device's, which knows its own.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }

    unsafe fn send(&mut self, at: usize, to: Address, len: usize) -> Result<(), DeviceError> {
        self.copy(at..at + len, |from, stream| {
            // SAFETY: the caller's; the bytes stay as they are until the event.
            check("cuMemcpyHtoDAsync", unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, len, stream) })
        })
    }

    unsafe fn receive(&mut self, at: usize, from: Address, len: usize) -> Result<(), DeviceError> {
        self.copy(at..at + len, |to, stream| {
            // SAFETY: the caller's; nobody looks at the bytes before the event.
            check("cuMemcpyDtoHAsync", unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, len, stream) })
        })
    }

    fn is_done(&self) -> Result<bool, DeviceError> {
        self.cuda.bind()?;
        // SAFETY: the event is ours. One that was not recorded is there.
        match unsafe { sys::cuEventQuery(self.copied) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.cuda.bind()?;
        // SAFETY: as above.
        unsafe { check("cuEventSynchronize", sys::cuEventSynchronize(self.copied)) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Of a device that fails nobody knows what it still reads.
        if self.wait().is_ok() {
            // SAFETY: ours, and read by nobody. What the driver keeps it gives back when the process ends.
            let _ =
                unsafe { (sys::cuEventDestroy_v2(self.copied), sys::cuMemFreeHost(self.at.as_ptr().cast())) };
        }
    }
}

impl Device for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn architecture(&self) -> u16 {
        self.architecture
    }

    fn shared_bytes_max(&self) -> u32 {
        self.shared_bytes_max
    }

    fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained.
        unsafe { check("cuCtxSetCurrent", sys::cuCtxSetCurrent(self.context)) }
    }

    fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    fn is_idle(&self) -> Result<bool, DeviceError> {
        self.bind()?;
        // SAFETY: the stream is ours.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", result).map(|()| true),
        }
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are variables of their type.
        unsafe { check("cuMemGetInfo", sys::cuMemGetInfo_v2(&mut free, &mut total))? };
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: the address is a variable; what was allocated is as long as what is set to zero.
        unsafe {
            let result = sys::cuMemAlloc_v2(&mut address, bytes);
            if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let DeviceMemory { free, total } = self.memory()?;
                return Err(DeviceError::Memory { asked: bytes as u64, free, total });
            }
            check("cuMemAlloc", result)?;
            check("cuMemsetD8Async", sys::cuMemsetD8Async(address, 0, bytes, self.stream))?;
        }
        Ok(address)
    }

    fn free(&self, address: Address) {
        // A device that fails has no memory to give back; whoever uses it next hears of it.
        if self.bind().is_ok() {
            // SAFETY: the address was allocated; the stream's work so far is done with it.
            let _ = unsafe { (sys::cuStreamSynchronize(self.stream), sys::cuMemFree_v2(address)) };
        }
    }

    fn share(&self, address: Address) -> Result<Shared, DeviceError> {
        self.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the handle is a variable, and the address was allocated.
        unsafe { check("cuIpcGetMemHandle", sys::cuIpcGetMemHandle(&mut handle, address))? };
        let handle = handle.reserved.map(|byte| byte as u8);
        Ok(Shared { process: process(), device: self.uuid()?, address, handle })
    }

    fn map(&self, shared: &Shared) -> Result<Address, DeviceError> {
        self.bind()?;
        if shared.process == process() {
            let says = || "ranks of one process have several GPUs".to_owned();
            let same = self.uuid()? == shared.device;
            return same
                .then_some(shared.address)
                .ok_or_else(|| DeviceError::Call { call: "map", says: says() });
        }
        let handle = sys::CUipcMemHandle { reserved: shared.handle.map(|byte| byte as std::ffi::c_char) };
        let peers = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the address is a variable.
        let result = unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, peers) };
        check("cuIpcOpenMemHandle", result).map(|()| address)
    }

    fn unmap(&self, shared: &Shared, address: Address) {
        if shared.process != process() && self.bind().is_ok() {
            // SAFETY: mapped by `map`, once. That it cannot be let go is no harm to anybody.
            let _ = unsafe { sys::cuIpcCloseMemHandle(address) };
        }
    }

    fn word(&self) -> Result<NonNull<AtomicU32>, DeviceError> {
        self.bind()?;
        let mut word = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the word is a variable, and as long as what is written.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut word, size_of::<AtomicU32>(), flags))?;
            word.cast::<AtomicU32>().write(AtomicU32::new(0));
        }
        Ok(NonNull::new(word.cast()).expect("memory that was given is somewhere"))
    }

    unsafe fn free_word(&self, word: NonNull<AtomicU32>) {
        if self.bind().is_ok() {
            // SAFETY: the caller's.
            let _ = unsafe { sys::cuMemFreeHost(word.as_ptr().cast()) };
        }
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's. Of memory that is not pinned the driver keeps a copy before this returns.
        let result =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream) };
        check("cuMemcpyHtoDAsync", result)
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's; nobody looks at the bytes before the stream is done.
        unsafe {
            let result = sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), self.stream);
            check("cuMemcpyDtoHAsync", result)?;
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream))
        }
    }

    fn stage(self: Arc<Self>, bytes: usize) -> Result<Box<dyn Stage>, DeviceError> {
        self.bind()?;
        let mut at = ptr::null_mut();
        // SAFETY: both out-pointers are to variables, and the memory is as long as what is written.
        unsafe {
            check("cuMemHostAlloc", sys::cuMemHostAlloc(&mut at, bytes, sys::CU_MEMHOSTALLOC_PORTABLE))?;
            let at = NonNull::new(at.cast()).expect("memory that was given is somewhere");
            at.write_bytes(0, bytes);
            let mut pinned = Pinned { cuda: self, at, bytes, copied: ptr::null_mut() };
            check("cuEventCreate", sys::cuEventCreate(&mut pinned.copied, WITHOUT_TIMES))?;
            Ok(Box::new(pinned))
        }
    }

    fn open_library(&self) -> Result<(), DeviceError> {
        self.with_library(|_| Ok(()))
    }

    unsafe fn multiply(&self, product: &Gemm) -> Result<(), DeviceError> {
        // SAFETY: the caller's; the stream is ours.
        self.with_library(|library| unsafe { library.multiply(product, self.stream.cast()) })
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.bind()?;
        let function = self.kernel(launch.kernel, launch.shared_bytes)?;
        // Kernels wait for those before them themselves, so the next one may begin to load its weights.
        let mut overlap = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig_st {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut overlap,
            numAttrs: 1,
        };
        let mut arguments: [*mut c_void; 1] = [launch.arguments().0.cast_mut()];
        // SAFETY: the caller's; the driver copies the argument before it returns.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), ptr::null_mut()) };
        check("cuLaunchKernelEx", result)
    }

    fn replay(&self, key: u64, work: &mut dyn FnMut() -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        self.bind()?;
        let known = self.known().graphs.get(&key).copied();
        let graph = match known {
            Some(graph) => graph,
            None => {
                let graph = self.capture(work)?;
                if self.known().graphs.len() == GRAPHS_MAX {
                    self.forget();
                }
                self.known().graphs.insert(key, graph);
                graph
            }
        };
        // SAFETY: the graph is kept.
        unsafe { check("cuGraphLaunch", sys::cuGraphLaunch(graph, self.stream)) }
    }

    fn forget(&self) {
        for (_, graph) in std::mem::take(&mut self.known().graphs) {
            // SAFETY: made by `capture`, and destroyed once. That it cannot be destroyed is no harm to anybody.
            let _ = unsafe { sys::cuGraphExecDestroy(graph) };
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        self.forget();
        drop(self.library.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        // SAFETY: nobody uses them any more. If the driver refuses, the process's end gives all back.
        unsafe {
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuModuleUnload(self.module);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

fn check(call: &'static str, result: sys::CUresult) -> Result<(), DeviceError> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the text is a constant of the driver, or stays null for an unknown error.
    let says = unsafe {
        let _ = sys::cuGetErrorString(result, &mut text);
        if text.is_null() {
            format!("{result:?}")
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    };
    Err(DeviceError::Call { call, says })
}

//! A GPU that is not there: the CUDA kernels' own source, compiled for the host and run thread by thread.
//!
//! A block's threads are fibers; barriers, shuffles and tensor-core products are meetings of them (`cuda/emulator.hpp`). What a
//! kernel computes here is what it computes on a GPU, but for the rounding inside a product of fragments and of 2^x. Shared
//! memory that nobody wrote is no number, a kernel that wrote behind the end of what was allocated is named, and a barrier that not
//! all threads come to ends the process with a sentence. It is some hundred thousand times slower than a GPU, and for tests.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_model::gpu::{Address, Device, DeviceError, DeviceMemory, Gemm, Launch, Shared, Stage};

unsafe extern "C" {
    fn galerne_emulate(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: usize,
        arguments: *const c_void,
        argument_bytes: usize,
    ) -> c_int;
}

/// Memory on the host, and the kernels.
pub struct Emulator {
    memory_bytes: u64,
    architecture: u16,
    shared_bytes_max: u32,
    apart: bool,
    memory: Mutex<Memory>,
    late: Mutex<Vec<PutOff>>,
}

#[derive(Default)]
struct Memory {
    taken: u64,
    /// By address.
    blocks: BTreeMap<Address, Block>,
}

/// Memory that was asked for, and behind it lines that nobody may write.
struct Block {
    lines: Box<[Line]>,
    bytes: usize,
}

const LINE_BYTES: usize = 256;
/// Lines behind a block, and what they are full of.
const GUARD_LINES: usize = 64;
const GUARD: [u8; LINE_BYTES] = [0xa5; LINE_BYTES];

impl Block {
    fn zeroed(bytes: usize) -> Self {
        let own = bytes.div_ceil(LINE_BYTES);
        let mut lines = vec![Line([0; LINE_BYTES]); own + GUARD_LINES].into_boxed_slice();
        lines[own..].fill(Line(GUARD));
        Self { lines, bytes }
    }

    /// Bytes that a GPU would take for it.
    fn taken(&self) -> u64 {
        ((self.lines.len() - GUARD_LINES) * LINE_BYTES) as u64
    }

    /// Whether nobody wrote behind its end.
    fn is_whole(&self) -> bool {
        self.lines[self.lines.len() - GUARD_LINES..].iter().all(|line| line.0 == GUARD)
    }
}

/// Host memory from which is copied as late as a GPU may: before its next work.
struct Late {
    gpu: Arc<Emulator>,
    bytes: Vec<u8>,
}

/// A copy to the device that is still to be made.
struct PutOff {
    from: usize,
    to: Address,
    len: usize,
}

impl Stage for Late {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    unsafe fn send(&mut self, at: usize, to: Address, len: usize) -> Result<(), DeviceError> {
        let from = self.bytes[at..at + len].as_ptr().expose_provenance();
        self.gpu.late().push(PutOff { from, to, len });
        Ok(())
    }

    unsafe fn receive(&mut self, at: usize, from: Address, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's.
        unsafe { self.gpu.download(from, &mut self.bytes[at..at + len]) }
    }

    fn is_done(&self) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.gpu.catch_up();
        Ok(())
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.gpu.catch_up();
    }
}

/// What memory is allocated in, so that it begins where a GPU's does.
#[derive(Clone)]
#[repr(align(256))]
struct Line([u8; LINE_BYTES]);

impl Emulator {
    /// A Hopper GPU of so many bytes.
    pub fn new(memory_bytes: u64) -> Self {
        Self {
            memory_bytes,
            architecture: 90,
            shared_bytes_max: u32::MAX,
            apart: false,
            memory: Mutex::default(),
            late: Mutex::default(),
        }
    }

    /// The same of another architecture, ten times its compute capability: it is asked for other kernels.
    pub fn with_architecture(self, architecture: u16) -> Self {
        Self { architecture, ..self }
    }

    /// The same with no more shared memory for a block than this, as older GPUs have it.
    pub fn with_shared_bytes_max(self, shared_bytes_max: u32) -> Self {
        Self { shared_bytes_max, ..self }
    }

    /// The same where nobody else's memory can be reached.
    pub fn apart(self) -> Self {
        Self { apart: true, ..self }
    }

    fn late(&self) -> MutexGuard<'_, Vec<PutOff>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the copies that were put off.
    fn catch_up(&self) {
        for PutOff { from, to, len } in self.late().drain(..) {
            let from: *const u8 = std::ptr::with_exposed_provenance(from);
            // SAFETY: whoever sent these bytes keeps them as they are until now, and as many stand allocated there.
            unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, len) };
        }
    }

    fn locked(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Emulator {
    fn name(&self) -> &str {
        "emulator"
    }

    fn architecture(&self) -> u16 {
        self.architecture
    }

    fn shared_bytes_max(&self) -> u32 {
        self.shared_bytes_max
    }

    fn bind(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stream(&self) -> *mut c_void {
        std::ptr::null_mut()
    }

    fn is_idle(&self) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        Ok(DeviceMemory { free: self.memory_bytes - self.locked().taken, total: self.memory_bytes })
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DeviceError> {
        let (asked, DeviceMemory { free, total }) = (bytes as u64, self.memory()?);
        if asked > free {
            return Err(DeviceError::Memory { asked, free, total });
        }
        let block = Block::zeroed(bytes);
        let mut memory = self.locked();
        let address = block.lines.as_ptr() as Address;
        memory.taken += block.taken();
        memory.blocks.insert(address, block);
        Ok(address)
    }

    fn free(&self, address: Address) {
        self.catch_up();
        let mut memory = self.locked();
        if let Some(block) = memory.blocks.remove(&address) {
            memory.taken -= block.taken();
        }
    }

    fn share(&self, address: Address) -> Result<Shared, DeviceError> {
        let process = std::process::id().into();
        Ok(Shared { process, device: std::ptr::from_ref(self) as usize as u128, address, handle: [0; 64] })
    }

    fn map(&self, shared: &Shared) -> Result<Address, DeviceError> {
        if self.apart || shared.process != u64::from(std::process::id()) {
            let says = "emulators share memory within a process".to_owned();
            return Err(DeviceError::Call { call: "map", says });
        }
        Ok(shared.address)
    }

    fn unmap(&self, _: &Shared, _: Address) {}

    fn word(&self) -> Result<NonNull<AtomicU32>, DeviceError> {
        Ok(NonNull::from(Box::leak(Box::new(AtomicU32::new(0)))))
    }

    unsafe fn free_word(&self, word: NonNull<AtomicU32>) {
        // SAFETY: it came out of a box.
        drop(unsafe { Box::from_raw(word.as_ptr()) });
    }

    unsafe fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        self.catch_up();
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.catch_up();
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn stage(self: Arc<Self>, bytes: usize) -> Result<Box<dyn Stage>, DeviceError> {
        Ok(Box::new(Late { gpu: self, bytes: vec![0; bytes] }))
    }

    fn open_library(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn multiply(&self, product: &Gemm) -> Result<(), DeviceError> {
        self.catch_up();
        let &Gemm { weights, x, out, rows, tokens, inputs, stride, .. } = product;
        let row = |matrix: Address, index: usize| {
            // SAFETY: the caller's.
            unsafe { std::slice::from_raw_parts((matrix as *const u16).add(index * stride), inputs) }
        };
        let wide = |bits: &u16| f32::from_bits(u32::from(*bits) << 16);
        for token in 0..tokens {
            let inputs: Vec<f32> = row(x, token).iter().map(wide).collect();
            for output in 0..rows {
                // From behind: no order that our own products have.
                let terms = row(weights, output).iter().zip(&inputs).rev();
                let sum: f32 = terms.map(|(w, x)| wide(w) * x).sum();
                // SAFETY: the caller's.
                unsafe { (out as *mut f32).add(token * rows + output).write(sum) };
            }
        }
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), DeviceError> {
        self.catch_up();
        let (arguments, bytes) = launch.arguments();
        let name = || launch.kernel.to_string_lossy().into_owned();
        if launch.shared_bytes > self.shared_bytes_max {
            let says = format!("{} cannot have {} bytes of shared memory", name(), launch.shared_bytes);
            return Err(DeviceError::Call { call: "launch", says });
        }
        // SAFETY: the caller's; the name ends with a zero.
        let code = unsafe {
            let (name, grid) = (launch.kernel.as_ptr(), launch.grid.as_ptr());
            galerne_emulate(name, grid, launch.threads, launch.shared_bytes as usize, arguments, bytes)
        };
        let says = match code {
            0 => match self.locked().blocks.values().find(|block| !block.is_whole()) {
                None => return Ok(()),
                Some(block) => format!("{} wrote behind the end of {} bytes", name(), block.bytes),
            },
            1 => return Err(DeviceError::Kernel(name())),
            2 => format!("{} does not take {bytes} bytes of arguments", name()),
            3 => format!("{} cannot have blocks of {} threads", name(), launch.threads),
            _ => "there is no memory for the threads of a block".to_owned(),
        };
        Err(DeviceError::Call { call: "launch", says })
    }

    fn replay(
        &self,
        _key: u64,
        work: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        work()
    }

    fn forget(&self) {}
}

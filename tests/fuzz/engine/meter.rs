//! What an input costs: memory by an allocator that counts, time by the processor's clock.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Counts bytes of all threads: what is held now, and the most that was held since [`start`].
pub(crate) struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

fn shrunk(bytes: usize) {
    HELD.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call is handed to the system's allocator as it came; counting touches two atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if bytes >= layout.size() {
            grown(bytes - layout.size());
        } else {
            shrunk(layout.size() - bytes);
        }
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// One measurement; no two at a time.
pub(crate) struct Meter {
    held: usize,
    cpu: Duration,
}

pub(crate) fn start() -> Meter {
    let held = HELD.load(Ordering::Relaxed);
    PEAK.store(held, Ordering::Relaxed);
    Meter { held, cpu: cpu() }
}

impl Meter {
    /// The most bytes that were held beyond those at the start, and the processor time of all threads.
    pub(crate) fn stop(&self) -> (usize, Duration) {
        (PEAK.load(Ordering::Relaxed).saturating_sub(self.held), cpu().saturating_sub(self.cpu))
    }
}

/// Processor time of this process: other processes on the machine do not count.
fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

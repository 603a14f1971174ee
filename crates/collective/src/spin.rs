use std::hint::spin_loop;
use std::thread::available_parallelism;

/// About 50 µs: longer than a peer on a core of its own lags behind, shorter than to sleep and be woken.
const TRIES_MAX: u32 = 2048;

/// About 1 µs: where the peer needs this very core, spinning only delays it.
const TRIES_CROWDED_MAX: u32 = 64;

/// About 1 µs, as short as it gets.
const TRIES_MIN: u32 = 64;

/// One failure in so many is followed by a long try. Two ranks that both sleep for want of patience meet each
/// other's slow awakening for ever; one patient wait brings them back into step.
const FAILURES_TO_PROBE: u32 = 256;

/// Brief spinning before sleep, as long as it pays: twice as long after a success, half as long after a failure.
#[derive(Debug)]
pub(crate) struct Spin {
    tries: u32,
    tries_max: u32,
    failures: u32,
}

impl Spin {
    /// For a host on which `busy_threads` of the group compute at a time.
    pub(crate) fn new(busy_threads: usize) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        let tries_max = if busy_threads <= cores { TRIES_MAX } else { TRIES_CROWDED_MAX };
        Self { tries: tries_max, tries_max, failures: 0 }
    }

    /// Whether `ready` became true.
    pub(crate) fn until(&mut self, ready: impl Fn() -> bool) -> bool {
        // Says nothing about whether spinning pays.
        if ready() {
            return true;
        }
        for _ in 0..self.tries {
            spin_loop();
            if ready() {
                self.tries = (self.tries * 2).min(self.tries_max);
                return true;
            }
        }
        self.failures = self.failures.wrapping_add(1);
        let probe = self.failures.is_multiple_of(FAILURES_TO_PROBE);
        self.tries = if probe { self.tries_max } else { (self.tries / 2).max(TRIES_MIN) };
        false
    }
}

//! Which edges of the program a run has passed. `make fuzz` compiles with LLVM's coverage counters (SanitizerCoverage,
//! inline 8-bit counters), which a stable compiler can insert; in a build without them nothing calls in here, and no
//! input is ever new.

use std::sync::Mutex;

/// Counters of one object file: address and length.
static COUNTERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Called by each instrumented object file before `main`.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, end: *mut u8) {
    if let Ok(mut counters) = COUNTERS.lock() {
        let (start, length) = (start as usize, (end as usize).saturating_sub(start as usize));
        if length > 0 && !counters.contains(&(start, length)) {
            counters.push((start, length));
        }
    }
}

/// What all runs together have passed.
#[derive(Default)]
pub(crate) struct Seen {
    /// One bit for each order of magnitude of each counter.
    buckets: Vec<u8>,
    /// Counters that were ever above zero.
    pub(crate) edges: usize,
}

impl Seen {
    /// Takes in the counters and sets them to zero. Whether one has reached an order of magnitude that is new.
    pub(crate) fn take(&mut self) -> bool {
        let counters = COUNTERS.lock().map(|counters| counters.clone()).unwrap_or_default();
        let mut new = false;
        let mut place = 0;
        for (start, length) in counters {
            self.buckets.resize(self.buckets.len().max(place + length), 0);
            let mut at = 0;
            while at < length {
                let counter = start + at;
                if counter.is_multiple_of(8) && at + 8 <= length {
                    // Most counters are zero: eight at once.
                    // SAFETY: the compiler keeps these bytes for the whole life of the program, and other threads only
                    // ever store into them; a count that is lost in between is no loss.
                    let eight = unsafe { (counter as *const u64).read_volatile() };
                    if eight == 0 {
                        at += 8;
                        continue;
                    }
                }
                // SAFETY: as above.
                let count = unsafe { (counter as *const u8).read_volatile() };
                if count > 0 {
                    // SAFETY: as above.
                    unsafe { (counter as *mut u8).write_volatile(0) };
                    new |= self.note(place + at, count);
                }
                at += 1;
            }
            place += length;
        }
        new
    }

    /// Whether this counter has never been of this order of magnitude.
    fn note(&mut self, place: usize, count: u8) -> bool {
        let bucket = &mut self.buckets[place];
        let (before, bit) = (*bucket, 1 << count.ilog2());
        self.edges += usize::from(before == 0);
        *bucket |= bit;
        before & bit == 0
    }

    /// Whether the program has counters at all.
    pub(crate) fn is_possible() -> bool {
        COUNTERS.lock().is_ok_and(|counters| !counters.is_empty())
    }
}

//! What the operating system decides for a process: the time and random bytes. On a thread that simulates both come from
//! the seed, wherever they are asked for: in our own code, in the standard library's hash maps, in tokio's `select!`. Other
//! threads get what the system says.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// The clocks of simulated machines begin here, in nanoseconds: a while after 1970, as Unix time.
const BEGAN_NS: u64 = 1_000_000_000 * 1_000_000_000;

/// Wall clocks are ahead by less than this, in nanoseconds: an hour.
const SKEW_NS_MAX: u64 = 3_600 * 1_000_000_000;

thread_local! {
    static DICE: Cell<Option<Dice>> = const { Cell::new(None) };
    static NOW_NS: Cell<u64> = const { Cell::new(0) };
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Copy, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number below `sides`.
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.next() % sides
    }

    /// Whether one of so many chances has come.
    pub(super) fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    /// One of them.
    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        (!from.is_empty()).then(|| &from[self.roll(from.len() as u64) as usize])
    }
}

/// Spreads the bits of a number.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// From now on this thread simulates: its random bytes follow from `seed`, and its clocks stand.
pub(super) fn begin(seed: u64) {
    DICE.set(Some(Dice::new(seed)));
    NOW_NS.set(0);
}

/// The clocks show this, in milliseconds since the beginning.
pub(super) fn set_clock(now_ms: u64) {
    NOW_NS.set(now_ms * 1_000_000);
}

/// In place of libc's: everybody's on Linux who wants random bytes.
///
/// # Safety
/// As getrandom(2): `buffer` has room for `bytes` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, bytes: usize, flags: u32) -> isize {
    let Some(mut dice) = DICE.get() else {
        // SAFETY: as the caller promises.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, bytes, flags) } as isize;
    };
    // SAFETY: as the caller promises.
    let out = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), bytes) };
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&dice.next().to_le_bytes()[..chunk.len()]);
    }
    DICE.set(Some(dice));
    bytes as isize
}

/// By how much a wall clock is wrong now: no two machines' agree, and each leaps. Nothing may follow from what they show.
fn skew_ns() -> u64 {
    mix(NOW_NS.get()) % SKEW_NS_MAX
}

type ClockGettime = unsafe extern "C" fn(libc::clockid_t, *mut libc::timespec) -> c_int;

/// In place of libc's: whoever wants to know the time.
///
/// # Safety
/// As clock_gettime(2): `time` points to a timespec.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if DICE.get().is_none() {
        // SAFETY: as the caller promises.
        return unsafe { real_clock()(clock, time) };
    }
    let now = BEGAN_NS + NOW_NS.get() + if clock == libc::CLOCK_REALTIME { skew_ns() } else { 0 };
    let tv_sec = i64::try_from(now / 1_000_000_000).unwrap_or(i64::MAX);
    let tv_nsec = i64::try_from(now % 1_000_000_000).unwrap_or_default();
    // SAFETY: as the caller promises.
    unsafe { time.write(libc::timespec { tv_sec, tv_nsec }) };
    0
}

/// libc's own, behind ours.
fn real_clock() -> ClockGettime {
    static REAL: OnceLock<ClockGettime> = OnceLock::new();
    *REAL.get_or_init(|| {
        // SAFETY: libc has a function of this name and type.
        unsafe {
            let found = libc::dlsym(libc::RTLD_NEXT, c"clock_gettime".as_ptr());
            assert!(!found.is_null(), "libc has no clock_gettime");
            std::mem::transmute::<*mut c_void, ClockGettime>(found)
        }
    })
}

/// Time for whoever measures how long a simulation takes.
pub(super) fn real_now() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours; the clock exists on every Linux.
    unsafe { real_clock()(libc::CLOCK_MONOTONIC, &raw mut time) };
    std::time::Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

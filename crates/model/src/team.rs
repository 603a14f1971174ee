//! A rank's own threads. They share one job at a time: a number of tasks, cut into zones, one a thread, which each goes
//! through in small ranges and in order, as memory likes to be read; who is done takes ranges of others' zones, so that a
//! thread which the system has put aside delays nobody by more than its current range.
//!
//! A job starts a few hundred times a second and lasts some tens of microseconds, so a thread that has nothing to
//! do spins for a while before it sleeps, and a job does not wait for threads that have not noticed it.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

use crate::cores::Home;
use crate::error::ModelError;

/// Most threads of one rank.
pub(crate) const THREADS_MAX: usize = 256;
/// Rounds of waiting before a thread sleeps: some hundred microseconds, the pause between two decode steps.
const SPINS: usize = 8_000;
/// The same where threads outnumber cores and a spinning one may keep another from working.
const SPINS_CROWDED: usize = 64;

/// Most zones of a job; more threads share them.
const ZONES_MAX: usize = 16;

/// `state` counts the threads in the job in its low half and generations in its high half: odd while a job is open.
const GENERATION: u64 = 1 << 32;

/// A team of `threads` threads; the caller of [`each`](Team::each) is one of them.
pub(crate) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    spins: usize,
}

struct Shared {
    state: AtomicU64,
    /// The next task of each zone of the open job.
    next: [Next; ZONES_MAX],
    sleepers: AtomicUsize,
    stop: AtomicBool,
    failed: AtomicBool,
    /// Written by the leader while no thread is in a job; read by threads that entered one.
    job: UnsafeCell<Option<Job>>,
}

/// A cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Next(AtomicUsize);

// SAFETY: `job` is written only between jobs, when no thread has entered one, and read only within; see `enter`.
unsafe impl Sync for Shared {}

#[derive(Clone)]
struct Job {
    run: *const (dyn Fn(usize, Range<usize>) + Sync),
    tasks: usize,
    grain: usize,
    threads: usize,
    leader: Thread,
}

impl Job {
    fn zones(&self) -> usize {
        self.threads.min(ZONES_MAX)
    }

    /// Where a zone begins, and the one before it ends.
    fn start(&self, zone: usize) -> usize {
        self.tasks * zone / self.zones()
    }
}

// SAFETY: `run` points to a `Sync` closure that outlives the job, as the leader waits in `each` until all have left.
unsafe impl Send for Job {}

impl Team {
    /// Starts `threads - 1` helpers. `crowded`: threads outnumber the cores. `homes`: where each thread is bound, the caller
    /// first; none is if there are none.
    pub(crate) fn new(threads: usize, crowded: bool, homes: Vec<Home>) -> Result<Self, ModelError> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: Default::default(),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            job: UnsafeCell::new(None),
        });
        let spins = if crowded { SPINS_CROWDED } else { SPINS };
        let mut team = Self { shared, helpers: Vec::new(), spins };
        let mut homes = homes.into_iter();
        if let Some(home) = homes.next() {
            home.bind();
        }
        for worker in 1..threads {
            let (shared, home) = (Arc::clone(&team.shared), homes.next());
            let helper = thread::Builder::new()
                .name(format!("compute-{worker}"))
                .spawn(move || {
                    if let Some(home) = home {
                        home.bind();
                    }
                    help(&shared, worker, spins);
                })
                .map_err(ModelError::Thread)?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    /// Threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `run(worker, range)` until the ranges, `grain` tasks at most each, have covered `0..tasks`; returns
    /// when all calls have. `worker` is below [`threads`](Team::threads) and differs between concurrent calls.
    ///
    /// # Panics
    /// If `run` panics on any thread.
    pub(crate) fn each(&mut self, tasks: usize, grain: usize, run: &(dyn Fn(usize, Range<usize>) + Sync)) {
        let grain = grain.max(1);
        if self.helpers.is_empty() || tasks <= grain {
            if tasks > 0 {
                run(0, 0..tasks);
            }
            return;
        }
        // SAFETY: the lifetime is only erased: `Open` waits for all threads to leave before `each` returns or unwinds.
        let run = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize, Range<usize>) + Sync + '_),
                *const (dyn Fn(usize, Range<usize>) + Sync + 'static),
            >(run)
        };
        let job = Job { run, tasks, grain, threads: self.threads(), leader: thread::current() };
        let open = Open::new(self, job.clone());
        take_ranges(&open.team.shared, &job, 0);
        drop(open);
        assert!(
            !self.shared.failed.load(Ordering::Relaxed),
            "a compute thread panicked; its message stands above"
        );
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper that panicked has been reported by `each`.
            let _ = helper.join();
        }
    }
}

/// An open job; closed, and left by all, when dropped.
struct Open<'a> {
    team: &'a Team,
}

impl<'a> Open<'a> {
    fn new(team: &'a Team, job: Job) -> Self {
        let shared = &*team.shared;
        for (zone, next) in shared.next[..job.zones()].iter().enumerate() {
            next.0.store(job.start(zone), Ordering::Relaxed);
        }
        // SAFETY: no job is open and nobody is in one, so nobody reads.
        unsafe { *shared.job.get() = Some(job) };
        shared.state.fetch_add(GENERATION, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            for helper in &team.helpers {
                helper.thread().unpark();
            }
        }
        Self { team }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let shared = &*self.team.shared;
        shared.state.fetch_add(GENERATION, Ordering::SeqCst);
        let mut spins = 0;
        while inside(shared.state.load(Ordering::Acquire)) > 0 {
            if spins < self.team.spins {
                spins += 1;
                spin_loop();
            } else {
                // The last one out unparks; a token from an earlier job only makes the loop turn once more.
                thread::park();
            }
        }
    }
}

fn is_open(state: u64) -> bool {
    state & GENERATION != 0
}

fn inside(state: u64) -> u64 {
    state % GENERATION
}

/// A helper's life.
fn help(shared: &Shared, worker: usize, spins: usize) {
    let mut last = 0;
    while let Some(generation) = enter(shared, last, spins) {
        last = generation;
        // SAFETY: this thread is inside an open job, so the leader does not write.
        let Some(job) = (unsafe { (*shared.job.get()).clone() }) else {
            unreachable!("an open job is there")
        };
        let guard = Inside { shared, leader: job.leader.clone() };
        take_ranges(shared, &job, worker);
        drop(guard);
    }
}

/// A helper in a job; it leaves when dropped, also if the job panicked.
struct Inside<'a> {
    shared: &'a Shared,
    leader: Thread,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.failed.store(true, Ordering::Relaxed);
        }
        let before = self.shared.state.fetch_sub(1, Ordering::AcqRel);
        if inside(before) == 1 && !is_open(before) {
            self.leader.unpark();
        }
    }
}

fn take_ranges(shared: &Shared, job: &Job, worker: usize) {
    let zones = job.zones();
    for zone in (0..zones).map(|further| (worker * zones / job.threads + further) % zones) {
        let end = job.start(zone + 1);
        loop {
            let start = shared.next[zone].0.fetch_add(job.grain, Ordering::Relaxed);
            if start >= end {
                break;
            }
            // SAFETY: the leader keeps the closure alive until everyone has left the job.
            unsafe { (*job.run)(worker, start..end.min(start + job.grain)) };
        }
    }
}

/// Waits for a job later than generation `last` and enters it; `None` when the team ends.
fn enter(shared: &Shared, last: u64, spins: usize) -> Option<u64> {
    let mut spun = 0;
    loop {
        if shared.stop.load(Ordering::SeqCst) {
            return None;
        }
        let state = shared.state.load(Ordering::SeqCst);
        let generation = state / GENERATION;
        if is_open(state) && generation != last {
            let entered =
                shared.state.compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed).is_ok();
            if entered {
                return Some(generation);
            }
        } else if spun < spins {
            spun += 1;
            spin_loop();
        } else {
            sleep(shared, state);
            spun = 0;
        }
    }
}

/// Parks unless `state` has changed; the leader looks at `sleepers` after it has changed the state.
fn sleep(shared: &Shared, state: u64) {
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    if shared.state.load(Ordering::SeqCst) == state && !shared.stop.load(Ordering::SeqCst) {
        thread::park();
    }
    shared.sleepers.fetch_sub(1, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        for (threads, crowded) in [(1, false), (2, false), (3, true), (8, true)] {
            let mut team = Team::new(threads, crowded, Vec::new()).unwrap();
            for tasks in [0, 1, 2, 7, 100, 1000] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                team.each(tasks, 3, &|worker, range| {
                    assert!(worker < threads && (range.len() <= 3 || threads == 1));
                    for task in range {
                        runs[task].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(runs.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_nobody_hangs() {
        let mut team = Team::new(3, true, Vec::new()).unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            team.each(64, 1, &|_, range| assert!(range.start != 40, "task 40"));
        }));
        assert!(outcome.is_err());
    }
}

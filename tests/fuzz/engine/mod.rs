//! Runs a target on inputs that grow out of its seeds, and holds what each of them costs against its limits.

mod coverage;
pub(crate) mod grpc;
pub(crate) mod meter;
pub(crate) mod mutate;
mod record;
mod seed;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use coverage::Seen;
use record::Record;
pub(crate) use seed::Seed;

/// Stack of the thread that runs a target: what a thread of the server has.
const STACK_BYTES: usize = 2 << 20;
/// A sentence for a person is not longer.
const SENTENCE_BYTES_MAX: usize = 2_000;
/// Accepted inputs that are kept to go on from.
const POOL_MAX: usize = 512;
/// Runs that shrink an input that was found.
const SHRINK_RUNS_MAX: usize = 400;

/// What became of an input: accepted, or refused with this sentence.
pub(crate) type Outcome = Result<(), String>;

/// How an input becomes another; see [`mutate`].
pub(crate) type Change = fn(&mut Seed, &[u8], &[u8], &[&str]) -> Vec<u8>;

/// One surface.
pub(crate) struct Target {
    /// Also the name of its test.
    pub(crate) name: &'static str,
    /// Inputs to begin with: what the surface is there for, and what was found before.
    pub(crate) seeds: Vec<Vec<u8>>,
    /// Words that inputs are made of.
    pub(crate) words: &'static [&'static str],
    pub(crate) change: Change,
    /// Inputs in `cargo test`.
    pub(crate) runs: u64,
    /// Memory that any input may take, and more for each of its bytes.
    pub(crate) memory_bytes: (usize, usize),
    /// Processor time that any input may take, and more for each of its bytes. Generous: builds without optimization
    /// run this too.
    pub(crate) cpu: (Duration, Duration),
    /// What no sentence may repeat.
    pub(crate) secret: Option<&'static str>,
}

/// What is wrong with an input.
struct Fault(String);

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// The right to be measured, of one test at a time: memory and time are counted for the whole process. Taken before
/// anything is prepared.
pub(crate) struct Alone(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

pub(crate) fn alone() -> Alone {
    static ALONE: Mutex<()> = Mutex::new(());
    Alone(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs `target`: as many inputs as it says, the same ones each time; or, if `FUZZ_SECONDS` is set, for so long and
/// guided by coverage; or, if `FUZZ_INPUT` is set, the input in that file alone.
pub(crate) fn fuzz(_: &Alone, target: &Target, run: impl FnMut(&[u8]) -> Outcome + Send) {
    count_panics();
    let found = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(target.name.into()).stack_size(STACK_BYTES);
        let run = thread.spawn_scoped(scope, || Fuzz::new(target, run).all()).expect("a thread");
        run.join().expect("the engine does not panic")
    });
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Counts our own panics in all threads, also of those that catch them. A library's panic that ends in an error is as
/// good as an error; it is not shown, because to show where it happened takes more memory than any target may.
fn count_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let show = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.location().is_none_or(|place| !place.file().contains("/registry/src/")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
                show(info);
            }
        }));
    });
}

fn seconds() -> Option<Duration> {
    let seconds = std::env::var("FUZZ_SECONDS").ok()?;
    Some(Duration::from_secs(seconds.parse().expect("FUZZ_SECONDS is a number")))
}

struct Fuzz<'a, R> {
    target: &'a Target,
    run: R,
    record: Record,
    pool: Vec<Vec<u8>>,
    seen: Seen,
    found: Vec<String>,
    runs: u64,
    accepted: u64,
    /// How long to go on; else as many runs as the target says.
    seconds: Option<Duration>,
}

impl<'a, R: FnMut(&[u8]) -> Outcome> Fuzz<'a, R> {
    fn new(target: &'a Target, run: R) -> Self {
        let record = Record::open(target.name);
        Self {
            target,
            run,
            record,
            pool: Vec::new(),
            seen: Seen::default(),
            found: Vec::new(),
            runs: 0,
            accepted: 0,
            seconds: seconds(),
        }
    }

    /// Returns what was found, as sentences that say how to see it again.
    fn all(mut self) -> Vec<String> {
        if let Some(path) = std::env::var_os("FUZZ_INPUT") {
            let input = std::fs::read(&path).expect("FUZZ_INPUT names a file");
            let outcome = self.once(&input);
            println!("{}: {:?}", self.target.name, outcome.as_ref().map_err(|fault| &fault.0));
            self.record.close();
            return outcome.err().map(|fault| fault.0).into_iter().collect();
        }
        for input in self.target.seeds.clone().into_iter().chain(self.record.left_behind()) {
            self.take(input);
        }
        match self.seconds {
            None => {
                for number in 0..self.target.runs {
                    if self.found.len() < 3 {
                        self.next(number);
                    }
                }
            }
            Some(seconds) => self.during(seconds),
        }
        self.record.close();
        println!("{}: {} inputs, {} accepted", self.target.name, self.runs, self.accepted);
        self.found
    }

    fn during(&mut self, seconds: Duration) {
        for input in self.record.corpus() {
            self.take(input);
        }
        let (start, mut told) = (Instant::now(), Instant::now());
        for number in 0.. {
            if start.elapsed() >= seconds || self.found.len() >= 10 {
                break;
            }
            self.next(start.elapsed().as_nanos() as u64 ^ number);
            if told.elapsed() >= Duration::from_secs(1) {
                told = Instant::now();
                self.tell(start.elapsed(), seconds);
            }
        }
        self.tell(start.elapsed(), seconds);
    }

    fn tell(&self, passed: Duration, of: Duration) {
        let Self { target, pool, seen, found, runs, .. } = self;
        let rate = *runs as f64 / passed.as_secs_f64().max(0.001);
        let edges = if Seen::is_possible() { format!("{} edges", seen.edges) } else { "no coverage".into() };
        eprintln!(
            "{:<14} {:>6} of {} s  {runs:>9} runs  {rate:>7.0}/s  {edges}  {} inputs  {} found",
            target.name,
            passed.as_secs(),
            of.as_secs(),
            pool.len(),
            found.len()
        );
    }

    /// Makes an input out of those before, and runs it.
    fn next(&mut self, number: u64) {
        let seed = &mut Seed::of(self.target.name, number);
        let (from, other) = (seed.below(self.pool.len()), seed.below(self.pool.len()));
        let empty = Vec::new();
        let [from, other] = [from, other].map(|at| self.pool.get(at).unwrap_or(&empty));
        let input = (self.target.change)(seed, from, other, self.target.words);
        let place = seed.below(POOL_MAX);
        self.take_at(input, place);
    }

    fn take(&mut self, input: Vec<u8>) {
        self.take_at(input, usize::MAX);
    }

    /// Runs an input and keeps it, in this place of a full pool, if it is worth going on from.
    fn take_at(&mut self, input: Vec<u8>, place: usize) {
        self.runs += 1;
        let outcome = self.once(&input);
        let new = self.seen.take();
        match outcome {
            Err(fault) => {
                let input = self.shrunk(input, &fault);
                let path = self.record.found(&input);
                self.found.push(format!(
                    "{}: {}\n  again: FUZZ_INPUT={} cargo test --release --workspace --test fuzz {}",
                    self.target.name,
                    fault.0,
                    path.display(),
                    self.target.name
                ));
            }
            Ok(accepted) => {
                self.accepted += u64::from(accepted);
                self.keep(input, place, accepted, new);
            }
        }
    }

    fn keep(&mut self, input: Vec<u8>, place: usize, accepted: bool, new: bool) {
        let guided = Seen::is_possible();
        if guided && new && self.seconds.is_some() {
            self.record.keep(&input);
        }
        if guided && !new || !guided && !accepted && place != usize::MAX {
            return;
        }
        if guided || self.pool.len() < POOL_MAX {
            self.pool.push(input);
        } else if let Some(old) = self.pool.get_mut(place) {
            *old = input;
        }
    }

    /// Whether the input was accepted.
    fn once(&mut self, input: &[u8]) -> Result<bool, Fault> {
        let Target { memory_bytes: (memory, memory_each), cpu: (cpu, cpu_each), secret, .. } = *self.target;
        let panics = PANICS.load(Ordering::SeqCst);
        self.record.running(input);
        let meter = meter::start();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(input)));
        let (taken, time) = meter.stop();
        self.record.ended();
        let outcome = outcome.map_err(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
            Fault(format!("it panics: {said}"))
        })?;
        if PANICS.load(Ordering::SeqCst) != panics {
            return Err(Fault("a thread of it panics".into()));
        }
        let bytes = input.len();
        if taken > memory + memory_each * bytes {
            return Err(Fault(format!("an input of {bytes} bytes takes {taken} bytes of memory")));
        }
        if time > cpu + cpu_each * u32::try_from(bytes).unwrap_or(u32::MAX) {
            return Err(Fault(format!("an input of {bytes} bytes takes {time:?}")));
        }
        if let Err(sentence) = &outcome {
            check_sentence(sentence, secret).map_err(Fault)?;
        }
        Ok(outcome.is_ok())
    }

    /// A smaller input with a fault of the same kind.
    fn shrunk(&mut self, mut input: Vec<u8>, fault: &Fault) -> Vec<u8> {
        let kind = |fault: &Fault| fault.0.chars().take(9).collect::<String>();
        let (mut piece, mut runs) = (input.len().div_ceil(2), 0);
        while piece > 0 && runs < SHRINK_RUNS_MAX {
            let mut at = 0;
            while at < input.len() && runs < SHRINK_RUNS_MAX {
                let end = (at + piece).min(input.len());
                let smaller = [&input[..at], &input[end..]].concat();
                runs += 1;
                if self.once(&smaller).is_err_and(|other| kind(&other) == kind(fault)) {
                    input = smaller;
                } else {
                    at = end;
                }
            }
            piece /= 2;
        }
        input
    }
}

/// A refusal is a sentence for a person, on one line, that repeats no secret.
fn check_sentence(sentence: &str, secret: Option<&str>) -> Result<(), String> {
    let shown: String = sentence.chars().take(300).collect();
    if sentence.trim().is_empty() {
        Err("it is refused without a word".into())
    } else if sentence.len() > SENTENCE_BYTES_MAX {
        Err(format!("it is refused with {} bytes: {shown:?}", sentence.len()))
    } else if sentence.chars().any(char::is_control) {
        Err(format!("it is refused with control characters: {shown:?}"))
    } else if secret.is_some_and(|secret| sentence.contains(secret)) {
        Err(format!("it is refused with the text that it was sent: {shown:?}"))
    } else {
        Ok(())
    }
}

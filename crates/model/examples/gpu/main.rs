//! What our kernels do on a GPU: whether they are right, and how fast they are. `benches/gpu` runs it on a machine that has one;
//! with `--emulate` each part runs in small on the host, which is how CI tries it.
//!
//! ```text
//! gpu check  [--goldens FOLDER] [--near CHECKPOINT]… [--same CHECKPOINT]… [--nccl CHECKPOINT]… [--memory CHECKPOINT]…
//!            [--processes CHECKPOINT]… [--stopped CHECKPOINT]… [--stopped-memory CHECKPOINT]…
//!            [--prompts CHECKPOINT]… [--quick] [--fp8]
//! gpu bench  CHECKPOINT [--quick] [--fp8] [--fast]
//! gpu logits CHECKPOINT < PROMPTS > LOGITS
//! gpu bounds
//! gpu sums   CHECKPOINT
//! ```
//! `check` compares with transformers' numbers (`--goldens`), with the CPU's in f32 (`--near`), and a model's bits with each
//! other, however the work is cut (`--same`), also by ranks that share the GPU and speak NCCL (`--nccl`) or use each other's memory
//! (`--memory`, and `--processes` where each is a process); `--stopped` has one of these wait for one that hangs. `sums` tells how long
//! ranks take to bring each other the pieces of a sum. `--prompts` compares prompts that `fast` makes of a library's products with our
//! own. `bench` measures steps, with `--fast` prompts alone, and `bounds` what memory gives; `--fp8` holds weights in FP8. `logits` takes a prompt a line, token ids separated by spaces, and writes `[tokens][vocab]` of little-endian f32. All but `logits`
//! print an object a line as soon as they know it; one with `"ok": false` is a failure, and makes the exit code 1.

mod bench;
mod bounds;
mod check;
mod device;
mod golden;
#[path = "../../tests/it/support/local.rs"]
mod local;
mod processes;
mod ranks;
mod script;
mod sizes;
mod stopped;
mod sums;

use std::error::Error;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use galerne_types::Quantize;
use serde_json::{Value, json};

use crate::device::Gpus;
use crate::ranks::Way;

pub(crate) type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const USAGE: &str = "gpu check|bench|logits|bounds|sums, see the head of crates/model/examples/gpu/main.rs";

/// What the command line asks for.
#[derive(Default)]
struct Asked {
    command: String,
    checkpoint: Option<PathBuf>,
    goldens: Option<PathBuf>,
    near: Vec<PathBuf>,
    same: Vec<PathBuf>,
    nccl: Vec<PathBuf>,
    memory: Vec<PathBuf>,
    processes: Vec<PathBuf>,
    stopped: Vec<PathBuf>,
    stopped_memory: Vec<PathBuf>,
    prompts: Vec<PathBuf>,
    /// Of `rank`: N, which, and whether it goes on for ever.
    world_size: usize,
    rank: usize,
    on: bool,
    quick: bool,
    fp8: bool,
    fast: bool,
    emulate: bool,
}

impl Asked {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Outcome<Self> {
        let mut asked = Self { command: arguments.next().ok_or(USAGE)?, ..Self::default() };
        while let Some(argument) = arguments.next() {
            let mut path = || arguments.next().map(PathBuf::from).ok_or(format!("{argument} wants a path"));
            match argument.as_str() {
                "--goldens" => asked.goldens = Some(path()?),
                "--near" => asked.near.push(path()?),
                "--same" => asked.same.push(path()?),
                "--nccl" => asked.nccl.push(path()?),
                "--memory" => asked.memory.push(path()?),
                "--processes" => asked.processes.push(path()?),
                "--stopped" => asked.stopped.push(path()?),
                "--stopped-memory" => asked.stopped_memory.push(path()?),
                "--prompts" => asked.prompts.push(path()?),
                "--of" => asked.world_size = number(arguments.next())?,
                "--rank" => asked.rank = number(arguments.next())?,
                "--on" => asked.on = true,
                "--quick" => asked.quick = true,
                "--fp8" => asked.fp8 = true,
                "--fast" => asked.fast = true,
                "--emulate" => asked.emulate = true,
                _ if argument.starts_with('-') || asked.checkpoint.is_some() => return Err(USAGE.into()),
                _ => asked.checkpoint = Some(argument.into()),
            }
        }
        Ok(asked)
    }

    fn checkpoint(&self) -> Outcome<PathBuf> {
        Ok(self.checkpoint.clone().ok_or("which checkpoint?")?)
    }
}

fn number(text: Option<String>) -> Outcome<usize> {
    Ok(text.ok_or(USAGE)?.parse()?)
}

/// Prints what is found, a line each, and remembers whether all of it is well.
pub(crate) struct Report {
    failures: usize,
}

impl Report {
    pub(crate) fn tell(&mut self, found: &Value) {
        self.failures += usize::from(found["ok"] == false);
        println!("{found}");
        // Whoever reads it may end this process at any time.
        let _ = std::io::stdout().flush();
    }

    /// Tells an error of one part, so that the others can go on.
    pub(crate) fn attempt(&mut self, part: &str, name: &str, work: impl FnOnce(&mut Self) -> Outcome<()>) {
        if let Err(error) = work(self) {
            self.tell(&json!({ "part": part, "name": name, "ok": false, "error": error.to_string() }));
        }
    }
}

/// What is done with a checkpoint, in a hurry or not.
type Work = fn(&Gpus, &Path, bool, &mut Report) -> Outcome<()>;

fn main() -> ExitCode {
    let start = Instant::now();
    match run(std::env::args().skip(1), start) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failures) => {
            eprintln!("{failures} failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Runs what is asked for; how many checks have failed.
fn run(arguments: impl Iterator<Item = String>, start: Instant) -> Outcome<usize> {
    let asked = Asked::parse(arguments)?;
    let gpus =
        Gpus { emulate: asked.emulate, quantize: asked.fp8.then_some(Quantize::Fp8), fast: asked.fast };
    let mut report = Report { failures: 0 };
    match asked.command.as_str() {
        "check" => {
            if let Some(folder) = &asked.goldens {
                for model in golden::MODELS {
                    report.attempt("golden", model.0, |report| {
                        golden::check(&gpus, folder, model, asked.quick, report)
                    });
                }
            }
            let with_each = |part: &str, paths: &[PathBuf], report: &mut Report, work: Work| {
                for path in paths {
                    report.attempt(part, &path.display().to_string(), |report| {
                        work(&gpus, path, asked.quick, report)
                    });
                }
            };
            with_each("near", &asked.near, &mut report, |gpus, path, _, report| {
                check::near(gpus, path, report)
            });
            with_each("same", &asked.same, &mut report, check::same);
            with_each("fast", &asked.prompts, &mut report, |gpus, path, _, report| {
                check::fast(gpus, path, report)
            });
            with_each("nccl", &asked.nccl, &mut report, |gpus, path, quick, report| {
                check::met(Way::Nccl, gpus, path, quick, report)
            });
            with_each("memory", &asked.memory, &mut report, |gpus, path, quick, report| {
                check::met(Way::Memory, gpus, path, quick, report)
            });
            with_each("processes", &asked.processes, &mut report, processes::check);
            with_each("stopped", &asked.stopped, &mut report, |gpus, path, _, report| {
                stopped::check(Way::Nccl, gpus, path, report)
            });
            with_each("stopped", &asked.stopped_memory, &mut report, |gpus, path, _, report| {
                stopped::check(Way::Memory, gpus, path, report)
            });
        }
        "bench" => bench::run(
            &gpus,
            &asked.checkpoint()?,
            &sizes::Sizes::of(asked.emulate, asked.quick),
            start,
            &mut report,
        )?,
        "logits" => check::logits(&gpus, &asked.checkpoint()?)?,
        "bounds" => bounds::run(&gpus, &mut report)?,
        "sums" => sums::run(&gpus, &asked.checkpoint()?, &mut report)?,
        "rank" => {
            let (how, place) = ((asked.quick, asked.on), (asked.rank, asked.world_size));
            processes::rank(&gpus, &asked.checkpoint()?, how, place)?;
        }
        _ => return Err(USAGE.into()),
    }
    Ok(report.failures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(command: &str) {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden");
        let command = command.replace("GOLDEN", golden);
        let arguments = command.split(' ').map(str::to_owned);
        assert_eq!(run(arguments, Instant::now()).unwrap(), 0, "{command}");
    }

    #[test]
    fn goldens_and_bits_are_checked_on_an_emulated_gpu() {
        passes("check --emulate --quick --goldens GOLDEN --near GOLDEN/bard-1m --same GOLDEN/tiny-mistral");
        passes("check --emulate --prompts GOLDEN/tiny-mistral");
    }

    #[test]
    fn ranks_meet_by_memory_on_an_emulated_gpu() {
        passes("check --emulate --quick --memory GOLDEN/tiny-mistral --stopped-memory GOLDEN/tiny-mistral");
        passes("sums --emulate GOLDEN/tiny-mistral");
    }

    #[test]
    fn steps_and_bounds_are_measured_on_an_emulated_gpu() {
        passes("bench --emulate --fp8 GOLDEN/tiny-mistral");
        passes("bench --emulate --fast GOLDEN/tiny-mistral");
        passes("bounds --emulate");
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for command in ["", "mark", "bench", "bench a b", "check --near"] {
            assert!(run(command.split(' ').map(str::to_owned), Instant::now()).is_err(), "{command}");
        }
    }
}

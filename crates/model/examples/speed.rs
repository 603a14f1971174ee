//! How fast a checkpoint runs on this machine, at N = 1: one prompt of 512 tokens (pp512), and decoding of 1 to 32
//! sequences together, 64 steps from a prompt of 16 tokens; the best of some runs, with 1 thread and with all.
//!
//! ```text
//! cargo run --release -p galerne-model --example speed -- CHECKPOINT [auto|f32|int8] [RUNS] [ISA]
//! ```
//! Beside the tokens per second of time stand those per second of processor time, which other work on the machine
//! does not touch, and what the products came to: bytes of weights read and operations (two a weight and token).

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Isa, Options, Rank, Weights, compute_for};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Draw, Epoch, Input, Sampling, Shards, Slice, Step};

const PROMPT_TOKENS: usize = 512;
const SHORT_PROMPT_TOKENS: usize = 16;
const DECODED_TOKENS: usize = 64;
const BATCHES: [usize; 4] = [1, 8, 16, 32];
/// Blocks of a sequence: room for the longest of both.
const BLOCKS: usize = PROMPT_TOKENS.div_ceil(KV_BLOCK_TOKENS);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path =
        PathBuf::from(arguments.next().ok_or("which checkpoint? speed CHECKPOINT [HOW] [RUNS] [ISA]")?);
    let checkpoint = Checkpoint::open(&path)?;
    let compute = match arguments.next().as_deref() {
        None | Some("auto") => compute_for(&checkpoint),
        Some(how) => how.parse()?,
    };
    let runs = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let named = arguments.next();
    let isa =
        Isa::available().into_iter().rfind(|isa| named.as_deref().is_none_or(|name| isa.name() == name));
    let isa = isa.ok_or("this machine has no such instruction set")?;
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None)?;
    let most = Options::default().threads;
    let start = Instant::now();
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, most, &|_, _| {})?);
    let mb = weights.bytes() as f64 / 1e6;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{}: {mb:.1} MB of weights loaded in {seconds:.2} s; {compute} on {}",
        checkpoint.name(),
        isa.name()
    );
    for threads in if most > 1 { vec![1, most] } else { vec![1] } {
        let options = Options {
            threads,
            kv_blocks: BLOCKS * BATCHES[BATCHES.len() - 1],
            sequences_max: BATCHES[BATCHES.len() - 1],
            compute,
            isa,
            ..Options::default()
        };
        let collective = Box::new(Solo::new(shards.virtual_shards()));
        let mut rank = Rank::new(Arc::clone(&weights), &options, collective)?;
        let mut best = |what: &str, work: Work<'_>| {
            let mut best: Option<Run> = None;
            for _ in 0..runs {
                let run = work(&mut rank)?;
                if best.as_ref().is_none_or(|best| run.wall < best.wall) {
                    best = Some(run);
                }
            }
            let run = best.ok_or("no run, no figure")?;
            println!("{threads} threads, {what:<8} {}", run.told(&weights));
            Ok::<(), Box<dyn Error>>(())
        };
        best("pp512", &mut |rank| prefill(rank, &weights))?;
        for batch in BATCHES {
            best(&format!("batch {batch}"), &mut |rank| decode(rank, &weights, batch))?;
        }
    }
    Ok(())
}

type Work<'a> = &'a mut dyn FnMut(&mut Rank) -> Result<Run, Box<dyn Error>>;

/// Some steps and what they took, in seconds.
#[derive(Default)]
struct Run {
    tokens: usize,
    steps: usize,
    wall: f64,
    cpu: f64,
}

impl Run {
    fn told(&self, weights: &Weights) -> String {
        let (config, tokens) = (weights.config(), self.tokens as f64);
        let head = (config.vocab * config.hidden) as f64 * if self.steps == 1 { 1.0 } else { tokens };
        let operations = 2.0 * (matrix_elements(weights) * tokens + head);
        format!(
            "{:7.1} tok/s, {:7.1} a CPU second; {:5.1} GB/s, {:6.1} GOP/s",
            tokens / self.wall,
            tokens / self.cpu,
            (weights.bytes() * self.steps) as f64 / self.wall / 1e9,
            operations / self.wall / 1e9,
        )
    }
}

/// Elements of the layers' matrices.
fn matrix_elements(weights: &Weights) -> f64 {
    let config = weights.config();
    let attention = 2 * config.hidden * config.head_dim * (config.heads + config.kv_heads);
    (config.layers * (attention + 3 * config.hidden * config.intermediate)) as f64
}

fn prefill(rank: &mut Rank, weights: &Weights) -> Result<Run, Box<dyn Error>> {
    let prompt = prompt(PROMPT_TOKENS, 0, weights.config().vocab);
    let mut run = Run::default();
    step(rank, vec![slice(0, 0, Input::Tokens(prompt))], &mut run)?;
    Ok(run)
}

fn decode(rank: &mut Rank, weights: &Weights, batch: usize) -> Result<Run, Box<dyn Error>> {
    let slots = 0..batch as u32;
    for slot in slots.clone() {
        let prompt = prompt(SHORT_PROMPT_TOKENS, slot, weights.config().vocab);
        step(rank, vec![slice(slot, 0, Input::Tokens(prompt))], &mut Run::default())?;
    }
    let mut run = Run::default();
    for position in SHORT_PROMPT_TOKENS..SHORT_PROMPT_TOKENS + DECODED_TOKENS {
        let slices = slots.clone().map(|slot| slice(slot, position, Input::Last));
        step(rank, slices.collect(), &mut run)?;
    }
    Ok(run)
}

fn prompt(tokens: usize, seed: u32, vocab: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 7919 + seed * 104_729 + 13) % vocab as u32).collect()
}

fn slice(slot: u32, start: usize, input: Input) -> Slice {
    let first = slot * BLOCKS as BlockId;
    let blocks = (start + input.len()).div_ceil(KV_BLOCK_TOKENS) as BlockId;
    let draw = Some(Draw::new(Sampling::greedy(), 0));
    Slice {
        slot,
        start: start as u32,
        input,
        first_block: 0,
        blocks: (first..first + blocks).collect(),
        draw,
        score: None,
    }
}

/// Runs a step and adds what it took.
fn step(rank: &mut Rank, slices: Vec<Slice>, run: &mut Run) -> Result<(), Box<dyn Error>> {
    let step = Step { epoch: Epoch(1), number: 1, slices, traces: Vec::new() };
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    rank.step(&step, &mut |_| None)?;
    run.wall += wall.elapsed().as_secs_f64();
    run.cpu += cpu_seconds() - cpu;
    run.tokens += step.tokens();
    run.steps += 1;
    Ok(())
}

/// Processor time of all threads of this process.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

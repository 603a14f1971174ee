//! How fast a checkpoint runs on this machine, at N = 1: one prompt of 512 tokens (pp512), and decoding of 1 to 32
//! sequences together, 64 steps from a prompt of 16 tokens; the best of some runs, with 1 thread and with all; the
//! first token from a prompt of 16 counted from the start of the process, and its peak memory.
//!
//! ```text
//! cargo run --release -p galerne-model --example speed -- CHECKPOINT [auto|f32|int8|bf16] [RUNS] [ISA]
//!     [--threads 1,2] [--batches 1,8,16,32] [--steps 64] [--quantize q8_0]
//!     [--cores 0-1] [--json]
//! ```
//! With `--json`, "first token" is printed as soon as it is there, then an object for each number of threads, as
//! `benches/peers` reads them.
//!
//! Beside the tokens per second of time stand those per second of processor time, which other work on the machine
//! does not touch, and what the products came to: bytes of weights read and operations (two a weight and token).

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use galerne_checkpoint::{Checkpoint, Weight};
use galerne_collective::Solo;
use galerne_model::{Cores, Isa, Options, Rank, Weights, compute_for};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Draw, Epoch, Input, Quantize, Sampling, Shards, Slice, Step};
use serde_json::{Value, json};

const PROMPT_TOKENS: usize = 512;
const SHORT_PROMPT_TOKENS: usize = 16;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What the command line asks for.
struct Asked {
    checkpoint: PathBuf,
    how: String,
    runs: usize,
    isa: Isa,
    threads: Vec<usize>,
    batches: Vec<usize>,
    steps: usize,
    quantize: Option<Quantize>,
    cores: Option<Cores>,
    json: bool,
}

impl Asked {
    fn parse() -> Outcome<Self> {
        let most = Options::default().threads;
        let (mut threads, mut batches, mut steps) = (vec![1, most], vec![1, 8, 16, 32], 64);
        threads.dedup();
        let (mut quantize, mut cores, mut json, mut plain) = (None, None, false, Vec::new());
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
            match argument.as_str() {
                "--json" => json = true,
                "--threads" => threads = numbers(&value()?)?,
                "--batches" => batches = numbers(&value()?)?,
                "--steps" => steps = value()?.parse()?,
                "--cores" => cores = Cores::of_machine(Some(&value()?.parse()?)),
                "--quantize" => quantize = Some(value()?.parse()?),
                _ => plain.push(argument),
            }
        }
        let mut plain = plain.into_iter();
        let checkpoint = plain.next().ok_or("which checkpoint? speed CHECKPOINT [HOW] [RUNS] [ISA]")?.into();
        let how = plain.next().unwrap_or_else(|| "auto".to_owned());
        let runs = plain.next().map_or(Ok(3), |text| text.parse())?;
        let isa = plain.next().map_or_else(|| Ok(Isa::best()), |name| name.parse())?;
        Ok(Self { checkpoint, how, runs, isa, threads, batches, steps, quantize, cores, json })
    }

    /// Blocks that each sequence of a batch needs.
    fn blocks(&self) -> usize {
        (SHORT_PROMPT_TOKENS + self.steps).div_ceil(KV_BLOCK_TOKENS)
    }
}

fn numbers(text: &str) -> Outcome<Vec<usize>> {
    Ok(text.split(',').map(str::parse).collect::<Result<_, _>>()?)
}

fn main() -> Outcome<()> {
    let start = Instant::now();
    let asked = Asked::parse()?;
    let mut checkpoint = Checkpoint::open(&asked.checkpoint)?;
    if let Some(quantize) = asked.quantize {
        checkpoint = checkpoint.quantized(quantize);
    }
    let compute = match asked.how.as_str() {
        "auto" => compute_for(&checkpoint, asked.isa),
        how => how.parse()?,
    };
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None)?;
    let most = asked.threads.iter().copied().max().unwrap_or(1);
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, most, asked.cores.as_ref(), &|_, _| {})?);
    let loaded = start.elapsed().as_secs_f64();
    let bytes = bytes_read(&checkpoint, &weights);
    let how = format!("{compute} on {}", asked.isa.name());
    let sequences = asked.batches.iter().copied().max().unwrap_or(1);
    for (index, &threads) in asked.threads.iter().enumerate() {
        let options = Options {
            threads,
            cores: asked.cores.clone(),
            kv_blocks: PROMPT_TOKENS.div_ceil(KV_BLOCK_TOKENS).max(sequences * asked.blocks()),
            sequences_max: sequences,
            compute,
            isa: asked.isa,
            ..Options::default()
        };
        let collective = Box::new(Solo::new(shards.virtual_shards()));
        let mut rank = Rank::new(Arc::clone(&weights), &options, collective)?;
        prefill(&mut rank, &weights, SHORT_PROMPT_TOKENS)?;
        if index == 0 {
            let (mb, first) = (weights.bytes() as f64 / 1e6, start.elapsed().as_secs_f64());
            let name = checkpoint.name();
            match asked.json {
                true => println!("first token"),
                false => println!(
                    "{name}: {mb:.1} MB of weights loaded in {loaded:.2} s, first token at {first:.2} s; {how}"
                ),
            }
        }
        if !asked.json {
            println!("{threads} threads:");
        }
        let mut told = measure(&mut rank, &weights, bytes, &asked)?;
        told["how"] = how.as_str().into();
        if asked.json {
            println!("{told}");
        }
    }
    if !asked.json {
        println!("{:.0} MB of memory at most", peak_mb()?);
    }
    Ok(())
}

/// All figures of a rank, told as they come.
fn measure(rank: &mut Rank, weights: &Weights, bytes: usize, asked: &Asked) -> Outcome<Value> {
    let mut told = json!({
        "bytes": bytes,
        "layer_weights": matrix_elements(weights),
        "head_weights": head_elements(weights),
    });
    let mut best = |what: &str, work: Work<'_>| {
        let mut best: Option<Run> = None;
        for _ in 0..asked.runs {
            let run = work(rank)?;
            if best.as_ref().is_none_or(|best| run.wall < best.wall) {
                best = Some(run);
            }
        }
        let run = best.ok_or("no run, no figure")?;
        told[what] = (run.tokens as f64 / run.wall).into();
        if !asked.json {
            println!("{what:<8} {}", run.told(weights, bytes));
        }
        Ok::<(), Box<dyn Error>>(())
    };
    best("pp512", &mut |rank| prefill(rank, weights, PROMPT_TOKENS))?;
    for &batch in &asked.batches {
        best(&format!("batch {batch}"), &mut |rank| decode(rank, weights, asked, batch))?;
    }
    told["peak_mb"] = peak_mb()?.into();
    Ok(told)
}

type Work<'a> = &'a mut dyn FnMut(&mut Rank) -> Outcome<Run>;

/// Some steps and what they took, in seconds.
#[derive(Default)]
struct Run {
    tokens: usize,
    steps: usize,
    wall: f64,
    cpu: f64,
}

impl Run {
    fn told(&self, weights: &Weights, bytes: usize) -> String {
        let tokens = self.tokens as f64;
        let drawn = if self.steps == 1 { 1.0 } else { tokens };
        let operations = 2.0 * (matrix_elements(weights) * tokens + head_elements(weights) * drawn);
        format!(
            "{:7.1} tok/s, {:7.1} a CPU second; {:5.1} GB/s, {:6.1} GOP/s",
            tokens / self.wall,
            tokens / self.cpu,
            (bytes * self.steps) as f64 / self.wall / 1e9,
            operations / self.wall / 1e9,
        )
    }
}

/// Bytes of weights that a step reads: all but an embedding that is not the head, of which it looks up some rows.
fn bytes_read(checkpoint: &Checkpoint, weights: &Weights) -> usize {
    let embedding = checkpoint.tensor(Weight::Embedding);
    let row = embedding.cols / embedding.dtype.block_elems() * embedding.dtype.block_bytes();
    weights.bytes() - if weights.config().tied { 0 } else { embedding.rows * row }
}

/// Elements of the layers' matrices.
fn matrix_elements(weights: &Weights) -> f64 {
    let config = weights.config();
    let attention = 2 * config.hidden * config.head_dim * (config.heads + config.kv_heads);
    (config.layers * (attention + 3 * config.hidden * config.intermediate)) as f64
}

/// Elements of the head, which only a token sees that is drawn from.
fn head_elements(weights: &Weights) -> f64 {
    (weights.config().vocab * weights.config().hidden) as f64
}

fn prefill(rank: &mut Rank, weights: &Weights, tokens: usize) -> Outcome<Run> {
    let prompt = prompt(tokens, 0, weights.config().vocab);
    let mut run = Run::default();
    step(rank, vec![slice(0, 0, Input::Tokens(prompt), 0)], &mut run)?;
    Ok(run)
}

fn decode(rank: &mut Rank, weights: &Weights, asked: &Asked, batch: usize) -> Outcome<Run> {
    let slots = 0..batch as u32;
    let first = |slot: u32| slot * asked.blocks() as BlockId;
    for slot in slots.clone() {
        let prompt = prompt(SHORT_PROMPT_TOKENS, slot, weights.config().vocab);
        step(rank, vec![slice(slot, 0, Input::Tokens(prompt), first(slot))], &mut Run::default())?;
    }
    let mut run = Run::default();
    for position in SHORT_PROMPT_TOKENS..SHORT_PROMPT_TOKENS + asked.steps {
        let slices = slots.clone().map(|slot| slice(slot, position, Input::Last, first(slot)));
        step(rank, slices.collect(), &mut run)?;
    }
    Ok(run)
}

fn prompt(tokens: usize, seed: u32, vocab: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * 7919 + seed * 104_729 + 13) % vocab as u32).collect()
}

/// Some tokens of a sequence that keeps its keys and values from block `first` on.
fn slice(slot: u32, start: usize, input: Input, first: BlockId) -> Slice {
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
fn step(rank: &mut Rank, slices: Vec<Slice>, run: &mut Run) -> Outcome<()> {
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

/// The most memory that this process has held so far, in MB; 0 where the system does not tell.
fn peak_mb() -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = line.map_or(Ok(0.0), |line| line.trim().trim_end_matches(" kB").parse())?;
    Ok(kib * 1024.0 / 1e6)
}

//! What keys and values cost at long contexts, in each way to keep them: behind contexts of some lengths, 16 steps of
//! decoding of 1 and of 8 sequences together, and 256 tokens of a prompt; at N = 1 on all threads. The ways alternate, and
//! the best of some runs counts.
//!
//! ```text
//! cargo run --release -p galerne-model --example contexts -- CHECKPOINT [auto|f32|int8] [RUNS]
//! ```
//! The contexts are made of blocks that were computed each by itself: what stands in them does not change the time.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Isa, Options, Rank, Weights, compute_for, kv_bytes_per_block};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Draw, Epoch, Input, KvDtype, Sampling, Shards, Slice, Step};

const CONTEXTS: [usize; 4] = [500, 2000, 4000, 8000];
const WORK: [Work; 3] = [
    Work { name: "batch 1", sequences: 1, steps: 16, step_tokens: 1 },
    Work { name: "batch 8", sequences: 8, steps: 16, step_tokens: 1 },
    Work { name: "prompt", sequences: 1, steps: 1, step_tokens: 256 },
];
/// Blocks of all sequences of a run: 8 of the 4,000s, or one of the 8,000s.
const BLOCKS: usize = 8 * 4096 / KV_BLOCK_TOKENS;

/// Steps of some tokens of each of some sequences.
struct Work {
    name: &'static str,
    sequences: usize,
    steps: usize,
    step_tokens: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("which checkpoint? contexts CHECKPOINT [HOW] [RUNS]")?);
    let checkpoint = Checkpoint::open(&path)?;
    let compute = match arguments.next().as_deref() {
        None | Some("auto") => compute_for(&checkpoint, Isa::best()),
        Some(how) => how.parse()?,
    };
    let runs = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let config = checkpoint.config();
    let shards = Shards::for_model(config.kv_heads, 1, None)?;
    let options = Options { compute, kv_blocks: BLOCKS, ..Options::default() };
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, options.threads, None, &|_, _| {})?);
    println!("{}: products in {compute}, {} threads", checkpoint.name(), options.threads);
    let mut ranks = Vec::new();
    for kv_dtype in KvDtype::CPU {
        let (options, collective) =
            (Options { kv_dtype, ..options.clone() }, Solo::new(shards.virtual_shards()));
        let mut rank = Rank::new(Arc::clone(&weights), &options, Box::new(collective))?;
        let seconds = fill(&mut rank, config.vocab)?;
        let token = kv_bytes_per_block(config, shards, 0, kv_dtype)? / KV_BLOCK_TOKENS;
        println!("{kv_dtype}: {token} bytes a token; {BLOCKS} blocks filled in {seconds:.1} s");
        ranks.push((kv_dtype, rank));
    }
    for (work, context) in WORK.iter().flat_map(|work| CONTEXTS.map(|context| (work, context))) {
        if work.sequences * work.blocks(context) > BLOCKS || work.end(context) > config.context_tokens_max {
            continue;
        }
        let mut best = [f64::INFINITY; KvDtype::CPU.len()];
        for _ in 0..runs {
            for ((_, rank), best) in ranks.iter_mut().zip(&mut best) {
                *best = work.run(rank, context)?.min(*best);
            }
        }
        for ((dtype, _), seconds) in ranks.iter().zip(best) {
            let tokens = (work.sequences * work.steps * work.step_tokens) as f64;
            println!(
                "{}, context {context}, {dtype:<4} {:7.1} tok/s, {:.2} of f32's",
                work.name,
                tokens / seconds,
                best[0] / seconds,
            );
        }
    }
    Ok(())
}

/// Writes all blocks, as prompts of one block each.
fn fill(rank: &mut Rank, vocab: usize) -> Result<f64, Box<dyn Error>> {
    let blocks: Vec<BlockId> = (0..BLOCKS as BlockId).collect();
    let start = Instant::now();
    for blocks in blocks.chunks(8) {
        let prompt =
            |block: BlockId| (0..KV_BLOCK_TOKENS as u32).map(move |i| (block * 32 + i) * 7919 % vocab as u32);
        let slices = blocks.iter().zip(0..);
        let slices = slices.map(|(&block, slot)| slice(slot, 0, prompt(block).collect(), vec![block]));
        step(rank, slices.collect())?;
    }
    Ok(start.elapsed().as_secs_f64())
}

impl Work {
    fn end(&self, context: usize) -> usize {
        context + self.steps * self.step_tokens
    }

    /// Blocks of one sequence.
    fn blocks(&self, context: usize) -> usize {
        self.end(context).div_ceil(KV_BLOCK_TOKENS)
    }

    /// Seconds that the steps take.
    fn run(&self, rank: &mut Rank, context: usize) -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        for position in (context..self.end(context)).step_by(self.step_tokens) {
            let count = (position + self.step_tokens).div_ceil(KV_BLOCK_TOKENS);
            let tokens: Vec<u32> =
                (position..position + self.step_tokens).map(|token| token as u32).collect();
            let slices = (0..self.sequences).map(|sequence| {
                let first = sequence * self.blocks(context);
                let blocks = (first..first + count).map(|block| block as BlockId).collect();
                slice(sequence as u32, position, tokens.clone(), blocks)
            });
            step(rank, slices.collect())?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

fn slice(slot: u32, start: usize, tokens: Vec<u32>, blocks: Vec<BlockId>) -> Slice {
    let (start, draw) = (start as u32, Some(Draw::new(Sampling::greedy(), 0)));
    Slice { slot, start, input: Input::Tokens(tokens), first_block: 0, blocks, draw, score: None }
}

fn step(rank: &mut Rank, slices: Vec<Slice>) -> Result<(), Box<dyn Error>> {
    rank.step(&Step { epoch: Epoch(1), number: 1, slices, traces: Vec::new() }, &mut |_| None)?;
    Ok(())
}

//! How fast a checkpoint runs on this machine: prefill and decode of one sequence, at N = 1.
//!
//! ```text
//! cargo run --release -p galerne-model --example speed -- CHECKPOINT [THREADS] [RUNS]
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Options, Rank, Weights};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Draw, Epoch, Input, Sampling, Shards, Slice, Step};

const PROMPT_TOKENS: usize = 512;
const DECODED_TOKENS: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("which checkpoint? speed CHECKPOINT [THREADS] [RUNS]")?);
    let threads = arguments.next().map_or(Ok(Options::default().threads), |text| text.parse())?;
    let runs = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let checkpoint = Checkpoint::open(&path)?;
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None)?;
    let start = Instant::now();
    let weights = Weights::load(&checkpoint, shards, 0, threads, &|_, _| {})?;
    let options = Options { threads, kv_blocks: 64, ..Options::default() };
    println!(
        "{}: {:.1} MB of weights loaded in {:.2} s; {} threads, {}",
        checkpoint.name(),
        weights.bytes() as f64 / 1e6,
        start.elapsed().as_secs_f64(),
        threads,
        options.isa.name()
    );
    let vocab = checkpoint.config().vocab as u32;
    let mut rank = Rank::new(Arc::new(weights), &options, Box::new(Solo::new(shards.virtual_shards())))?;
    let (mut prefill_best, mut decode_best) = (0.0, 0.0);
    for run in 0..runs {
        let prompt = (0..PROMPT_TOKENS as u32).map(|i| (i * 7919 + 13) % vocab).collect();
        let prefill = timed(&mut rank, 0, Input::Tokens(prompt))?;
        let mut decode = 0.0;
        for position in PROMPT_TOKENS..PROMPT_TOKENS + DECODED_TOKENS {
            decode += timed(&mut rank, position, Input::Last)?;
        }
        let (prefill, decode) = (PROMPT_TOKENS as f64 / prefill, DECODED_TOKENS as f64 / decode);
        println!("run {run}: prefill {prefill:6.1} tok/s, decode {decode:6.1} tok/s");
        prefill_best = f64::max(prefill_best, prefill);
        decode_best = f64::max(decode_best, decode);
    }
    println!("best:  prefill {prefill_best:6.1} tok/s, decode {decode_best:6.1} tok/s");
    Ok(())
}

/// Seconds that a step takes.
fn timed(rank: &mut Rank, start: usize, input: Input) -> Result<f64, Box<dyn Error>> {
    let blocks = (0..(start + input.len()).div_ceil(KV_BLOCK_TOKENS) as u32).collect();
    let draw = Some(Draw::new(Sampling::greedy(), 0));
    let slice = Slice { slot: 0, start: start as u32, input, first_block: 0, blocks, draw, score: None };
    let step = Step { epoch: Epoch(1), number: 1, slices: vec![slice], traces: Vec::new() };
    let begin = Instant::now();
    rank.step(&step, &mut |_| None)?;
    Ok(begin.elapsed().as_secs_f64())
}

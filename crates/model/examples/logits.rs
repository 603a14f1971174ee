//! The logits of every position of prompts, to be compared with another engine's (`benches/error`): one prompt a line of
//! standard input, its token ids separated by spaces; `[tokens][vocab]` of little-endian f32 to standard output.
//!
//! ```text
//! cargo run --release -p galerne-model --example logits -- CHECKPOINT f32|int8 [f32|bf16|int8]
//! ```
//! The second of these says how keys and values are kept.

use std::error::Error;
use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Options, Rank, Trace, Weights};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Draw, Epoch, Input, KvDtype, Sampling, Shards, Slice, Step};

const USAGE: &str = "logits CHECKPOINT f32|int8 [f32|bf16|int8]";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let checkpoint = Checkpoint::open(&PathBuf::from(arguments.next().ok_or(USAGE)?))?;
    let compute = arguments.next().ok_or(USAGE)?.parse()?;
    let kv_dtype = arguments.next().map_or(Ok(KvDtype::F32), |text| text.parse())?;
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None)?;
    let options = Options { compute, kv_dtype, kv_blocks: 64, ..Options::default() };
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, options.threads, None, &|_, _| {})?);
    let mut rank = Rank::new(weights, &options, Box::new(Solo::new(shards.virtual_shards())))?;
    let (mut number, mut out) = (0, std::io::stdout().lock());
    for prompt in std::io::stdin().lock().lines() {
        let prompt = prompt?;
        for (position, id) in prompt.split_whitespace().enumerate() {
            number += 1;
            let blocks = (0..=(position / KV_BLOCK_TOKENS) as u32).collect();
            let slice = Slice {
                slot: 0,
                start: position as u32,
                input: Input::Tokens(vec![id.parse()?]),
                first_block: 0,
                blocks,
                draw: Some(Draw::new(Sampling::greedy(), position as u32)),
                score: None,
            };
            let step = Step { epoch: Epoch(0), number, slices: vec![slice], traces: Vec::new() };
            let mut logits = Vec::new();
            rank.step_traced(&step, &mut |_| None, &mut |trace| {
                if let Trace::Logits { row, .. } = trace {
                    logits = row.iter().flat_map(|logit| logit.to_le_bytes()).collect();
                }
            })?;
            out.write_all(&logits)?;
        }
    }
    Ok(())
}

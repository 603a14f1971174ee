//! A step of decoding takes no memory from the system but for the list of tokens that it returns.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Options, Rank, Weights};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Compute, Draw, Epoch, Input, Sampling, Shards, Slice, Step};

/// Counts what all threads ask for.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SEQUENCES: usize = 4;
/// Steps that make room for what comes.
const FIRST_STEPS: usize = 2;
/// What it takes to start a thread: on a busy machine a helper may begin during any step.
const START_MAX: usize = 8;

/// Token number `position` of every sequence.
fn step(position: usize, tokens: usize) -> Step {
    let slice = |slot: usize| Slice {
        slot: slot as u32,
        start: position as u32,
        input: if position == 0 { Input::Tokens(vec![7 + slot as u32; tokens]) } else { Input::Last },
        first_block: 0,
        blocks: (0..(position + tokens).div_ceil(KV_BLOCK_TOKENS)).map(|at| (4 * slot + at) as u32).collect(),
        draw: Some(Draw::new(Sampling::greedy(), position as u32)),
        score: None,
    };
    let slices = (0..SEQUENCES).map(slice).collect();
    Step { epoch: Epoch(1), number: 1, slices, traces: Vec::new() }
}

#[test]
fn a_decode_step_allocates_its_answer_and_nothing_else() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let shards = Shards::for_model(checkpoint.config().kv_heads, 1, None).unwrap();
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, 1, None, &|_, _| {}).unwrap());
    for compute in [Compute::F32, Compute::Int8, Compute::Bf16] {
        let options =
            Options { threads: 2, kv_blocks: 16, sequences_max: SEQUENCES, compute, ..Options::default() };
        let mut rank =
            Rank::new(Arc::clone(&weights), &options, Box::new(Solo::new(shards.virtual_shards()))).unwrap();
        let steps: Vec<Step> = [step(0, 10)].into_iter().chain((10..74).map(|at| step(at, 1))).collect();
        let mut allocations = 0;
        for (number, step) in steps.iter().enumerate() {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let sampled = rank.step(step, &mut |_| None).unwrap();
            if number >= FIRST_STEPS {
                allocations += ALLOCATIONS.load(Ordering::Relaxed) - before;
            }
            assert_eq!(sampled.tokens.len(), SEQUENCES);
        }
        let counted = steps.len() - FIRST_STEPS;
        assert!(
            (counted..=counted + START_MAX).contains(&allocations),
            "{allocations} allocations in {counted} steps in {compute}"
        );
    }
}

//! `fast`: many tokens by a library's products, here by plain loops of the emulator.

use std::sync::Arc;

use galerne_checkpoint::{Config, Dtype};
use galerne_collective::Solo;
use galerne_emulator::Emulator;
use galerne_model::gpu::{Device, GpuWeights, Link, kv_bytes_per_block};
use galerne_model::{Options, Rank, Trace};
use galerne_types::{Compute, KvDtype, Quantize, Shards, Slice};

use crate::gpu::{distance, gpu_options, prompt};
use crate::support::files::{Model, config};
use crate::support::group::{GPU_BYTES, Held, load_on_another_gpu, load_on_gpus, run_group, run_ranks};
use crate::support::script::{sequence, steps};

/// Three prompts of so many tokens that run in one step.
fn beside(tokens: u32) -> Vec<Vec<Slice>> {
    let prompts =
        [1, 2, 3].map(|seed| prompt(tokens, seed).into_iter().map(|id| id % 32).collect::<Vec<_>>());
    (0..).zip(&prompts).map(|(slot, prompt)| sequence(slot, prompt, prompt.len(), 1)).collect()
}

fn compute(fast: bool) -> Compute {
    if fast { Compute::Fast(90) } else { Compute::Tensor(90) }
}

fn options(fast: bool) -> Options {
    Options { step_tokens_max: 540, compute: compute(fast), ..gpu_options() }
}

/// What layers see at rank 0, before it is rounded.
fn hidden(gpus: &[Held], fast: bool, tokens: u32) -> Vec<f32> {
    run_ranks(gpus, &options(fast), |rank| {
        let mut all = Vec::new();
        for step in steps(beside(tokens)) {
            let mut keep = |trace: Trace<'_>| {
                if let Trace::Hidden { rows, .. } = trace {
                    all.extend_from_slice(rows);
                }
            };
            rank.step_traced(&step, &mut |_| None, &mut keep).unwrap();
        }
        all
    })
}

/// Many tokens come near what our own products make of them, but not to its bits; few do.
fn check(gpus: &[Held], what: &str) {
    let run = |fast| run_group(gpus, &options(fast), &steps(beside(178)));
    let distance = distance(&run(true), &run(false));
    println!("{what}: {distance}");
    assert!(distance < 0.05, "{what}: {distance} of the logits' spread");
    assert!(hidden(gpus, true, 178) != hidden(gpus, false, 178), "{what}: the library was not asked");
    assert!(hidden(gpus, true, 20) == hidden(gpus, false, 20), "{what}: it was asked for few tokens");
}

#[test]
fn many_tokens_are_near_what_our_own_products_make_of_them() {
    // Heads of 96 dimensions with nobody to share a KV head leave a pair of k-tiles empty; six shards of three ranks are two pieces at
    // some.
    let fp8 = Some(Quantize::Fp8);
    for (heads, kv_heads, head_dim, shards, quantize, world_sizes) in
        [(8, 4, 16, 4, None, &[1, 2][..]), (3, 3, 96, 6, None, &[1, 3]), (8, 4, 16, 4, fp8, &[1, 2])]
    {
        let (_folder, checkpoint) =
            Model::random(config(heads, kv_heads, head_dim, 100, 32), 3).gguf(Dtype::Bf16);
        for &world_size in world_sizes {
            let gpus = load_on_gpus(&checkpoint, quantize, shards, world_size);
            check(&gpus, &format!("{heads} heads of {head_dim}, {quantize:?}, N = {world_size}"));
        }
    }
}

#[test]
fn gate_and_up_are_the_librarys_where_there_are_no_warpgroups() {
    let (_folder, checkpoint) = Model::random(config(2, 1, 32, 100, 32), 3).gguf(Dtype::Bf16);
    for (architecture, shared_bytes_max) in [(80, 163 << 10), (100, 227 << 10)] {
        let gpu = load_on_another_gpu(&checkpoint, architecture, shared_bytes_max);
        check(&gpu, &format!("sm_{architecture}"));
    }
}

#[test]
fn memory_is_counted_before_it_is_taken() {
    let (_folder, checkpoint) =
        Model::random(Config { vocab: 3000, ..config(8, 4, 32, 160, 300) }, 3).gguf(Dtype::Bf16);
    let shards = Shards::new(4, 1).unwrap();
    for (architecture, quantize, fast) in
        [(90, None, false), (90, None, true), (100, None, true), (90, Some(Quantize::Fp8), true)]
    {
        let device: Arc<dyn Device> = Arc::new(Emulator::new(GPU_BYTES).with_architecture(architecture));
        let options = Options { step_tokens_max: 600, compute: compute(fast), ..gpu_options() };
        let needed =
            GpuWeights::bytes_needed(&checkpoint, (shards, 0), quantize, architecture, &options).unwrap();
        let weights = GpuWeights::load(&checkpoint, shards, 0, quantize, &device, 1, &|_, _| {}).unwrap();
        let block = kv_bytes_per_block(checkpoint.config(), shards, 0, KvDtype::Bf16).unwrap();
        let _rank = Rank::on_gpu(Arc::new(weights), &options, Box::new(Solo::new(4)), Link::host()).unwrap();
        let memory = device.memory().unwrap();
        let counted = needed[0] + needed[1] + options.kv_blocks * block;
        let (taken, rounding) = ((memory.total - memory.free) as usize, 40 * 256);
        assert!(
            counted <= taken && taken < counted + rounding,
            "sm_{architecture}, {quantize:?}, fast: {fast}: {counted} counted, {taken} taken"
        );
    }
}

//! Sums by each other's memory: the same bits as by any other way, and nobody waits for ranks that are gone.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Collective as _;
use galerne_emulator::Emulator;
use galerne_model::Rank;
use galerne_model::gpu::{Device, GpuWeights, Link};
use galerne_types::Shards;

use crate::gpu::{gpu_options, prompt, random};
use crate::support::group::{GPU_BYTES, assert_same, load_on_gpus, peers, run_group, run_near};
use crate::support::local::Local;
use crate::support::script::{sequence, steps};

#[test]
fn sums_by_memory_have_the_bits_of_all_others() {
    let (_folder, checkpoint) = random(12, 6, 16);
    let hidden = checkpoint.config().hidden;
    let script = steps(vec![sequence(0, &prompt(97, 0), 30, 6), sequence(1, &prompt(40, 0), 7, 20)]);
    let alone = run_group(&load_on_gpus(&checkpoint, None, 6, 1), &gpu_options(), &script);
    for ranks in [2, 3, 6] {
        let gpus = load_on_gpus(&checkpoint, None, 6, ranks);
        // All of them, and those of few tokens while longer ones go another way.
        for tokens in [300, 8] {
            let found = run_near(tokens * hidden, &gpus, &gpu_options(), &script);
            assert_same(&found, &alone, &format!("{ranks} ranks, up to {tokens} tokens"));
        }
    }
}

/// Weights of both ranks, each with a GPU of its own.
fn pair(checkpoint: &Checkpoint, gpus: [Emulator; 2]) -> Vec<Arc<GpuWeights>> {
    let shards = Shards::new(6, 2).unwrap();
    let load = |(rank, gpu)| {
        let device: Arc<dyn Device> = Arc::new(gpu);
        Arc::new(GpuWeights::load(checkpoint, shards, rank, None, &device, 2, &|_, _| {}).unwrap())
    };
    (0..).zip(gpus).map(load).collect()
}

#[test]
fn a_rank_that_waits_for_another_leaves_when_the_epoch_ends() {
    let (_folder, checkpoint) = random(12, 6, 16);
    let weights = pair(&checkpoint, [Emulator::new(GPU_BYTES), Emulator::new(GPU_BYTES)]);
    let [mut first, mut second] = Local::group(6, 2).try_into().ok().unwrap();
    let abort = first.abort_handle();
    thread::scope(|scope| {
        let gone = scope.spawn(|| peers(&weights[1], 1 << 16, &mut second).unwrap());
        let met = peers(&weights[0], 1 << 16, &mut first).unwrap();
        let gone = gone.join().unwrap(); // its memory is there, and nobody in it
        let link = Link::host().beside(Some(met));
        let mut rank = Rank::on_gpu(Arc::clone(&weights[0]), &gpu_options(), Box::new(first), link).unwrap();
        let waits = scope.spawn(move || {
            let script = steps(vec![sequence(0, &prompt(5, 0), 5, 1)]);
            rank.step(&script[0], &mut |_| None).map(drop)
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!waits.is_finished());
        abort.abort();
        assert!(waits.join().unwrap().is_err());
        drop(gone);
    });
}

#[test]
fn what_one_rank_cannot_reach_is_used_by_none() {
    let (_folder, checkpoint) = random(12, 6, 16);
    for apart in [0, 1] {
        let gpu =
            |rank| if rank == apart { Emulator::new(GPU_BYTES).apart() } else { Emulator::new(GPU_BYTES) };
        let weights = pair(&checkpoint, [gpu(0), gpu(1)]);
        thread::scope(|scope| {
            let meet =
                |(mut end, weights): (Local, &Arc<GpuWeights>)| peers(weights, 1 << 16, &mut end).is_none();
            let ranks = Local::group(6, 2).into_iter().zip(&weights);
            let ranks: Vec<_> = ranks.map(|rank| scope.spawn(move || meet(rank))).collect();
            assert!(ranks.into_iter().all(|rank| rank.join().unwrap()));
        });
    }
}

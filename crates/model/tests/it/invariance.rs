//! The same bits, however the work is cut.

use galerne_checkpoint::{Checkpoint, Dtype};
use galerne_model::{Isa, ModelError, Options, Trace, WindowChoice};
use galerne_types::{Compute, Epoch, Input, KvDtype, Quantize, Slice, Step};

use crate::support::files::{Model, Noise, config, in_whole_blocks};
use crate::support::group::{Drawn, assert_same, load, options, run, run_group, solo};
use crate::support::script::{greedy, known, ring, sequence, sharing, sliding, steps};

fn checkpoint(dtype: Dtype) -> (tempfile::TempDir, Checkpoint) {
    Model::random(in_whole_blocks(config(8, 4, 16, 160, 300), dtype), 3).gguf(dtype)
}

fn prompt(count: usize, seed: u64) -> Vec<u32> {
    let mut noise = Noise(seed);
    (0..count).map(|_| ((noise.next() + 1.0) * 149.0) as u32).collect()
}

fn only(drawn: &Drawn, slot: u32) -> Drawn {
    drawn
        .iter()
        .filter(|((of, _), _)| *of == slot)
        .map(|((_, index), token)| ((0, *index), token.clone()))
        .collect()
}

#[test]
fn ranks_chunks_batches_threads_and_instruction_sets_do_not_show() {
    let quantized = [Dtype::Q4_1, Dtype::Q4_0, Dtype::Q8_0, Dtype::Q4K, Dtype::Q6K];
    let others = [Dtype::F16, Dtype::Bf16, Dtype::F32];
    let int8 = quantized.into_iter().map(|dtype| (dtype, Compute::Int8, None));
    let f32 = quantized.into_iter().chain(others).map(|dtype| (dtype, Compute::F32, None));
    let pairs = [(Dtype::Bf16, Compute::Bf16, None)];
    let at_load = [(Dtype::Bf16, Compute::Int8, Some(Quantize::Q4_0))];
    // Each way to keep keys and values meets formats of every kind: the one does not see the other.
    let ways = f32.chain(int8).chain(pairs).chain(at_load).zip(KvDtype::CPU.into_iter().cycle());
    for ((dtype, compute, quantize), kv_dtype) in ways {
        let (_folder, mut checkpoint) = checkpoint(dtype);
        let mut dtype = format!("{dtype} in {compute}, keys and values in {kv_dtype}");
        if let Some(quantize) = quantize {
            checkpoint = checkpoint.quantized(quantize);
            dtype += &format!(", {quantize} at load");
        }
        let options = || Options { compute, kv_dtype, ..options() };
        let long = prompt(97, 1);
        let groups = [1, 2, 4].map(|world_size| load(&checkpoint, 4, world_size));
        let alone = run_group(&groups[0], &options(), &steps(vec![sequence(0, &long, 97, 12)]));
        for chunk in [1, 2, 3, 5, 13, 32, 64] {
            let found = run_group(&groups[0], &options(), &steps(vec![sequence(0, &long, chunk, 12)]));
            assert_same(&found, &alone, &format!("{dtype}: chunks of {chunk}"));
        }
        let beside = vec![
            sequence(1, &prompt(40, 2), 7, 20),
            sequence(0, &long, 16, 12),
            sequence(2, &prompt(1, 3), 1, 20),
            sequence(3, &prompt(200, 4), 100, 3),
        ];
        for isa in Isa::available() {
            for (threads, weights) in [1, 2, 3].into_iter().zip(&groups) {
                let options = Options { isa, threads, ..options() };
                let what = format!("{dtype}: {} ranks, {threads} threads, {}", weights.len(), isa.name());
                let found = run_group(weights, &options, &steps(beside.clone()));
                assert_same(&only(&found, 0), &alone, &what);
                let found = run_group(weights, &options, &steps(vec![sequence(0, &long, 97, 12)]));
                assert_same(&found, &alone, &what);
            }
        }
    }
}

#[test]
fn a_step_larger_than_a_tile_is_the_same_step() {
    let (_folder, checkpoint) = checkpoint(Dtype::Q8_0);
    let long = prompt(254, 8);
    let weights = load(&checkpoint, 4, 1);
    let options = Options { step_tokens_max: 1000, ..options() };
    let expected = run_group(&weights, &options, &steps(vec![sequence(0, &long, 100, 2)]));
    let all = [0, 1, 2].map(|slot| sequence(slot, &long, 254, 2)).to_vec();
    let found = run_group(&weights, &options, &steps(all));
    for slot in 0..3 {
        assert_same(&only(&found, slot), &expected, "three tiles");
    }
}

#[test]
fn a_prefix_that_another_sequence_computed_gives_the_same_bits() {
    for (dtype, kv_dtype) in [Dtype::Q4_1, Dtype::Bf16, Dtype::Q8_0].into_iter().zip(KvDtype::CPU) {
        let (_folder, checkpoint) = checkpoint(dtype);
        let options = || Options { kv_dtype, ..options() };
        let first = prompt(97, 1);
        let other = [&first[..64], &prompt(40, 9)].concat();
        for world_size in [1, 2] {
            let weights = load(&checkpoint, 4, world_size);
            let alone = run_group(&weights, &options(), &steps(vec![sequence(0, &other, 50, 12)]));
            let computes = sequence(0, &first, 32, 12);
            let shares = sharing(1, 0, 64, sequence(1, &other, 16, 12));
            let (before, beside) =
                (steps(vec![computes[..2].to_vec()]), steps(vec![computes[2..].to_vec(), shares]));
            let found = run_group(&weights, &options(), &[before, beside].concat());
            assert_same(&only(&found, 1), &alone, &format!("{dtype}, {kv_dtype}: {world_size} ranks"));
        }
    }
}

#[test]
fn blocks_that_left_the_window_are_used_again() {
    let (_folder, checkpoint) = checkpoint(Dtype::Q8_0);
    let long = prompt(200, 1);
    for (window, kv_dtype) in [1, 16, 33, 64, 100].into_iter().zip(KvDtype::CPU.into_iter().cycle()) {
        let options = Options { window: WindowChoice::Tokens(window), kv_dtype, ..options() };
        let alone = run(&mut solo(&checkpoint, &options), &steps(vec![sequence(0, &long, 200, 40)]));
        for chunk in [1, 31, 32, 50] {
            let slides = [0, 1].map(|slot| sliding(window, chunk, sequence(slot, &long, chunk, 40)));
            let few = Options { kv_blocks: 2 * ring(window, chunk), ..options.clone() };
            let found = run(&mut solo(&checkpoint, &few), &steps(slides.to_vec()));
            for slot in [0, 1] {
                assert_same(
                    &only(&found, slot),
                    &alone,
                    &format!("window {window}, chunks of {chunk}, {kv_dtype}"),
                );
            }
        }
    }
}

#[test]
fn what_lies_outside_the_window_does_not_matter_and_its_blocks_neither() {
    let (_folder, checkpoint) = checkpoint(Dtype::F32);
    let options = Options { window: WindowChoice::Tokens(1), ..options() };
    let mut rank = solo(&checkpoint, &options);
    // With a window of one token the last position depends on itself alone.
    let one = run(&mut rank, &steps(vec![vec![known(0, 70, &[5], greedy(0))]]));
    let other = run(&mut rank, &steps(vec![sequence(0, &[&prompt(70, 7)[..], &[5]].concat(), 9, 1)]));
    assert_same(&one, &other, "window of one token");
}

#[test]
fn a_refused_step_changes_nothing() {
    let (_folder, checkpoint) = checkpoint(Dtype::Bf16);
    let mut rank = solo(&checkpoint, &options());
    let last = |slot: u32| Slice { input: Input::Last, ..known(slot, 0, &[0], greedy(0)) };
    let step = |slices| Step { epoch: Epoch(1), number: 9, slices, traces: Vec::new() };
    for slices in [vec![last(0)], vec![known(9, 0, &[1], None)], vec![known(0, 0, &[300], None)]] {
        let refusal =
            rank.step_traced(&step(slices), &mut |_| None, &mut |_: Trace<'_>| panic!("nothing is computed"));
        assert!(matches!(refusal, Err(ModelError::Step { number: 9, .. })), "{refusal:?}");
    }
    let after = run(&mut rank, &steps(vec![sequence(0, &[1, 2, 3], 3, 2)]));
    let fresh = run(&mut solo(&checkpoint, &options()), &steps(vec![sequence(0, &[1, 2, 3], 3, 2)]));
    assert_same(&after, &fresh, "after refusals");
    assert!(rank.step(&step(vec![]), &mut |_| None).unwrap().tokens.is_empty());
}

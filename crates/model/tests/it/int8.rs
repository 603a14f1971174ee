//! Products of bytes against the reference path: how far activations of eight bits move the logits.

use galerne_checkpoint::{Checkpoint, Dtype};
use galerne_model::{Options, WindowChoice, compute_for};
use galerne_types::Compute;

use crate::golden::Golden;
use crate::smollm2;
use crate::support::files::{Model, config, in_whole_blocks};
use crate::support::group::{Drawn, options, run, solo};
use crate::support::script::{greedy, known, steps};

/// Most that the logits of a position are off, as a share of their own spread; measured are up to 0.056.
const ERROR_MAX: f32 = 0.07;
/// The same for the wide model of super-blocks; measured are up to 0.089, and of 32-blocks there up to 0.104.
const WIDE_ERROR_MAX: f32 = 0.11;

/// The logits of every position of a prompt.
fn logits(checkpoint: &Checkpoint, prompt: &[u32], compute: Compute) -> Drawn {
    let mut rank = solo(checkpoint, &Options { compute, threads: 2, ..options() });
    let slices = prompt.iter().enumerate().map(|(at, id)| known(0, at, &[*id], greedy(at))).collect();
    run(&mut rank, &steps(vec![slices]))
}

fn deviation(row: &[f32]) -> f32 {
    let mean = row.iter().sum::<f32>() / row.len() as f32;
    (row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / row.len() as f32).sqrt()
}

/// Every position's logits are off by that share at most, in the root mean square; and the first choice is the same
/// wherever the reference prefers it by more than the logits of the two can have moved.
fn check(checkpoint: &Checkpoint, prompt: &[u32], error_max: f32, what: &str) {
    let reference = logits(checkpoint, prompt, Compute::F32);
    let found = logits(checkpoint, prompt, Compute::Int8);
    assert_ne!(found, reference, "{what}: the two ways are one");
    for (at, (reference_id, reference)) in &reference {
        let (id, row) = &found[at];
        let errors: Vec<f32> = row.iter().zip(reference).map(|(found, expected)| found - expected).collect();
        let (error, spread) = (deviation(&errors), deviation(reference));
        assert!(error <= error_max * spread, "{what}: at {at:?} off by {error} of {spread}");
        let gap = reference[*reference_id as usize] - reference[*id as usize];
        let moved = errors.iter().fold(0f32, |most, error| most.max(error.abs()));
        assert!(gap <= 2.0 * moved.min(8.0 * error), "{what}: at {at:?} {id} for {reference_id}, by {gap}");
    }
}

#[test]
fn every_quantized_format_is_near_the_reference() {
    for dtype in [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K] {
        let config = config(4, 2, 16, 96, 100);
        let config = in_whole_blocks(config, dtype);
        let error_max = if dtype.is_k_quant() { WIDE_ERROR_MAX } else { ERROR_MAX };
        let model = Model::random(config, 1).rounded(dtype);
        let (_folder, checkpoint) = model.gguf(dtype);
        assert_eq!(compute_for(&checkpoint), Compute::F32, "it is small");
        let prompt: Vec<u32> = (0..40).map(|i| i * 31 % 100).collect();
        check(&checkpoint, &prompt, error_max, &dtype.to_string());
    }
}

#[test]
fn the_demo_model_is_near_the_reference() {
    let checkpoint = smollm2::open();
    let cases = Golden::load("smollm2-135m").cases();
    for case in cases.iter().filter(|case| case.window == WindowChoice::Full) {
        check(&checkpoint, &case.prompt, ERROR_MAX, &case.key);
    }
}

//! Products of bytes and of pairs against the reference path: how far rounded activations move the logits; and how far
//! weights do that are quantized at load.

use std::path::Path;

use galerne_checkpoint::{Checkpoint, Dtype};
use galerne_model::{Isa, Options, WindowChoice, compute_for};
use galerne_types::{Compute, Quantize};

use crate::golden::Golden;
use crate::smollm2;
use crate::support::files::{Model, config, in_whole_blocks};
use crate::support::group::options;
use crate::support::near::{assert_near, logits};

/// Most that the logits of a position are off, as a share of their own spread; measured are up to 0.056.
const ERROR_MAX: f32 = 0.07;
/// The same for the wide model of super-blocks; measured are up to 0.089, and of 32-blocks there up to 0.104.
const WIDE_ERROR_MAX: f32 = 0.11;

/// The same for activations in bf16, in bard-1m; measured are up to 0.007.
const PAIRS_ERROR_MAX: f32 = 0.01;

/// The same for weights quantized at load, in bard-1m; measured are up to 0.016 and 0.174.
const AT_LOAD_ERROR_MAX: [(Quantize, f32); 2] = [(Quantize::Q8_0, 0.02), (Quantize::Q4_0, 0.2)];

fn check(checkpoint: &Checkpoint, compute: Compute, prompt: &[u32], error_max: f32, what: &str) {
    let [reference, found] = [Compute::F32, compute]
        .map(|compute| logits(checkpoint, prompt, &Options { compute, threads: 2, ..options() }));
    assert_near(&found, &reference, error_max, what);
}

#[test]
fn every_quantized_format_is_near_the_reference() {
    for dtype in [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K] {
        let config = config(4, 2, 16, 96, 100);
        let config = in_whole_blocks(config, dtype);
        let error_max = if dtype.is_k_quant() { WIDE_ERROR_MAX } else { ERROR_MAX };
        let model = Model::random(config, 1).rounded(dtype);
        let (_folder, checkpoint) = model.gguf(dtype);
        assert_eq!(compute_for(&checkpoint, Isa::best()), Compute::F32, "it is small");
        let prompt: Vec<u32> = (0..40).map(|i| i * 31 % 100).collect();
        check(&checkpoint, Compute::Int8, &prompt, error_max, &dtype.to_string());
    }
}

#[test]
fn the_demo_model_is_near_the_reference() {
    let checkpoint = smollm2::open();
    let cases = Golden::load("smollm2-135m").cases();
    for case in cases.iter().filter(|case| case.window == WindowChoice::Full) {
        check(&checkpoint, Compute::Int8, &case.prompt, ERROR_MAX, &case.key);
    }
}

fn bard() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m")).unwrap()
}

#[test]
fn bard_by_products_of_pairs_is_near_the_reference() {
    for case in Golden::load("bard-1m").cases().iter().filter(|case| case.window == WindowChoice::Full) {
        check(&bard(), Compute::Bf16, &case.prompt, PAIRS_ERROR_MAX, &case.key);
    }
}

#[test]
fn bard_quantized_at_load_is_near_the_reference() {
    let cases = Golden::load("bard-1m").cases();
    for (quantize, error_max) in AT_LOAD_ERROR_MAX {
        for case in cases.iter().filter(|case| case.window == WindowChoice::Full) {
            let reference = logits(&bard(), &case.prompt, &options());
            let found = logits(&bard().quantized(quantize), &case.prompt, &options());
            assert_near(&found, &reference, error_max, &format!("{quantize}, {}", case.key));
        }
    }
}

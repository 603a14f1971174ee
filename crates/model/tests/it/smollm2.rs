//! The demo model, from its GGUF file.

use std::path::PathBuf;

use galerne_checkpoint::{Checkpoint, Dtype};
use galerne_model::Options;
use half::bf16;

use crate::golden::Golden;
use crate::support::files::Model;
use crate::support::group::{assert_same, load, options, run, run_group, solo};
use crate::support::script::{sequence, steps};

pub(crate) fn open() -> Checkpoint {
    let path = std::env::var_os("GALERNE_DEMO_MODEL").map_or_else(
        || {
            let cache = "../../.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(cache)
        },
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "the demo model is not at {}: run `make test`, which fetches it, or name it in GALERNE_DEMO_MODEL",
        path.display()
    );
    Checkpoint::open(&path).unwrap()
}

/// The golden was made from the file's values rounded to bf16, which moves its logits by some hundredths.
#[test]
fn rounded_to_bf16_it_has_the_reference_logits_and_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Model::read(&open());
    for norm in model.tensors.values_mut().filter(|tensor| tensor.rows == 1) {
        norm.values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    model.write_folder(folder.path(), Dtype::Bf16);
    drop(model);
    let golden = Golden::load("smollm2-135m");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for case in golden.cases() {
        let mut rank = solo(&checkpoint, &Options { window: case.window, threads: 2, ..options() });
        golden.check(&mut rank, &case);
    }
}

#[test]
fn as_it_is_it_says_nearly_the_same() {
    let checkpoint = open();
    for case in Golden::load("smollm2-135m").cases().iter().filter(|case| case.gaps[0] > 0.3) {
        let mut rank = solo(&checkpoint, &Options { window: case.window, threads: 2, ..options() });
        let drawn = run(&mut rank, &steps(vec![sequence(0, &case.prompt, 64, 1)]));
        assert_eq!(drawn[&(0, 0)].0, case.greedy[0], "{}", case.key);
    }
}

#[test]
fn the_number_of_ranks_does_not_show() {
    let checkpoint = open();
    let golden = Golden::load("smollm2-135m");
    let prompt = &golden.cases()[3].prompt;
    for (virtual_shards, world_sizes) in [(3, vec![1, 3]), (4, vec![1, 2, 4])] {
        let mut first = None;
        for world_size in world_sizes {
            let weights = load(&checkpoint, virtual_shards, world_size);
            for (chunk, threads) in [(prompt.len(), 2), (20, 1)] {
                let options = Options { threads, ..options() };
                let drawn = run_group(&weights, &options, &steps(vec![sequence(0, prompt, chunk, 3)]));
                let expected = first.get_or_insert_with(|| drawn.clone());
                assert_same(
                    &drawn,
                    expected,
                    &format!("S = {virtual_shards}, N = {world_size}, {threads} threads"),
                );
            }
        }
    }
}

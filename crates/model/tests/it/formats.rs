//! Against a plain forward pass: formats that have no golden, and widths that nothing divides.

use galerne_checkpoint::{Checkpoint, Config, Dtype, Weight};
use galerne_model::{ModelError, Options, Weights, WindowChoice};
use galerne_types::{Quantize, Shards};

use crate::support::assert_close;
use crate::support::files::{Model, Noise, config};
use crate::support::group::{Drawn, assert_same, load, options, run_group};
use crate::support::reference;
use crate::support::script::{greedy, known, sequence, steps};

fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut noise = Noise(99);
    (0..count).map(|_| ((noise.next() + 1.0) / 2.0 * (vocab - 1) as f32) as u32).collect()
}

/// Logits of every position of a prompt, and one prefill in chunks, against the reference.
fn check(
    checkpoint: &Checkpoint,
    model: &Model,
    (s, n): (usize, usize),
    window: Option<usize>,
    what: &str,
) -> Drawn {
    let prompt = tokens(70, model.config.vocab);
    let window_choice = window.map_or(WindowChoice::Full, WindowChoice::Tokens);
    let options = Options { window: window_choice, threads: 2, ..options() };
    let weights = load(checkpoint, s, n);
    let slices = prompt.iter().enumerate().map(|(at, id)| known(0, at, &[*id], greedy(at))).collect();
    let beside = sequence(1, &prompt, 33, 1);
    let drawn = run_group(&weights, &options, &steps(vec![slices, beside]));
    let expected = reference::logits(model, &prompt, window);
    for (at, expected) in expected.iter().enumerate() {
        assert_close(&drawn[&(0, at as u32)].1, expected, &format!("{what}, position {at}"));
    }
    assert!(drawn[&(1, 0)] == drawn[&(0, 69)], "{what}: prefill and decode differ");
    drawn
}

#[test]
fn every_gguf_format_means_what_ggml_means() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1] {
        // Heads of 16 × 2: a shard's columns of the output projection are whole blocks. Of 8 × 2: they are not.
        for (heads, kv_heads, head_dim, tied) in [(4, 2, 16, false), (8, 4, 8, true)] {
            let config = Config { tied, ..config(heads, kv_heads, head_dim, 96, 100) };
            let model = Model::random(config, 1).rounded(dtype);
            let (_folder, checkpoint) = model.gguf(dtype);
            check(&checkpoint, &model, (4, 2), None, &format!("{dtype}, head_dim {head_dim}"));
        }
    }
}

/// Heads as above; and rows of down that are no whole blocks, which stay as they are.
#[test]
fn a_model_quantized_at_load_is_the_one_that_its_blocks_say() {
    for quantize in [Quantize::Q8_0, Quantize::Q4_0] {
        for (heads, kv_heads, head_dim, intermediate, tied) in
            [(4, 2, 16, 160, false), (8, 4, 8, 96, true), (4, 2, 16, 100, false)]
        {
            let config = Config { tied, ..config(heads, kv_heads, head_dim, intermediate, 100) };
            let folder = tempfile::tempdir().unwrap();
            Model::random(config, 1).write_folder(folder.path(), Dtype::Bf16);
            let checkpoint = Checkpoint::open(folder.path()).unwrap().quantized(quantize);
            let model = Model::read(&checkpoint);
            let what = format!("{quantize}, head_dim {head_dim}, MLP {intermediate}");
            let alone = check(&checkpoint, &model, (4, 1), None, &what);
            for world_size in [2, 4] {
                let cut = check(&checkpoint, &model, (4, world_size), None, &what);
                assert_same(&cut, &alone, &format!("{what}, {world_size} ranks"));
            }
        }
    }
}

#[test]
fn super_blocks_mean_what_ggml_means() {
    for dtype in [Dtype::Q4K, Dtype::Q6K] {
        // A KV head's columns of the output projection are a super-block each; or a quarter of one. Super-blocks of the
        // MLP are dealt out one each; or one to one shard and two to another.
        for (kv_heads, head_dim, intermediate, tied) in [(2, 128, 1024, false), (4, 64, 1280, true)] {
            let config = Config { hidden: 256, tied, ..config(4, kv_heads, head_dim, intermediate, 100) };
            let model = Model::random(config, 1).rounded(dtype);
            let (_folder, checkpoint) = model.gguf(dtype);
            check(&checkpoint, &model, (4, 2), None, &format!("{dtype}, head_dim {head_dim}"));
            let elements = Weight::all(checkpoint.config()).map(|weight| weight.shape(checkpoint.config()));
            let elements = elements.map(|(rows, cols)| rows * cols).sum::<usize>();
            let bytes = load(&checkpoint, 4, 1)[0].bytes();
            let most = elements * if head_dim == 128 { 1 } else { 2 }; // without padding and norms, 4.6 or 6.6 bits
            assert!(bytes < most, "{dtype}, head_dim {head_dim}: {bytes} bytes of {elements} weights");
        }
    }
}

#[test]
fn widths_that_nothing_divides_compute_the_same_function() {
    let odd = [config(6, 3, 8, 100, 301), config(5, 1, 6, 33, 65), config(4, 4, 12, 31, 40)];
    for (seed, config) in odd.into_iter().enumerate() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let model = Model::random(config.clone(), seed as u64).rounded(dtype);
            let folder = tempfile::tempdir().unwrap();
            model.write_folder(folder.path(), dtype);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            for window in [None, Some(20), Some(1)] {
                let what = format!("{dtype} {config:?} window {window:?}");
                let alone = check(&checkpoint, &model, (4, 1), window, &what);
                for world_size in [2, 4] {
                    let cut = check(&checkpoint, &model, (4, world_size), window, &what);
                    assert_same(&cut, &alone, &format!("{what}, {world_size} ranks"));
                }
            }
        }
    }
}

#[test]
fn ranks_that_are_no_subtree_sum_alike() {
    let model = Model::random(config(6, 3, 8, 200, 131), 5);
    let folder = tempfile::tempdir().unwrap();
    model.write_folder(folder.path(), Dtype::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let alone = check(&checkpoint, &model, (6, 1), None, "six shards");
    for world_size in [2, 3, 6] {
        let cut = check(&checkpoint, &model, (6, world_size), None, "six shards");
        assert_same(&cut, &alone, &format!("{world_size} ranks"));
    }
}

#[test]
fn a_rank_loads_its_share_and_tells_how_far_it_is() {
    let model = Model::random(config(4, 4, 32, 256, 512), 5);
    let folder = tempfile::tempdir().unwrap();
    model.write_folder(folder.path(), Dtype::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let bytes = |world_size| {
        let shards = Shards::new(4, world_size).unwrap();
        let seen = std::sync::Mutex::new((0, 0));
        let progress = |done, total| {
            let mut seen = seen.lock().unwrap();
            *seen = (seen.0.max(done), total);
        };
        let weights = Weights::load(&checkpoint, shards, world_size - 1, 3, None, &progress).unwrap();
        let (done, total) = *seen.lock().unwrap();
        assert!(done == total && total == weights.bytes() as u64, "{done} of {total}");
        weights.bytes()
    };
    assert_eq!((bytes(1), bytes(1)), (2 * bytes(2), 4 * bytes(4)));
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let model = Model::random(config(4, 4, 8, 32, 32), 5);
    let folder = tempfile::tempdir().unwrap();
    model.write_folder(folder.path(), Dtype::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let load = Weights::load(&checkpoint, Shards::new(2, 1).unwrap(), 0, 1, None, &|_, _| {});
    assert!(matches!(load, Err(ModelError::TooFewShards { virtual_shards: 2, kv_heads: 4 })));
}

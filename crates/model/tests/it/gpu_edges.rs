//! Kernels at the edges of their tiles: rooms, widths and lengths that fill nothing. What is written behind the end of memory the
//! emulator refuses; what is read there shows in the logits.

use std::sync::Arc;

use galerne_checkpoint::{Config, Dtype};
use galerne_emulator::Emulator;
use galerne_model::gpu::{Address, Buffer, Device, Launch};
use galerne_model::{Options, WindowChoice};
use galerne_types::KvDtype;

use crate::gpu::distance;
use crate::support::files::{Model, config};
use crate::support::group::{assert_same, load, load_on_gpus, options, run_group};
use crate::support::script::{sequence, steps};

fn gpu_options(step_tokens_max: usize) -> Options {
    Options { kv_dtype: KvDtype::Bf16, step_tokens_max, ..options() }
}

fn prompt(count: u32, seed: u32, vocab: u32) -> Vec<u32> {
    (0..count).map(|at| (at * 7919 + seed * 104_729) % vocab).collect()
}

#[test]
fn a_room_for_any_number_of_tokens_is_enough_for_them() {
    let (_folder, checkpoint) = Model::random(config(4, 2, 16, 96, 40), 3).gguf(Dtype::Bf16);
    let gpu = load_on_gpus(&checkpoint, None, 2, 1);
    for tokens in [1, 9, 17, 24, 40, 57, 65] {
        let script = steps(vec![sequence(0, &prompt(tokens, 1, 40), tokens as usize, 2)]);
        let exact = run_group(&gpu, &gpu_options(tokens as usize), &script);
        let ample = run_group(&gpu, &gpu_options(300), &script);
        assert_same(&exact, &ample, &format!("room for {tokens} tokens"));
    }
}

#[test]
fn widths_that_fill_no_tile_come_to_the_reference() {
    // Hidden, heads, KV heads, head_dim, MLP columns, vocabulary, S: all odd in some way, or just beyond a tile.
    let shapes = [
        (48, 3, 1, 16, 33, 17, 1),
        (33, 2, 1, 34, 31, 33, 1),
        (64, 6, 3, 18, 65, 301, 4),
        (80, 16, 1, 8, 97, 50, 2),
        (40, 5, 5, 98, 200, 15, 8),
        (1056, 1, 1, 128, 34, 19, 1),
    ];
    for (hidden, heads, kv_heads, head_dim, intermediate, vocab, shards) in shapes {
        let what = format!(
            "{heads} heads, {kv_heads} KV heads of {head_dim}, {hidden} by {intermediate}, {shards} shards"
        );
        let config = Config { hidden, ..config(heads, kv_heads, head_dim, intermediate, vocab) };
        let (_folder, checkpoint) = Model::random(config, 5).gguf(Dtype::Bf16);
        let (gpu, cpu) = (load_on_gpus(&checkpoint, None, shards, 1), load(&checkpoint, shards, 1));
        for (tokens, kv_dtype) in
            [(1, KvDtype::Bf16), (9, KvDtype::Bf16), (66, KvDtype::Bf16), (35, KvDtype::Fp8)]
        {
            let script = steps(vec![sequence(0, &prompt(tokens, 1, vocab as u32), tokens as usize, 1)]);
            let options = gpu_options(tokens as usize);
            let found = run_group(&gpu, &Options { kv_dtype, ..options.clone() }, &script);
            let distance = distance(&found, &run_group(&cpu, &options, &script));
            let allowed = if kv_dtype == KvDtype::Fp8 { 0.6 } else { 0.2 };
            assert!(
                distance < allowed,
                "{what}, {tokens} tokens, {kv_dtype}: {distance} of the logits' spread"
            );
        }
    }
}

#[test]
fn prompts_that_end_beside_a_block_a_chunk_or_a_window_come_to_the_reference() {
    let (_folder, checkpoint) = Model::random(config(6, 2, 32, 64, 40), 7).gguf(Dtype::Bf16);
    let (gpu, cpu) = (load_on_gpus(&checkpoint, None, 2, 1), load(&checkpoint, 2, 1));
    for window in [WindowChoice::Full, WindowChoice::Tokens(32), WindowChoice::Tokens(65)] {
        for tokens in [32, 33, 64, 65, 129] {
            let script = steps(vec![sequence(0, &prompt(tokens, 1, 40), tokens as usize, 1)]);
            let options = Options { window, ..gpu_options(tokens as usize) };
            let found = run_group(&gpu, &options, &script);
            let distance = distance(&found, &run_group(&cpu, &options, &script));
            assert!(distance < 0.1, "{window:?}, {tokens} tokens: {distance} of the logits' spread");
        }
    }
}

/// The argument of `cuda/bounds.cu`.
#[repr(C)]
struct Bound {
    from: Address,
    to: Address,
    count: u64,
    blocks: u32,
}

#[test]
fn a_kernel_that_writes_behind_the_end_is_named() {
    let device: Arc<dyn Device> = Arc::new(Emulator::new(1 << 20));
    let from = Buffer::zeroed(&device, 4096).unwrap();
    for (room, whole) in [(4096, true), (4080, true), (3840, false)] {
        let to = Buffer::zeroed(&device, room).unwrap();
        let arguments = Bound { from: from.address(), to: to.address(), count: 256, blocks: 1 };
        // SAFETY: what is written behind the end of `to` lies in the emulator's guard.
        let launched = unsafe { device.launch(&Launch::new(c"copy_all", [1, 1, 1], 256, 0, &arguments)) };
        // Lines of 256 bytes are the least that a device gives.
        match launched {
            Ok(()) => assert!(whole, "{room} bytes"),
            Err(error) => {
                assert!(
                    !whole && error.to_string().contains("copy_all wrote behind the end of 3840 bytes"),
                    "{error}"
                );
            }
        }
    }
}

//! Answers that are run ahead: the same tokens from the same logits, to the last bit, whatever a draft says.

use galerne_checkpoint::Dtype;
use galerne_model::{Options, WindowChoice};
use galerne_types::{Compute, Draw, Sampling, TokenId};

use crate::support::files::{Model, config, in_whole_blocks};
use crate::support::group::{Drawn, assert_same, load, options, run_group};
use crate::support::script::{drafted, sampled, sequence, steps};

const SLOTS: [u32; 2] = [0, 1];

fn tokens(drawn: &Drawn, slot: u32) -> Vec<TokenId> {
    drawn.iter().filter(|((of, _), _)| *of == slot).map(|(_, (id, _))| *id).collect()
}

#[test]
fn a_draft_changes_no_bit() {
    let warm = Sampling { temperature: 1.3, top_p: 0.95, seed: 5, logprobs: Some(2), ..Sampling::greedy() };
    let model = |dtype| Model::random(in_whole_blocks(config(8, 4, 16, 160, 300), dtype), 3).gguf(dtype);
    for (dtype, compute, sampling) in [
        (Dtype::Bf16, Compute::F32, &warm),
        (Dtype::Q4_1, Compute::F32, &Sampling::greedy()),
        (Dtype::Q4_1, Compute::Int8, &warm),
    ] {
        let (_folder, checkpoint) = model(dtype);
        let prompts = SLOTS.map(|slot| (0..40 + slot).map(|at| (at * 31 + slot) % 300).collect::<Vec<_>>());
        for window in [WindowChoice::AsModel, WindowChoice::Tokens(20)] {
            let options = Options { compute, window, ..options() };
            let plain = SLOTS.map(|slot| sequence(slot, &prompts[slot as usize], 40, 70));
            let plain = plain.map(|slices| sampled(sampling, slices)).to_vec();
            let expected = run_group(&load(&checkpoint, 4, 1), &options, &steps(plain));
            let answers = SLOTS.map(|slot| tokens(&expected, slot));
            for world_size in [1, 2] {
                let weights = load(&checkpoint, 4, world_size);
                for lengths in [&[1][..], &[15], &[0, 2, 7, 3]] {
                    let run = |slot: u32| {
                        let (prompt, answer) = (&prompts[slot as usize], &answers[slot as usize]);
                        sampled(sampling, drafted(slot, prompt, answer, lengths))
                    };
                    let ahead = SLOTS.map(run);
                    assert!(ahead[0].len() < 70, "{} slices", ahead[0].len());
                    let found = run_group(&weights, &options, &steps(ahead.to_vec()));
                    assert_same(
                        &found,
                        &expected,
                        &format!("{dtype} in {compute}, {world_size} ranks, {lengths:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn the_last_draw_is_what_came_true() {
    let (_folder, checkpoint) = Model::random(config(8, 4, 16, 160, 300), 3).gguf(Dtype::F32);
    let weights = load(&checkpoint, 4, 1);
    let prompt = [1, 2, 3];
    let expected = run_group(&weights, &options(), &steps(vec![sequence(0, &prompt, 3, 12)]));
    // Every draft is wrong from its first token on: each step draws one token, and the next one goes on from that.
    let mut slices = sequence(0, &prompt, 3, 12);
    for slice in &mut slices[1..11] {
        let Some(Draw { index, draft, .. }) = &mut slice.draw else { continue };
        *draft = vec![expected[&(0, *index)].0 ^ 1, 5];
    }
    assert_same(&run_group(&weights, &options(), &steps(vec![slices])), &expected, "wrong drafts");
}

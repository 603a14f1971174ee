//! Less exact ways to compute against the reference: how far they move the logits.

use galerne_checkpoint::Checkpoint;
use galerne_model::Options;

use super::group::{Drawn, run, solo};
use super::script::{greedy, known, steps};

/// The logits of every position of a prompt.
pub(crate) fn logits(checkpoint: &Checkpoint, prompt: &[u32], options: &Options) -> Drawn {
    let mut rank = solo(checkpoint, options);
    let slices = prompt.iter().enumerate().map(|(at, id)| known(0, at, &[*id], greedy(at))).collect();
    run(&mut rank, &steps(vec![slices]))
}

fn deviation(row: &[f32]) -> f32 {
    let mean = row.iter().sum::<f32>() / row.len() as f32;
    (row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / row.len() as f32).sqrt()
}

/// Every position's logits are off by that share of their spread at most, in the root mean square; and the first choice
/// is the same wherever the reference prefers it by more than the logits of the two can have moved.
pub(crate) fn assert_near(found: &Drawn, reference: &Drawn, error_max: f32, what: &str) {
    assert_ne!(found, reference, "{what}: the two ways are one");
    for (at, (reference_id, reference)) in reference {
        let (id, row) = &found[at];
        let errors: Vec<f32> = row.iter().zip(reference).map(|(found, expected)| found - expected).collect();
        let (error, spread) = (deviation(&errors), deviation(reference));
        assert!(error <= error_max * spread, "{what}: at {at:?} off by {error} of {spread}");
        let gap = reference[*reference_id as usize] - reference[*id as usize];
        let moved = errors.iter().fold(0f32, |most, error| most.max(error.abs()));
        assert!(gap <= 2.0 * moved.min(8.0 * error), "{what}: at {at:?} {id} for {reference_id}, by {gap}");
    }
}

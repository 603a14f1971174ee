//! Steps that a GPU is given before the one before is over.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use galerne_checkpoint::Checkpoint;
use galerne_model::{Mask, Options, Rank};
use galerne_types::{Draw, Epoch, History, Input, RequestId, Sampled, Sampling, Score, Slice, Step, TokenId};

use crate::gpu::gpu_options;
use crate::support::group::{load, load_on_gpus, options, run_ranks, run_ranks_near};
use crate::support::script::{greedy, known, sampled, sequence, steps};

const VOCAB: u32 = 1024;

fn bard() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m")).unwrap()
}

fn prompt(count: u32, seed: u32) -> Vec<TokenId> {
    (0..count).map(|at| (at * 7919 + seed * 104_729) % VOCAB).collect()
}

fn step(number: u64, slices: Vec<Slice>) -> Step {
    Step { epoch: Epoch(1), number, slices, traces: Vec::new() }
}

/// Goes on from the token that was drawn last.
fn last(slot: u32, start: usize, draw: Draw) -> Slice {
    Slice { input: Input::Last, ..known(slot, start, &[0], Some(draw)) }
}

/// A grammar that binds nothing.
fn everything() -> Mask {
    vec![u32::MAX; VOCAB as usize / 32].into()
}

/// What each step draws; where `ahead`, each is begun before the one before is run, if that can be. And which were.
fn run(rank: &mut Rank, script: &[Step], ahead: bool) -> (Vec<Sampled>, Vec<bool>) {
    let (mut found, mut begun) = (Vec::new(), Vec::new());
    for (at, step) in script.iter().enumerate() {
        if ahead && rank.begin(step).unwrap() {
            begun.push(script.get(at + 1).is_some_and(|next| rank.begin(next).unwrap()));
        }
        found.push(rank.step(step, &mut |_| Some(everything())).unwrap());
    }
    (found, begun)
}

/// Sequences of all kinds, of which one is bound by a grammar at its fourth token.
fn script() -> Vec<Step> {
    let warm = Sampling { temperature: 0.9, seed: 5, logprobs: Some(3), ..Sampling::greedy() };
    let biased = Sampling { logit_bias: vec![(7, 4.0)], top_p: 0.9, seed: 9, ..warm };
    let mut constrained = sequence(2, &prompt(5, 3), 5, 7);
    constrained[BOUND].draw.as_mut().unwrap().grammar = Some(RequestId(2));
    let mut again = sequence(3, &prompt(4, 8), 4, 2);
    again.extend(sequence(3, &prompt(9, 9), 4, 3));
    let first = sequence(0, &prompt(40, 1), 11, 5);
    steps(vec![first, sampled(&warm, sequence(1, &prompt(7, 2), 7, 9)), constrained, sampled(&biased, again)])
}

const BOUND: usize = 3;

#[test]
fn what_is_begun_ahead_draws_what_is_run_step_by_step() {
    let (gpu, script) = (load_on_gpus(&bard(), None, 4, 1), script());
    let [plain, ahead] =
        [false, true].map(|ahead| run_ranks(&gpu, &gpu_options(), |rank| run(rank, &script, ahead)));
    assert_eq!(ahead.0, plain.0);
    // The last one has none behind it, and the one under a grammar waits for the host.
    let begun =
        (0..script.len()).filter(|at| *at != BOUND).map(|at| at + 1 != BOUND && at + 1 < script.len());
    assert_eq!(ahead.1, begun.collect::<Vec<_>>());
    // What is watched passes through the host.
    let watched = run_ranks(&gpu, &gpu_options(), |rank| {
        let step = |step| rank.step_traced(step, &mut |_| Some(everything()), &mut |_| ()).unwrap();
        script.iter().map(step).collect::<Vec<_>>()
    });
    assert_eq!(plain.0, watched);
}

#[test]
fn ranks_need_not_begin_the_same_steps_ahead() {
    let script = script();
    let alone =
        run_ranks(&load_on_gpus(&bard(), None, 4, 1), &gpu_options(), |rank| run(rank, &script, false));
    for (world_size, len_max) in [(2, 1 << 16), (4, 1 << 16), (4, 600)] {
        let gpus = load_on_gpus(&bard(), None, 4, world_size);
        for offset in [0, 1] {
            let eager = AtomicUsize::new(offset);
            let work = |rank: &mut Rank| {
                run(rank, &script, eager.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)).0
            };
            let near = run_ranks_near(len_max, &gpus, &gpu_options(), work);
            assert!(near == alone.0, "{world_size} ranks by memory");
            assert!(run_ranks(&gpus, &gpu_options(), work) == alone.0, "{world_size} ranks by hosts");
        }
    }
}

#[test]
fn more_rows_than_are_drawn_at_once_come_in_order() {
    const SLOTS: u32 = 37;
    let gpu = load_on_gpus(&bard(), None, 4, 1);
    let options = Options { sequences_max: SLOTS as usize, ..gpu_options() };
    let at = |slot: u32, mut slice: Slice| {
        (slice.slot, slice.blocks) = (slot, vec![slot]);
        slice
    };
    let first = |slot| at(slot, known(0, 0, &prompt(3 + slot % 4, slot), greedy(0)));
    let next = |slot, by: usize| {
        let start = 3 + slot as usize % 4 + by - 1;
        at(slot, last(0, start, greedy(by).unwrap()))
    };
    let script: Vec<_> = (0..4)
        .map(|by| {
            let slice = |slot| if by == 0 { first(slot) } else { next(slot, by) };
            step(by as u64 + 1, (0..SLOTS).map(slice).collect())
        })
        .collect();
    let [plain, ahead] =
        [false, true].map(|ahead| run_ranks(&gpu, &options, |rank| run(rank, &script, ahead)));
    assert_eq!(ahead.0, plain.0);
    assert_eq!(ahead.1, [true, true, true, false]);
}

#[test]
fn what_needs_the_host_is_not_begun() {
    let gpu = load_on_gpus(&bard(), None, 4, 1);
    let draw = || greedy(1).unwrap();
    let penalized = |index| {
        let sampling = Sampling { repetition_penalty: 1.5, ..Sampling::greedy() };
        let history = (index == 0).then(|| History { prompt: prompt(4, 1), answer: Vec::new() });
        Draw { history, ..Draw::new(sampling, index) }
    };
    run_ranks(&gpu, &gpu_options(), |rank| {
        let first = step(1, vec![known(0, 0, &prompt(4, 1), Some(penalized(0)))]);
        assert!(rank.begin(&first).unwrap(), "what it looks back on is known");
        assert!(rank.begin(&first).unwrap(), "it was");
        let mut scored = known(1, 0, &prompt(4, 2), greedy(0));
        scored.score = Some(Score { top: 0, targets: vec![3] });
        for (slice, why) in [
            (last(0, 4, penalized(1)), "looks back on what is not drawn"),
            (last(0, 4, Draw { grammar: Some(RequestId(1)), ..draw() }), "a grammar"),
            (
                Slice { draw: Some(Draw { draft: vec![5], ..draw() }), ..known(0, 4, &[1, 2], None) },
                "a draft",
            ),
            (scored, "a score"),
            (known(1, 0, &prompt(4, 2), None), "nothing is drawn"),
            (last(1, 4, draw()), "nothing was drawn for it"),
            (known(1, 0, &[VOCAB], greedy(0)), "no such token"),
            (known(1, 0, &[1 << 31], greedy(0)), "no such token, but a slot's"),
        ] {
            assert!(!rank.begin(&step(2, vec![slice])).unwrap(), "{why}");
        }
        let (second, third) = (step(2, vec![last(0, 4, draw())]), step(3, vec![last(0, 5, draw())]));
        assert!(rank.begin(&second).unwrap());
        assert!(!rank.begin(&third).unwrap(), "two are under way");
        let early = rank.step(&second, &mut |_| None).unwrap_err().to_string();
        assert!(early.contains("step 1 was begun, and is to be run before"), "{early}");
        rank.step(&first, &mut |_| None).unwrap();
        assert!(rank.begin(&third).unwrap());
        rank.step(&second, &mut |_| None).unwrap();
        rank.step(&third, &mut |_| None).unwrap();
        let wrong = rank.step(&step(4, vec![known(1, 0, &[1 << 31], greedy(0))]), &mut |_| None);
        assert!(wrong.unwrap_err().to_string().contains("is beyond the vocabulary"));
    });
    let of_two = load_on_gpus(&bard(), None, 4, 2);
    let first = || step(1, vec![known(0, 0, &prompt(4, 1), greedy(0))]);
    let looks_back = step(1, vec![known(0, 0, &prompt(4, 1), Some(penalized(0)))]);
    run_ranks(&of_two, &gpu_options(), |rank| {
        assert!(!rank.begin(&looks_back).unwrap(), "rank 0 alone knows the tokens before");
        assert!(rank.begin(&first()).unwrap());
        rank.step(&first(), &mut |_| None).unwrap();
    });
    assert!(!run_ranks(&load(&bard(), 4, 1), &options(), |rank| rank.begin(&first()).unwrap()), "a CPU");
}

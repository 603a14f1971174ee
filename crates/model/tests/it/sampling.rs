//! Every option of sampling at once, and prompt scores: the same however the work is cut.

use galerne_checkpoint::Checkpoint;
use galerne_model::{Mask, Options, Rank};
use galerne_types::{
    Draw, History, KvDtype, RequestId, Sampled, Sampling, Score, Slice, Step, TokenId, TokenOut,
};

use crate::support::group::{Held, load, load_on_gpus, options, run_ranks, run_ranks_near};
use crate::support::script::{known, sampled, sequence, steps};

const VOCAB: u32 = 1024;

fn bard() -> Checkpoint {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/bard-1m");
    Checkpoint::open(&folder).unwrap()
}

fn prompt(count: u32, seed: u32) -> Vec<TokenId> {
    (0..count).map(|at| (at * 7919 + seed * 104_729) % VOCAB).collect()
}

/// All options on; what it looks back on is long, so that it matters.
fn sampling(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.3,
        top_k: 200,
        top_p: 0.97,
        min_p: 0.002,
        repetition_penalty: 1.4,
        presence_penalty: 0.3,
        frequency_penalty: 0.7,
        logit_bias: vec![(5, 2.0), (70, -3.0), (900, 4.5)],
        seed,
        logprobs: Some(4),
    }
}

/// Three tokens in four, others at each token.
fn mask(request: RequestId, drawn: u32) -> Mask {
    let word = |at: u32| !(0x1111_1111 << ((at + drawn + request.0 as u32) % 4));
    (0..VOCAB / 32).map(word).collect::<Vec<_>>().into()
}

/// A sequence of the script whose draws take all options, and a mask.
fn constrained(slot: u32, prompt: &[TokenId], chunk: usize, drawn: usize) -> Vec<Slice> {
    let mut slices = sequence(slot, prompt, chunk, drawn);
    let history = History { prompt: prompt.to_vec(), answer: Vec::new() };
    for draw in slices.iter_mut().filter_map(|slice| slice.draw.as_mut()) {
        draw.sampling = sampling(77 + u64::from(slot));
        draw.banned = vec![1, 2, 3];
        draw.history = (draw.index == 0).then(|| history.clone());
        draw.grammar = Some(RequestId(slot.into()));
    }
    slices
}

/// Runs `steps` and returns what rank 0 tells of each; every mask is asked for once, in order.
fn run(weights: &[Held], options: &Options, steps: &[Step]) -> Vec<Sampled> {
    run_ranks(weights, options, |rank: &mut Rank| {
        let mut asked = [0; 4];
        let mut run = |step: &Step| {
            let mut masks = |request: RequestId| {
                let drawn = &mut asked[request.0 as usize];
                *drawn += 1;
                Some(mask(request, *drawn - 1))
            };
            rank.step(step, &mut masks).unwrap()
        };
        steps.iter().map(&mut run).collect()
    })
}

/// What was drawn for a slot, in order.
fn drawn(steps: &[Step], sampled: &[Sampled], slot: u32) -> Vec<TokenOut> {
    let slices =
        steps.iter().zip(sampled).flat_map(|(step, sampled)| step.slices.iter().zip(&sampled.tokens));
    slices.filter(|(slice, _)| slice.slot == slot).filter_map(|(_, token)| token.clone()).collect()
}

#[test]
fn all_options_at_once_are_the_same_for_any_cut() {
    let checkpoint = bard();
    let long = prompt(75, 1);
    let alone = steps(vec![constrained(0, &long, 75, 40)]);
    let beside = steps(vec![
        constrained(1, &prompt(9, 2), 4, 50),
        constrained(0, &long, 11, 40),
        sequence(2, &prompt(30, 3), 30, 5),
    ]);
    let mut expected: Option<Vec<TokenOut>> = None;
    for world_size in [1, 2, 4] {
        let weights = load(&checkpoint, 4, world_size);
        for (script, threads) in [(&alone, 1), (&beside, 1), (&beside, 2)] {
            let sampled = run(&weights, &Options { threads, ..options() }, script);
            let found = drawn(script, &sampled, 0);
            assert_eq!(found.len(), 40);
            let expected = expected.get_or_insert_with(|| found.clone());
            assert_eq!(&found, expected, "{world_size} ranks, {threads} threads");
        }
    }
    let expected = expected.unwrap();
    for (index, token) in (0..).zip(&expected) {
        assert!(mask(RequestId(0), index)[token.id as usize / 32] >> (token.id % 32) & 1 == 1, "masked out");
        assert!(![1, 2, 3].contains(&token.id), "banned");
    }
    let plain = steps(vec![sequence(0, &long, 75, 40)]);
    let sampled = run(&load(&checkpoint, 4, 1), &options(), &plain);
    assert_ne!(drawn(&plain, &sampled, 0).last().unwrap().id, expected.last().unwrap().id);
}

/// A replay carries its answer behind the prompt, and tells it with its first draw.
#[test]
fn a_replay_looks_back_on_what_was_drawn_before_it() {
    let weights = load(&bard(), 4, 1);
    let prompt = prompt(20, 5);
    let free = |mut slices: Vec<Slice>| {
        slices.iter_mut().filter_map(|slice| slice.draw.as_mut()).for_each(|draw| draw.grammar = None);
        slices
    };
    let whole = steps(vec![free(constrained(0, &prompt, 20, 30))]);
    let whole = drawn(&whole, &run(&weights, &options(), &whole), 0);
    let answer: Vec<TokenId> = whole[..12].iter().map(|token| token.id).collect();
    let mut slices = free(constrained(0, &[&prompt[..], &answer].concat(), 7, 18));
    for draw in slices.iter_mut().filter_map(|slice| slice.draw.as_mut()) {
        draw.index += 12;
        draw.history =
            draw.history.take().map(|_| History { prompt: prompt.clone(), answer: answer.clone() });
    }
    let rest = steps(vec![slices]);
    assert_eq!(drawn(&rest, &run(&weights, &options(), &rest), 0), whole[12..]);
}

#[test]
fn penalties_without_a_history_and_a_grammar_without_a_mask_are_errors() {
    let weights = load(&bard(), 4, 1);
    let with = |draw: Draw| steps(vec![vec![known(0, 0, &[1, 2], Some(draw))]]).remove(0);
    let (untold, bound) = run_ranks(&weights, &options(), |rank| {
        let untold = rank.step(&with(Draw::new(sampling(1), 0)), &mut |_| None).unwrap_err().to_string();
        let bound = Draw { grammar: Some(RequestId(9)), ..Draw::new(Sampling::greedy(), 0) };
        (untold, rank.step(&with(bound), &mut |_| None).unwrap_err().to_string())
    });
    assert!(untold.contains("the tokens before were never told"), "{untold}");
    assert!(bound.contains("request 9"), "{bound}");
}

/// Scores of `prompt` in chunks, from a step with other work beside.
fn scores(weights: &[Held], prompt: &[TokenId], chunk: usize) -> Vec<TokenOut> {
    let mut slices = sequence(0, prompt, chunk, 1);
    for slice in &mut slices {
        let start = slice.start as usize;
        let targets = prompt[start + 1..prompt.len().min(start + slice.input.len() + 1)].to_vec();
        slice.score = Some(Score { top: 3, targets });
    }
    let script = steps(vec![sequence(1, &prompt[..8], 3, 9), slices]);
    let sampled = run(weights, &options(), &script);
    sampled.into_iter().flat_map(|sampled| sampled.scores).flatten().collect()
}

#[test]
fn a_prompts_scores_are_those_of_its_logits_whatever_the_chunks() {
    let checkpoint = bard();
    let prompt = prompt(150, 4);
    // Drawn position by position with log probabilities: the most likely ones, of which the next token may be one.
    let solo = load(&checkpoint, 4, 1);
    let by_position = (0..149).map(|at| {
        let sampling =
            Sampling { logprobs: Some(3), logit_bias: vec![(prompt[at + 1], 100.0)], ..Sampling::greedy() };
        known(0, at, &prompt[at..=at], Some(Draw::new(sampling, at as u32)))
    });
    let script = steps(vec![by_position.collect()]);
    let expected = drawn(&script, &run(&solo, &options(), &script), 0);
    assert!(
        expected.iter().map(|token| token.id).eq(prompt[1..].iter().copied()),
        "biased to the next token"
    );
    for world_size in [1, 2, 4] {
        let weights = load(&checkpoint, 4, world_size);
        for chunk in [1, 7, 33, 150] {
            assert_eq!(scores(&weights, &prompt, chunk), expected, "{world_size} ranks, chunks of {chunk}");
        }
    }
}

/// Beside each other in one step: every option, every option but the mask, a bare temperature, and greedy draws.
#[test]
fn a_gpu_draws_what_it_leaves_to_threads_when_it_is_watched() {
    let gpu = load_on_gpus(&bard(), None, 4, 1);
    let options = Options { kv_dtype: KvDtype::Bf16, ..options() };
    let free = |slot| {
        let mut slices = constrained(slot, &prompt(9, slot), 4, 6);
        slices.iter_mut().filter_map(|slice| slice.draw.as_mut()).for_each(|draw| draw.grammar = None);
        slices
    };
    let warm = Sampling { temperature: 0.8, seed: 5, ..Sampling::greedy() };
    let script = steps(vec![
        constrained(0, &prompt(9, 1), 9, 6),
        free(1),
        sampled(&warm, sequence(2, &prompt(5, 3), 5, 6)),
        sequence(3, &prompt(5, 4), 5, 6),
    ]);
    let run = |rank: &mut Rank, watched: bool| {
        let mut masks = |request: RequestId| Some(mask(request, 0));
        let mut run = |step: &Step| match watched {
            true => rank.step_traced(step, &mut masks, &mut |_| ()).unwrap(),
            false => rank.step(step, &mut masks).unwrap(),
        };
        script.iter().map(&mut run).collect::<Vec<_>>()
    };
    let watched = run_ranks(&gpu, &options, |rank| run(rank, true));
    assert_eq!(run_ranks(&gpu, &options, |rank| run(rank, false)), watched);
    // Ranks whose GPUs bring the parts of all rows to rank 0's at once, or a row at a time.
    for (world_size, len_max) in [(2, 1 << 16), (2, 600), (4, 1 << 16), (4, 600)] {
        let gpus = load_on_gpus(&bard(), None, 4, world_size);
        let found = run_ranks_near(len_max, &gpus, &options, |rank| run(rank, false));
        assert_eq!(found, watched, "{world_size} ranks");
    }
}

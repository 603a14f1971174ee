//! Frames between the parts of a cluster: what any message turns into, and what a rank does with any step.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use galerne_checkpoint::Checkpoint;
use galerne_collective::Solo;
use galerne_model::{Isa, Options, Rank, Weights, WindowChoice};
use galerne_types::{
    Compute, Draw, Epoch, History, Input, KvDtype, Request, RequestId, Sampling, Score, Shards, Slice, Step,
    TokenOut,
};
use galerne_wire::v1;
use prost::Message;

use crate::engine::{Outcome, Target, alone, fuzz, mutate};

fn sampling() -> Sampling {
    Sampling {
        temperature: 0.7,
        top_k: 5,
        top_p: 0.9,
        repetition_penalty: 1.1,
        logit_bias: vec![(3, -1.0)],
        logprobs: Some(2),
        ..Sampling::greedy()
    }
}

/// Steps that a rank of the tiny model runs.
fn steps() -> Vec<Vec<u8>> {
    let slice = |slot, start, input: Input, draw: Option<Draw>| Slice {
        slot,
        start,
        input,
        first_block: 0,
        blocks: vec![slot],
        draw,
        score: None,
    };
    let history = Some(History { prompt: vec![1, 2], answer: vec![3] });
    let draw = Draw { history, banned: vec![2], ..Draw::new(sampling(), 0) };
    let score = Some(Score { top: 2, targets: vec![5, 6] });
    let slices = [
        vec![slice(0, 0, Input::Tokens(vec![1, 2, 3]), Some(draw.clone()))],
        vec![
            Slice { score, ..slice(0, 0, Input::Tokens(vec![1, 5, 6]), Some(draw)) },
            slice(1, 0, Input::Tokens(vec![4]), None),
        ],
        vec![slice(0, 3, Input::Last, Some(Draw::new(Sampling::greedy(), 1)))],
    ];
    let step = |(at, slices)| Step {
        epoch: Epoch(5),
        number: at as u64 + 1,
        slices,
        traces: vec!["00-a-b-01".to_owned()],
    };
    slices.into_iter().enumerate().map(step).map(|step| v1::Step::from(&step).encode_to_vec()).collect()
}

#[test]
fn frames() {
    let alone = alone();
    let mut seeds = steps();
    let grammar = Some(galerne_types::Grammar::Choice(vec!["a".to_owned()]));
    let request = Request {
        id: RequestId(1),
        tenant: galerne_types::TenantId(9),
        prompt: vec![1, 2, 3],
        first_index: 0,
        sampling: sampling(),
        max_tokens: 9,
        min_tokens: 1,
        stop_tokens: vec![2],
        prompt_logprobs: Some(1),
        grammar,
        cache_salt: Some(4),
        priority: 0,
        trace: None,
    };
    let ask = v1::ask::Ask::Run(v1::RunRequest::new(&request));
    seeds.push(v1::Ask { ask: Some(ask) }.encode_to_vec());
    let token = v1::RunToken {
        index: 3,
        token: Some(v1::Token { id: 5, logprob: -0.5, ..Default::default() }),
        timing: None,
    };
    let event = v1::RunEvent { event: Some(v1::run_event::Event::Token(token)), id: 1 };
    let mut tokens = v1::Tokens::default();
    (0..9).for_each(|index| tokens.push(index / 4, index, 1000 + index));
    let events = vec![event];
    seeds.push(v1::News { ends: events.clone(), events, tokens: Some(tokens) }.encode_to_vec());
    let target = Target {
        name: "frames",
        seeds,
        words: &["\n", "\u{8}\u{1}", "\u{12}\u{0}", "\u{1a}\u{7f}", "00-a-b-01"],
        change: mutate::bytes,
        runs: 20_000,
        memory_bytes: (64 << 10, 64),
        cpu: (Duration::from_millis(200), Duration::from_micros(5)),
        secret: None,
    };
    fuzz(&alone, &target, |input| {
        let step = v1::Step::decode(input).map(Step::try_from);
        if let Ok(Ok(step)) = &step {
            assert_eq!(
                Step::try_from(v1::Step::from(step)).map(|again| format!("{again:?}")),
                Ok(format!("{step:?}"))
            );
        }
        let v1::News { events, tokens, ends } = v1::News::decode(input).unwrap_or_default();
        if let Ok(runs) = tokens.unwrap_or_default().runs() {
            assert!(runs.map(|run| run.tokens.len()).sum::<usize>() <= input.len());
        }
        for event in events.into_iter().chain(ends) {
            match event.event {
                Some(v1::run_event::Event::Token(token)) => drop(token.token.map(TokenOut::from)),
                Some(v1::run_event::Event::Scored(scored)) => {
                    scored.scores.into_iter().for_each(|score| drop(TokenOut::from(score)));
                }
                _ => {}
            }
        }
        let asked = match v1::Ask::decode(input).unwrap_or_default().ask {
            Some(v1::ask::Ask::Run(request)) => request.into_request(RequestId(1)).map(drop),
            _ => Ok(()),
        };
        asked.map_err(|error| error.to_string())?;
        step.map_or(Ok(()), |step| step.map(drop).map_err(|error| error.to_string()))
    });
}

/// A rank of the tiny model runs whatever step comes, and goes on afterwards.
#[test]
fn ranks() {
    let alone = alone();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-mistral");
    let checkpoint = Checkpoint::open(&path).expect("a model");
    let leaves = checkpoint.config().kv_heads;
    let shards = Shards::new(leaves, 1).expect("shards");
    let weights = Arc::new(Weights::load(&checkpoint, shards, 0, 1, None, &|_, _| ()).expect("weights"));
    let options = Options {
        threads: 1,
        cores: None,
        kv_blocks: 8,
        sequences_max: 4,
        step_tokens_max: 64,
        window: WindowChoice::AsModel,
        compute: Compute::F32,
        kv_dtype: KvDtype::Int8,
        isa: Isa::best(),
    };
    let mut rank = Rank::new(weights, &options, Box::new(Solo::new(leaves))).expect("a rank");
    let target = Target {
        name: "ranks",
        seeds: steps(),
        words: &["\n", "\u{8}\u{1}", "\u{12}\u{0}", "\u{1a}\u{3}\u{1}\u{2}\u{3}", "\"\u{1}\u{0}"],
        change: mutate::bytes,
        runs: 4_000,
        memory_bytes: (4 << 20, 200),
        cpu: (Duration::from_millis(800), Duration::from_micros(20)),
        secret: None,
    };
    fuzz(&alone, &target, |input| -> Outcome {
        let Ok(step) = v1::Step::decode(input) else { return Ok(()) };
        let step = Step::try_from(step).map_err(|error| error.to_string())?;
        rank.step(&step, &mut |_| None).map(drop).map_err(|error| error.to_string())
    });
}

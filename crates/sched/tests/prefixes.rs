//! Prompts that begin as others did, against a rank that remembers what is written where: by examples, and in random
//! schedules, in which every answer is the one that its request gets alone, also where it is run ahead.

mod rank;

use std::collections::{BTreeMap, VecDeque};

use galerne_sched::{Admitted, Cost, Limits, Scheduler};
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{
    Epoch, Event, FinishReason, Input, Request, RequestId, Sampling, Step, TenantId, TokenId,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rank::{Rank, VOCAB};

const STOP: TokenId = 3;

/// A step's weights take most of its time, so that drafts are worth theirs.
const COST: Cost =
    Cost { step_ns: 1_000_000, token_ns: 10_000, key_ns: 0, logits_ns: 0, window_tokens: None };

fn limits() -> Limits {
    Limits {
        kv_blocks: 16,
        sequences_max: 4,
        step_tokens_max: 64,
        context_tokens_max: 256,
        window_tokens: None,
        vocab: VOCAB,
        waiting_max: 8,
        prefix_cache: true,
        speculation: true,
        itl_target: None,
    }
}

fn request(id: u64, prompt: Vec<TokenId>, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId::default(),
        prompt,
        first_index: 0,
        sampling: Sampling { seed: id, temperature: 1.0, ..Sampling::greedy() },
        max_tokens,
        min_tokens: 0,
        stop_tokens: vec![STOP],
        prompt_logprobs: None,
        grammar: None,
        cache_salt: Some(0),
        priority: 0,
        trace: None,
    }
}

fn prompt(tokens: usize) -> Vec<TokenId> {
    (0..tokens as u32).map(|position| 4 + position * 7 % (VOCAB - 4)).collect()
}

/// A scheduler, a rank that runs its steps, and what its clients are told.
struct Bench {
    scheduler: Scheduler,
    rank: Rank,
    in_flight: VecDeque<Step>,
    /// By request: its answer, how many tokens of its prompt were scored, and why it ended.
    told: BTreeMap<RequestId, (Vec<TokenId>, u32, Option<FinishReason>)>,
    admitted: BTreeMap<RequestId, Admitted>,
    /// Tokens of prompts that were run.
    prefilled: usize,
    /// Tokens of drafts that were run, and those that came true.
    drafted: (usize, usize),
}

impl Bench {
    fn new(limits: &Limits) -> Self {
        Self {
            scheduler: Scheduler::new(Epoch(1), limits.clone()),
            rank: Rank::new(limits),
            in_flight: VecDeque::new(),
            told: BTreeMap::new(),
            admitted: BTreeMap::new(),
            prefilled: 0,
            drafted: (0, 0),
        }
    }

    fn plan(&mut self) -> bool {
        let step = self.scheduler.plan();
        for admitted in self.scheduler.take_admitted() {
            assert_eq!(self.admitted.insert(admitted.request, admitted), None, "admitted once");
        }
        let Some(step) = step else { return false };
        for slice in &step.slices {
            self.prefilled += if let Input::Tokens(tokens) = &slice.input { tokens.len() } else { 0 };
        }
        self.in_flight.push_back(step);
        true
    }

    fn commit(&mut self) {
        let Some(step) = self.in_flight.pop_front() else { return };
        let sampled = self.rank.run(&step);
        self.drafted.0 += step.slices.iter().map(|slice| slice.draft().len()).sum::<usize>();
        self.drafted.1 += sampled.further.iter().map(Vec::len).sum::<usize>();
        self.scheduler.took(&step, COST.predict(&step));
        for event in self.scheduler.commit(&step, &sampled) {
            match event {
                Event::Token { request, index, token } => {
                    let (answer, ..) = self.told.entry(request).or_default();
                    assert_eq!(index as usize, answer.len(), "indices follow each other");
                    answer.push(token.id);
                }
                Event::Scored { request, position, scores } => {
                    let (_, scored, _) = self.told.entry(request).or_default();
                    assert_eq!(position, *scored + 1, "scores follow each other");
                    *scored += scores.len() as u32;
                }
                Event::Finished { request, reason } => {
                    self.told.entry(request).or_default().2 = Some(reason);
                }
            }
        }
    }

    fn drain(&mut self) {
        while self.plan() || !self.in_flight.is_empty() {
            while self.plan() {}
            self.commit();
        }
    }

    /// Runs a request to its end; says how many tokens of its prompt were found.
    fn run(&mut self, request: &Request) -> u32 {
        let id = request.id;
        self.scheduler.submit(request.clone()).unwrap();
        self.drain();
        self.check(request);
        self.admitted[&id].cached_tokens
    }

    /// Whether the answer is the one that the request gets alone, as far as it has come.
    fn check(&self, request: &Request) {
        let (answer, scored, end) = self.told.get(&request.id).cloned().unwrap_or_default();
        let alone = rank::alone(request, &self.rank.limits);
        match end {
            Some(reason) => assert_eq!((&answer, reason), (&alone.0, alone.1), "request {}", request.id.0),
            None => assert!(alone.0.starts_with(&answer), "request {}", request.id.0),
        }
        if request.prompt_logprobs.is_some() && !answer.is_empty() {
            assert_eq!(scored as usize, request.prompt.len() - 1, "every token but the first is scored");
        }
    }
}

#[test]
fn a_prompt_is_found_block_by_block_but_its_last_token_is_always_run() {
    let mut bench = Bench::new(&limits());
    assert_eq!(bench.run(&request(0, prompt(100), 1)), 0);
    for (id, (tokens, expected)) in
        [(100, 96), (97, 96), (96, 64), (64, 32), (33, 32), (32, 0), (5, 0)].into_iter().enumerate()
    {
        let before = bench.prefilled;
        assert_eq!(bench.run(&request(1 + id as u64, prompt(tokens), 1)), expected, "{tokens} tokens");
        assert_eq!(bench.prefilled - before, tokens - expected as usize);
    }
    let mut other = prompt(100);
    other[40] = 5;
    assert_eq!(bench.run(&request(20, other, 1)), 32, "up to where it differs");
}

#[test]
fn what_was_answered_is_found_in_the_next_turn() {
    let mut bench = Bench::new(&limits());
    let first = Request { stop_tokens: Vec::new(), ..request(0, prompt(20), 80) };
    bench.run(&first);
    let (answer, ..) = bench.told[&RequestId(0)].clone();
    let next = [first.prompt, answer, prompt(10)].concat();
    assert_eq!(bench.run(&request(1, next, 5)), 96, "all of 99 tokens that were run");
}

#[test]
fn tenants_and_salts_share_nothing() {
    let mut bench = Bench::new(&limits());
    let of = |id, tenant, cache_salt| Request {
        tenant: TenantId(tenant),
        cache_salt,
        ..request(id, prompt(70), 1)
    };
    for (id, tenant, salt, expected) in [
        (0, 1, Some(0), 0),
        (1, 2, Some(0), 0),
        (2, 1, Some(5), 0),
        (3, 1, None, 0),
        (4, 1, None, 0),
        (5, 1, Some(0), 64),
        (6, 1, Some(5), 64),
        (7, 2, Some(0), 64),
    ] {
        assert_eq!(bench.run(&of(id, tenant, salt)), expected, "request {id}");
    }
    let looked_up = bench.admitted.values().map(|admitted| admitted.looked_up_tokens);
    assert_eq!(looked_up.collect::<Vec<_>>(), [70, 70, 70, 0, 0, 70, 70, 70]);
}

#[test]
fn without_a_cache_nothing_is_kept() {
    let mut bench = Bench::new(&Limits { prefix_cache: false, ..limits() });
    assert_eq!((0..2).map(|id| bench.run(&request(id, prompt(70), 1))).sum::<u32>(), 0);
}

#[test]
fn a_prompt_that_is_scored_is_run_whole_and_found_by_others() {
    let mut bench = Bench::new(&limits());
    let scored = |id| Request { prompt_logprobs: Some(0), ..request(id, prompt(100), 1) };
    assert_eq!((bench.run(&scored(0)), bench.run(&scored(1))), (0, 0));
    assert_eq!(bench.run(&request(2, prompt(100), 1)), 96);
}

#[test]
fn choices_of_one_prompt_run_it_once_and_nobody_else_waits_for_that() {
    let mut bench = Bench::new(&limits());
    let choice = |id| request(id, prompt(200), 5);
    let other = |id| Request { tenant: TenantId(1), ..request(id, prompt(10), 5) };
    (0..3).for_each(|id| bench.scheduler.submit(choice(id)).unwrap());
    bench.scheduler.submit(other(9)).unwrap();
    assert!(bench.plan());
    assert_eq!(bench.admitted.keys().map(|id| id.0).collect::<Vec<_>>(), [0, 9]);
    bench.drain();
    (0..3).for_each(|id| bench.check(&choice(id)));
    assert_eq!((1..3).map(|id| bench.admitted[&RequestId(id)].cached_tokens).sum::<u32>(), 2 * 192);
    assert_eq!(bench.prefilled, 200 + 2 * 8 + 10);
    // The one that they wait for goes away.
    (10..13).for_each(|id| bench.scheduler.submit(Request { cache_salt: Some(3), ..choice(id) }).unwrap());
    assert!(bench.plan());
    bench.scheduler.cancel(RequestId(10));
    bench.drain();
    (11..13).for_each(|id| bench.check(&Request { cache_salt: Some(3), ..choice(id) }));
    assert_eq!(bench.admitted[&RequestId(12)].cached_tokens, 192);
}

#[test]
fn a_prompt_is_found_while_another_one_runs_it_and_its_blocks_are_held_once() {
    let mut bench = Bench::new(&Limits { kv_blocks: 12, ..limits() });
    let long = |id| Request { stop_tokens: Vec::new(), ..request(id, prompt(250), 6) };
    bench.scheduler.submit(long(0)).unwrap(); // eight blocks
    (0..2).for_each(|_| assert!(bench.plan()));
    bench.scheduler.submit(long(1)).unwrap(); // as many: only what both share makes room for them
    while !bench.admitted.contains_key(&RequestId(1)) {
        bench.commit();
        assert!(bench.plan());
    }
    assert_eq!(bench.admitted[&RequestId(1)].cached_tokens, 224, "what is planned is found");
    assert_eq!(bench.scheduler.load().kv_blocks_free, 12 - 8 - 1);
    bench.drain();
    (0..2).for_each(|id| bench.check(&long(id)));
    assert_eq!(bench.scheduler.load().kv_blocks_free, 12);
}

#[test]
fn the_least_recently_used_makes_room() {
    let mut bench = Bench::new(&Limits { kv_blocks: 8, ..limits() });
    let other = |id, tokens| Request { tenant: TenantId(1), ..request(id, prompt(tokens), 1) };
    bench.run(&request(0, prompt(97), 1));
    bench.run(&other(1, 97));
    assert_eq!(bench.run(&request(2, prompt(97), 1)), 96, "used again: now the other one's are older");
    bench.run(&Request { tenant: TenantId(2), ..request(3, prompt(97), 1) });
    assert_eq!(bench.run(&request(4, prompt(97), 1)), 96);
    assert_eq!(bench.run(&other(5, 97)), 32, "its last blocks went first");
}

#[test]
fn who_was_preempted_finds_what_it_had() {
    let mut bench = Bench::new(&limits());
    let long = |id| {
        let mut tokens = prompt(40);
        tokens[0] = 10 + id as TokenId;
        Request { stop_tokens: Vec::new(), ..request(id, tokens, 60) }
    };
    (0..4).for_each(|id| bench.scheduler.submit(long(id)).unwrap());
    for _ in 0..6 {
        while bench.plan() {}
        bench.commit();
    }
    bench.scheduler.submit(Request { tenant: TenantId(1), ..request(9, prompt(20), 3) }).unwrap();
    let before = bench.prefilled;
    while bench.scheduler.take_preempted().is_empty() {
        bench.plan();
        bench.commit();
    }
    bench.drain();
    (0..4).for_each(|id| bench.check(&long(id)));
    let run = bench.prefilled - before - 20;
    assert!(run < KV_BLOCK_TOKENS, "{run} tokens were run again");
}

#[test]
fn with_a_window_a_stream_of_any_length_holds_the_same_memory() {
    let windowed = Limits { window_tokens: Some(70), context_tokens_max: 10_000, ..limits() };
    assert_eq!([1, 64, 200, 9_999].map(|positions| windowed.kv_blocks_held(positions)), [1, 2, 6, 6]);
    let mut bench = Bench::new(&Limits { kv_blocks: 12, ..windowed });
    let long = |id| {
        let tokens = [&[10 + id as TokenId], &prompt(1999)[..]].concat();
        Request { stop_tokens: Vec::new(), ..request(id, tokens, 1500) }
    };
    (0..3).for_each(|id| bench.scheduler.submit(long(id)).unwrap());
    while bench.told.get(&RequestId(1)).is_none_or(|(answer, ..)| answer.len() < 1400) {
        while bench.plan() {}
        let step = bench.in_flight.front().unwrap();
        assert!(
            step.slices.iter().all(|slice| slice.blocks.len() <= 6 && slice.first_block * 32 <= slice.start)
        );
        assert_eq!(bench.scheduler.load().waiting, 1, "two have room, at any length");
        bench.commit();
    }
    bench.drain();
    (0..3).for_each(|id| bench.check(&long(id)));
    assert_eq!(bench.scheduler.load().kv_blocks_free, 12);
}

#[test]
fn with_a_window_a_prompt_is_found_whose_beginning_is_gone() {
    let mut bench = Bench::new(&Limits { window_tokens: Some(70), kv_blocks: 8, ..limits() });
    bench.run(&request(0, prompt(224), 1));
    bench.run(&Request { tenant: TenantId(1), ..request(1, prompt(33), 1) });
    assert_eq!(bench.run(&request(2, prompt(230), 1)), 224);
    assert_eq!(bench.run(&request(3, prompt(40), 1)), 0, "its first block made room for the other tenant's");
}

#[test]
fn an_answer_that_repeats_itself_is_run_ahead_and_stays_the_same() {
    let mut bench = Bench::new(&limits());
    for id in 0..6 {
        bench.run(&Request { stop_tokens: vec![8; (id % 3 == 2).into()], ..request(id, prompt(40), 150) });
    }
    let (run, true_ones) = bench.drafted;
    assert!(true_ones > 100 && run > true_ones, "{true_ones} of {run} came true");
}

#[derive(Clone, Debug)]
enum Op {
    Submit {
        tenant: u64,
        salt: Option<u64>,
        /// Tokens that it has in common with others, and its own.
        common: usize,
        own: usize,
        max_tokens: u32,
        scored: bool,
    },
    /// Goes on behind an answer, as far as that has come.
    Next(prop::sample::Index, usize),
    Cancel(prop::sample::Index),
    Plan,
    Commit,
}

fn op() -> impl Strategy<Value = Op> {
    let salt = prop_oneof![6 => Just(Some(0)), 1 => Just(Some(1)), 1 => Just(None)];
    prop_oneof![
        3 => (0..3u64, salt, 0..120usize, 1..40usize, 1..60u32, prop::bool::weighted(0.1)).prop_map(
            |(tenant, salt, common, own, max_tokens, scored)| {
                Op::Submit { tenant: tenant / 2, salt, common, own, max_tokens, scored }
            }
        ),
        2 => (any::<prop::sample::Index>(), 1..40usize).prop_map(|(which, own)| Op::Next(which, own)),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        12 => Just(Op::Plan),
        12 => Just(Op::Commit),
    ]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let window = prop_oneof![Just(None), prop_oneof![1..5u32, 5..40u32, 40..256u32].prop_map(Some)];
    (window, 8..30u32, 1..7u32, prop_oneof![1..7u32, 7..100u32]).prop_map(
        |(window_tokens, kv_blocks, sequences_max, step_tokens_max)| Limits {
            window_tokens,
            kv_blocks,
            sequences_max,
            step_tokens_max,
            waiting_max: 6,
            ..limits()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn an_answer_is_the_same_whatever_was_found(limits in any_limits(), ops in prop::collection::vec(op(), 1..250)) {
        let (mut bench, mut requests) = (Bench::new(&limits), Vec::new());
        for op in &ops {
            apply(op, &mut bench, &mut requests);
        }
        bench.drain();
        requests.iter().for_each(|request| bench.check(request));
        for request in &requests {
            check_found(request, &requests, &bench);
        }
        prop_assert_eq!(bench.scheduler.load().kv_blocks_free, limits.kv_blocks, "nothing leaks");
    }
}

fn apply(op: &Op, bench: &mut Bench, requests: &mut Vec<Request>) {
    let id = requests.len() as u64;
    let new = match *op {
        Op::Submit { tenant, salt, common, own, max_tokens, scored } => {
            let own = (0..own as u32).map(|position| 4 + (id as u32 * 13 + position * 5) % (VOCAB - 4));
            let tokens = prompt(common).into_iter().chain(own).collect();
            let prompt_logprobs = scored.then_some(0);
            Request {
                tenant: TenantId(tenant),
                cache_salt: salt,
                prompt_logprobs,
                ..request(id, tokens, max_tokens)
            }
        }
        Op::Next(ref which, own) if !requests.is_empty() => {
            let before: &Request = &requests[which.index(requests.len())];
            let answer = bench.told.get(&before.id).map_or(Vec::new(), |(answer, ..)| answer.clone());
            let tokens = [before.prompt.clone(), answer, prompt(own)].concat();
            let (tenant, cache_salt) = (before.tenant, before.cache_salt);
            Request { tenant, cache_salt, ..request(id, tokens, 20) }
        }
        Op::Cancel(ref which) if !requests.is_empty() => {
            return bench.scheduler.cancel(requests[which.index(requests.len())].id);
        }
        Op::Next(..) | Op::Cancel(_) => return,
        Op::Plan => {
            bench.plan();
            return;
        }
        Op::Commit => return bench.commit(),
    };
    if bench.scheduler.submit(new.clone()).is_ok() {
        requests.push(new);
    }
}

/// What a request found, another one of its tenant and salt has had; of two it is not known which came first.
fn check_found(request: &Request, all: &[Request], bench: &Bench) {
    let Some(&Admitted { looked_up_tokens, cached_tokens, .. }) = bench.admitted.get(&request.id) else {
        return;
    };
    let looks_up = request.cache_salt.is_some() && request.prompt_logprobs.is_none();
    assert_eq!(looked_up_tokens as usize, if looks_up { request.prompt.len() } else { 0 });
    assert!(cached_tokens == 0 || cached_tokens < looked_up_tokens);
    let found = &request.prompt[..cached_tokens as usize];
    let shares = |other: &&Request| {
        let answer = bench.told.get(&other.id).map_or(&[][..], |(answer, ..)| answer);
        let tokens = other.prompt.iter().chain(answer);
        other.id != request.id
            && (other.tenant, other.cache_salt) == (request.tenant, request.cache_salt)
            && tokens.take(found.len()).eq(found)
    };
    assert!(
        found.is_empty() || all.iter().any(|other| shares(&other)),
        "request {} found a stranger's",
        request.id.0
    );
}

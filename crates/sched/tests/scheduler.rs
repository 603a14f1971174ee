//! The scheduler's promises, each by an example.

use std::collections::VecDeque;

use galerne_sched::{Limits, Load, Scheduler};
use galerne_types::{
    Epoch, Event, FinishReason, History, Input, Refusal, Request, RequestId, Sampled, Sampling, Score, Slice,
    Step, TenantId, TokenId, TokenOut,
};

const STOP: TokenId = 2;
const PLAIN: TokenId = 42;

fn limits() -> Limits {
    Limits {
        kv_blocks: 16,
        sequences_max: 4,
        step_tokens_max: 64,
        context_tokens_max: 256,
        window_tokens: None,
        vocab: 100,
        waiting_max: 8,
        prefix_cache: true,
        speculation: true,
        itl_target: None,
    }
}

fn request(id: u64, prompt_tokens: usize, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId::default(),
        prompt: vec![7; prompt_tokens],
        first_index: 0,
        sampling: Sampling::greedy(),
        max_tokens,
        min_tokens: 0,
        stop_tokens: vec![STOP],
        prompt_logprobs: None,
        grammar: None,
        cache_salt: None,
        priority: 0,
        trace: None,
    }
}

fn scheduler(requests: impl IntoIterator<Item = Request>) -> Scheduler {
    let mut scheduler = Scheduler::new(Epoch(1), limits());
    for request in requests {
        scheduler.submit(request).unwrap();
    }
    scheduler
}

/// The answer of ranks that draw `token` wherever one is to be drawn.
fn draws(step: &Step, token: TokenId) -> Sampled {
    let token = TokenOut::unreported(token);
    let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(|_| token.clone())).collect();
    let scores = step.slices.iter().filter_map(|slice| slice.score.as_ref());
    let told = |&id: &TokenId| TokenOut { logprob: -1.0, ..TokenOut::unreported(id) };
    let scores = scores.map(|score| score.targets.iter().map(told).collect()).collect();
    Sampled { tokens, scores, ..Sampled::default() }
}

fn told(events: &[Event]) -> Vec<(u64, Result<u32, FinishReason>)> {
    let tell = |event: &Event| match event {
        Event::Token { request, index, .. } => (request.0, Ok(*index)),
        Event::Finished { request, reason } => (request.0, Err(*reason)),
        Event::Scored { .. } => panic!("nobody asked for scores"),
    };
    events.iter().map(tell).collect()
}

/// The requests that were admitted since this was last called.
fn admitted(scheduler: &mut Scheduler) -> Vec<u64> {
    scheduler.take_admitted().iter().map(|admitted| admitted.request.0).collect()
}

/// Slot, first position and number of tokens of each slice.
fn shape(step: &Step) -> Vec<(u32, u32, usize)> {
    step.slices.iter().map(|slice| (slice.slot, slice.start, slice.input.len())).collect()
}

#[test]
fn a_step_holds_answers_first_and_then_chunks_of_prompts() {
    let mut scheduler = scheduler([request(0, 10, 9), request(1, 90, 9), request(2, 5, 9)]);
    let first = scheduler.plan().unwrap();
    assert_eq!(shape(&first), [(0, 0, 10), (1, 0, 54)]);
    assert_eq!(first.slices.iter().map(|slice| slice.draw.is_some()).collect::<Vec<_>>(), [true, false]);
    let second = scheduler.plan().unwrap();
    assert_eq!(shape(&second), [(0, 10, 1), (1, 54, 36), (2, 0, 5)]);
    assert_eq!(second.slices[0].input, Input::Last);
    assert_eq!(scheduler.plan(), None, "two steps are under way");

    assert_eq!(told(&scheduler.commit(&first, &draws(&first, PLAIN))), [(0, Ok(0))]);
    let third = scheduler.plan().unwrap();
    assert_eq!(shape(&third), [(0, 11, 1), (1, 90, 1), (2, 5, 1)]);
}

#[test]
fn a_stream_that_ends_is_dropped_from_the_step_after_next() {
    let mut scheduler = scheduler([request(0, 4, 9), request(1, 4, 9)]);
    let first = scheduler.plan().unwrap();
    let second = scheduler.plan().unwrap();
    assert_eq!(second.slices.len(), 2, "planned before the end was known");
    let mut sampled = draws(&first, PLAIN);
    sampled.tokens[0] = Some(TokenOut::unreported(STOP));
    let events = scheduler.commit(&first, &sampled);
    assert_eq!(told(&events), [(0, Ok(0)), (0, Err(FinishReason::Stop)), (1, Ok(0))]);
    assert_eq!(scheduler.load().kv_blocks_free, 14, "the second step still uses its block");

    let third = scheduler.plan().unwrap();
    assert_eq!(shape(&third), [(1, 5, 1)]);
    assert_eq!(told(&scheduler.commit(&second, &draws(&second, PLAIN))), [(1, Ok(1))], "its draw is ignored");
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 0, tenants: 1, kv_blocks_free: 15, kv_blocks: 16, prefix_cache: true }
    );
}

/// Who was alone holds all four slots when another one comes: the youngest goes back to the queue, and on later, where it
/// stopped.
#[test]
fn who_comes_while_another_holds_all_need_not_wait() {
    let penalized = |id| Request {
        sampling: Sampling { presence_penalty: 1.0, ..Sampling::greedy() },
        ..request(id, 10, 100)
    };
    let mut scheduler = scheduler((0..6).map(penalized));
    let first = scheduler.plan().unwrap();
    let second = scheduler.plan().unwrap();
    assert_eq!(shape(&second), [(0, 10, 1), (1, 10, 1), (2, 10, 1), (3, 10, 1)]);
    let comes = Request { tenant: TenantId(1), ..request(9, 20, 3) };
    scheduler.submit(comes).unwrap();
    scheduler.take_admitted();
    scheduler.commit(&first, &draws(&first, PLAIN));
    let third = scheduler.plan().unwrap();
    assert_eq!(shape(&third), [(0, 11, 1), (1, 11, 1), (2, 11, 1)], "the second step holds the slot");
    assert_eq!(scheduler.take_preempted(), [RequestId(3)]);
    assert_eq!(told(&scheduler.commit(&second, &draws(&second, PLAIN)))[3], (3, Ok(1)), "nothing is lost");
    let fourth = scheduler.plan().unwrap();
    assert_eq!(shape(&fourth), [(0, 12, 1), (1, 12, 1), (2, 12, 1), (3, 0, 20)]);
    assert_eq!(admitted(&mut scheduler), [9]);

    let (mut steps, mut again) = (VecDeque::from([third, fourth]), Vec::new());
    let draw = loop {
        let step = steps.pop_front().unwrap();
        scheduler.commit(&step, &draws(&step, PLAIN));
        let Some(step) = scheduler.plan() else { continue };
        let prompt = step.slices.iter().find(|slice| slice.input != Input::Last);
        if let Some(Slice { input: Input::Tokens(tokens), draw, .. }) = prompt {
            again.extend(tokens.clone());
            if let Some(draw) = draw {
                break draw.clone();
            }
        }
        steps.push_back(step);
    };
    assert_eq!(again, [vec![7; 10], vec![PLAIN; 2]].concat(), "its prompt, and its answer so far");
    assert_eq!(
        (draw.index, draw.history),
        (2, Some(History { prompt: vec![7; 10], answer: vec![PLAIN; 2] }))
    );
    let begun = admitted(&mut scheduler);
    assert!(!begun.contains(&3) && scheduler.take_preempted().is_empty(), "once");
}

#[test]
fn a_preempted_request_can_be_cancelled_at_any_time() {
    for committed in [0, 1, 2] {
        let mut scheduler = scheduler((0..4).map(|id| request(id, 10, 100)));
        let steps = [scheduler.plan().unwrap(), scheduler.plan().unwrap()];
        scheduler.submit(Request { tenant: TenantId(1), ..request(9, 20, 1) }).unwrap();
        scheduler.commit(&steps[0], &draws(&steps[0], PLAIN));
        let third = scheduler.plan().unwrap();
        assert_eq!(scheduler.take_preempted(), [RequestId(3)]);
        if committed > 0 {
            scheduler.commit(&steps[1], &draws(&steps[1], PLAIN));
        }
        if committed > 1 {
            scheduler.commit(&third, &draws(&third, PLAIN));
            scheduler.plan().unwrap();
        }
        (0..4).chain([9]).for_each(|id| scheduler.cancel(RequestId(id)));
        assert_eq!((scheduler.load().running, scheduler.load().waiting), (0, 0));
    }
}

/// Half of the slots, or of the blocks: who has them, or asks for more than them, takes nothing from others.
#[test]
fn what_is_more_than_an_equal_share_waits() {
    let mine = |id, prompt| Request { tenant: TenantId(1), ..request(id, prompt, 20) };
    for (held, theirs, next) in [
        (vec![mine(0, 10), mine(1, 10)], vec![request(2, 10, 20), request(3, 10, 20)], mine(9, 10)),
        (vec![mine(0, 170)], vec![request(1, 100, 60), request(2, 100, 60)], mine(9, 70)),
    ] {
        let running = held.len() + theirs.len();
        let mut scheduler = scheduler(theirs);
        for request in held {
            let step = scheduler.plan().unwrap();
            scheduler.commit(&step, &draws(&step, PLAIN));
            scheduler.submit(request).unwrap();
        }
        scheduler.plan().unwrap();
        assert_eq!(scheduler.load().running, running);
        scheduler.submit(next).unwrap();
        scheduler.plan().unwrap();
        assert_eq!((scheduler.load().waiting, scheduler.take_preempted()), (1, Vec::new()));
    }
}

#[test]
fn an_end_by_length_is_foreseen() {
    let mut scheduler = scheduler([request(0, 4, 2)]);
    let [first, second] = [scheduler.plan().unwrap(), scheduler.plan().unwrap()];
    assert!(scheduler.commit(&first, &draws(&first, PLAIN)).len() == 1);
    assert_eq!(scheduler.plan(), None, "both tokens are planned");
    let events = scheduler.commit(&second, &draws(&second, PLAIN));
    assert_eq!(told(&events), [(0, Ok(1)), (0, Err(FinishReason::Length))]);
}

#[test]
fn a_full_context_ends_a_stream() {
    let mut scheduler = scheduler([request(0, 254, u32::MAX)]);
    let mut events = Vec::new();
    while let Some(step) = scheduler.plan() {
        events.extend(scheduler.commit(&step, &draws(&step, PLAIN)));
    }
    assert_eq!(told(&events), [(0, Ok(0)), (0, Ok(1)), (0, Err(FinishReason::Length))]);
}

#[test]
fn stop_tokens_are_banned_before_min_tokens() {
    let mut scheduler = scheduler([Request { min_tokens: 2, ..request(0, 4, 9) }]);
    for expected in [vec![STOP], vec![STOP], vec![]] {
        let step = scheduler.plan().unwrap();
        assert_eq!(step.slices[0].draw.as_ref().unwrap().banned, expected);
        scheduler.commit(&step, &draws(&step, PLAIN));
    }
}

#[test]
fn a_prompt_is_scored_chunk_by_chunk_before_the_first_token() {
    let prompt: Vec<TokenId> = (1..=65).collect();
    let scored = Request { prompt: prompt.clone(), prompt_logprobs: Some(3), ..request(0, 65, 2) };
    let mut scheduler = scheduler([scored, request(1, 1, 1)]);
    let first = scheduler.plan().unwrap();
    assert_eq!(first.slices[0].score, Some(Score { top: 3, targets: prompt[1..].to_vec() }));
    let second = scheduler.plan().unwrap();
    assert_eq!(shape(&second), [(0, 64, 1), (1, 0, 1)]);
    assert!(second.slices.iter().all(|slice| slice.score.is_none()), "nothing follows the last token");
    let events = scheduler.commit(&first, &draws(&first, PLAIN));
    let [Event::Scored { request: RequestId(0), position: 1, scores }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(scores.iter().map(|score| score.id).collect::<Vec<_>>(), prompt[1..]);
    assert_eq!(told(&scheduler.commit(&second, &draws(&second, PLAIN)))[0], (0, Ok(0)));
}

#[test]
fn the_first_draw_tells_what_penalties_look_back_on() {
    let sampling = Sampling { presence_penalty: 0.5, ..Sampling::greedy() };
    let replay = Request { prompt: vec![5, 6, 7, 8], first_index: 1, sampling, ..request(0, 4, 9) };
    let mut scheduler = scheduler([replay, request(1, 4, 9)]);
    let [first, second] = [scheduler.plan().unwrap(), scheduler.plan().unwrap()];
    let history = |step: &Step, slice: usize| step.slices[slice].draw.as_ref().unwrap().history.clone();
    assert_eq!(history(&first, 0), Some(History { prompt: vec![5, 6, 7], answer: vec![8] }));
    assert_eq!((history(&first, 1), history(&second, 0)), (None, None));
}

#[test]
fn a_replay_goes_on_where_the_stream_broke() {
    let mut scheduler = scheduler([Request { first_index: 3, ..request(0, 4 + 3, 5) }]);
    let mut events = Vec::new();
    while let Some(step) = scheduler.plan() {
        events.extend(scheduler.commit(&step, &draws(&step, PLAIN)));
    }
    assert_eq!(told(&events), [(0, Ok(3)), (0, Ok(4)), (0, Err(FinishReason::Length))]);
}

#[test]
fn nobody_overtakes_the_oldest_that_waits() {
    let mut scheduler = Scheduler::new(Epoch(1), Limits { kv_blocks: 12, ..limits() });
    // The first two can need 8 blocks each, the third one block: it would fit beside the first, and waits.
    for request in [request(0, 200, 300), request(1, 200, 300), request(2, 1, 1)] {
        scheduler.submit(request).unwrap();
    }
    assert_eq!(shape(&scheduler.plan().unwrap()), [(0, 0, 64)]);
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 2, tenants: 1, kv_blocks_free: 4, kv_blocks: 12, prefix_cache: true }
    );
    scheduler.cancel(RequestId(1));
    assert_eq!(shape(&scheduler.plan().unwrap()), [(0, 64, 64)]);
    assert_eq!(scheduler.load().waiting, 0, "the queue moves up when the oldest gives up");
}

#[test]
fn the_urgent_come_first_within_a_tenant_and_take_from_no_other() {
    let mut scheduler = Scheduler::new(Epoch(1), Limits { sequences_max: 1, ..limits() });
    let urgent = |id, priority| Request { priority, ..request(id, 1, 1) };
    let other = Request { tenant: TenantId(5), ..urgent(9, 100) };
    for request in [urgent(0, 0), urgent(1, 3), urgent(2, 0), urgent(3, -1), urgent(4, 0), other] {
        scheduler.submit(request).unwrap();
    }
    let mut begun = Vec::new();
    while let Some(step) = scheduler.plan() {
        begun.extend(admitted(&mut scheduler));
        scheduler.commit(&step, &draws(&step, PLAIN));
    }
    assert_eq!(begun.iter().filter(|id| **id != 9).collect::<Vec<_>>(), [&3, &0, &2, &4, &1]);
    assert!(begun[..2].contains(&9), "another tenant's turn comes all the same: {begun:?}");
}

/// Plans and commits until the request has its first token; says which requests were admitted on the way.
fn until_first_token(scheduler: &mut Scheduler, id: u64) -> Vec<u64> {
    let mut begun = Vec::new();
    loop {
        let step = scheduler.plan().unwrap();
        begun.extend(admitted(scheduler));
        if told(&scheduler.commit(&step, &draws(&step, PLAIN))).contains(&(id, Ok(0))) {
            return begun;
        }
    }
}

#[test]
fn a_tenant_that_was_served_less_is_next() {
    let mut scheduler = Scheduler::new(Epoch(1), Limits { sequences_max: 1, ..limits() });
    let of = |tenant: u64, id: u64| Request { tenant: TenantId(tenant), ..request(id, 10, 20) };
    for request in [of(1, 0), of(1, 1), of(1, 2), of(2, 3), of(2, 4)] {
        scheduler.submit(request).unwrap();
    }
    assert_eq!(until_first_token(&mut scheduler, 2), [0, 3, 1, 4, 2]);
}

#[test]
fn a_tenant_does_not_take_the_last_slots_and_places_while_others_are_about() {
    let mut scheduler = scheduler([request(0, 4, 1)]);
    until_first_token(&mut scheduler, 0);
    let greedy = |id: u64| Request { tenant: TenantId(2), ..request(id, 4, 100) };
    let accepted = (1..20).take_while(|&id| scheduler.submit(greedy(id)).is_ok()).count();
    assert_eq!(accepted, 6, "of 8 places");
    let step = scheduler.plan().unwrap();
    assert_eq!(step.slices.len(), 3, "of 4 slots");
    scheduler.commit(&step, &draws(&step, PLAIN));
    scheduler.submit(request(30, 4, 1)).unwrap();
    assert_eq!(until_first_token(&mut scheduler, 30), [1, 2, 3, 30]);
}

#[test]
fn the_prompts_of_one_who_was_served_more_take_little_of_a_step() {
    let mut scheduler = scheduler([request(0, 4, 1)]);
    until_first_token(&mut scheduler, 0);
    scheduler.submit(Request { tenant: TenantId(2), ..request(1, 130, 9) }).unwrap();
    let first = scheduler.plan().unwrap();
    assert_eq!(shape(&first), [(0, 0, 64)], "served less than the one that is away");
    let second = scheduler.plan().unwrap();
    assert_eq!(shape(&second), [(0, 64, 2)]);
    scheduler.commit(&first, &draws(&first, PLAIN));
    scheduler.submit(request(2, 20, 9)).unwrap();
    assert_eq!(shape(&scheduler.plan().unwrap()), [(1, 0, 20), (0, 66, 2)], "it does not wait");
}

#[test]
fn a_cancelled_request_is_silent_and_its_blocks_are_free_after_the_steps_that_hold_them() {
    let mut scheduler = scheduler([request(0, 40, 9), request(1, 4, 9)]);
    let step = scheduler.plan().unwrap();
    scheduler.cancel(RequestId(0));
    scheduler.cancel(RequestId(0));
    assert_eq!(
        scheduler.load(),
        Load { running: 1, waiting: 0, tenants: 1, kv_blocks_free: 13, kv_blocks: 16, prefix_cache: true }
    );
    assert_eq!(told(&scheduler.commit(&step, &draws(&step, PLAIN))), [(1, Ok(0))]);
    assert_eq!(scheduler.load().kv_blocks_free, 15);

    scheduler.cancel(RequestId(1));
    assert_eq!(
        scheduler.load(),
        Load { running: 0, waiting: 0, tenants: 0, kv_blocks_free: 16, kv_blocks: 16, prefix_cache: true }
    );
    assert_eq!(scheduler.plan(), None);
}

#[test]
fn requests_that_cannot_run_are_refused_with_a_reason() {
    let mut scheduler = Scheduler::new(Epoch(1), Limits { kv_blocks: 4, waiting_max: 1, ..limits() });
    let sampling = |change: fn(&mut Sampling)| {
        let mut request = request(0, 4, 9);
        change(&mut request.sampling);
        request
    };
    for (wrong, words) in [
        (request(0, 0, 9), "prompt is empty"),
        (request(0, 256, 9), "context holds 256"),
        (request(0, 100, 100), "can need 7 KV blocks, but the group has 4"),
        (request(0, 4, 0), "max_tokens is 0"),
        (Request { prompt: vec![1, 100], ..request(0, 2, 9) }, "token 1 of the prompt"),
        (Request { first_index: 9, ..request(0, 20, 9) }, "nothing is left"),
        (Request { first_index: 4, ..request(0, 4, 9) }, "a replay from index 4"),
        (Request { stop_tokens: vec![1; 65], ..request(0, 4, 9) }, "65 stop tokens"),
        (Request { stop_tokens: vec![100], ..request(0, 4, 9) }, "stop token 100"),
        (sampling(|sampling| sampling.temperature = f32::NAN), "temperature NaN"),
        (sampling(|sampling| sampling.top_p = 0.0), "top_p 0"),
        (sampling(|sampling| sampling.logprobs = Some(21)), "21 logprobs"),
        (sampling(|sampling| sampling.min_p = 1.5), "min_p 1.5"),
        (sampling(|sampling| sampling.repetition_penalty = 0.0), "repetition_penalty 0"),
        (sampling(|sampling| sampling.repetition_penalty = f32::INFINITY), "repetition_penalty inf"),
        (sampling(|sampling| sampling.presence_penalty = 2.5), "presence_penalty 2.5"),
        (sampling(|sampling| sampling.frequency_penalty = f32::NAN), "frequency_penalty NaN"),
        (sampling(|sampling| sampling.logit_bias = vec![(1, 0.5); 1025]), "bias of 1025 tokens"),
        (sampling(|sampling| sampling.logit_bias = vec![(100, 0.5)]), "logit bias of token 100"),
        (sampling(|sampling| sampling.logit_bias = vec![(1, 101.0)]), "logit bias 101 of token 1"),
        (
            sampling(|sampling| sampling.logit_bias = vec![(1, 0.5), (2, 1.0), (1, 0.5)]),
            "token 1 has more than",
        ),
        (Request { prompt_logprobs: Some(21), ..request(0, 4, 9) }, "21 prompt logprobs"),
        (Request { prompt_logprobs: Some(0), first_index: 1, ..request(0, 4, 9) }, "a replay does not score"),
    ] {
        let text = scheduler.submit(wrong).unwrap_err().to_string();
        assert!(text.contains(words), "{text:?} does not say {words:?}");
    }
    scheduler.submit(request(0, 4, 9)).unwrap();
    assert!(
        matches!(scheduler.submit(request(0, 4, 9)), Err(Refusal::Invalid(text)) if text.contains("already"))
    );
    assert_eq!(scheduler.submit(request(1, 4, 9)), Err(Refusal::Overloaded { waiting: 1 }));
    scheduler.take_over(request(1, 4, 9)).unwrap();
    assert!(matches!(scheduler.take_over(request(1, 4, 9)), Err(Refusal::Invalid(_))));

    let mut tiny = Scheduler::new(Epoch(1), Limits { vocab: 8, ..limits() });
    let all = Request { stop_tokens: (0..8).collect(), ..request(0, 4, 9) };
    assert!(tiny.submit(all).unwrap_err().to_string().contains("every token"));
}

#[test]
#[should_panic(expected = "steps are committed in order")]
fn a_step_is_committed_once() {
    let mut scheduler = scheduler([request(0, 4, 9)]);
    let step = scheduler.plan().unwrap();
    scheduler.commit(&step, &draws(&step, PLAIN));
    scheduler.commit(&step, &draws(&step, PLAIN));
}

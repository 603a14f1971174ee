//! What the leader's own work costs: `plan` and `commit` of a step, with all slots decoding and a full queue.
//!
//! `cargo run --release -p galerne-sched --example plan`

#![expect(clippy::disallowed_methods, reason = "it measures")]

use std::time::{Duration, Instant};

use galerne_sched::{Limits, Scheduler};
use galerne_types::{Epoch, Request, RequestId, Sampled, Sampling, Step, TenantId, TokenOut};

const RUNNING: u32 = 256;
const WAITING: usize = 4096;
const PROMPT_TOKENS: u32 = 2000;
const ANSWER_TOKENS: u32 = 2000;
const STEPS: usize = 1500;

fn request(id: u64, tenants: u64) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId(id % tenants),
        prompt: (0..PROMPT_TOKENS).map(|position| (id as u32 * 31 + position * 7) % 32_000).collect(),
        first_index: 0,
        sampling: Sampling::greedy(),
        max_tokens: ANSWER_TOKENS,
        min_tokens: 0,
        stop_tokens: vec![2],
        prompt_logprobs: None,
        grammar: None,
        cache_salt: Some(0),
        priority: 0,
        trace: None,
    }
}

fn drawn(step: &Step) -> Sampled {
    let token = |_| TokenOut::unreported(9);
    let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(token)).collect();
    Sampled { tokens, ..Sampled::default() }
}

/// Time of `plan` and `commit` of each step in which all slots decode, sorted.
fn measure(tenants: u64, window_tokens: Option<u32>, slots_short: bool) -> Vec<Duration> {
    let blocks_each = (PROMPT_TOKENS + ANSWER_TOKENS).div_ceil(32);
    let limits = Limits {
        // One request more would fit but for a slot, or but for a block.
        kv_blocks: blocks_each * (RUNNING + 1) - u32::from(!slots_short),
        sequences_max: RUNNING + u32::from(!slots_short),
        step_tokens_max: 8192,
        context_tokens_max: 32_768,
        window_tokens,
        vocab: 32_000,
        waiting_max: 2 * WAITING,
        prefix_cache: true,
        speculation: true,
        itl_target: None,
    };
    let mut scheduler = Scheduler::new(Epoch(1), limits);
    for id in 0..WAITING as u64 + u64::from(RUNNING) {
        if let Err(refusal) = scheduler.submit(request(id, tenants)) {
            println!("{id} requests: {refusal}");
            break;
        }
    }
    let mut times = Vec::with_capacity(STEPS);
    while times.len() < STEPS {
        let began = Instant::now();
        let step = scheduler.plan().expect("there is always something to run");
        let planned = began.elapsed();
        let sampled = drawn(&step);
        let began = Instant::now();
        let events = scheduler.commit(&step, &sampled);
        let time = planned + began.elapsed();
        if step.slices.len() == RUNNING as usize && events.len() == RUNNING as usize {
            times.push(time);
        }
    }
    times.sort_unstable();
    times
}

fn main() {
    println!("plan and commit of a step with {RUNNING} answers under way and {WAITING} requests waiting");
    for (tenants, window_tokens, slots_short) in [
        (1, None, true),
        (1, None, false),
        (1, Some(1024), true),
        (16, None, true),
        (16, None, false),
        (4096, None, true),
    ] {
        let times = measure(tenants, window_tokens, slots_short);
        let us = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos() as f64 / 1000.0;
        let short = if slots_short { "slots" } else { "blocks" };
        println!(
            "{tenants:>5} tenants, window {window_tokens:?}, short of {short}: p50 {:.1} us, p90 {:.1} us, p99 {:.1} us",
            us(50),
            us(90),
            us(99)
        );
    }
}

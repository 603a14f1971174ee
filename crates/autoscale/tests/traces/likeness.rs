//! The group of the simulation beside the real scheduler, and the law's predictions beside the group.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use galerne_autoscale::{Demand, Law, Lengths, Room, Sla, StepCost, Target};
use galerne_sched::{Cost, Limits, Scheduler};
use galerne_types::{Epoch, Event, Request, RequestId, Sampled, Sampling, Step, TenantId, TokenOut};

use crate::group::{Ask, Group, Outcome};
use crate::trace::{COST, ROOM, Trace};

const LAW: Law = Law { cost: COST, room: ROOM };

fn percentile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}

/// The same by the scheduler itself, as a leader drives it: planning goes on while steps run.
fn scheduled(asks: &[Ask]) -> Vec<Outcome> {
    let ns = |seconds: f64| (seconds * 1e9) as u64;
    let StepCost { step_s, token_s, key_s } = COST;
    let cost = Cost {
        step_ns: ns(step_s),
        token_ns: ns(token_s),
        key_ns: ns(key_s),
        logits_ns: 0,
        window_tokens: None,
    };
    let limits = Limits {
        kv_blocks: 1 << 20,
        sequences_max: ROOM.sequences_max,
        step_tokens_max: ROOM.step_tokens_max,
        context_tokens_max: 1 << 16,
        window_tokens: None,
        vocab: 100,
        waiting_max: 1024,
        prefix_cache: false,
        speculation: false,
        itl_target: None,
    };
    let mut scheduler = Scheduler::new(Epoch(1), limits);
    let (mut in_flight, mut firsts, mut outcomes) = (VecDeque::<Step>::new(), BTreeMap::new(), Vec::new());
    let (mut coming, mut now_s, mut end_s) = (asks.iter().enumerate().peekable(), 0.0, f64::INFINITY);
    loop {
        // Whatever is planned while a step runs is planned as soon as it can be: when that begins, or when a request comes.
        in_flight.extend(std::iter::from_fn(|| scheduler.plan()));
        if let (true, Some(step)) = (end_s.is_infinite(), in_flight.front()) {
            end_s = now_s + cost.predict(step).as_secs_f64();
        }
        if let Some((number, ask)) = coming.next_if(|(_, ask)| ask.due_s < end_s) {
            now_s = ask.due_s;
            scheduler.submit(request(number, ask)).expect("room");
            continue;
        }
        let Some(step) = in_flight.pop_front() else { return outcomes };
        (now_s, end_s) = (end_s, f64::INFINITY);
        let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(|_| TokenOut::unreported(9)));
        let sampled = Sampled { tokens: tokens.collect(), ..Sampled::default() };
        for event in scheduler.commit(&step, &sampled) {
            match event {
                Event::Token { request, .. } => {
                    firsts.entry(request).or_insert(now_s);
                }
                Event::Finished { request, .. } => {
                    let (ask, first_s) = (asks[request.0 as usize], firsts[&request]);
                    outcomes.push(Outcome { ask, first_s, end_s: now_s });
                }
                _ => {}
            }
        }
    }
}

fn request(number: usize, ask: &Ask) -> Request {
    Request {
        id: RequestId(number as u64),
        tenant: TenantId(0),
        prompt: vec![7; ask.prompt as usize],
        first_index: 0,
        sampling: Sampling::greedy(),
        max_tokens: ask.answer,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        prompt_logprobs: None,
        grammar: None,
        cache_salt: None,
        priority: 0,
        trace: None,
    }
}

fn percentiles(outcomes: &[Outcome], share: f64) -> (f64, f64) {
    let ttft = outcomes.iter().map(Outcome::ttft_s).collect();
    let tpot = outcomes.iter().filter_map(Outcome::tpot_s).collect();
    (percentile(ttft, share), percentile(tpot, share))
}

fn near(found: f64, expected: f64, part: f64) -> bool {
    (found - expected).abs() <= part * expected
}

#[test]
fn the_simulated_group_takes_as_long_as_the_scheduler() {
    for rate in [1.0, 4.0, 6.0] {
        let asks = Trace::steady(rate, 120.0).asks(3);
        let (group, scheduler) = (served(&asks, 1, &LAW), scheduled(&asks));
        assert_eq!((group.len(), scheduler.len()), (asks.len(), asks.len()));
        for share in [0.5, 0.95] {
            let (found, expected) = (percentiles(&group, share), percentiles(&scheduler, share));
            println!("{rate}/s, p{share}: TTFT, TPOT {found:.3?}, of the scheduler {expected:.3?}");
            assert!(near(found.0, expected.0, 0.1), "TTFT {found:?} instead of {expected:?}");
            assert!(near(found.1, expected.1, 0.05), "TPOT {found:?} instead of {expected:?}");
        }
    }
}

/// Several groups with a router in front, in the simulation.
fn served(asks: &[Ask], groups: u32, law: &Law) -> Vec<Outcome> {
    let group = |seed| Group::new(law.cost, law.room, u64::from(seed));
    let mut groups: Vec<Group> = (0..groups).map(group).collect();
    let mut outcomes = Vec::new();
    for ask in asks {
        groups.iter_mut().for_each(|group| group.advance(ask.due_s, &mut outcomes));
        let least = groups.iter_mut().min_by_key(|group| group.in_flight()).expect("a group");
        assert!(least.submit(*ask, ask.due_s), "the queue runs over");
    }
    groups.iter_mut().for_each(|group| group.advance(f64::INFINITY, &mut outcomes));
    outcomes
}

fn lengths(of: impl Iterator<Item = u32>) -> Lengths {
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for tokens in of.map(f64::from) {
        (count, sum, squares) = (count + 1.0, sum + tokens, squares + tokens * tokens);
    }
    Lengths { mean: sum / count, squares: squares / count }
}

/// What the law is tried at: requests a second at each group. By which part TTFT and TPOT may be wrong.
struct Machine {
    law: Law,
    rates: [f64; 4],
    errors: [f64; 2],
}

/// That of the traces; the same with few slots, for which requests wait; a small model on a CPU, where prompts are most of the
/// work, and the router shares them out better than the law believes.
const MACHINES: [Machine; 3] = [
    Machine { law: LAW, rates: [1.0, 3.0, 5.0, 6.5], errors: [0.15, 0.1] },
    Machine {
        law: Law { room: Room { sequences_max: 24, ..ROOM }, ..LAW },
        rates: [1.0, 2.0, 3.0, 3.3],
        errors: [0.45, 0.1],
    },
    Machine {
        law: Law {
            cost: StepCost { step_s: 0.004, token_s: 600e-6, key_s: 50e-9 },
            room: Room { sequences_max: 64, step_tokens_max: 256 },
        },
        rates: [0.5, 1.0, 1.5, 2.0],
        errors: [0.35, 0.85],
    },
];

#[test]
fn the_law_predicts_the_percentiles_of_the_simulation() {
    for Machine { law, rates, errors } in MACHINES {
        for (groups, length_s) in [(1, 2400.0), (3, 1200.0), (10, 600.0)] {
            for each in rates {
                let rate_per_s = each * f64::from(groups);
                let asks = Trace::steady(rate_per_s, length_s).asks(5);
                let outcomes = served(&asks, groups, &law);
                let demand = Demand {
                    rate_per_s,
                    dispersion: 1.0,
                    prompts: lengths(asks.iter().map(|ask| ask.prompt)),
                    answers: lengths(asks.iter().map(|ask| ask.answer)),
                };
                for percent in [90, 95, 97] {
                    let target = |within| Some(Target { within, percent });
                    let sla =
                        Sla { ttft: target(Duration::from_secs(1)), tpot: target(Duration::from_millis(80)) };
                    let predicted = law.predict(&sla, &demand, groups);
                    let (ttft, tpot) = percentiles(&outcomes, f64::from(percent) / 100.0);
                    println!(
                        "| {groups} | {each} | p{percent} | {ttft:.2} | {:.2} | {:.1} | {:.1} |",
                        predicted.ttft_s,
                        tpot * 1e3,
                        predicted.tpot_s * 1e3
                    );
                    assert!(near(predicted.ttft_s, ttft, errors[0]), "TTFT {} for {ttft}", predicted.ttft_s);
                    assert!(near(predicted.tpot_s, tpot, errors[1]), "TPOT {} for {tpot}", predicted.tpot_s);
                }
            }
        }
    }
}

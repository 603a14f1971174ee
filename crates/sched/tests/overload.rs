//! More than a group can do, in virtual time: what it does stays as much, and nobody who was accepted is lost.

mod requests;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use galerne_sched::{Cost, Limits, Scheduler};
use galerne_types::{Epoch, Event, Refusal, Request, RequestId, Sampled, Step, TenantId, TokenOut};
use requests::plain;

/// Steps of a small model on a CPU.
const COST: Cost =
    Cost { step_ns: 4_000_000, token_ns: 600_000, key_ns: 50, logits_ns: 100_000, window_tokens: None };
/// Arrivals are counted until then, and what is done until then.
const TIME: Duration = Duration::from_secs(600);
/// Requests a second that this group can about finish.
const CAPACITY: f64 = 9.0;

fn limits() -> Limits {
    Limits {
        kv_blocks: 220, // of sixteen long requests half have room at once
        sequences_max: 16,
        step_tokens_max: 128,
        context_tokens_max: 1024,
        window_tokens: None,
        vocab: 100,
        waiting_max: 64,
        prefix_cache: true,
        speculation: false,
        itl_target: None,
    }
}

/// Numbers that look random (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
struct Lots(u64);

impl Lots {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ x >> 31) % bound
    }
}

/// What became of the requests.
#[derive(Debug, Default)]
struct Outcome {
    accepted: usize,
    refused: usize,
    preempted: usize,
    finished: usize,
    /// Tokens of answers that were finished within the time.
    tokens: u64,
}

struct World {
    scheduler: Scheduler,
    lots: Lots,
    tenants: u64,
    now: Duration,
    /// Tokens that each open request has.
    open: BTreeMap<RequestId, u64>,
    times_preempted: BTreeMap<RequestId, u32>,
    outcome: Outcome,
}

impl World {
    fn arrive(&mut self, id: u64) {
        let mut lots = |from: u64, to: u64| from + self.lots.below(to - from);
        let tenant = TenantId(lots(0, self.tenants));
        let (prompt, max_tokens) = (lots(10, 120), lots(5, 200) as u32);
        let tokens = (0..prompt).map(|_| lots(0, 100) as u32).collect();
        let request = Request { tenant, cache_salt: Some(0), ..plain(id, tokens, max_tokens) };
        match self.scheduler.submit(request) {
            Ok(()) => {
                self.outcome.accepted += 1;
                self.open.insert(RequestId(id), 0);
            }
            Err(Refusal::Overloaded { .. }) => self.outcome.refused += 1,
            Err(other) => panic!("{other}"),
        }
    }

    fn commit(&mut self, step: &Step) {
        let took = COST.predict(step);
        self.now += took;
        self.scheduler.took(step, took);
        let token = |_| TokenOut::unreported(9);
        let tokens = step.slices.iter().map(|slice| slice.draw.as_ref().map(token)).collect();
        for event in self.scheduler.commit(step, &Sampled { tokens, ..Sampled::default() }) {
            match event {
                Event::Token { request, .. } => *self.open.get_mut(&request).unwrap() += 1,
                Event::Finished { request, .. } => {
                    let tokens = self.open.remove(&request).expect("it ends once");
                    self.outcome.finished += 1;
                    self.outcome.tokens += if self.now <= TIME { tokens } else { 0 };
                }
                Event::Scored { .. } => {}
            }
        }
        for request in self.scheduler.take_preempted() {
            self.outcome.preempted += 1;
            *self.times_preempted.entry(request).or_default() += 1;
        }
    }
}

/// Requests that come at random times, so many a second in the mean, until the time is over; then all are finished.
fn run(rate: f64, tenants: u64) -> Outcome {
    let mut world = World {
        scheduler: Scheduler::new(Epoch(1), limits()),
        lots: Lots(1),
        tenants,
        now: Duration::ZERO,
        open: BTreeMap::new(),
        times_preempted: BTreeMap::new(),
        outcome: Outcome::default(),
    };
    let (mut next, mut due, mut steps) = (0, Duration::ZERO, VecDeque::new());
    loop {
        while due <= world.now && due < TIME {
            world.arrive(next);
            next += 1;
            let uniform = (world.lots.below(1 << 53) as f64 + 0.5) / (1u64 << 53) as f64;
            due += Duration::from_secs_f64(-uniform.ln() / rate);
        }
        steps.extend(std::iter::from_fn(|| world.scheduler.plan()));
        match steps.pop_front() {
            Some(step) => world.commit(&step),
            None if due < TIME => world.now = due,
            None => break,
        }
    }
    assert_eq!((world.open.len(), world.outcome.finished), (0, world.outcome.accepted), "nobody is lost");
    assert!(world.times_preempted.values().all(|times| *times <= 2));
    world.outcome
}

#[test]
fn goodput_stays_at_its_peak_however_many_come() {
    for tenants in [1, 5] {
        let runs = [0.5, 0.8, 1.0, 1.5, 2.0, 4.0].map(|load| (load, run(load * CAPACITY, tenants)));
        let peak = runs.iter().map(|(_, outcome)| outcome.tokens).max().unwrap();
        for (load, outcome) in &runs {
            println!("{tenants} tenants, load {load}: {outcome:?}");
        }
        let (_, half) = &runs[0];
        assert!(half.tokens < peak * 3 / 4 && half.refused == 0, "half the load is done, and is no peak");
        for (load, outcome) in &runs[3..] {
            assert!(outcome.refused > 0, "{tenants} tenants: load {load} is too much");
            assert!(
                outcome.tokens * 10 >= peak * 9,
                "{tenants} tenants: {outcome:?} at load {load}, peak {peak}"
            );
        }
    }
}

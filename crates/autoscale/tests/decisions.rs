//! Decisions on windows that were made up, and what always holds.

use std::time::Duration;

use galerne_autoscale::{
    Autoscaler, Bounds, COLD_START_S_FIRST, Decision, Demand, GroupWindow, Groups, HOLD_COLD_STARTS, Law,
    Lengths, METRICS, Moments, Room, Sla, StepCost, Steps, Target, Why, Window,
};
use proptest::prelude::*;

const COST: StepCost = StepCost { step_s: 0.025, token_s: 150e-6, key_s: 50e-9 };
const ROOM: Room = Room { sequences_max: 128, step_tokens_max: 1024 };
const SLA: Sla = Sla {
    ttft: Some(Target { within: Duration::from_secs(1), percent: 97 }),
    tpot: Some(Target { within: Duration::from_millis(80), percent: 97 }),
};
const WINDOW: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(900);
const PROMPT: u32 = 400;
const ANSWER: u32 = 150;

/// An autoscaler whose wish comes true at once.
struct Fleet {
    autoscaler: Autoscaler,
    now: Duration,
    groups: Groups,
    /// Of each group, all and those that its nine requests leave free.
    kv_blocks: (u32, u32),
}

impl Fleet {
    fn new(bounds: Bounds, ready: u32) -> Self {
        let groups = Groups { ready, ..Groups::default() };
        Self {
            autoscaler: Autoscaler::new(SLA, bounds, ROOM),
            now: Duration::ZERO,
            groups,
            kv_blocks: (0, 0),
        }
    }

    /// A window passes in which so many requests came, whose steps differ a little from window to window.
    fn window(&mut self, arrivals: u64, held: u32) -> Decision {
        let of = |tokens: u32| {
            let mut moments = Moments::default();
            (0..arrivals).for_each(|_| moments.add(tokens));
            moments
        };
        let (count, tokens) = (60 + self.now.as_secs() % 7, 9000 + 500 * (self.now.as_secs() % 11));
        let keys = tokens * (200 + self.now.as_secs() % 13);
        let busy_s = count as f64 * COST.step_s + tokens as f64 * COST.token_s + keys as f64 * COST.key_s;
        let steps = Steps { count, tokens, keys, busy: Duration::from_secs_f64(busy_s) };
        let serves = arrivals > 0 && self.groups.ready > 0;
        let (kv_blocks, kv_blocks_free) = self.kv_blocks;
        let group = GroupWindow { running: 9, waiting: 0, kv_blocks, kv_blocks_free, steps };
        let window = Window {
            length: WINDOW,
            arrivals,
            prompts: of(PROMPT),
            answers: if serves { of(ANSWER) } else { Moments::default() },
            held,
            groups: if serves { vec![group; self.groups.ready as usize] } else { Vec::new() },
        };
        self.now += WINDOW;
        self.autoscaler.observe(self.now, &window);
        let decision = self.autoscaler.decide(self.now, self.groups);
        self.groups.ready = decision.groups;
        decision
    }

    /// So many windows of so many requests each; the last decision.
    fn windows(&mut self, count: u32, arrivals: u64) -> Decision {
        (0..count).map(|_| self.window(arrivals, 0)).last().expect("a window")
    }
}

const ANY: Bounds = Bounds { groups_min: 0, groups_max: 50, idle: IDLE };

#[test]
fn what_nothing_is_known_of_is_left_alone_but_for_waking_it() {
    let mut fleet = Fleet::new(ANY, 3);
    assert_eq!(fleet.window(0, 0).groups, 3);
    let mut fleet = Fleet::new(ANY, 0);
    let decision = fleet.window(2, 2);
    assert_eq!((decision.groups, decision.why), (1, Why::Waking));
    assert_eq!(decision.to_string(), "1 group: requests have come, and nobody serves");
}

#[test]
fn a_person_reads_why_there_are_so_many() {
    let mut fleet = Fleet::new(ANY, 9);
    let decision = fleet.windows(120, 300);
    assert_eq!((decision.groups, decision.needed, decision.why), (9, 9, Why::Fewest));
    let fewer = decision.fewer.unwrap();
    assert!(decision.chosen.unwrap().holds() && !fewer.holds() && fewer.groups == 8);
    assert_eq!(
        decision.to_string(),
        "9 groups for 60.4 requests/s within 60 s: TTFT p97 0.33 s of 1.00 s, TPOT p97 67.5 ms of 80.0 ms; \
         with 8: TTFT p97 0.40 s of 1.00 s, TPOT p97 84.2 ms of 80.0 ms"
    );
    let found = fleet.autoscaler.cost().unwrap();
    assert!((found.token_s / COST.token_s - 1.0).abs() < 0.01, "{found:?}");
    let metrics: Vec<_> = decision.metrics().collect();
    assert_eq!(metrics.iter().map(|(name, _)| *name).collect::<Vec<_>>(), METRICS);
    assert_eq!(metrics[0], (METRICS[0], 9.0));
}

#[test]
fn more_are_needed_than_there_may_be() {
    let mut fleet = Fleet::new(Bounds { groups_min: 1, groups_max: 4, ..ANY }, 4);
    let decision = fleet.windows(60, 300);
    assert_eq!((decision.groups, decision.why), (4, Why::AtMost));
    assert!(decision.needed >= 9, "{decision}");
    let text = decision.to_string();
    assert!(text.starts_with("4 groups, the most that there may be; "), "{text}");
    let mut fleet = Fleet::new(Bounds { groups_min: 4, groups_max: 4, ..ANY }, 4);
    assert_eq!(fleet.windows(60, 20).why, Why::AtLeast);
}

#[test]
fn what_one_request_alone_would_not_get_is_out_of_reach() {
    let mut fleet = Fleet::new(ANY, 9);
    let tpot = Some(Target { within: Duration::from_millis(20), percent: 97 });
    fleet.autoscaler.change(Sla { tpot, ..SLA }, ANY, ROOM);
    let decision = fleet.windows(60, 300);
    assert_eq!(decision.why, Why::OutOfReach);
    assert!((15..50).contains(&decision.groups), "{decision}");
}

#[test]
fn fewer_have_to_be_enough_for_a_while() {
    let mut fleet = Fleet::new(ANY, 9);
    fleet.windows(120, 300);
    let hold_windows = COLD_START_S_FIRST as u32 * HOLD_COLD_STARTS / WINDOW.as_secs() as u32;
    for _ in 0..hold_windows {
        let decision = fleet.window(150, 0);
        assert_eq!(decision.groups, 9, "{decision}");
    }
    assert!(matches!(fleet.window(150, 0), Decision { groups: 5..=6, why: Why::Fewest, .. }));
}

#[test]
fn one_that_starts_again_does_not_shrink_what_it_finds_at_once() {
    for resumes in [true, false] {
        let mut fleet = Fleet::new(ANY, 9);
        if resumes {
            fleet.autoscaler.resume(9, Some(Duration::from_secs(30)));
            fleet.groups.ready = 4; // the others form anew
        }
        let hold_s = if resumes { 60 } else { COLD_START_S_FIRST * u64::from(HOLD_COLD_STARTS) };
        let windows = hold_s / WINDOW.as_secs();
        for _ in 0..windows {
            let decision = fleet.window(150, 0);
            assert_eq!(decision.groups, 9, "{decision}");
        }
        assert!(fleet.windows(4, 150).groups < 9);
    }
}

#[test]
fn where_memory_holds_few_answers_more_groups_are_needed() {
    let mut fleet = Fleet::new(ANY, 9);
    fleet.kv_blocks = (400, 400 - 9 * 18); // room for 22 requests of 18 blocks, of 128 slots
    let decision = fleet.windows(120, 300);
    let few = decision.chosen.unwrap();
    assert!((12..20).contains(&decision.groups) && few.holds(), "{decision}");
    fleet.kv_blocks = (40_000, 40_000 - 9 * 18);
    assert_eq!(fleet.windows(120, 300).needed, 9);
}

#[test]
fn a_fleet_turns_no_third_time_within_an_hour_to_shrink() {
    let mut fleet = Fleet::new(ANY, 12);
    fleet.windows(120, 300);
    for (arrivals, groups) in [(600, 16..=20), (300, 8..=10), (600, 16..=20)] {
        let decision = fleet.windows(80, arrivals);
        assert!(groups.contains(&decision.groups), "{decision}");
    }
    let decision = fleet.windows(80, 300);
    assert!(matches!(decision.why, Why::Steadied { would_do: 9..=10 }), "{decision}");
    let more = fleet.windows(10, 900);
    assert!(more.groups > decision.groups, "it grows whenever it must: {more}");
}

#[test]
fn nobody_asks_for_a_while_and_the_fleet_sleeps_if_it_may() {
    for groups_min in [0, 1] {
        let mut fleet = Fleet::new(Bounds { groups_min, ..ANY }, 2);
        fleet.windows(60, 20);
        let idle_windows = (IDLE.as_secs() / WINDOW.as_secs()) as u32;
        assert_eq!(fleet.windows(idle_windows - 1, 0).groups, 1);
        let decision = fleet.windows(30, 0);
        assert_eq!(decision.groups, groups_min, "{decision}");
        assert_eq!(decision.why == Why::Idle, groups_min == 0);
        let wakes = fleet.window(20, 20);
        assert!(wakes.groups >= 1, "{wakes}");
    }
}

#[test]
fn requests_that_wait_are_worked_off_too() {
    let mut fleet = Fleet::new(ANY, 9);
    let before = fleet.windows(120, 300).groups;
    let decision = fleet.window(300, 3000);
    assert!(decision.groups > before && decision.why == Why::Backlog { waiting: 3000 }, "{decision}");
}

fn demand(rate_per_s: f64, prompt: f64, answer: f64, cv2: f64, dispersion: f64) -> Demand {
    let lengths = |mean: f64| Lengths { mean, squares: mean * mean * (1.0 + cv2) };
    Demand { rate_per_s, dispersion, prompts: lengths(prompt), answers: lengths(answer) }
}

proptest! {
    #[test]
    fn more_groups_are_never_slower_and_more_requests_never_need_fewer(
        rate in 0.1_f64..500.0, prompt in 1.0_f64..3000.0, answer in 2.0_f64..1000.0,
        cv2 in 0.0_f64..3.0, dispersion in 1.0_f64..10.0, groups in 1_u32..60,
    ) {
        let law = Law { cost: COST, room: ROOM };
        let demand = demand(rate, prompt, answer, cv2, dispersion);
        let (few, more) = (law.predict(&SLA, &demand, groups), law.predict(&SLA, &demand, groups + 1));
        prop_assert!(more.share <= few.share * (1.0 + 1e-9), "{few:?} {more:?}");
        let fewest = |rate_per_s: f64| {
            law.fewest(&SLA, &Demand { rate_per_s, ..demand }, 4096).map_or(u32::MAX, |found| found.groups)
        };
        prop_assert!(fewest(rate) <= fewest(rate * 1.1));
    }

    #[test]
    fn the_fewest_hold_and_one_fewer_does_not(rate in 0.1_f64..500.0, prompt in 1.0_f64..1000.0, answer in 2.0_f64..400.0) {
        let law = Law { cost: COST, room: ROOM };
        let demand = demand(rate, prompt, answer, 0.5, 1.0);
        if let Some(found) = law.fewest(&SLA, &demand, 4096) {
            prop_assert!(found.holds());
            prop_assert!(!law.predict(&SLA, &demand, found.groups - 1).holds());
        }
    }

    #[test]
    fn decisions_stay_within_bounds_whatever_comes(
        min in 0_u32..5, more in 0_u32..10, arrivals in prop::collection::vec((0_u64..2000, 0_u32..100), 1..60), ready in 0_u32..20,
    ) {
        let bounds = Bounds { groups_min: min, groups_max: min + more, ..ANY };
        let mut fleet = Fleet::new(bounds, ready);
        for (arrivals, held) in arrivals {
            let decision = fleet.window(arrivals, held);
            prop_assert!((min..=min + more).contains(&decision.groups), "{decision}");
            prop_assert!(decision.metrics().all(|(_, value)| value.is_finite()));
        }
    }
}

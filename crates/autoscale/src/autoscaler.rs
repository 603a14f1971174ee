//! The decision: enough groups at once, fewer with patience.

use std::collections::VecDeque;
use std::time::Duration;

use crate::cold_start::ColdStart;
use crate::cost::{Fit, StepCost};
use crate::decision::{Decision, Why};
use crate::forecast::Forecast;
use crate::law::{Demand, Law};
use crate::lengths::Learner;
use crate::sla::{Bounds, Room, Sla};
use crate::window::{GroupWindow, Groups, Window};

/// Fewer groups have to be enough for so many cold starts before there are fewer: what would soon have to be started again
/// is not worth draining.
pub const HOLD_COLD_STARTS: u32 = 2;

/// Fewer groups have to be enough for so much more than is expected.
const FEWER_MARGIN: f64 = 1.04;

/// Requests that wait are to be worked off within so long, in seconds.
pub const RECOVERY_S: u64 = 180;

/// The fleet grows after it shrank, or shrinks after it grew, so often within an hour. When it has, it does not shrink; it
/// grows whenever it must, since what is promised comes first.
pub const CHANGES_PER_HOUR_MAX: usize = 2;

/// More groups than this are not reckoned with.
const NEEDED_MAX: u32 = 4096;

/// By this part the KV blocks of a request follow the last window.
const BLOCKS_PART: f64 = 0.1;

const HOUR: Duration = Duration::from_secs(3600);

/// Learns from windows, and decides how many groups there should be. Times are durations since a start that the caller chose.
#[derive(Clone, Debug)]
pub struct Autoscaler {
    sla: Sla,
    bounds: Bounds,
    room: Room,
    fit: Fit,
    forecast: Forecast,
    prompts: Learner,
    answers: Learner,
    cold_start: ColdStart,
    /// Requests that waited at the end of the last window, those that ran, and those that nobody could take.
    waiting: u64,
    running: u64,
    held: u32,
    /// KV blocks of a group, and those that a running request holds in the mean.
    kv_blocks: u32,
    blocks_each: f64,
    /// How many groups there should be, since it was decided the first time.
    target: Option<u32>,
    /// How many would have done, as it was decided within the last [`HOLD_COLD_STARTS`].
    would_do: VecDeque<(Duration, u32)>,
    /// The last move was upwards.
    rose: Option<bool>,
    /// When it was another way than the one before, within the last hour.
    turned: VecDeque<Duration>,
}

impl Autoscaler {
    /// One that knows nothing yet. `room` is that of each group.
    pub fn new(sla: Sla, bounds: Bounds, room: Room) -> Self {
        Self {
            sla,
            bounds,
            room,
            fit: Fit::default(),
            forecast: Forecast::default(),
            prompts: Learner::default(),
            answers: Learner::default(),
            cold_start: ColdStart::default(),
            waiting: 0,
            running: 0,
            held: 0,
            kv_blocks: 0,
            blocks_each: 0.0,
            target: None,
            would_do: VecDeque::new(),
            rose: None,
            turned: VecDeque::new(),
        }
    }

    /// Somebody has changed what is promised, how many groups there may be, or what each of them takes up. What was learned
    /// stays.
    pub fn change(&mut self, sla: Sla, bounds: Bounds, room: Room) {
        (self.sla, self.bounds, self.room) = (sla, bounds, room);
    }

    /// Goes on where another one has ended, which had decided for `groups`; `cold_start` is what it believed of starts.
    pub fn resume(&mut self, groups: u32, cold_start: Option<Duration>) {
        self.target = Some(groups);
        if let Some(took) = cold_start {
            self.cold_start.learn(took);
        }
    }

    /// A group has begun to serve so long after it was asked for.
    pub fn started(&mut self, took: Duration) {
        self.cold_start.learn(took);
    }

    /// A window has ended, now.
    pub fn observe(&mut self, now: Duration, window: &Window) {
        self.forecast.learn(now, window.length, window.arrivals);
        self.prompts.learn(window.length, window.prompts);
        self.answers.learn(window.length, window.answers);
        self.fit.fade(window.length);
        window.groups.iter().for_each(|group| self.fit.learn(group.steps));
        self.waiting = window.waiting();
        self.running = window.running();
        self.held = window.held;
        self.measure_blocks(&window.groups);
    }

    /// What a step costs, as far as that is known: to be shown.
    pub fn cost(&self) -> Option<StepCost> {
        self.fit.cost()
    }

    /// How long a group takes to start, if that was measured: to be kept by a caller who starts again.
    pub fn cold_start(&self) -> Option<Duration> {
        self.cold_start.measured()
    }

    /// How many groups there should be, and why. To be asked after each window.
    pub fn decide(&mut self, now: Duration, groups: Groups) -> Decision {
        let current = self.target.unwrap_or(groups.ready + groups.starting);
        if self.would_do.is_empty() {
            self.would_do.push_back((now, current)); // fewer have not been enough for any time yet
        }
        let (mut decision, from) = self.wanted(groups, current);
        self.fall(now, current, &mut decision);
        self.move_to(now, current, decision.groups);
        if let Some((law, demand)) = from {
            let predict = |groups| law.predict(&self.sla, &demand, groups);
            decision.chosen = Some(predict(decision.groups));
            decision.fewer = decision.groups.checked_sub(1).map(predict);
        }
        decision
    }

    /// What is needed for what is expected, within bounds, and from what that follows: `groups` is the number to go to if it is
    /// more than `current`, and one that would do if it is less.
    fn wanted(&self, groups: Groups, current: u32) -> (Decision, Option<(Law, Demand)>) {
        let mut decision = Decision {
            groups: self.bounds.clamp(current),
            needed: current,
            why: Why::Unknown,
            sla: self.sla,
            rate_per_s: 0.0,
            horizon: self.cold_start.believed(),
            chosen: None,
            fewer: None,
        };
        if self.bounds.groups_min == 0 && self.nobody_asks() {
            (decision.groups, decision.needed, decision.why) = (0, 0, Why::Idle);
            return (decision, None);
        }
        let wakes = current == 0 && self.held > 0;
        let Some((law, mut demand)) = self.law() else {
            if wakes {
                (decision.groups, decision.needed, decision.why) = (self.bounds.clamp(1), 1, Why::Waking);
            }
            return (decision, None);
        };
        let backlog = self.backlog(&law, &demand, groups);
        demand.rate_per_s += backlog / RECOVERY_S as f64;
        decision.rate_per_s = demand.rate_per_s;
        let reachable = law.reachable(&self.sla, &demand);
        let fewest = |margin: f64| {
            let demand = Demand { rate_per_s: demand.rate_per_s * margin, ..demand };
            law.fewest(&reachable, &demand, NEEDED_MAX).map_or(NEEDED_MAX, |found| found.groups.max(1))
        };
        decision.needed = fewest(1.0);
        let would_do = fewest(FEWER_MARGIN).min(current).max(decision.needed);
        decision.groups = self.bounds.clamp(would_do);
        decision.why = match decision.groups {
            bounded if bounded < would_do => Why::AtMost,
            bounded if bounded > would_do => Why::AtLeast,
            _ if wakes => Why::Waking,
            _ if reachable != self.sla => Why::OutOfReach,
            _ if backlog >= 1.0 => Why::Backlog { waiting: self.waiting },
            _ => Why::Fewest,
        };
        (decision, Some((law, demand)))
    }

    /// Fewer groups than there are, if they would have done for a while and the fleet has not turned too often.
    fn fall(&mut self, now: Duration, current: u32, decision: &mut Decision) {
        let would_do = decision.groups;
        self.would_do.push_back((now, would_do));
        let hold = self.cold_start.believed() * HOLD_COLD_STARTS;
        while self.would_do.front().is_some_and(|(at, _)| *at + hold < now) {
            self.would_do.pop_front();
        }
        while self.turned.front().is_some_and(|at| *at + HOUR <= now) {
            self.turned.pop_front();
        }
        if would_do >= current {
            return;
        }
        let held = self.would_do.iter().map(|(_, groups)| *groups).max().unwrap_or(would_do).min(current);
        let turns_too_often = self.rose == Some(true) && self.turned.len() >= CHANGES_PER_HOUR_MAX;
        if held == current || turns_too_often {
            let why = if held == current { Why::Held { would_do } } else { Why::Steadied { would_do } };
            (decision.groups, decision.why) = (self.bounds.clamp(current), why);
        } else {
            decision.groups = self.bounds.clamp(held);
        }
    }

    fn move_to(&mut self, now: Duration, current: u32, groups: u32) {
        self.target = Some(groups);
        if groups == current {
            return;
        }
        let rises = groups > current;
        if self.rose.is_some_and(|rose| rose != rises) {
            self.turned.push_back(now);
        }
        self.rose = Some(rises);
    }

    /// What steps cost, what a group has room for and what is expected, once all of that is known.
    fn law(&self) -> Option<(Law, Demand)> {
        let expected = self.forecast.expected(self.cold_start.believed())?;
        let (prompts, answers) = (self.prompts.lengths()?, self.answers.lengths()?);
        let mut room = self.room;
        if self.blocks_each > 0.0 {
            let held = f64::from(self.kv_blocks) / self.blocks_each;
            room.sequences_max = room.sequences_max.min(held as u32).max(1);
        }
        let demand =
            Demand { rate_per_s: expected.rate_per_s, dispersion: expected.dispersion, prompts, answers };
        Some((Law { cost: self.fit.cost()?, room }, demand))
    }

    /// Requests that will wait when those groups serve that are starting, or would be started now, beyond those for which the
    /// wait is as promised.
    fn backlog(&self, law: &Law, demand: &Demand, groups: Groups) -> f64 {
        let cold_start = self.cold_start.believed();
        let started = if groups.starting > 0 { groups.starting_for } else { Duration::ZERO };
        let left_s = cold_start.saturating_sub(started).as_secs_f64();
        let grows = (demand.rate_per_s - law.throughput(demand, groups.ready)).max(0.0) * left_s;
        let patience_s = self.sla.ttft.map_or(0.0, |target| target.within.as_secs_f64());
        (self.waiting as f64 + grows - demand.rate_per_s * patience_s).max(0.0)
    }

    fn nobody_asks(&self) -> bool {
        self.waiting == 0 && self.running == 0 && self.forecast.idle() >= self.bounds.idle
    }

    /// How many KV blocks a running request holds.
    fn measure_blocks(&mut self, groups: &[GroupWindow]) {
        let sum = |of: fn(&GroupWindow) -> u32| groups.iter().map(|group| f64::from(of(group))).sum::<f64>();
        let running = sum(|group| group.running);
        if running > 0.0 {
            let held = sum(|group| group.kv_blocks.saturating_sub(group.kv_blocks_free));
            let each = held / running;
            self.blocks_each +=
                (each - self.blocks_each) * if self.blocks_each == 0.0 { 1.0 } else { BLOCKS_PART };
            self.kv_blocks = groups.iter().map(|group| group.kv_blocks).min().unwrap_or_default();
        }
    }
}

//! Three rules that say how many groups there should be, and how each is asked.

use std::collections::VecDeque;
use std::time::Duration;

use galerne_autoscale::{Autoscaler, Bounds};

use crate::trace::{ROOM, SLA};
use crate::world::World;

/// Requests in flight at one group that the peers' rules aim at. A group of a fleet of ten keeps what is promised up to 65
/// (6.4 requests a second); what a careful person would set is what each of these rules advises or has by default below that.
pub(crate) const IN_FLIGHT_MOST: f64 = 65.0;

/// Ours lets the last group go after so long without a request.
const IDLE: Duration = Duration::from_secs(300);

/// None of the rules goes further.
pub(crate) const GROUPS_MAX: u32 = 24;

pub(crate) enum Rule {
    Ours(Box<Autoscaler>),
    Hpa(Hpa),
    Knative(Knative),
}

impl Rule {
    pub(crate) fn ours(groups_min: u32) -> Self {
        let bounds = Bounds { groups_min, groups_max: GROUPS_MAX, idle: IDLE };
        Self::Ours(Box::new(Autoscaler::new(SLA, bounds, ROOM)))
    }

    /// How often it is asked, in seconds: the HPA's default is 15, Knative's 2.
    pub(crate) fn interval_s(&self) -> f64 {
        match self {
            Self::Ours(_) => 5.0,
            Self::Hpa(_) => 15.0,
            Self::Knative(_) => 2.0,
        }
    }

    /// Asks it.
    pub(crate) fn ask(&mut self, world: &mut World) -> u32 {
        let groups = world.groups();
        let current = groups.ready + groups.starting;
        let wanted = match self {
            Self::Ours(autoscaler) => {
                let (window, starts) = world.window();
                let now = Duration::from_secs_f64(world.now_s);
                starts.into_iter().for_each(|took| autoscaler.started(took));
                autoscaler.observe(now, &window);
                autoscaler.decide(now, groups).groups
            }
            Self::Hpa(hpa) => hpa.wanted(world.now_s, current, world.in_flight() as f64),
            Self::Knative(knative) => knative.wanted(world.now_s, groups.ready, world.in_flight() as f64),
        };
        wanted.min(GROUPS_MAX)
    }
}

/// The horizontal pod autoscaler of Kubernetes (autoscaling/v2) with its defaults, by a metric of pods: `ceil(current ·
/// value / target)`, nothing within a tenth; upwards at most twofold or by four in 15 s, whichever is more; downwards the
/// most of what it wanted in the last five minutes.
#[derive(Default)]
pub(crate) struct Hpa {
    wanted: VecDeque<(f64, u32)>,
}

impl Hpa {
    /// Of what a group can bear, so much is aimed at.
    const TARGET: f64 = 0.8 * IN_FLIGHT_MOST;

    fn wanted(&mut self, now_s: f64, current: u32, in_flight: f64) -> u32 {
        let ratio = in_flight / (f64::from(current.max(1)) * Self::TARGET);
        let desired = if (ratio - 1.0).abs() <= 0.1 {
            current
        } else {
            (f64::from(current.max(1)) * ratio).ceil() as u32
        };
        let desired = desired.max(1);
        self.wanted.push_back((now_s, desired));
        while self.wanted.front().is_some_and(|(at, _)| *at < now_s - 300.0) {
            self.wanted.pop_front();
        }
        if desired > current {
            return desired.min((2 * current).max(current + 4));
        }
        self.wanted.iter().map(|(_, groups)| *groups).max().unwrap_or(desired).min(current)
    }
}

/// Knative's autoscaler (KPA) with its defaults: the mean of requests in flight over 60 s by a target of 70%; over 6 s
/// where that would double the fleet, which then does not shrink for a minute. It never more than halves the fleet at once.
#[derive(Default)]
pub(crate) struct Knative {
    seen: VecDeque<(f64, f64)>,
    panics_until_s: f64,
    most: u32,
}

impl Knative {
    const TARGET: f64 = 0.7 * IN_FLIGHT_MOST;

    fn wanted(&mut self, now_s: f64, ready: u32, in_flight: f64) -> u32 {
        self.seen.push_back((now_s, in_flight));
        while self.seen.front().is_some_and(|(at, _)| *at <= now_s - 60.0) {
            self.seen.pop_front();
        }
        let mean = |window_s: f64| {
            let of: Vec<f64> =
                self.seen.iter().filter(|(at, _)| *at > now_s - window_s).map(|(_, value)| *value).collect();
            of.iter().sum::<f64>() / of.len().max(1) as f64
        };
        let groups = |value: f64| (value / Self::TARGET).ceil() as u32;
        let (stable, panic) = (groups(mean(60.0)), groups(mean(6.0)));
        if f64::from(panic) >= 2.0 * f64::from(ready.max(1)) {
            if now_s >= self.panics_until_s {
                self.most = 0;
            }
            self.panics_until_s = now_s + 60.0;
        }
        if now_s < self.panics_until_s {
            self.most = self.most.max(panic).max(ready);
            return self.most;
        }
        stable.max(ready / 2)
    }
}

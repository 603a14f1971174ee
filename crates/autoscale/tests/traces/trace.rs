//! Seeded traces: how many requests come a second, and when the very ones do.

use std::ops::Range;
use std::time::Duration;

use galerne_autoscale::{Room, Sla, StepCost, Target};
use galerne_workload::{Arrivals, Law, Pace, Source, Workload};

use crate::group::Ask;

/// A 7 B model in bf16 on a device that reads some 600 GB/s.
pub(crate) const COST: StepCost = StepCost { step_s: 0.025, token_s: 150e-6, key_s: 50e-9 };

pub(crate) const ROOM: Room = Room { sequences_max: 128, step_tokens_max: 1024 };

/// What is promised of 97% of requests.
pub(crate) const SLA: Sla = Sla {
    ttft: Some(Target { within: Duration::from_secs(1), percent: 97 }),
    tpot: Some(Target { within: Duration::from_millis(80), percent: 97 }),
};

const PROMPTS: &str = "lognormal:median=300,sigma=0.8,max=3000";
const ANSWERS: &str = "lognormal:median=120,sigma=0.7,max=1000";

/// When a burst begins and ends, in seconds.
const BURST_S: Range<f64> = 1200.0..2400.0;

/// Requests a second over time, in pieces of a second.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub(crate) name: &'static str,
    rates: Vec<f64>,
    /// From this second on prompts are twice as long.
    longer_from: usize,
}

impl Trace {
    fn new(name: &'static str, length_s: f64, rate: impl Fn(f64) -> f64) -> Self {
        let rates = (0..length_s as u32).map(|second| rate(f64::from(second))).collect();
        Self { name, rates, longer_from: usize::MAX }
    }

    pub(crate) fn steady(rate: f64, length_s: f64) -> Self {
        Self::new("steady", length_s, |_| rate)
    }

    /// The minutes in which a burst begins.
    pub(crate) fn surprises(&self) -> Vec<usize> {
        let jumps = |second: &usize| self.rates[*second] > 2.0 * self.rates[*second - 1];
        (1..self.rates.len()).filter(jumps).map(|second| second / 60).collect()
    }

    /// A rate that jumps to its fourfold after twenty minutes, for twenty minutes, once in so many hours.
    pub(crate) fn burst(name: &'static str, every_hours: f64, length_hours: f64) -> Self {
        let bursts = |time_s: f64| BURST_S.contains(&(time_s % (every_hours * 3600.0)));
        Self::new(name, length_hours * 3600.0, |time_s| if bursts(time_s) { 100.0 } else { 25.0 })
    }

    /// A day pressed into so many hours: a wave between two rates.
    pub(crate) fn diurnal(name: &'static str, hours: f64, rates: Range<f64>) -> Self {
        let wave = |time_s: f64| (1.0 - libm::cos(std::f64::consts::TAU * time_s / (hours * 3600.0))) / 2.0;
        Self::new(name, hours * 3600.0, |time_s| rates.start + (rates.end - rates.start) * wave(time_s))
    }

    /// Six times as many within an hour, and half an hour of it.
    pub(crate) fn ramp() -> Self {
        Self::new("ramp", 5400.0, |time_s| 15.0 + 75.0 * (time_s / 3600.0).min(1.0))
    }

    /// The same rate all the time, and prompts that are twice as long from the second hour on.
    pub(crate) fn drift() -> Self {
        Self { name: "drift", longer_from: 3600, ..Self::steady(40.0, 7200.0) }
    }

    /// Two hours, and then nothing for an hour.
    pub(crate) fn stop() -> Self {
        Self::new("stop", 10_800.0, |time_s| if time_s < 7200.0 { 50.0 } else { 0.0 })
    }

    pub(crate) fn length_s(&self) -> f64 {
        self.rates.len() as f64
    }

    /// Requests of a Poisson process of this rate: one of rate 1 whose time is bent.
    pub(crate) fn asks(&self, seed: u64) -> Vec<Ask> {
        let pace = Some(Pace { arrivals: Arrivals::Poisson, rate_per_s: 1.0 });
        let parsed = |text: &str| text.parse().expect("a law of lengths");
        let law = Law { pace, prompt: parsed(PROMPTS), output: parsed(ANSWERS), prefixes: None };
        let mut coming = Workload::new(seed, Source::Law(law)).peekable();
        let (mut asks, mut sum) = (Vec::new(), 0.0);
        for (second, rate) in self.rates.iter().enumerate() {
            while let Some(planned) = coming.next_if(|planned| planned.due.as_secs_f64() < sum + rate) {
                let due_s = second as f64 + (planned.due.as_secs_f64() - sum) / rate;
                let times = if second < self.longer_from { 1 } else { 2 };
                let prompt = planned.prompt.tokens().unwrap_or(1) as u32 * times;
                asks.push(Ask { due_s, prompt, answer: planned.output_tokens });
            }
            sum += rate;
        }
        asks
    }
}

//! The requests of a run, one after the other.

use std::time::Duration;

use crate::arrivals::Arrivals;
use crate::dice::{Dice, Purpose};
use crate::length::Length;
use crate::prompt::{Part, Prompt};
use crate::trace::Trace;

/// A request that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// From 0 on.
    pub number: u64,
    /// When, since the start of the run; zero in a closed loop, where each waits for another one's end.
    pub due: Duration,
    /// What is asked.
    pub prompt: Prompt,
    /// Tokens of the answer that are asked for.
    pub output_tokens: u32,
    /// Makes a sampled answer repeatable.
    pub seed: u64,
}

/// Requests in the order in which they come; they end with a trace, or never.
#[derive(Clone, Debug)]
pub struct Workload {
    seed: u64,
    source: Source,
    next: u64,
    /// When the last one was due, in seconds.
    clock_s: f64,
}

/// Where requests come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// They are drawn by lot.
    Law(Law),
    /// They were recorded.
    Trace {
        /// What was.
        trace: Trace,
        /// How much faster than it was.
        speed: f64,
    },
}

/// How requests are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Law {
    /// When they come; without it, they are all due at once, as a closed loop takes them.
    pub pace: Option<Pace>,
    /// Tokens of a prompt, without its prefix.
    pub prompt: Length,
    /// Tokens of an answer.
    pub output: Length,
    /// What prompts begin with.
    pub prefixes: Option<Prefixes>,
}

/// Arrivals in an open loop.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Their law.
    pub arrivals: Arrivals,
    /// Requests a second, in the mean.
    pub rate_per_s: f64,
}

/// Beginnings that prompts have in common, as with system prompts.
#[derive(Clone, Copy, Debug)]
pub struct Prefixes {
    /// How many different ones; each prompt begins with one of them, by lot.
    pub count: u32,
    /// Tokens of each.
    pub tokens: u32,
}

impl Workload {
    /// Everything follows from `seed`.
    pub fn new(seed: u64, source: Source) -> Self {
        Self { seed, source, next: 0, clock_s: 0.0 }
    }

    /// From which prompts are made up, too.
    pub fn seed(&self) -> u64 {
        self.seed
    }
}

impl Iterator for Workload {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let number = self.next;
        let (due, prompt, output_tokens) = match &self.source {
            Source::Trace { trace, speed } => trace.request(number, *speed)?,
            Source::Law(law) => {
                if let Some(Pace { arrivals, rate_per_s }) = law.pace {
                    let mut dice = Dice::new(self.seed, Purpose::Arrival, number);
                    self.clock_s += arrivals.gap(&mut dice) / rate_per_s;
                }
                let due = Duration::try_from_secs_f64(self.clock_s).unwrap_or(Duration::MAX);
                let mut dice = Dice::new(self.seed, Purpose::Length, number);
                let (prompt, output) = (law.prompt.draw(&mut dice), law.output.draw(&mut dice));
                (due, law.asks(self.seed, number, prompt), output)
            }
        };
        self.next += 1;
        Some(Planned { number, due, prompt, output_tokens, seed: self.seed.wrapping_add(number) })
    }
}

impl Law {
    fn asks(&self, seed: u64, number: u64, tokens: u32) -> Prompt {
        let prefix = self.prefixes.map(|Prefixes { count, tokens }| {
            let which = Dice::new(seed, Purpose::Prefix, number).below(count.into());
            Part { purpose: Purpose::Shared, number: which, tokens }
        });
        Prompt::Parts(prefix.into_iter().chain([Part { purpose: Purpose::Own, number, tokens }]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::TokenIds;

    fn requests(seed: u64, arrivals: Arrivals, prompt: &str, count: usize) -> Vec<Planned> {
        let pace = Some(Pace { arrivals, rate_per_s: 50.0 });
        let prefixes = Some(Prefixes { count: 3, tokens: 20 });
        let law = Law { pace, prompt: prompt.parse().unwrap(), output: "5-9".parse().unwrap(), prefixes };
        Workload::new(seed, Source::Law(law)).take(count).collect()
    }

    #[test]
    fn a_seed_tells_all() {
        let one = requests(1, Arrivals::Poisson, "10-90", 100);
        assert_eq!(one, requests(1, Arrivals::Poisson, "10-90", 100));
        assert_ne!(one, requests(2, Arrivals::Poisson, "10-90", 100));
        let longer = requests(1, Arrivals::Poisson, "100-900", 100);
        assert!(one.iter().zip(&longer).all(|(one, longer)| one.due == longer.due), "arrivals stay");
    }

    #[test]
    fn requests_come_at_the_rate_and_as_regularly_as_the_law_says() {
        for (arrivals, expected) in
            [(Arrivals::Constant, 0.0), (Arrivals::Poisson, 1.0), (Arrivals::Gamma(0.25), 4.0)]
        {
            let due: Vec<f64> =
                requests(1, arrivals, "1", 20_000).iter().map(|request| request.due.as_secs_f64()).collect();
            assert!((due[19_999] - 400.0).abs() < 12.0, "{arrivals}: {} s", due[19_999]);
            let gaps: Vec<f64> = due.windows(2).map(|pair| (pair[1] - pair[0]) * 50.0).collect();
            let variance = gaps.iter().map(|gap| (gap - 1.0).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((variance - expected).abs() < 0.05 + expected / 10.0, "{arrivals}: variance {variance}");
        }
    }

    #[test]
    fn every_prefix_begins_its_share_of_prompts() {
        let prompts = requests(1, Arrivals::Constant, "5", 300);
        let mut firsts: Vec<Vec<u32>> = prompts
            .iter()
            .map(|request| request.prompt.ids(1, TokenIds { first: 1, last: 9999 }).unwrap()[..20].to_vec())
            .collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts.len(), 3);
    }
}

//! Outcomes, counted as they come.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::histogram::Histogram;
use crate::outcome::{Answer, ErrorKind, Failure, Outcome};
use crate::report::{Errors, Generator, Goodput, Report, Requests};
use crate::slo::Slo;

/// Characters of a failure's message that are kept as an example.
const EXAMPLE_CHARS_MAX: usize = 300;

/// What counts, and how it is judged.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Requests that are due before this do not count.
    pub warm_up: Duration,
    /// Targets of each request.
    pub slo: Option<Slo>,
    /// Share of the requests that must meet them.
    pub slo_share: f64,
    /// How late 99% of the requests may be sent at most for the run to be valid; `None` in a closed loop, which has no
    /// schedule.
    pub lag_max: Option<Duration>,
}

/// Takes every outcome of a run in, in any order, and keeps none: memory is bounded by the kinds of things counted.
pub struct Tally {
    rules: Rules,
    warm_up: u64,
    answered: u64,
    good: u64,
    failed: u64,
    errors: BTreeMap<ErrorKind, Errors>,
    /// From the first due time of what counts to the last end of it.
    window: Option<(Duration, Duration)>,
    prompt_tokens: u64,
    output_tokens: u64,
    ttft: Histogram,
    tpot: Histogram,
    itl: Histogram,
    e2e: Histogram,
    lag: Histogram,
}

impl Tally {
    /// Nothing counted yet.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            warm_up: 0,
            answered: 0,
            good: 0,
            failed: 0,
            errors: BTreeMap::new(),
            window: None,
            prompt_tokens: 0,
            output_tokens: 0,
            ttft: Histogram::default(),
            tpot: Histogram::default(),
            itl: Histogram::default(),
            e2e: Histogram::default(),
            lag: Histogram::default(),
        }
    }

    /// Counts one more.
    pub fn record(&mut self, outcome: &Outcome) {
        let Outcome { due, sent, end, result } = outcome;
        if *due < self.rules.warm_up {
            self.warm_up += 1;
            return;
        }
        let (from, to) = self.window.unwrap_or((*due, *end));
        self.window = Some((from.min(*due), to.max(*end)));
        self.lag.add(sent.saturating_sub(*due));
        if self.rules.slo.is_some_and(|slo| slo.met(outcome)) {
            self.good += 1;
        }
        match result {
            Ok(answer) => self.answer(*due, *end, answer),
            Err(failure) => self.failure(failure),
        }
    }

    fn answer(&mut self, due: Duration, end: Duration, answer: &Answer) {
        self.answered += 1;
        self.prompt_tokens += answer.prompt_tokens.map_or(0, u64::from);
        self.output_tokens += u64::from(answer.output_tokens);
        self.ttft.add(answer.first.saturating_sub(due));
        self.e2e.add(end.saturating_sub(due));
        if let Some(per_token) = answer.per_token() {
            self.tpot.add(per_token);
        }
        answer.gaps_ns.iter().for_each(|gap_ns| self.itl.add(Duration::from_nanos(*gap_ns)));
    }

    fn failure(&mut self, Failure { kind, message }: &Failure) {
        self.failed += 1;
        let example = || message.chars().take(EXAMPLE_CHARS_MAX).collect();
        let errors =
            self.errors.entry(kind.clone()).or_insert_with(|| Errors { count: 0, example: example() });
        errors.count += 1;
    }

    /// Requests that were answered so far, without those of the warm-up.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Requests that failed so far, without those of the warm-up.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Times to the first token so far.
    pub fn ttft(&self) -> &Histogram {
        &self.ttft
    }

    /// What came of the run. `unfinished` requests were given up when it was ended early.
    pub fn report(&self, unfinished: u64, generator: Generator) -> Report {
        let window_s = self.window.map_or(0.0, |(from, to)| to.saturating_sub(from).as_secs_f64());
        let counted = self.answered + self.failed;
        let per_s = |count: u64| if window_s > 0.0 { count as f64 / window_s } else { 0.0 };
        let goodput = self.rules.slo.map(|slo| {
            let share = self.good as f64 / counted.max(1) as f64;
            let wanted_share = self.rules.slo_share;
            let met = counted > 0 && share >= wanted_share;
            Goodput { slo: slo.to_string(), requests_per_s: per_s(self.good), share, wanted_share, met }
        });
        let problems = self.problems(&generator);
        Report {
            valid: problems.is_empty(),
            problems,
            requests: Requests {
                warm_up: self.warm_up,
                counted,
                answered: self.answered,
                failed: self.failed,
                unfinished,
            },
            errors: self.errors.iter().map(|(kind, errors)| (kind.to_string(), errors.clone())).collect(),
            window_s,
            requests_per_s: per_s(self.answered),
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            prompt_tokens_per_s: per_s(self.prompt_tokens),
            output_tokens_per_s: per_s(self.output_tokens),
            goodput,
            ttft_ms: self.ttft.summary(),
            tpot_ms: self.tpot.summary(),
            itl_ms: self.itl.summary(),
            e2e_ms: self.e2e.summary(),
            send_lag_ms: self.rules.lag_max.map(|_| self.lag.summary()),
            generator,
        }
    }

    /// Why the figures are not those of the load that was asked for.
    fn problems(&self, generator: &Generator) -> Vec<String> {
        let mut problems = Vec::new();
        if self.answered == 0 {
            problems.push("no request that counts was answered".to_owned());
        }
        let lag = self.lag.percentile(99).unwrap_or_default();
        if let Some(max) = self.rules.lag_max.filter(|max| lag > *max) {
            let why = if generator.in_flight_peak >= generator.in_flight_max {
                format!("all of --in-flight-max {} were open", generator.in_flight_max)
            } else {
                "this machine is too slow for the load, or too busy".to_owned()
            };
            problems
                .push(format!("the schedule was not kept: send lag p99 is {lag:.1?}, above {max:?}: {why}"));
        }
        problems
    }
}

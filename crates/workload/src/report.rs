//! What came of a run, for programs (as JSON) and people (`Display`).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::histogram::Summary;

/// What came of a run. Fields are those of the JSON; times are in milliseconds where their names say so. Percentiles are
/// at most 0.1% above the exact ones ([`Histogram`](crate::Histogram)).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The load was the one that was asked for. If not, the figures are not to be believed.
    pub valid: bool,
    /// Why not.
    pub problems: Vec<String>,
    /// How many.
    pub requests: Requests,
    /// Failures by kind: `429`, `http 503`, `grpc UNAVAILABLE`, `connect`, `broken`, `stream`, `late`, `protocol`.
    pub errors: BTreeMap<String, Errors>,
    /// From the first due time of what counts to the last end of it, in seconds.
    pub window_s: f64,
    /// Answers a second of the window.
    pub requests_per_s: f64,
    /// Of all answered requests, as the server counted them.
    pub prompt_tokens: u64,
    /// Of all answers.
    pub output_tokens: u64,
    /// Those of prompts a second of the window.
    pub prompt_tokens_per_s: f64,
    /// Those of answers a second of the window.
    pub output_tokens_per_s: f64,
    /// How the targets were met, if there are any.
    pub goodput: Option<Goodput>,
    /// From due to the first token; answered requests alone, as with the other latencies.
    pub ttft_ms: Summary,
    /// Time per output token after the first, a figure for each request.
    pub tpot_ms: Summary,
    /// From one message with tokens to the next, a figure for each message.
    pub itl_ms: Summary,
    /// From due to the end.
    pub e2e_ms: Summary,
    /// From due to sent; none in a closed loop.
    pub send_lag_ms: Option<Summary>,
    /// What the generator itself took.
    pub generator: Generator,
}

/// How many requests there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Requests {
    /// Ended, but due before the end of the warm-up: in no other figure.
    pub warm_up: u64,
    /// All others that ended.
    pub counted: u64,
    /// Those with a whole answer.
    pub answered: u64,
    /// Those without.
    pub failed: u64,
    /// Still open when the run was ended early; not counted.
    pub unfinished: u64,
}

/// Failures of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// How many.
    pub count: u64,
    /// What the first of them said.
    pub example: String,
}

/// How targets were met.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goodput {
    /// The targets.
    pub slo: String,
    /// Requests a second that met all of them.
    pub requests_per_s: f64,
    /// Share of the counted requests that met all of them; one that failed did not.
    pub share: f64,
    /// Share that must.
    pub wanted_share: f64,
    /// Enough did.
    pub met: bool,
}

/// What the generator itself took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Generator {
    /// Processor time, user and system, in seconds.
    pub cpu_s: f64,
    /// The same for each token that came, in microseconds.
    pub cpu_us_per_token: f64,
    /// Requests that were open at once.
    pub in_flight_peak: u64,
    /// Requests that may be.
    pub in_flight_max: u64,
}

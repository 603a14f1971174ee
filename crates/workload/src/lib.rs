//! What a load is, and what came of it: arrivals, lengths, traces, prompts; percentiles and the report.
//!
//! A [`Workload`] is an iterator of [`Planned`] requests that follows from its seed alone, on every machine alike: each
//! draws from numbers of its own, so that another length law changes no arrival. Whoever replays it gives each
//! [`Outcome`] to a [`Tally`], and gets a [`Report`] from it. Nothing here sends anything or knows what time it is: times
//! are durations since the start of the run, which came in from outside.
//!
//! Latencies count from when a request was *due*, not from when it was sent. A server that stalls, or a generator that is
//! late, then shows in the latency of every request that was due meanwhile (what is otherwise known as coordinated
//! omission).

mod arrivals;
mod dice;
mod error;
mod histogram;
mod length;
mod outcome;
mod prompt;
mod report;
mod slo;
mod table;
mod tally;
mod trace;
mod workload;

pub use arrivals::Arrivals;
pub use error::WorkloadError;
pub use histogram::{Histogram, Summary};
pub use length::{LENGTH_TOKENS_MAX, Length};
pub use outcome::{Answer, ErrorKind, Failure, Outcome};
pub use prompt::{Part, Prompt, TokenIds};
pub use report::{Errors, Generator, Goodput, Report, Requests};
pub use slo::Slo;
pub use tally::{Rules, Tally};
pub use trace::{Trace, TraceLine};
pub use workload::{Law, Pace, Planned, Prefixes, Source, Workload};

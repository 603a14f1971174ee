//! Logs, and spans that OTLP carries away.
//!
//! [`start`] is called once a process. Logs go to standard error, filtered by a directive that can be changed while the
//! process runs. Spans exist only for requests that are followed: [`follow`] decides that once, where a request enters
//! the cluster, and from there the decision travels as a W3C `traceparent`. A request that is not followed has
//! [`Span::none`](tracing::Span::none) everywhere, which costs a comparison.
//!
//! Spans are `tracing` spans with the target [`SPANS`]; nothing else is exported, so no log line of any crate can
//! carry something into a span. Neither spans nor logs may hold text of prompts or answers, keys or secrets.

mod error;
mod export;
mod log;
mod start;
mod trace;

pub use error::TelemetryError;
pub use log::{LogFormat, LogHandle, filter};
pub use start::{Export, Options, Telemetry, start};
pub use trace::{Parent, current, exports, follow, link, number, remote, traceparent};

/// The target of all spans that are exported.
pub const SPANS: &str = "galerne_spans";

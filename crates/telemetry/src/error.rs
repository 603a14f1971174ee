//! What can be wrong with what a process is told about its telemetry.

/// Says which flag is wrong, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TelemetryError {
    /// The filter of logs cannot be parsed.
    #[error("{filter:?} is not a filter of logs ({reason}): try `info`, or `warn,galerne_worker=debug`")]
    Filter {
        /// What was asked for.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The share of requests to follow is no share.
    #[error("the share of requests to trace must be from 0 to 1, not {0}")]
    Ratio(String),
    /// Nothing can be exported to that endpoint.
    #[error(
        "cannot export spans to {endpoint:?} ({reason}): give a gRPC endpoint such as http://127.0.0.1:4317, or an \
         https:// one"
    )]
    Endpoint {
        /// What was asked for.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that says how the collector is spoken to cannot be read.
    #[error("{file}, which is needed to speak to the collector, cannot be read: {reason}")]
    File {
        /// Which.
        file: String,
        /// Why not.
        reason: String,
    },
    /// The process logs already.
    #[error("telemetry was started twice in this process")]
    Twice,
}

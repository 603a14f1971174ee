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
        "cannot export spans to {endpoint:?} ({reason}): give a gRPC endpoint such as http://127.0.0.1:4317"
    )]
    Endpoint {
        /// What was asked for.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The process logs already.
    #[error("telemetry was started twice in this process")]
    Twice,
}

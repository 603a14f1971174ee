//! What can be wrong with the description of a load.

/// Each says what was wrong and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// No arrival process.
    #[error("{0:?} is no arrival process: give constant, poisson or gamma:SHAPE (below 1: bursts)")]
    Arrivals(String),
    /// No law of lengths.
    #[error(
        "{0:?} is no length in tokens: give 256, 100-400, normal:mean=256,sd=64 or lognormal:median=256,sigma=0.8, the last \
         two also with ,max=2048"
    )]
    Length(String),
    /// No targets.
    #[error("{0:?} is no target: give some of ttft=500ms, tpot=50ms, e2e=10s, with commas between")]
    Slo(String),
    /// No range of token ids.
    #[error("{0:?} is no range of token ids: give FIRST-LAST, e.g. 1000-30000")]
    TokenIds(String),
    /// A line of a trace that cannot be replayed.
    #[error("line {line} of the trace {reason}")]
    Trace {
        /// From 1 on.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

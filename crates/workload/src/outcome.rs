//! What became of one request.

use std::fmt;
use std::time::Duration;

/// What became of one request; times since the start of the run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When it was to be sent: latencies count from here. In a closed loop, when it was sent.
    pub due: Duration,
    /// When its sending began.
    pub sent: Duration,
    /// When its stream had ended, or had failed.
    pub end: Duration,
    /// The answer.
    pub result: Result<Answer, Failure>,
}

/// An answer that came to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When its first token came.
    pub first: Duration,
    /// When its last token came.
    pub last: Duration,
    /// Between one message with tokens and the next, in nanoseconds.
    pub gaps_ns: Vec<u64>,
    /// Tokens of the prompt, as the server counted them.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer.
    pub output_tokens: u32,
}

impl Answer {
    /// Time per output token after the first; `None` for a single token.
    pub fn per_token(&self) -> Option<Duration> {
        let after_first = u64::from(self.output_tokens).saturating_sub(1);
        let took = u64::try_from(self.last.saturating_sub(self.first).as_nanos()).unwrap_or(u64::MAX);
        Some(Duration::from_nanos(took.checked_div(after_first)?))
    }
}

/// A request that got no whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which kind, to be counted.
    pub kind: ErrorKind,
    /// What the server, or the way to it, said.
    pub message: String,
}

/// Kinds of failures.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorKind {
    /// 429 or RESOURCE_EXHAUSTED: beyond a limit or a quota.
    Refused,
    /// Another status of HTTP.
    Http(u16),
    /// Another code of gRPC's.
    Grpc(String),
    /// No connection.
    Connect,
    /// The connection or the stream ended before the answer did.
    Broken,
    /// The stream said that it failed.
    Stream,
    /// Not ended within the time that a request has.
    Late,
    /// An answer that is none of the protocol's.
    Protocol,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => write!(f, "429"),
            Self::Http(status) => write!(f, "http {status}"),
            Self::Grpc(code) => write!(f, "grpc {code}"),
            Self::Connect => write!(f, "connect"),
            Self::Broken => write!(f, "broken"),
            Self::Stream => write!(f, "stream"),
            Self::Late => write!(f, "late"),
            Self::Protocol => write!(f, "protocol"),
        }
    }
}

//! When the parts of one answer came.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use galerne_workload::Answer;
use tokio::time::Instant;

/// Runs with one request.
pub(crate) struct Stopwatch {
    start: Instant,
    first: Option<Instant>,
    last: Instant,
    gaps_ns: Vec<u64>,
    count: u32,
    /// Of all requests together, for those who look on.
    tokens: Arc<AtomicU64>,
}

impl Stopwatch {
    /// Times are told since `start`.
    pub(crate) fn new(start: Instant, tokens: Arc<AtomicU64>) -> Self {
        Self { start, first: None, last: start, gaps_ns: Vec::new(), count: 0, tokens }
    }

    /// A message with so many tokens has come.
    pub(crate) fn tokens(&mut self, count: u32) {
        let now = Instant::now();
        if self.first.is_none() {
            self.first = Some(now);
        } else {
            self.gaps_ns.push(u64::try_from((now - self.last).as_nanos()).unwrap_or(u64::MAX));
        }
        self.last = now;
        self.count = self.count.saturating_add(count);
        self.tokens.fetch_add(count.into(), Ordering::Relaxed);
    }

    /// The answer has come to its end, and had so many tokens as the server counted them; without that, as many as came.
    /// One in which no text was has its first token here.
    pub(crate) fn answer(mut self, prompt_tokens: Option<u32>, output_tokens: Option<u32>) -> Answer {
        if self.first.is_none() {
            self.tokens(1);
        }
        let since = |at: Instant| at.saturating_duration_since(self.start);
        let first = since(self.first.unwrap_or(self.last));
        let output_tokens = output_tokens.unwrap_or(self.count);
        Answer { first, last: since(self.last), gaps_ns: self.gaps_ns, prompt_tokens, output_tokens }
    }
}

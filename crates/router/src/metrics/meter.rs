//! Measures one answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use galerne_types::FinishReason;
use galerne_wire::v1;
use tokio::time::Instant;
use tracing::Span;

use super::model::{MIGRATIONS, ModelMetrics};
use crate::failure::Failure;
use crate::groups::Place;
use crate::trace::AnswerSpan;

/// Measures one answer; one that is dropped before its end counts as given up by its client.
pub(crate) struct Meter {
    metrics: Arc<ModelMetrics>,
    began: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    /// Where the time before the first token went, by the leader.
    timing: Option<v1::Timing>,
    prompt_tokens: usize,
    /// The most that the answer may become.
    tokens_max: u32,
    tokens: u64,
    /// Those that are counted among all.
    settled: u64,
    /// Tokens not counted yet that came with the one before.
    together: u64,
    /// Its group was lost behind its last token.
    stalls: bool,
    ended: bool,
    span: AnswerSpan,
    family: Arc<Family>,
}

/// The answers to one request.
#[derive(Debug)]
struct Family {
    all: AtomicU64,
    /// Those that have not ended.
    left: AtomicU64,
    /// Tokens of the longest.
    longest: AtomicU64,
    /// The request was turned away, and with it every answer that had not begun.
    refused: AtomicBool,
}

impl Meter {
    pub(crate) fn new(metrics: Arc<ModelMetrics>) -> Self {
        let (span, began) = (AnswerSpan::begin(&metrics.name), Instant::now());
        Self {
            metrics,
            began,
            first_token: None,
            last_token: began,
            timing: None,
            prompt_tokens: 0,
            tokens_max: 0,
            tokens: 0,
            settled: 0,
            together: 0,
            stalls: false,
            ended: false,
            span,
            family: Arc::new(Family {
                all: 1.into(),
                left: 1.into(),
                longest: 0.into(),
                refused: false.into(),
            }),
        }
    }

    /// The answer's span, or none.
    pub(crate) fn span(&self) -> Span {
        self.span.own()
    }

    /// The meter of another answer to the same request.
    pub(crate) fn sibling(&self) -> Self {
        let mut sibling = Self::new(self.metrics.clone());
        (sibling.began, sibling.family) = (self.began, self.family.clone());
        self.family.all.fetch_add(1, Ordering::Relaxed);
        self.family.left.fetch_add(1, Ordering::Relaxed);
        sibling
    }

    /// The answer's prompt has so many tokens, and itself at most `max`.
    pub(crate) fn prompt(&mut self, tokens: usize, max: u32) {
        (self.prompt_tokens, self.tokens_max) = (tokens, max);
        self.metrics.prompt_tokens.inc_by(tokens as u64);
        self.span.prompt(tokens);
    }

    /// A token came at that time; with the first, the leader tells where the time went.
    pub(crate) fn token(&mut self, timing: Option<v1::Timing>, now: Instant) {
        if self.first_token.is_none() {
            let cached = timing.as_ref().map_or(0, |timing| timing.cached_tokens as usize);
            self.metrics.demand.prompt(self.prompt_tokens.saturating_sub(cached));
            (self.first_token, self.timing) = (Some(now), timing);
            let after_s = (now - self.began).as_secs_f64();
            self.metrics.first_token.observe(after_s);
            self.metrics.gen_ai_first_token.observe(after_s);
            self.span.first_token(after_s);
        } else if now == self.last_token {
            self.together += 1;
        } else {
            self.metrics.next_token.observe((now - self.last_token).as_secs_f64());
        }
        if std::mem::take(&mut self.stalls) {
            self.metrics.stall.observe((now - self.last_token).as_secs_f64());
        }
        self.last_token = now;
        self.tokens += 1;
    }

    /// Its group did not go on with it, for one of the reasons of [`MIGRATIONS`].
    pub(crate) fn migrates(&mut self, reason: &str, left: &Place) {
        self.stalls = true;
        let counts = MIGRATIONS.iter().zip(&self.metrics.migrations);
        counts.filter(|(known, _)| **known == reason).for_each(|(_, count)| count.inc());
        self.span.migrates(reason, left, self.tokens);
    }

    /// Counts the tokens that came since the last time, before their answer waits for more: many may come at once.
    pub(crate) fn settle(&mut self) {
        if self.settled < self.tokens {
            self.metrics
                .generation_tokens
                .inc_by(self.tokens - std::mem::replace(&mut self.settled, self.tokens));
        }
        if self.together > 0 {
            self.metrics.next_token.observe_many(0.0, std::mem::take(&mut self.together));
        }
    }

    /// The answer ended in an error.
    pub(crate) fn fail(&mut self, failure: &Failure) {
        let place = Failure::REASONS.iter().position(|reason| *reason == failure.reason());
        if let Some(count) = place.and_then(|place| self.metrics.failures.get(place)) {
            count.inc();
        }
        if failure.is_refusal() && self.first_token.is_none() {
            self.family.refused.store(true, Ordering::Relaxed);
            self.refused();
        } else {
            self.end(FinishReason::Error);
        }
    }

    /// The answer never ran.
    fn refused(&mut self) {
        self.ended = true;
        self.span.end(FinishReason::Error, 0);
        self.metrics.gen_ai_failed.observe(self.began.elapsed().as_secs_f64());
    }

    /// The answer ended. As with vLLM, each answer to a request counts as one that ended, but not a request that never
    /// ran.
    pub(crate) fn end(&mut self, reason: FinishReason) {
        self.ended = true;
        self.settle();
        self.span.end(reason, self.tokens);
        let (m, whole_s) = (&self.metrics, self.began.elapsed().as_secs_f64());
        m.whole.observe(whole_s);
        if reason == FinishReason::Error { &m.gen_ai_failed } else { &m.gen_ai_whole }.observe(whole_s);
        match reason {
            FinishReason::Stop => m.stop.inc(),
            FinishReason::Length => m.length.inc(),
            FinishReason::Cancelled => m.abort.inc(),
            FinishReason::Error => m.error.inc(),
        }
        if let Some(first) = self.first_token {
            self.begun(first);
            m.demand.answer(self.tokens as usize);
        }
        let Family { all, left, longest, refused: _ } = &*self.family;
        longest.fetch_max(self.tokens, Ordering::Relaxed);
        if left.fetch_sub(1, Ordering::AcqRel) == 1 {
            m.answers.observe(all.load(Ordering::Relaxed) as f64);
            m.longest_answer.observe(longest.load(Ordering::Relaxed) as f64);
        }
    }

    /// What is told of answers that had at least one token.
    fn begun(&self, first: Instant) {
        let m = &self.metrics;
        let decode_s = (self.last_token - first).as_secs_f64();
        m.decode.observe(decode_s);
        if let Some(v1::Timing { queued_us, prefill_us, .. }) = self.timing {
            let prefill_s = Duration::from_micros(prefill_us).as_secs_f64();
            m.queue.observe(Duration::from_micros(queued_us).as_secs_f64());
            m.prefill.observe(prefill_s);
            m.inference.observe(prefill_s + decode_s);
        }
        if self.tokens > 1 {
            let mean_s = decode_s / (self.tokens - 1) as f64;
            m.time_per_token.observe(mean_s);
            m.gen_ai_time_per_token.observe(mean_s);
        }
        let (prompt, answer) = (self.prompt_tokens as f64, self.tokens as f64);
        m.prompt_length.observe(prompt);
        m.answer_limit.observe(self.tokens_max.into());
        m.gen_ai_input.observe(prompt);
        m.answer_length.observe(answer);
        m.gen_ai_output.observe(answer);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        match self.first_token {
            _ if self.ended => {}
            None if self.family.refused.load(Ordering::Relaxed) => self.refused(),
            _ => self.end(FinishReason::Cancelled),
        }
    }
}

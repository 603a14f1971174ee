//! Metrics, under the names that dashboards for vLLM expect, and some of our own.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use galerne_types::FinishReason;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tracing::Span;

use crate::groups::{Groups, Listed};
use crate::trace::AnswerSpan;

/// Buckets of vLLM's histograms, in seconds.
const FIRST_TOKEN_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const NEXT_TOKEN_S: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
];
const ANSWER_S: [f64; 19] = [
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 480.0,
    1920.0,
];

/// Everything that `/metrics` tells.
pub(crate) struct Metrics {
    registry: Registry,
    prompt_tokens: Family<ModelLabels, Counter>,
    generation_tokens: Family<ModelLabels, Counter>,
    requests: Family<FinishLabels, Counter>,
    first_token: Family<ModelLabels, Histogram>,
    next_token: Family<ModelLabels, Histogram>,
    answer: Family<ModelLabels, Histogram>,
    running: Family<GroupLabels, Gauge>,
    groups: Family<StateLabels, Gauge>,
    retries: Family<RetryLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabels {
    model_name: String,
    group: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    model_name: String,
    reason: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            requests: Family::default(),
            first_token: Family::new_with_constructor(|| Histogram::new(FIRST_TOKEN_S)),
            next_token: Family::new_with_constructor(|| Histogram::new(NEXT_TOKEN_S)),
            answer: Family::new_with_constructor(|| Histogram::new(ANSWER_S)),
            running: Family::default(),
            groups: Family::default(),
            retries: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("vllm:prompt_tokens", "Tokens of prompts", self.prompt_tokens.clone());
        r.register("vllm:generation_tokens", "Tokens generated", self.generation_tokens.clone());
        r.register("vllm:request_success", "Requests that ended, by how", self.requests.clone());
        let help = "Time from a request's arrival to its first token";
        r.register("vllm:time_to_first_token_seconds", help, self.first_token.clone());
        r.register("vllm:inter_token_latency_seconds", "Time between two tokens", self.next_token.clone());
        let help = "Time from a request's arrival to the end of its answer";
        r.register("vllm:e2e_request_latency_seconds", help, self.answer.clone());
        r.register("vllm:num_requests_running", "Requests of this router at a group", self.running.clone());
        r.register("galerne_groups", "Groups of the fleet, by state", self.groups.clone());
        let help = "Requests that were sent to another group before their first token";
        r.register("galerne_router_retries", help, self.retries.clone());
    }

    /// The metrics of one model, looked up once.
    pub(crate) fn of_model(&self, name: &str) -> ModelMetrics {
        let labels = ModelLabels { model_name: name.to_owned() };
        let finish = |finished_reason| {
            let labels = FinishLabels { model_name: name.to_owned(), finished_reason };
            self.requests.get_or_create_owned(&labels)
        };
        let retry =
            |reason| self.retries.get_or_create_owned(&RetryLabels { model_name: name.to_owned(), reason });
        ModelMetrics {
            model_name: name.into(),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&labels),
            generation_tokens: self.generation_tokens.get_or_create_owned(&labels),
            first_token: self.first_token.get_or_create_owned(&labels),
            next_token: self.next_token.get_or_create_owned(&labels),
            answer: self.answer.get_or_create_owned(&labels),
            stop: finish("stop"),
            length: finish("length"),
            abort: finish("abort"),
            error: finish("error"),
            retry_lost: retry("lost"),
            retry_epoch: retry("epoch"),
        }
    }

    /// The OpenMetrics text, with the gauges as they stand now.
    pub(crate) fn encode(&self, groups: &Groups) -> Result<String, fmt::Error> {
        self.running.clear();
        self.groups.clear();
        for Listed { id, group, standing, same_weights: _, in_flight } in groups.list() {
            self.groups.get_or_create(&StateLabels { state: standing.name() }).inc();
            if let Some(health) = group.serving() {
                let labels = GroupLabels { model_name: health.model.name.clone(), group: id.0 };
                self.running.get_or_create(&labels).set(in_flight.into());
            }
        }
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

/// Handles to one model's metrics.
#[derive(Clone)]
pub(crate) struct ModelMetrics {
    model_name: Arc<str>,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    next_token: Histogram,
    answer: Histogram,
    stop: Counter,
    length: Counter,
    abort: Counter,
    error: Counter,
    /// Retries because a leader could not be reached.
    pub(crate) retry_lost: Counter,
    /// Retries because the fleet's view was older than the leader's.
    pub(crate) retry_epoch: Counter,
}

/// Measures one answer; one that is dropped before its end counts as given up by its client.
pub(crate) struct Meter {
    metrics: ModelMetrics,
    began: Instant,
    last_token: Option<Instant>,
    tokens: u64,
    ended: bool,
    span: AnswerSpan,
}

impl Meter {
    pub(crate) fn new(metrics: ModelMetrics) -> Self {
        let span = AnswerSpan::begin(&metrics.model_name);
        Self { metrics, began: Instant::now(), last_token: None, tokens: 0, ended: false, span }
    }

    /// The answer's span, or none.
    pub(crate) fn span(&self) -> Span {
        self.span.own()
    }

    /// The meter of another answer to the same request.
    pub(crate) fn sibling(&self) -> Self {
        let mut sibling = Self::new(self.metrics.clone());
        sibling.began = self.began;
        sibling
    }

    pub(crate) fn prompt(&self, tokens: usize) {
        self.metrics.prompt_tokens.inc_by(tokens as u64);
        self.span.prompt(tokens);
    }

    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                let after_s = (now - self.began).as_secs_f64();
                self.metrics.first_token.observe(after_s);
                self.span.first_token(after_s);
            }
            Some(last) => self.metrics.next_token.observe((now - last).as_secs_f64()),
        }
        self.tokens += 1;
        self.metrics.generation_tokens.inc();
    }

    pub(crate) fn end(&mut self, reason: FinishReason) {
        self.ended = true;
        self.span.end(reason, self.tokens);
        self.metrics.answer.observe(self.began.elapsed().as_secs_f64());
        match reason {
            FinishReason::Stop => self.metrics.stop.inc(),
            FinishReason::Length => self.metrics.length.inc(),
            FinishReason::Cancelled => self.metrics.abort.inc(),
            FinishReason::Error => self.metrics.error.inc(),
        };
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if !self.ended {
            self.end(FinishReason::Cancelled);
        }
    }
}

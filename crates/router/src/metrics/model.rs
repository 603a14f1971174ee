//! What is measured of each model's requests, under vLLM's names with vLLM's bounds, and OpenTelemetry's.

use std::sync::Arc;

use super::instruments::{Counter, Histogram};
use super::page::Page;
use crate::demand::Demand;
use crate::failure::Failure;

/// Bounds of vLLM's histograms, in seconds.
const FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const NEXT_TOKEN_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// Bounds of vLLM's histogram of answers to a request.
const ANSWERS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Bounds that OpenTelemetry's conventions for generative AI advise.
const GEN_AI_REQUEST_S: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const GEN_AI_FIRST_TOKEN_S: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const GEN_AI_NEXT_TOKEN_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
const GEN_AI_TOKENS: &[f64] = &[
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// One model's metrics. Whoever measures holds this, so that nothing is looked up for each token.
#[derive(Debug)]
pub(crate) struct ModelMetrics {
    pub(super) name: String,
    /// Of all models.
    pub(super) demand: Arc<Demand>,
    pub(super) prompt_tokens: Counter,
    pub(super) generation_tokens: Counter,
    pub(super) first_token: Histogram,
    pub(super) next_token: Histogram,
    pub(super) time_per_token: Histogram,
    pub(super) whole: Histogram,
    pub(super) queue: Histogram,
    pub(super) prefill: Histogram,
    pub(super) decode: Histogram,
    pub(super) inference: Histogram,
    pub(super) prompt_length: Histogram,
    pub(super) answer_length: Histogram,
    pub(super) answer_limit: Histogram,
    /// Of all answers to one request.
    pub(super) longest_answer: Histogram,
    /// Answers to one request.
    pub(super) answers: Histogram,
    pub(super) stop: Counter,
    pub(super) length: Counter,
    pub(super) abort: Counter,
    pub(super) error: Counter,
    /// By [`Failure::reason`], in the order of [`Failure::REASONS`].
    pub(super) failures: Vec<Counter>,
    pub(super) gen_ai_whole: Histogram,
    pub(super) gen_ai_failed: Histogram,
    pub(super) gen_ai_first_token: Histogram,
    pub(super) gen_ai_time_per_token: Histogram,
    pub(super) gen_ai_input: Histogram,
    pub(super) gen_ai_output: Histogram,
    /// Retries because a leader could not be reached.
    pub(crate) retry_lost: Counter,
    /// Retries because the fleet's view was older than the leader's.
    pub(crate) retry_epoch: Counter,
    /// Retries because the group was drained.
    pub(crate) retry_drained: Counter,
    /// Answers that went on elsewhere, in the order of [`MIGRATIONS`].
    pub(super) migrations: [Counter; MIGRATIONS.len()],
    /// From the last token before a loss to the first one after it.
    pub(super) stall: Histogram,
}

/// Why answers go on elsewhere: their group was lost, or its leader leads another epoch.
pub(super) const MIGRATIONS: [&str; 2] = ["lost", "epoch"];

/// Bounds of stalls, in seconds.
const STALL_S: &[f64] =
    &[0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0];

impl ModelMetrics {
    /// `context`: tokens of a prompt and its answer together, at most.
    pub(super) fn new(name: &str, context: usize, demand: Arc<Demand>) -> Self {
        Self {
            name: name.to_owned(),
            demand,
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            first_token: Histogram::new(FIRST_TOKEN_S),
            next_token: Histogram::new(NEXT_TOKEN_S),
            time_per_token: Histogram::new(NEXT_TOKEN_S),
            whole: Histogram::new(REQUEST_S),
            queue: Histogram::new(REQUEST_S),
            prefill: Histogram::new(REQUEST_S),
            decode: Histogram::new(REQUEST_S),
            inference: Histogram::new(REQUEST_S),
            prompt_length: Histogram::of_tokens(context),
            answer_length: Histogram::of_tokens(context),
            answer_limit: Histogram::of_tokens(context),
            longest_answer: Histogram::of_tokens(context),
            answers: Histogram::new(ANSWERS),
            stop: Counter::default(),
            length: Counter::default(),
            abort: Counter::default(),
            error: Counter::default(),
            failures: Failure::REASONS.iter().map(|_| Counter::default()).collect(),
            gen_ai_whole: Histogram::new(GEN_AI_REQUEST_S),
            gen_ai_failed: Histogram::new(GEN_AI_REQUEST_S),
            gen_ai_first_token: Histogram::new(GEN_AI_FIRST_TOKEN_S),
            gen_ai_time_per_token: Histogram::new(GEN_AI_NEXT_TOKEN_S),
            gen_ai_input: Histogram::new(GEN_AI_TOKENS),
            gen_ai_output: Histogram::new(GEN_AI_TOKENS),
            retry_lost: Counter::default(),
            retry_epoch: Counter::default(),
            retry_drained: Counter::default(),
            migrations: Default::default(),
            stall: Histogram::new(STALL_S),
        }
    }
}

type CounterOf = fn(&ModelMetrics) -> &Counter;
type HistogramOf = fn(&ModelMetrics) -> &Histogram;

const COUNTERS: [(&str, &str, CounterOf); 2] = [
    ("vllm:prompt_tokens_total", "Tokens of prompts.", |m| &m.prompt_tokens),
    ("vllm:generation_tokens_total", "Tokens generated.", |m| &m.generation_tokens),
];

const HISTOGRAMS: [(&str, &str, HistogramOf); 13] = [
    ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", |m| &m.first_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", |m| &m.next_token),
    ("vllm:request_time_per_output_token_seconds", "Mean of a request's times between two tokens.", |m| {
        &m.time_per_token
    }),
    ("vllm:e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", |m| &m.whole),
    ("vllm:request_queue_time_seconds", "From a request's arrival at a group until it runs.", |m| &m.queue),
    ("vllm:request_prefill_time_seconds", "From a request's admission to its first token.", |m| &m.prefill),
    ("vllm:request_decode_time_seconds", "From a request's first token to its last.", |m| &m.decode),
    ("vllm:request_inference_time_seconds", "From a request's admission to its last token.", |m| {
        &m.inference
    }),
    ("vllm:request_prompt_tokens", "Tokens of a request's prompt.", |m| &m.prompt_length),
    ("vllm:request_generation_tokens", "Tokens of a request's answer.", |m| &m.answer_length),
    ("vllm:request_params_max_tokens", "Tokens that a request's answer may have.", |m| &m.answer_limit),
    ("vllm:request_max_num_generation_tokens", "Tokens of the longest of a request's answers.", |m| {
        &m.longest_answer
    }),
    ("vllm:request_params_n", "Answers to a request.", |m| &m.answers),
];

const GEN_AI: [(&str, &str, HistogramOf); 2] = [
    ("gen_ai_server_time_to_first_token_seconds", "From a request's arrival to its first token.", |m| {
        &m.gen_ai_first_token
    }),
    ("gen_ai_server_time_per_output_token_seconds", "Mean time of a token after the first.", |m| {
        &m.gen_ai_time_per_token
    }),
];

/// Writes everything that is measured of the models' requests.
pub(super) fn write(page: &mut Page, models: &[std::sync::Arc<ModelMetrics>]) {
    for (name, help, of) in COUNTERS {
        page.family(name, "counter", help);
        models.iter().for_each(|m| page.sample(&[("model_name", &m.name)], of(m).get()));
    }
    page.family("vllm:request_success_total", "counter", "Requests that ended, by how.");
    for m in models {
        let ends = [("stop", &m.stop), ("length", &m.length), ("abort", &m.abort), ("error", &m.error)];
        for (reason, count) in ends {
            page.sample(&[("model_name", &m.name), ("finished_reason", reason)], count.get());
        }
    }
    for (name, help, of) in HISTOGRAMS {
        page.family(name, "histogram", help);
        models.iter().for_each(|m| page.histogram(&[("model_name", &m.name)], of(m)));
    }
    write_gen_ai(page, models);
    page.family("galerne_router_errors_total", "counter", "Requests that ended in an error, by its reason.");
    for m in models {
        for (reason, count) in Failure::REASONS.iter().zip(&m.failures) {
            page.sample(&[("model_name", &m.name), ("reason", reason)], count.get());
        }
    }
    let help = "Requests that were sent to another group before their first token.";
    page.family("galerne_router_retries_total", "counter", help);
    for m in models {
        page.sample(&[("model_name", &m.name), ("reason", "lost")], m.retry_lost.get());
        page.sample(&[("model_name", &m.name), ("reason", "epoch")], m.retry_epoch.get());
        page.sample(&[("model_name", &m.name), ("reason", "drained")], m.retry_drained.get());
    }
    let help = "Answers that lost their group behind a token and were sent on, by what happened to it.";
    page.family("galerne_router_stream_migrations_total", "counter", help);
    for m in models {
        for (reason, count) in MIGRATIONS.iter().zip(&m.migrations) {
            page.sample(&[("model_name", &m.name), ("reason", reason)], count.get());
        }
    }
    let help = "From an answer's last token before its group was lost to the next one.";
    page.family("galerne_router_stream_stall_seconds", "histogram", help);
    models.iter().for_each(|m| page.histogram(&[("model_name", &m.name)], &m.stall));
}

fn write_gen_ai(page: &mut Page, models: &[std::sync::Arc<ModelMetrics>]) {
    let labels = |m: &ModelMetrics| {
        let own = [("gen_ai_operation_name", "generate_content"), ("gen_ai_provider_name", "galerne")];
        own.map(|(name, value)| (name, value.to_owned()))
            .into_iter()
            .chain([("gen_ai_request_model", m.name.clone()), ("gen_ai_response_model", m.name.clone())])
    };
    let write = |page: &mut Page, m: &ModelMetrics, more: Option<(&'static str, &str)>, what: &Histogram| {
        let all: Vec<_> = labels(m).chain(more.map(|(name, value)| (name, value.to_owned()))).collect();
        let all: Vec<_> = all.iter().map(|(name, value)| (*name, value.as_str())).collect();
        page.histogram(&all, what);
    };
    for name in ["gen_ai_server_request_duration_seconds", "gen_ai_client_operation_duration_seconds"] {
        page.family(name, "histogram", "From a request's arrival to the end of its answer.");
        for m in models {
            write(page, m, None, &m.gen_ai_whole);
            write(page, m, Some(("error_type", "_OTHER")), &m.gen_ai_failed);
        }
    }
    for (name, help, of) in GEN_AI {
        page.family(name, "histogram", help);
        models.iter().for_each(|m| write(page, m, None, of(m)));
    }
    page.family("gen_ai_client_token_usage", "histogram", "Tokens of a request's prompt, and of its answer.");
    for m in models {
        write(page, m, Some(("gen_ai_token_type", "input")), &m.gen_ai_input);
        write(page, m, Some(("gen_ai_token_type", "output")), &m.gen_ai_output);
    }
}

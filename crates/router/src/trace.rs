//! The spans of a request that is followed. All others have no span at all.
//!
//! ```text
//! POST /v1/chat/completions ─┬─ tokenize
//!                            └─ generate ── run ── (the leader's spans)
//! ```

use std::borrow::Cow;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use galerne_telemetry::{SPANS, current, follow, number, traceparent};
use galerne_types::FinishReason;
use galerne_wire::v1;
use tracing::{Instrument as _, Span, field, info, info_span};

use crate::groups::Place;
use crate::limits::ECHO_CHARS_MAX;

/// What nobody traces, since it is asked every few seconds.
const UNTRACED: [&str; 4] = ["/health", "/readyz", "/metrics", "/grpc."];

/// Puts a request that is followed into a server span, on either face.
pub(crate) async fn serve(request: Request, next: Next) -> Response {
    let span = server(&request);
    if span.is_none() {
        return next.run(request).await;
    }
    let response = next.run(request).instrument(span.clone()).await;
    let status = response.status();
    span.record("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    response
}

fn server(request: &Request) -> Span {
    let path = request.uri().path();
    if UNTRACED.iter().any(|untraced| path.starts_with(untraced)) {
        return Span::none();
    }
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    let Some(parent) = follow(header("traceparent"), header("tracestate")) else { return Span::none() };
    let rpc = header("content-type").is_some_and(|kind| kind.starts_with("application/grpc"));
    let route: Cow<'_, str> = match request.extensions().get::<MatchedPath>() {
        Some(route) if !rpc => route.as_str().into(),
        _ => path.chars().take(ECHO_CHARS_MAX).collect(),
    };
    let method = request.method().as_str();
    let name: Cow<'_, str> =
        if rpc { route.trim_start_matches('/').into() } else { format!("{method} {route}").into() };
    let span = info_span!(
        target: SPANS,
        parent: None,
        "request",
        otel.name = &*name,
        otel.kind = "server",
        otel.status_code = field::Empty,
        http.request.method = method,
        http.route = &*route,
        http.response.status_code = field::Empty,
        network.protocol.name = "http",
        rpc.system = rpc.then_some("grpc"),
    );
    parent.adopt(&span);
    span
}

/// The span in which a prompt becomes tokens.
pub(crate) fn tokenize() -> Span {
    let parent = current();
    if parent.is_none() { parent } else { info_span!(target: SPANS, parent: &parent, "tokenize") }
}

/// The spans of an answer: its own, and the server's, which ends when its last answer has ended.
pub(crate) struct AnswerSpan {
    own: Span,
    _server: Span,
}

impl AnswerSpan {
    /// The span of an answer that begins now, within the server span that this code runs in.
    pub(crate) fn begin(model: &str) -> Self {
        let server = current();
        if server.is_none() {
            return Self { own: Span::none(), _server: server };
        }
        let own = info_span!(
            target: SPANS,
            parent: &server,
            "generate",
            otel.name = format!("generate {model}"),
            otel.status_code = field::Empty,
            gen_ai.operation.name = "generate_content",
            gen_ai.provider.name = "galerne",
            gen_ai.request.model = model,
            gen_ai.response.model = model,
            gen_ai.usage.input_tokens = field::Empty,
            gen_ai.usage.output_tokens = field::Empty,
            gen_ai.response.finish_reasons = field::Empty,
            gen_ai.response.time_to_first_chunk = field::Empty,
        );
        Self { own, _server: server }
    }

    /// For what belongs to the answer.
    pub(crate) fn own(&self) -> Span {
        self.own.clone()
    }

    /// How long its prompt is.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.own.record("gen_ai.usage.input_tokens", number(tokens as u64));
    }

    /// The first token has come, that many seconds after the request.
    pub(crate) fn first_token(&self, after_s: f64) {
        self.own.record("gen_ai.response.time_to_first_chunk", after_s);
    }

    /// A place's group did not go on with it behind so many tokens.
    pub(crate) fn migrates(&self, reason: &str, left: &Place, tokens: u64) {
        let Place { group, epoch, .. } = left;
        let epoch = number(epoch.0);
        info!(%group, epoch, tokens, reason, "an answer has lost its group, and is sent on");
        if !self.own.is_none() {
            let tokens = number(tokens);
            info!(target: SPANS, parent: &self.own, %group, epoch, tokens, reason, "migration");
        }
    }

    /// It has ended.
    pub(crate) fn end(&self, reason: FinishReason, tokens: u64) {
        let name = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error => "error",
        };
        self.own.record("gen_ai.usage.output_tokens", number(tokens));
        self.own.record("gen_ai.response.finish_reasons", name);
        if reason == FinishReason::Error {
            self.own.record("otel.status_code", "ERROR");
        }
    }
}

/// The span of a request at a place's leader, which the request names.
pub(crate) fn run(request: &mut v1::RunRequest, place: &Place) -> Span {
    let parent = current();
    if parent.is_none() {
        return parent;
    }
    let span = info_span!(
        target: SPANS,
        parent: &parent,
        "run",
        otel.kind = "client",
        rpc.system = "grpc",
        galerne.group = %place.group,
        galerne.epoch = number(place.epoch.0),
    );
    request.traceparent = traceparent(&span).unwrap_or_default();
    span
}

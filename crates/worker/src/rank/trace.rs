//! The spans of a traced request at the leader, and of its steps at every rank.
//!
//! ```text
//! engine.run ─┬─ queue ─ prefill ─ decode      one after the other, at the leader
//!             └─ step, step, step …            at each rank, linked to the other traced requests of the batch
//! ```
//!
//! And `group.form` at each leader, a trace of its own: from an epoch's record on until its group serves.

use galerne_telemetry::{SPANS, link, number, remote, traceparent};
use galerne_types::{Epoch, EpochRecord, FinishReason, Request, Step};
use tracing::{Span, field, info_span};

/// A traced request, from its call to its end.
#[derive(Debug)]
pub(crate) struct Traced {
    run: Span,
    /// What it does now: waits, reads its prompt, or draws tokens.
    phase: Span,
    tokens: u64,
}

impl Traced {
    /// Begins the spans of a call, if its caller traces it.
    pub(crate) fn begin(traceparent: &str, epoch: Epoch) -> Option<Box<Self>> {
        let parent = remote(traceparent)?;
        let run = info_span!(
            target: SPANS,
            parent: None,
            "engine.run",
            otel.kind = "server",
            otel.status_code = field::Empty,
            galerne.epoch = number(epoch.0),
            gen_ai.usage.input_tokens = field::Empty,
            gen_ai.usage.output_tokens = field::Empty,
            gen_ai.response.finish_reasons = field::Empty,
        );
        parent.adopt(&run);
        let phase = info_span!(target: SPANS, parent: &run, "queue");
        Some(Box::new(Self { run, phase, tokens: 0 }))
    }

    /// Names the trace in the request, whose steps carry it to all ranks.
    pub(crate) fn mark(&self, request: &mut Request) {
        self.run.record("gen_ai.usage.input_tokens", number(request.prompt.len() as u64));
        request.trace = traceparent(&self.run);
    }

    /// It has left the queue.
    pub(crate) fn admitted(&mut self) {
        self.phase = info_span!(target: SPANS, parent: &self.run, "prefill");
    }

    /// A token was drawn for it.
    pub(crate) fn token(&mut self) {
        if self.tokens == 0 {
            self.phase = info_span!(target: SPANS, parent: &self.run, "decode");
        }
        self.tokens += 1;
    }

    /// It has ended; `None` says in an error. One that is dropped before has lost its client.
    pub(crate) fn end(&mut self, reason: Option<FinishReason>) {
        let reason = match reason {
            Some(FinishReason::Stop) => "stop",
            Some(FinishReason::Length) => "length",
            Some(FinishReason::Cancelled) => "cancelled",
            Some(FinishReason::Error) | None => "error",
        };
        self.run.record("gen_ai.response.finish_reasons", reason);
        if reason == "error" {
            self.run.record("otel.status_code", "ERROR");
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.run.record("gen_ai.usage.output_tokens", number(self.tokens));
    }
}

/// The span of a group that forms, at its leader: why the epoch before ended, and from now on how long until it serves.
/// An error, unless it is told to have [`formed`].
pub(crate) fn forming(epoch: Epoch, record: &EpochRecord) -> Span {
    let span = info_span!(
        target: SPANS,
        parent: None,
        "group.form",
        otel.status_code = "ERROR",
        galerne.group = %record.group,
        galerne.epoch = number(epoch.0),
        galerne.ranks = number(record.members.len() as u64),
        galerne.reformation.reason = field::Empty,
        galerne.reformation.rank = field::Empty,
    );
    if let Some(past) = record.past.last() {
        span.record("galerne.reformation.reason", past.loss.kind.name());
        if let Some(rank) = &past.loss.rank {
            span.record("galerne.reformation.rank", field::display(rank));
        }
    }
    span
}

/// The group serves: its span ends well.
pub(crate) fn formed(span: Span) {
    span.record("otel.status_code", "OK");
    drop(span);
}

/// The span of a step at this rank, to be dropped when it has run; none for a step without traced requests.
pub(crate) fn step(step: &Step, rank: usize) -> Span {
    let mut requests = step.traces.iter().filter_map(|trace| remote(trace));
    let Some(first) = requests.next() else { return Span::none() };
    let span = info_span!(
        target: SPANS,
        parent: None,
        "step",
        galerne.rank = number(rank as u64),
        galerne.epoch = number(step.epoch.0),
        galerne.step = number(step.number),
        galerne.step.tokens = number(step.tokens() as u64),
        galerne.step.sequences = number(step.slices.len() as u64),
    );
    first.adopt(&span);
    for other in requests {
        link(&span, &other);
    }
    span
}

//! Which requests are followed, and how a trace goes from one process to the next.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::SPANS;

/// Bytes of a `tracestate` that is carried on (W3C: at least 512 must be).
const TRACESTATE_BYTES_MAX: usize = 512;

/// One request in so many, in 2^-32ths: 2^32 follows all, 0 none, [`OFF`] not even those whose clients ask for it.
static SHARE: AtomicU64 = AtomicU64::new(OFF);
const OFF: u64 = u64::MAX;

/// Shares of all requests so far: a request is followed when the sum passes a whole number.
static SUM: AtomicU64 = AtomicU64::new(0);

/// Spans are exported from now on, of this share of the requests that do not say.
pub(crate) fn export(ratio: f64) {
    SHARE.store((ratio * 2f64.powi(32)) as u64, Ordering::Relaxed);
}

/// Whether this process exports spans.
pub fn exports() -> bool {
    SHARE.load(Ordering::Relaxed) != OFF
}

/// The span that a request's first span here belongs to: its client's, or none if the trace begins here.
#[derive(Clone, Debug)]
pub struct Parent(Context);

impl Parent {
    /// Makes `span`, which must not have been entered yet, a child.
    pub fn adopt(self, span: &Span) {
        // Fails for a span that is not exported, which needs no parent.
        let _ = span.set_parent(self.0);
    }
}

/// Whether a request is to be followed, by what its client said in the W3C headers `traceparent` and `tracestate`: a
/// client that traces decides, and of the others the chosen share is followed. `None` if not.
pub fn follow(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Parent> {
    let share = SHARE.load(Ordering::Relaxed);
    if share == OFF {
        return None;
    }
    match traceparent.and_then(|traceparent| parse(traceparent, tracestate)) {
        Some(client) => client.span().span_context().is_sampled().then_some(Parent(client)),
        None => {
            let sum = SUM.fetch_add(share, Ordering::Relaxed);
            let due = (sum.wrapping_add(share) >> 32) != (sum >> 32);
            due.then(|| Parent(Context::new()))
        }
    }
}

/// The span of another process that `traceparent` names, if it is followed and this process exports spans.
pub fn remote(traceparent: &str) -> Option<Parent> {
    if !exports() {
        return None;
    }
    let context = parse(traceparent, None)?;
    context.span().span_context().is_sampled().then_some(Parent(context))
}

/// Links `span` to one more span that caused it.
pub fn link(span: &Span, to: &Parent) {
    span.add_link(to.0.span().span_context().clone());
}

/// The span that is exported and in which this code runs, or [`Span::none`].
pub fn current() -> Span {
    let span = Span::current();
    if span.metadata().is_some_and(|metadata| metadata.target() == SPANS) { span } else { Span::none() }
}

/// `span` as a W3C `traceparent`, for the next process; `None` if it is not exported.
pub fn traceparent(span: &Span) -> Option<String> {
    if span.is_none() {
        return None;
    }
    let context = span.context();
    let (spanned, mut fields) = (context.span(), HashMap::new());
    if !spanned.span_context().is_sampled() {
        return None;
    }
    TraceContextPropagator::new().inject_context(&context, &mut fields);
    fields.remove("traceparent")
}

/// A count as spans carry it: OTLP knows signed numbers only, and others would become text.
pub fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Context> {
    let mut fields = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let tracestate = tracestate.filter(|state| state.len() <= TRACESTATE_BYTES_MAX).unwrap_or_default();
    fields.insert("tracestate".to_owned(), tracestate.to_owned());
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &fields);
    let valid = context.span().span_context().is_valid();
    valid.then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const UNSAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    /// One test, because the share is the process's.
    #[test]
    fn a_client_decides_and_of_the_rest_a_share_is_followed() {
        assert!(follow(Some(SAMPLED), None).is_none(), "nothing is exported");
        assert!(remote(SAMPLED).is_none());
        export(0.25);
        let followed =
            |traceparent: Option<&str>| (0..100).filter(|_| follow(traceparent, None).is_some()).count();
        assert_eq!(followed(Some(SAMPLED)), 100);
        assert_eq!(followed(Some(UNSAMPLED)), 0);
        assert_eq!(followed(None), 25);
        for broken in ["", "00-", "ff-x", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "é"] {
            assert_eq!(followed(Some(broken)), 25, "{broken:?} is no trace: this process begins one");
        }
        assert!(remote(SAMPLED).is_some() && remote(UNSAMPLED).is_none() && remote("x").is_none());
        export(1.0);
        assert_eq!(followed(None), 100);
        export(0.0);
        assert_eq!((followed(None), followed(Some(SAMPLED))), (0, 100));
    }

    #[test]
    fn what_is_not_followed_has_no_name() {
        assert_eq!(traceparent(&Span::none()), None);
        assert!(current().is_none());
    }
}

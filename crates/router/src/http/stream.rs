//! Answers as server-sent events.

mod pause;
mod stencil;

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use serde::Serialize;

use self::pause::Pause;
pub(super) use self::stencil::Stencil;
use super::error::ApiError;
use crate::answer::Delta;
use crate::choices::Choices;
use crate::failure::Failure;
use crate::limits::{HELD_EVENTS_MAX, WRITE_BYTES_MAX};

/// How an API writes choices as events.
pub(super) trait Dialect: Send + Unpin + 'static {
    /// Writes what one delta of a choice adds: no event, one or several.
    fn delta(
        &mut self,
        at: usize,
        delta: Delta,
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure>;

    /// Writes what follows the last delta.
    fn end(&mut self, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure>;

    /// Writes, as the last event, why there is no more.
    fn fail(&mut self, error: &ApiError, out: &mut BytesMut) {
        event(out, &serde_json::to_vec(&error.body()).unwrap_or_default());
    }
}

/// Pulled by the connection: nothing is queued here, and a connection that is gone drops it. What is ready at once
/// is written at once, and what comes right behind a write waits for a moment.
struct Events<D> {
    dialect: D,
    choices: Choices,
    out: BytesMut,
    /// Deltas in it.
    deltas: u32,
    /// Bytes of the last write: the next is likely as large.
    bytes: usize,
    /// The last event has been written.
    ended: bool,
    pause: Pause,
}

/// Bytes of one event, about.
const EVENT_BYTES: usize = 512;

/// The body that streams choices.
pub(super) fn body(dialect: impl Dialect, choices: Choices) -> Body {
    Body::from_stream(Events {
        dialect,
        choices,
        out: BytesMut::new(),
        deltas: 0,
        bytes: 0,
        ended: false,
        pause: Pause::default(),
    })
}

impl<D: Dialect> Stream for Events<D> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let events = &mut *self;
        while !events.ended && events.out.len() < WRITE_BYTES_MAX {
            let Poll::Ready(news) = events.choices.poll_next(context) else { break };
            if let Err(failure) = events.write(news.transpose()) {
                events.ended = true;
                tracing::debug!(%failure, "a stream ended early");
                events.dialect.fail(&ApiError::from(failure), &mut events.out);
            }
        }
        match (events.out.is_empty(), events.ended) {
            (false, _) => events.poll_write(context).map(|()| {
                events.deltas = 0;
                events.bytes = events.out.len();
                Some(Ok(std::mem::take(&mut events.out).freeze()))
            }),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}

impl<D: Dialect> Events<D> {
    /// Whether what there is may be written now.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.ended {
            return Poll::Ready(());
        }
        let paused = self.pause.is_on();
        let over = self.pause.poll(self.deltas, self.out.len() >= WRITE_BYTES_MAX, context);
        if paused != self.pause.is_on() {
            self.choices.tell_at(if over.is_ready() { 1 } else { HELD_EVENTS_MAX });
        }
        over
    }

    fn write(&mut self, news: Result<Option<(usize, Delta)>, Failure>) -> Result<(), Failure> {
        self.deltas += 1;
        if self.out.is_empty() {
            self.out.reserve(self.bytes.max(EVENT_BYTES));
        }
        match news? {
            Some((at, delta)) => self.dialect.delta(at, delta, &self.choices, &mut self.out),
            None => {
                self.ended = true;
                self.dialect.end(&self.choices, &mut self.out)
            }
        }
    }
}

/// Writes one event.
pub(super) fn event(out: &mut BytesMut, data: &[u8]) {
    out.put_slice(b"data: ");
    out.put_slice(data);
    out.put_slice(b"\n\n");
}

/// Writes a value as JSON.
pub(super) fn json(out: &mut BytesMut, value: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer(out.writer(), value)
        .map_err(|error| Failure::Engine(format!("its answer cannot be written as JSON: {error}")))
}

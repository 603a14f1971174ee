//! Messages of calls as they arrive: what is read of them counts among all bodies, and does not take for ever.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

use super::errors::{message_too_slow, messages_too_large};
use crate::gate::Caller;
use crate::server::ServerLimits;

/// Bytes in front of each message.
const FRAME_HEAD_BYTES: usize = 5;

/// A call's body. A client sends one message, or a few; those who watch for long send nothing meanwhile.
struct Limited {
    body: Body,
    caller: Caller,
    bytes_max: usize,
    /// Bytes that may still come.
    left: usize,
    whole_s_max: Duration,
    idle_s_max: Duration,
    /// When the whole body is due; set at the first wait for bytes.
    end: Option<Instant>,
    /// Set while bytes are waited for.
    alarm: Option<Pin<Box<Sleep>>>,
}

/// Puts limits around the body of a caller's request.
pub(super) fn limited(body: Body, caller: Caller, limits: &ServerLimits) -> Body {
    let &ServerLimits { body_bytes_max, body_s_max: whole_s_max, body_idle_s_max: idle_s_max, .. } = limits;
    let left = body_bytes_max.saturating_add(FRAME_HEAD_BYTES);
    let (end, alarm) = (None, None);
    Body::new(Limited { body, caller, bytes_max: body_bytes_max, left, whole_s_max, idle_s_max, end, alarm })
}

impl Limited {
    /// Ready when the next bytes are overdue.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        let now = Instant::now();
        let end = *self.end.get_or_insert(now + self.whole_s_max);
        let due = end.min(now + self.idle_s_max);
        ready!(self.alarm.get_or_insert_with(|| Box::pin(sleep_until(due))).as_mut().poll(cx));
        Poll::Ready(message_too_slow(if now >= end {
            format!("the message did not arrive within {} s", self.whole_s_max.as_secs_f64())
        } else {
            format!("nothing of the message arrived for {} s", self.idle_s_max.as_secs_f64())
        }))
    }
}

impl HttpBody for Limited {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            return this.poll_overdue(cx).map(|late| Some(Err(late)));
        };
        this.alarm = None;
        Poll::Ready(frame.map(|frame| {
            let frame = frame.map_err(|error| Status::from_error(error.into_inner()))?;
            let data = frame.data_ref().map_or(&[][..], |data| data);
            this.left =
                this.left.checked_sub(data.len()).ok_or_else(|| messages_too_large(this.bytes_max))?;
            this.caller.hold(data)?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

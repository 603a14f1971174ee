//! An answer as server-sent events.

use std::convert::Infallible;

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;

use super::error::ApiError;
use super::response::{Form, Gathered, Kind};
use crate::answer::Answer;
use crate::failure::Failure;

/// Pulled by the connection: nothing is queued here, and a connection that is gone drops it.
struct Events {
    form: Form,
    answer: Answer,
    /// Chunks have been sent.
    begun: bool,
    /// The last event has been sent.
    ended: bool,
    /// Characters in the texts of the tokens so far.
    text_offset: usize,
}

/// The body that streams an answer.
pub(super) fn body(form: Form, answer: Answer) -> Body {
    let events = Events { form, answer, begun: false, ended: false, text_offset: 0 };
    Body::from_stream(stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, Infallible>(bytes), events))
    }))
}

impl Events {
    /// The next event, with those that belong to it.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut out = BytesMut::new();
        if let Err(failure) = self.write(&mut out).await {
            self.ended = true;
            tracing::debug!(id = self.form.id, %failure, "a stream ended early");
            let error = ApiError::from(failure);
            event(&mut out, &serde_json::to_vec(&error.body()).unwrap_or_default());
        }
        Some(out.freeze())
    }

    async fn write(&mut self, out: &mut BytesMut) -> Result<(), Failure> {
        if !self.begun && self.form.kind == Kind::Chat {
            event(out, &self.form.opening(&self.answer)?);
        }
        let mut part = Gathered::default();
        while !self.form.worth_a_chunk(&part) {
            let delta = self.answer.next().await;
            part.add(delta.unwrap_or_else(|| Err(Failure::Engine("its stream had no end".to_owned())))?);
        }
        event(out, &self.form.chunk(&part, !self.begun, self.text_offset, &self.answer)?);
        self.begun = true;
        self.text_offset += self.form.token_chars(&part, &self.answer);
        if part.finish.is_some() {
            self.ended = true;
            if let Some(usage) = self.form.usage_chunk(&self.answer)? {
                event(out, &usage);
            }
            event(out, b"[DONE]");
        }
        Ok(())
    }
}

fn event(out: &mut BytesMut, data: &[u8]) {
    out.put_slice(b"data: ");
    out.put_slice(data);
    out.put_slice(b"\n\n");
}

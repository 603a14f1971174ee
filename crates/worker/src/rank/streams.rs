//! The leader's open streams: what the scheduler tells, out to the clients.

use std::collections::BTreeMap;
use std::time::Instant;

use galerne_types::limits::STREAM_EVENTS_MAX;
use galerne_types::{Event, RequestId};
use galerne_wire::v1;
use tokio::sync::mpsc;
use tonic::Status;

use super::trace::Traced;

/// One item of a stream.
pub(crate) type RunItem = Result<v1::RunEvent, Status>;

/// A new stream's two ends.
pub(crate) fn stream() -> (StreamSender, mpsc::Receiver<RunItem>) {
    // One place more than a reader may leave unread: its last word always fits.
    let (events, receiver) = mpsc::channel(STREAM_EVENTS_MAX + 1);
    let last_word = events.clone().try_reserve_owned();
    let last_word = last_word.expect("a new channel has room");
    (StreamSender { events, last_word, traced: None }, receiver)
}

/// Where a stream's events go.
#[derive(Debug)]
pub(crate) struct StreamSender {
    events: mpsc::Sender<RunItem>,
    last_word: mpsc::OwnedPermit<RunItem>,
    /// The spans of its request, if that is traced.
    traced: Option<Box<Traced>>,
}

impl StreamSender {
    /// The stream's request is traced.
    pub(crate) fn trace(&mut self, traced: Box<Traced>) {
        self.traced = Some(traced);
    }

    fn end(mut self, last_word: RunItem) {
        if let Some(traced) = &mut self.traced {
            let reason = last_word.as_ref().ok().and_then(|event| match event.event {
                Some(v1::run_event::Event::Finished(reason)) => v1::FinishReason::try_from(reason).ok(),
                _ => None,
            });
            traced.end(reason.and_then(v1::FinishReason::into_type));
        }
        self.last_word.send(last_word);
    }
}

/// All open streams of one epoch. Each ends in exactly one last word; dropping them fails those still open with
/// UNAVAILABLE.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    open: BTreeMap<RequestId, Open>,
}

/// An open stream, and when things happened to its request.
#[derive(Debug)]
struct Open {
    stream: StreamSender,
    submitted: Instant,
    admitted: Option<Instant>,
    /// Its first token was told.
    begun: bool,
}

impl Open {
    /// A token was drawn; says where the time went, for the first token only.
    fn token(&mut self) -> Option<v1::Timing> {
        if let Some(traced) = &mut self.stream.traced {
            traced.token();
        }
        if std::mem::replace(&mut self.begun, true) {
            return None;
        }
        let (admitted, now) = (self.admitted.unwrap_or(self.submitted), Instant::now());
        let us = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
        };
        Some(v1::Timing { queued_us: us(self.submitted, admitted), prefill_us: us(admitted, now) })
    }
}

impl Streams {
    /// Takes in a stream.
    pub(crate) fn open(&mut self, request: RequestId, stream: StreamSender) {
        let open = Open { stream, submitted: Instant::now(), admitted: None, begun: false };
        self.open.insert(request, open);
    }

    /// Requests were admitted just now.
    pub(crate) fn admitted(&mut self, requests: &[RequestId]) {
        let now = Instant::now();
        for request in requests {
            if let Some(open) = self.open.get_mut(request) {
                open.admitted = Some(now);
                if let Some(traced) = &mut open.stream.traced {
                    traced.admitted();
                }
            }
        }
    }

    /// Forgets the streams whose clients have left; these are the requests to cancel.
    pub(crate) fn take_left(&mut self) -> Vec<RequestId> {
        let left: Vec<RequestId> =
            self.open.iter().filter(|(_, open)| open.stream.events.is_closed()).map(|(&id, _)| id).collect();
        for id in &left {
            self.open.remove(id);
        }
        left
    }

    /// Passes an event on. Returns the request when it is to be cancelled: its reader is too slow and has been
    /// told so, or has left.
    pub(crate) fn emit(&mut self, event: Event) -> Option<RequestId> {
        match event {
            Event::Token { request, index, token } => {
                let timing = self.open.get_mut(&request).and_then(Open::token);
                let token = v1::RunToken { index, token: Some(token.into()), timing };
                self.tell(request, v1::run_event::Event::Token(token))
            }
            Event::Scored { request, position, scores } => {
                let scores = scores.into_iter().map(v1::Token::from).collect();
                self.tell(request, v1::run_event::Event::Scored(v1::Scored { position, scores }))
            }
            Event::Finished { request, reason } => {
                let reason = v1::FinishReason::from(reason).into();
                let event = v1::run_event::Event::Finished(reason);
                self.end(request, Ok(v1::RunEvent { event: Some(event) }));
                None
            }
        }
    }

    fn tell(&mut self, request: RequestId, event: v1::run_event::Event) -> Option<RequestId> {
        let open = self.open.get(&request)?;
        let full = open.stream.events.try_send(Ok(v1::RunEvent { event: Some(event) })).is_err();
        full.then(|| {
            self.end(request, Err(too_slow()));
            request
        })
    }

    /// Says a stream's last word.
    pub(crate) fn end(&mut self, request: RequestId, last_word: RunItem) {
        if let Some(open) = self.open.remove(&request) {
            open.stream.end(last_word);
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for (_, open) in std::mem::take(&mut self.open) {
            open.stream.end(Err(lost()));
        }
    }
}

/// The group's epoch is over.
pub(crate) fn lost() -> Status {
    Status::unavailable("the group was lost: retry elsewhere, or here when it has formed again")
}

fn too_slow() -> Status {
    Status::aborted(format!("this stream was read too slowly: {STREAM_EVENTS_MAX} events were waiting"))
}

#[cfg(test)]
mod tests {
    use galerne_types::{FinishReason, TokenOut};
    use tonic::Code;

    use super::*;

    const ID: RequestId = RequestId(1);

    fn token(index: u32) -> Event {
        Event::Token { request: ID, index, token: TokenOut::unreported(9) }
    }

    fn drain(receiver: &mut mpsc::Receiver<RunItem>) -> Vec<RunItem> {
        std::iter::from_fn(|| receiver.try_recv().ok()).collect()
    }

    #[test]
    fn a_stream_ends_in_its_finish() {
        let (sender, mut receiver) = stream();
        let mut streams = Streams::default();
        streams.open(ID, sender);
        assert_eq!(streams.emit(token(0)), None);
        assert_eq!(streams.emit(Event::Finished { request: ID, reason: FinishReason::Stop }), None);
        drop(streams);
        let items = drain(&mut receiver);
        assert_eq!(items.len(), 2);
        assert!(matches!(items[1].as_ref().unwrap().event, Some(v1::run_event::Event::Finished(_))));
    }

    #[test]
    fn the_first_token_tells_where_the_time_went() {
        let (sender, mut receiver) = stream();
        let mut streams = Streams::default();
        streams.open(ID, sender);
        streams.admitted(&[ID]);
        streams.emit(token(0));
        streams.emit(token(1));
        let timed = drain(&mut receiver).into_iter().map(|item| match item.unwrap().event {
            Some(v1::run_event::Event::Token(token)) => token.timing.is_some(),
            other => panic!("{other:?}"),
        });
        assert_eq!(timed.collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_slow_reader_is_told_once_and_cancelled() {
        let (sender, mut receiver) = stream();
        let mut streams = Streams::default();
        streams.open(ID, sender);
        let limit = STREAM_EVENTS_MAX as u32;
        assert!((0..limit).all(|index| streams.emit(token(index)).is_none()));
        assert_eq!(streams.emit(token(limit)), Some(ID));
        assert_eq!(streams.emit(token(limit + 1)), None, "it is gone");
        let items = drain(&mut receiver);
        assert_eq!(items.len(), STREAM_EVENTS_MAX + 1);
        assert_eq!(items.last().unwrap().as_ref().unwrap_err().code(), Code::Aborted);
    }

    #[test]
    fn the_end_of_an_epoch_is_told_to_every_stream() {
        let (sender, mut receiver) = stream();
        let mut streams = Streams::default();
        streams.open(ID, sender);
        drop(streams);
        let items = drain(&mut receiver);
        assert_eq!(items.len(), 1);
        assert_eq!(items[0].as_ref().unwrap_err().code(), Code::Unavailable);
    }

    #[test]
    fn a_client_that_left_is_noticed() {
        let (sender, receiver) = stream();
        let mut streams = Streams::default();
        streams.open(ID, sender);
        assert!(streams.take_left().is_empty());
        drop(receiver);
        assert_eq!(streams.take_left(), [ID]);
        assert!(streams.take_left().is_empty());
    }
}

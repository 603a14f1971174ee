//! News for one router: filled by the leader's loop, emptied by the connection. What the connection has not taken yet
//! goes in one message, so that a router which is behind is sent fewer and larger ones.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::Stream;
use futures_util::task::AtomicWaker;
use galerne_wire::v1;
use galerne_wire::v1::run_event::Event;
use tonic::Status;

/// Events that wait for a router which does not read before all its requests are ended: many seconds of a busy group.
const LINK_EVENTS_MAX: usize = 1 << 18;

/// Tokens and scores in one message, give or take one event: well within the size of a message, whatever is told of
/// each.
const NEWS_TOKENS_MAX: usize = 8192;

/// The leader's end.
#[derive(Clone, Debug)]
pub(crate) struct LinkSender(Arc<Shared>);

/// The connection's end.
#[derive(Debug)]
pub(crate) struct LinkReceiver(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    reader: AtomicWaker,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<v1::RunEvent>,
    /// Said after the last of them.
    end: Option<Status>,
    ended: bool,
}

/// A new link's two ends.
pub(crate) fn link() -> (LinkSender, LinkReceiver) {
    let shared = Arc::new(Shared::default());
    (LinkSender(shared.clone()), LinkReceiver(shared))
}

impl LinkSender {
    /// Puts an event behind those that wait; [`flush`](Self::flush) sends them. False if there are too many: the link
    /// has ended.
    pub(crate) fn push(&self, id: u32, event: Event) -> bool {
        let mut waiting = self.0.waiting();
        if waiting.ended {
            return false;
        }
        if waiting.events.len() >= LINK_EVENTS_MAX {
            let says = format!("this router reads too slowly: {LINK_EVENTS_MAX} events were waiting");
            waiting.finish(Status::aborted(says));
            drop(waiting);
            self.flush();
            return false;
        }
        waiting.events.push_back(v1::RunEvent { id, event: Some(event) });
        true
    }

    /// Wakes the connection.
    pub(crate) fn flush(&self) {
        self.0.reader.wake();
    }

    /// Ends the link behind what waits already.
    pub(crate) fn end(&self, status: Status) {
        self.0.waiting().finish(status);
        self.flush();
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn finish(&mut self, status: Status) {
        if !std::mem::replace(&mut self.ended, true) {
            self.end = Some(status);
        }
    }

    /// As many events as go into one message.
    fn take(&mut self) -> v1::News {
        let mut tokens = 0;
        let heavy = |event: &v1::RunEvent| match &event.event {
            Some(Event::Scored(scored)) => scored.scores.len(),
            _ => 1,
        };
        let count = self.events.iter().take_while(|event| {
            let fits = tokens < NEWS_TOKENS_MAX;
            tokens += heavy(event);
            fits
        });
        let count = count.count();
        v1::News { events: self.events.drain(..count).collect() }
    }
}

impl Stream for LinkReceiver {
    type Item = Result<v1::News, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.reader.register(context.waker());
        let mut waiting = self.0.waiting();
        if !waiting.events.is_empty() {
            return Poll::Ready(Some(Ok(waiting.take())));
        }
        match waiting.end.take() {
            Some(status) => Poll::Ready(Some(Err(status))),
            None if waiting.ended => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};
    use tonic::Code;

    use super::*;

    fn token(index: u32) -> Event {
        Event::Token(v1::RunToken { index, ..Default::default() })
    }

    #[test]
    fn what_waits_goes_in_one_message() {
        let (sender, mut receiver) = link();
        assert!(receiver.next().now_or_never().is_none());
        assert!((0..3).all(|index| sender.push(index, token(index))));
        let news = receiver.next().now_or_never().unwrap().unwrap().unwrap();
        assert_eq!(news.events.iter().map(|event| event.id).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(receiver.next().now_or_never().is_none());
    }

    #[test]
    fn a_message_has_its_limit() {
        let (sender, mut receiver) = link();
        let scores = || Event::Scored(v1::Scored { position: 1, scores: vec![v1::Token::default(); 5000] });
        assert!((0..5).all(|id| sender.push(id, scores())));
        let mut lengths = || receiver.next().now_or_never().map(|news| news.unwrap().unwrap().events.len());
        assert_eq!([lengths(), lengths(), lengths(), lengths()], [Some(2), Some(2), Some(1), None]);
    }

    #[test]
    fn a_router_that_does_not_read_is_told_so_behind_what_waits() {
        let (sender, mut receiver) = link();
        assert!((0..LINK_EVENTS_MAX).all(|_| sender.push(1, token(0))));
        assert!(!sender.push(1, token(0)) && !sender.push(2, token(0)), "it has ended");
        sender.end(Status::unavailable("later"));
        let mut events = 0;
        let end = loop {
            match receiver.next().now_or_never().unwrap().unwrap() {
                Ok(news) => events += news.events.len(),
                Err(end) => break end,
            }
        };
        assert_eq!((events, end.code()), (LINK_EVENTS_MAX, Code::Aborted));
        assert!(receiver.next().now_or_never().unwrap().is_none());
    }
}

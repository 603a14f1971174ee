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
pub(crate) const LINK_EVENTS_MAX: usize = 1 << 18;

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
    /// What comes before a request's bare tokens.
    events: VecDeque<v1::RunEvent>,
    /// A request's id, a token's index, the token.
    tokens: Vec<(u32, u32, u32)>,
    ends: VecDeque<v1::RunEvent>,
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
        if waiting.len() >= LINK_EVENTS_MAX {
            let says = format!("this router reads too slowly: {LINK_EVENTS_MAX} events were waiting");
            waiting.finish(Status::aborted(says));
            drop(waiting);
            self.flush();
            return false;
        }
        waiting.push(id, event);
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

    fn len(&self) -> usize {
        self.events.len() + self.tokens.len() + self.ends.len()
    }

    /// No bare token of a request comes before another event of it, and nothing behind its end.
    fn push(&mut self, id: u32, event: Event) {
        let place = match &event {
            Event::Finished(_) | Event::Failed(_) => &mut self.ends,
            Event::Begun(_) | Event::Scored(_) => &mut self.events,
            Event::Token(token) => match token.bare() {
                Some(bare) => return self.tokens.push((id, token.index, bare)),
                None => &mut self.events,
            },
        };
        place.push_back(v1::RunEvent { id, event: Some(event) });
    }

    /// As much as goes into one message.
    fn take(&mut self) -> v1::News {
        let mut room = NEWS_TOKENS_MAX;
        let events = take(&mut self.events, &mut room);
        let count = self.tokens.len().min(room);
        room -= count;
        self.tokens[..count].sort_unstable();
        let mut tokens = v1::Tokens::default();
        self.tokens.drain(..count).for_each(|(id, index, token)| tokens.push(id, index, token));
        let ends = take(&mut self.ends, &mut room);
        v1::News { events, tokens: (count > 0).then_some(tokens), ends }
    }
}

/// Events for which there is room, give or take one event, for so many tokens and scores.
fn take(waiting: &mut VecDeque<v1::RunEvent>, room: &mut usize) -> Vec<v1::RunEvent> {
    let heavy = |event: &v1::RunEvent| match &event.event {
        Some(Event::Scored(scored)) => scored.scores.len(),
        _ => 1,
    };
    let count = waiting.iter().take_while(|event| {
        let fits = *room > 0;
        *room = room.saturating_sub(heavy(event));
        fits
    });
    let count = count.count();
    waiting.drain(..count).collect()
}

impl Stream for LinkReceiver {
    type Item = Result<v1::News, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.reader.register(context.waker());
        let mut waiting = self.0.waiting();
        if waiting.len() > 0 {
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
        Event::Token(v1::RunToken { index, token: Some(v1::Token::default()), timing: None })
    }

    #[test]
    fn what_waits_goes_in_one_message() {
        let (sender, mut receiver) = link();
        assert!(receiver.next().now_or_never().is_none());
        assert!((0..3).all(|index| sender.push(index, token(index))));
        let news = receiver.next().now_or_never().unwrap().unwrap().unwrap();
        assert_eq!(news.tokens.unwrap().requests, [0, 1, 2]);
        assert!(receiver.next().now_or_never().is_none());
    }

    /// Of each request as it came, though tokens without more to tell travel apart.
    #[test]
    fn the_order_of_a_request_is_kept() {
        let (sender, mut receiver) = link();
        let first =
            || Event::Token(v1::RunToken { timing: Some(v1::Timing::default()), ..Default::default() });
        let end = || Event::Finished(v1::FinishReason::Stop.into());
        let scored = || Event::Scored(v1::Scored::default());
        for event in
            [(2, first()), (1, scored()), (2, token(1)), (1, first()), (2, end()), (1, token(1)), (1, end())]
        {
            assert!(sender.push(event.0, event.1));
        }
        let news = receiver.next().now_or_never().unwrap().unwrap().unwrap();
        let events = news.into_events().unwrap();
        let of = |id| {
            let events = events.iter().filter(move |event| event.id == id);
            events.map(|event| event.event.clone().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(of(1), [scored(), first(), token(1), end()]);
        assert_eq!(of(2), [first(), token(1), end()]);
    }

    #[test]
    fn an_end_does_not_overtake_tokens_for_which_a_message_has_no_room() {
        let (sender, mut receiver) = link();
        assert!((0..10_000).all(|index| sender.push(1, token(index))));
        assert!(sender.push(1, Event::Finished(v1::FinishReason::Stop.into())));
        let mut read = || receiver.next().now_or_never().unwrap().unwrap().unwrap();
        let (one, two) = (read(), read());
        assert_eq!((one.tokens.unwrap().counts, one.ends.len()), (vec![NEWS_TOKENS_MAX as u32], 0));
        let rest = two.tokens.unwrap();
        assert_eq!((rest.indices, two.ends.len()), (vec![NEWS_TOKENS_MAX as u32], 1));
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
                Ok(news) => events += news.into_events().unwrap().len(),
                Err(end) => break end,
            }
        };
        assert_eq!((events, end.code()), (LINK_EVENTS_MAX, Code::Aborted));
        assert!(receiver.next().now_or_never().unwrap().is_none());
    }
}

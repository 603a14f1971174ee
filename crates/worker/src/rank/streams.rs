//! The leader's open streams: what the scheduler tells, out to the routers.

use std::collections::BTreeMap;
use std::time::Instant;

use galerne_sched::Admitted;
use galerne_types::{Event, FinishReason, RequestId};
use galerne_wire::v1::run_event::Event as News;
use galerne_wire::{RepeatKey, v1};
use tonic::Status;

use super::link::LinkSender;
use super::trace::Traced;

/// The name of a request at this rank: the number of its router's link, and its id there.
pub(crate) fn request_id(link: u32, id: u32) -> RequestId {
    RequestId(u64::from(link) << 32 | u64::from(id))
}

fn link_of(request: RequestId) -> u32 {
    (request.0 >> 32) as u32
}

/// All open streams of one epoch. Each ends in exactly one last word, unless its router has left or does not read; dropping
/// them fails those still open.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    open: BTreeMap<RequestId, Open>,
    /// The latest of each name.
    named: BTreeMap<RepeatKey, RequestId>,
    /// Links with news that were not sent.
    unsent: BTreeMap<u32, LinkSender>,
}

/// An open stream, and when things happened to its request.
#[derive(Debug)]
struct Open {
    link: LinkSender,
    /// The spans of its request, if that is traced.
    traced: Option<Box<Traced>>,
    submitted: Instant,
    admitted: Option<Instant>,
    /// Tokens of its prompt that were not run again.
    cached_tokens: u32,
    /// Its first token was told.
    begun: bool,
    /// What its client calls it.
    key: Option<RepeatKey>,
}

impl Open {
    /// A token was drawn; says where the time went, for the first token only.
    fn token(&mut self) -> Option<v1::Timing> {
        if let Some(traced) = &mut self.traced {
            traced.token();
        }
        if std::mem::replace(&mut self.begun, true) {
            return None;
        }
        let (admitted, now) = (self.admitted.unwrap_or(self.submitted), Instant::now());
        let us = |from: Instant, to: Instant| {
            u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
        };
        let (queued_us, prefill_us) = (us(self.submitted, admitted), us(admitted, now));
        Some(v1::Timing { queued_us, prefill_us, cached_tokens: self.cached_tokens })
    }

    fn end(&mut self, reason: Option<FinishReason>) {
        if let Some(traced) = &mut self.traced {
            traced.end(reason);
        }
    }
}

impl Streams {
    /// Whether this request's stream is open.
    pub(crate) fn holds(&self, request: RequestId) -> bool {
        self.open.contains_key(&request)
    }

    /// Whether no stream is open.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes in a stream.
    pub(crate) fn open(&mut self, request: RequestId, link: LinkSender, traced: Option<Box<Traced>>) {
        let submitted = Instant::now();
        let open =
            Open { link, traced, submitted, admitted: None, cached_tokens: 0, begun: false, key: None };
        self.open.insert(request, open);
    }

    /// Gives an open stream its name; whose that was, if that one is open.
    pub(crate) fn name(&mut self, request: RequestId, key: RepeatKey) -> Option<RequestId> {
        self.open.get_mut(&request)?.key = Some(key);
        self.named.insert(key, request)
    }

    /// Whose name that is, of those that are open.
    pub(crate) fn of(&self, key: &RepeatKey) -> Option<RequestId> {
        self.named.get(key).copied()
    }

    fn close(&mut self, request: RequestId) -> Option<Open> {
        let open = self.open.remove(&request)?;
        if let Some(key) = open.key.filter(|key| self.named.get(key) == Some(&request)) {
            self.named.remove(&key);
        }
        Some(open)
    }

    /// Requests were admitted just now: their routers are told at once, so that they know whom to suspect should the ranks
    /// die of one. Returns the requests that are to be cancelled, as [`emit`](Self::emit).
    pub(crate) fn admitted(&mut self, requests: &[Admitted]) -> Vec<RequestId> {
        let (now, mut left) = (Instant::now(), Vec::new());
        for &Admitted { request, looked_up_tokens: _, cached_tokens } in requests {
            let Some(open) = self.open.get_mut(&request) else { continue };
            let first = open.admitted.replace(now).is_none();
            open.cached_tokens = cached_tokens;
            if let Some(traced) = &mut open.traced {
                traced.admitted();
            }
            if first {
                left.extend(self.tell(request, News::Begun(v1::Begun {})));
            }
        }
        self.flush();
        left
    }

    /// Forgets a stream that nobody waits for; true if it was open.
    pub(crate) fn forget(&mut self, request: RequestId) -> bool {
        self.close(request).is_some()
    }

    /// Forgets the streams of a router that has left; these are the requests to cancel.
    pub(crate) fn left(&mut self, link: u32) -> Vec<RequestId> {
        self.unsent.remove(&link);
        let left = self.open.range(request_id(link, 0)..=request_id(link, u32::MAX));
        let left: Vec<RequestId> = left.map(|(&request, _)| request).collect();
        for request in &left {
            self.close(*request);
        }
        left
    }

    /// Passes an event on. Returns the requests that are to be cancelled: all those of a router that reads too slowly.
    pub(crate) fn emit(&mut self, event: Event) -> Vec<RequestId> {
        match event {
            Event::Token { request, index, token } => {
                let Some(open) = self.open.get_mut(&request) else { return Vec::new() };
                let timing = open.token();
                self.tell(request, News::Token(v1::RunToken { index, token: Some(token.into()), timing }))
            }
            Event::Scored { request, position, scores } => {
                let scores = scores.into_iter().map(v1::Token::from).collect();
                self.tell(request, News::Scored(v1::Scored { position, scores }))
            }
            Event::Finished { request, reason } => {
                let news = News::Finished(v1::FinishReason::from(reason).into());
                self.end(request, news, Some(reason))
            }
        }
    }

    /// Ends a stream with an error. Returns the requests that are to be cancelled, as [`emit`](Self::emit) does.
    pub(crate) fn fail(&mut self, request: RequestId, failed: v1::Failed) -> Vec<RequestId> {
        self.end(request, News::Failed(failed), None)
    }

    fn end(&mut self, request: RequestId, news: News, reason: Option<FinishReason>) -> Vec<RequestId> {
        let left = self.tell(request, news);
        if let Some(mut open) = self.close(request) {
            open.end(reason);
        }
        left
    }

    fn tell(&mut self, request: RequestId, news: News) -> Vec<RequestId> {
        let Some(open) = self.open.get(&request) else { return Vec::new() };
        if !open.link.push(request.0 as u32, news) {
            return self.left(link_of(request));
        }
        self.unsent.entry(link_of(request)).or_insert_with(|| open.link.clone());
        Vec::new()
    }

    /// Sends what was told since the last time.
    pub(crate) fn flush(&mut self) {
        while let Some((_, link)) = self.unsent.pop_first() {
            link.flush();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for open in self.open.values_mut() {
            open.end(None);
            open.link.end(lost());
        }
    }
}

/// The group's epoch is over.
pub(crate) fn lost() -> Status {
    Status::unavailable("the group was lost: retry elsewhere, or here when it has formed again")
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};
    use galerne_types::TokenOut;
    use tonic::Code;

    use super::*;
    use crate::rank::link::{LINK_EVENTS_MAX, LinkReceiver, link};

    fn token(request: RequestId, index: u32) -> Event {
        Event::Token { request, index, token: TokenOut::unreported(9) }
    }

    fn read(receiver: &mut LinkReceiver) -> Option<Result<Vec<v1::RunEvent>, Status>> {
        Some(receiver.next().now_or_never()??.map(|news| news.into_events().unwrap()))
    }

    #[test]
    fn a_stream_ends_in_its_finish() {
        let (sender, mut receiver) = link();
        let (mut streams, id) = (Streams::default(), request_id(3, 7));
        streams.open(id, sender, None);
        streams.emit(token(id, 0));
        streams.emit(Event::Finished { request: id, reason: FinishReason::Stop });
        streams.emit(token(id, 1));
        streams.flush();
        drop(streams);
        let events = read(&mut receiver).unwrap().unwrap();
        assert_eq!(events.len(), 2);
        assert!(events.iter().all(|event| event.id == 7));
        assert!(matches!(events[1].event, Some(News::Finished(_))));
        assert!(read(&mut receiver).is_none(), "the link stands");
    }

    #[test]
    fn a_request_that_got_its_slot_is_told_once_and_the_first_token_tells_where_the_time_went() {
        let (sender, mut receiver) = link();
        let (mut streams, id) = (Streams::default(), request_id(0, 1));
        streams.open(id, sender, None);
        let admitted = [Admitted { request: id, looked_up_tokens: 70, cached_tokens: 64 }];
        assert!(streams.admitted(&admitted).is_empty());
        let begun = read(&mut receiver).expect("at once").unwrap();
        assert!(matches!(begun[0].event, Some(News::Begun(_))) && begun.len() == 1);
        streams.admitted(&admitted); // again, after it gave way
        assert!(read(&mut receiver).is_none());
        streams.emit(token(id, 0));
        streams.emit(token(id, 1));
        let timed = read(&mut receiver).unwrap().unwrap().into_iter().map(|event| match event.event {
            Some(News::Token(token)) => token.timing.map(|timing| timing.cached_tokens),
            other => panic!("{other:?}"),
        });
        assert_eq!(timed.collect::<Vec<_>>(), [Some(64), None]);
    }

    #[test]
    fn a_name_is_the_latest_open_streams() {
        let (sender, _receiver) = link();
        let (mut streams, ids) = (Streams::default(), [1, 2, 3, 4].map(|number| request_id(number, 0)));
        for id in ids {
            streams.open(id, sender.clone(), None);
        }
        assert_eq!(streams.name(ids[0], [7; 32]), None);
        assert_eq!(streams.name(ids[1], [7; 32]), Some(ids[0]));
        assert_eq!(streams.name(ids[2], [8; 32]), None, "another name");
        streams.fail(ids[0], v1::Failed::default());
        assert_eq!(
            streams.name(ids[3], [7; 32]),
            Some(ids[1]),
            "the first one's end is not the second one's"
        );
        for id in ids {
            streams.forget(id);
        }
        assert!(streams.named.is_empty());
    }

    #[test]
    fn all_requests_of_a_router_that_left_are_cancelled_and_no_others() {
        let (mut streams, mut links) = (Streams::default(), Vec::new());
        for (number, id) in [(1, 5), (1, u32::MAX), (2, 0)] {
            let (sender, receiver) = link();
            links.push(receiver);
            streams.open(request_id(number, id), sender, None);
        }
        assert_eq!(streams.left(1), [request_id(1, 5), request_id(1, u32::MAX)]);
        assert!(streams.left(1).is_empty() && streams.holds(request_id(2, 0)));
    }

    #[test]
    fn a_router_that_reads_too_slowly_loses_all_its_requests() {
        let (sender, _receiver) = link();
        let (mut streams, ids) = (Streams::default(), [request_id(1, 1), request_id(1, 2)]);
        for id in ids {
            streams.open(id, sender.clone(), None);
        }
        let full = (0..LINK_EVENTS_MAX as u32).all(|index| streams.emit(token(ids[0], index)).is_empty());
        assert!(full, "so many may wait");
        assert_eq!(
            streams.fail(ids[0], v1::Failed::default()),
            ids,
            "whatever the news is that does not fit"
        );
        assert!(!ids.into_iter().any(|id| streams.holds(id)));
    }

    #[test]
    fn the_end_of_an_epoch_is_told_on_every_link() {
        let (sender, mut receiver) = link();
        let mut streams = Streams::default();
        streams.open(request_id(1, 1), sender, None);
        drop(streams);
        assert_eq!(read(&mut receiver).unwrap().unwrap_err().code(), Code::Unavailable);
    }
}

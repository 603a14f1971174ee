//! The one stream between this router and a leader: all requests go up on it, news of all of them come down. Whoever
//! reads it never waits for a client: each request has an inbox with a limit.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use galerne_dispatch::INNOCENT_TOKENS;
use galerne_types::limits::STREAM_EVENTS_MAX;
use galerne_types::{Epoch, TokenId};
use galerne_wire::v1::ask::Ask;
use galerne_wire::v1::engine_client::EngineClient;
use galerne_wire::v1::run_event::Event;
use galerne_wire::{RepeatKey, TokenRun, WireError, show_epoch, show_secret, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::again::Suspect;
use crate::limits::SUPERSEDED_UNREAD_MAX;

/// The stream to the leader of one epoch. It ends when this is dropped and so is the last [`Letters`] of it.
pub(crate) struct Link {
    /// Holds two messages of a request at most, and of those there are no more than the router's limit of requests.
    asks: mpsc::UnboundedSender<Said>,
    /// Room for names of requests that begin elsewhere.
    room: Arc<Semaphore>,
    requests: Arc<Requests>,
    /// Reads it.
    listener: AbortHandle,
}

/// A message to the leader, which may take room until it is read.
type Said = (Ask, Option<OwnedSemaphorePermit>);

struct Requests {
    asks: mpsc::WeakUnboundedSender<Said>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    inboxes: HashMap<u32, Arc<Inbox>>,
    /// The id that was given last.
    last: u32,
    /// The leader has answered.
    heard: bool,
    /// Requests that have had few tokens.
    trials: HashMap<u32, Trial>,
    /// Why there will be no more news.
    end: Option<Status>,
}

/// A request until it is innocent of whatever becomes of its group.
struct Trial {
    suspect: Suspect,
    /// The ranks work on it.
    begun: bool,
    tokens: usize,
}

/// News that are put into the inboxes.
struct Delivery<'a> {
    requests: &'a Requests,
    open: MutexGuard<'a, Open>,
    now: Instant,
    /// Who is to be told.
    readers: Vec<Waker>,
}

/// News of one request that it has not taken yet.
struct Inbox(Mutex<Unread>);

struct Unread {
    events: VecDeque<News>,
    /// Said after the last of them.
    end: Option<Status>,
    /// When the last of them came, or the request was sent.
    heard: Instant,
    /// It is told of one event only when there are so many, or the last.
    told_at: usize,
    reader: Option<Waker>,
}

/// Something that was told of a request, and when it came.
pub(crate) type News = (Instant, Told);

/// What is told of a request.
#[derive(Debug)]
pub(crate) enum Told {
    /// The ranks work on it from now on.
    Begun,
    /// A token of which nothing is told but its index and which it is.
    Bare(u32, TokenId),
    Token(Box<v1::RunToken>),
    Scored(Box<v1::Scored>),
    Failed(Box<v1::Failed>),
    /// A finish reason.
    Finished(i32),
}

impl From<Event> for Told {
    fn from(event: Event) -> Self {
        match event {
            Event::Token(token) => Self::Token(Box::new(token)),
            Event::Scored(scored) => Self::Scored(Box::new(scored)),
            Event::Begun(v1::Begun {}) => Self::Begun,
            Event::Failed(failed) => Self::Failed(Box::new(failed)),
            Event::Finished(reason) => Self::Finished(reason),
        }
    }
}

/// A request's own end of a link. Dropping it cancels the request, unless that has ended.
pub(crate) struct Letters {
    id: u32,
    link: Arc<Link>,
    inbox: Arc<Inbox>,
    taken: VecDeque<News>,
}

/// Ends a request from outside, whether or not anybody looks at its news.
pub(crate) struct Cut {
    id: u32,
    link: Weak<Link>,
    inbox: Weak<Inbox>,
}

impl Cut {
    /// Whether there may be something to end.
    pub(crate) fn holds(&self) -> bool {
        self.inbox.strong_count() > 0
    }

    /// Cancels the request at its leader; there will be no more news of it.
    pub(crate) fn cut(&self) {
        let (Some(link), Some(inbox)) = (self.link.upgrade(), self.inbox.upgrade()) else { return };
        if link.requests.forget(self.id, &inbox) {
            inbox.end(&Status::cancelled("the request was cut"));
        }
    }
}

impl Link {
    /// Begins a stream to the leader of `epoch`.
    pub(crate) fn open(leader: EngineClient<Channel>, epoch: Epoch, secret: String) -> Arc<Self> {
        let (asks, asked) = mpsc::unbounded_channel();
        let requests = Arc::new(Requests { asks: asks.downgrade(), open: Mutex::default() });
        let listening = requests.clone();
        let listener = tokio::spawn(async move {
            let Err(end) = listening.listen(leader, epoch, &secret, asked).await;
            listening.end(&end);
        });
        let room = Arc::new(Semaphore::new(SUPERSEDED_UNREAD_MAX));
        Arc::new(Self { asks, room, requests, listener: listener.abort_handle() })
    }

    /// Ends it: its leader leads no more, whether or not it knows that.
    pub(crate) fn lose(&self) {
        self.listener.abort();
        self.requests.end(&Status::unavailable("the fleet shows that this epoch is over"));
    }

    /// Whether there will be no more news on it.
    pub(crate) fn ended(&self) -> bool {
        self.requests.open().end.is_some()
    }

    /// Whether its leader has ever answered on it.
    pub(crate) fn heard(&self) -> bool {
        self.requests.open().heard
    }

    /// How many requests the ranks work on, or were working on when it ended, that have had few tokens of it, and on which so
    /// many groups were lost before.
    pub(crate) fn suspects(&self, deaths: u32) -> usize {
        let open = self.requests.open();
        let suspects = open.trials.values().filter(|trial| trial.begun);
        suspects.filter(|trial| trial.suspect.suspicion.deaths() >= deaths).count()
    }

    /// Sends a request.
    pub(crate) fn send(self: &Arc<Self>, mut request: v1::RunRequest, suspect: Suspect) -> Letters {
        let inbox = Arc::new(Inbox::new());
        let mut open = self.requests.open();
        while open.inboxes.contains_key(&open.last) {
            open.last = open.last.wrapping_add(1);
        }
        let id = open.last;
        open.last = id.wrapping_add(1);
        match &open.end {
            Some(end) => inbox.end(end),
            None => {
                open.inboxes.insert(id, inbox.clone());
                open.trials.insert(id, Trial { suspect, begun: false, tokens: 0 });
                request.id = id;
                // Under the lock: requests reach the leader in the order of their ids.
                let _ = self.asks.send((Ask::Run(request), None));
            }
        }
        drop(open);
        Letters { id, link: self.clone(), inbox, taken: VecDeque::new() }
    }

    /// Tells the leader that a request of this key begins at another group, unless it has not read many that it was told of.
    pub(crate) fn supersede(&self, key: RepeatKey) {
        if let Ok(room) = self.room.clone().try_acquire_owned() {
            let _ = self.asks.send((Ask::Superseded(key.to_vec()), Some(room)));
        }
    }
}

impl Requests {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listen(
        &self,
        mut leader: EngineClient<Channel>,
        epoch: Epoch,
        secret: &str,
        asked: mpsc::UnboundedReceiver<Said>,
    ) -> Result<Infallible, Status> {
        let asks = UnboundedReceiverStream::new(asked).map(|(ask, _)| v1::Ask { ask: Some(ask) });
        let mut request = Request::new(asks);
        show_secret(&mut request, secret)?;
        show_epoch(&mut request, epoch);
        let mut stream = leader.serve(request).await?.into_inner();
        self.open().heard = true;
        while let Some(news) = stream.message().await? {
            self.deliver(news).map_err(|error| Status::internal(error.to_string()))?;
        }
        Err(Status::unavailable("the leader has closed its stream"))
    }

    /// Puts news into the inboxes, and tells their readers.
    ///
    /// # Errors
    ///
    /// When a part of them cannot be read.
    fn deliver(&self, news: v1::News) -> Result<(), WireError> {
        let v1::News { events, tokens, ends } = news;
        let (now, readers) = (Instant::now(), Vec::new());
        let mut delivery = Delivery { requests: self, open: self.open(), now, readers };
        delivery.events(events);
        for TokenRun { request, index, tokens } in tokens.unwrap_or_default().runs()? {
            delivery.open.gains(request, tokens.len());
            let mut told = (index..).zip(tokens).map(|(index, &id)| Told::Bare(index, id));
            delivery.put(request, &mut told, false);
        }
        delivery.events(ends);
        let Delivery { open, readers, .. } = delivery;
        drop(open);
        readers.into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// Cancels a request that has not ended; false if it has.
    fn forget(&self, id: u32, inbox: &Arc<Inbox>) -> bool {
        let mut open = self.open();
        let open_still = open.inboxes.get(&id).is_some_and(|known| Arc::ptr_eq(known, inbox));
        if open_still {
            open.inboxes.remove(&id);
            open.trials.remove(&id);
            drop(open);
            self.cancel(id);
        }
        open_still
    }

    /// Tells the leader that nobody waits for a request any more.
    fn cancel(&self, id: u32) {
        if let Some(asks) = self.asks.upgrade() {
            let _ = asks.send((Ask::Cancel(id), None));
        }
    }

    fn end(&self, end: &Status) {
        let mut open = self.open();
        if open.end.is_some() {
            return;
        }
        open.end = Some(end.clone());
        open.trials.values_mut().for_each(|trial| trial.suspect.turn = None);
        let inboxes = std::mem::take(&mut open.inboxes);
        drop(open);
        inboxes.into_values().for_each(|inbox| inbox.end(end));
    }
}

impl Open {
    /// A request has had tokens: its trial may be over.
    fn gains(&mut self, id: u32, tokens: usize) {
        let Entry::Occupied(mut trial) = self.trials.entry(id) else { return };
        trial.get_mut().tokens += tokens;
        if trial.get().tokens >= INNOCENT_TOKENS {
            trial.remove();
        }
    }
}

impl Delivery<'_> {
    fn events(&mut self, events: Vec<v1::RunEvent>) {
        for v1::RunEvent { id, event } in events {
            let Some(event) = event else { continue };
            let last = matches!(event, Event::Finished(_) | Event::Failed(_));
            match (&event, self.open.trials.get_mut(&id)) {
                (Event::Begun(_), Some(trial)) => trial.begun = true,
                (Event::Token(_), Some(_)) => self.open.gains(id, 1),
                _ => {}
            }
            self.put(id, &mut std::iter::once(event.into()), last);
        }
    }

    fn put(&mut self, id: u32, told: &mut dyn Iterator<Item = Told>, last: bool) {
        let Some(inbox) = self.open.inboxes.get(&id) else { return };
        let (reader, full) = inbox.put(self.now, told, last);
        self.readers.extend(reader);
        if last || full {
            self.open.inboxes.remove(&id);
            self.open.trials.remove(&id);
        }
        if full {
            self.requests.cancel(id);
        }
    }
}

impl Inbox {
    fn new() -> Self {
        let unread =
            Unread { events: VecDeque::new(), end: None, heard: Instant::now(), told_at: 1, reader: None };
        Self(Mutex::new(unread))
    }

    fn unread(&self) -> MutexGuard<'_, Unread> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes events in that came just now; who is to be told of them, and whether there was no room.
    fn put(&self, now: Instant, told: &mut dyn Iterator<Item = Told>, last: bool) -> (Option<Waker>, bool) {
        let mut unread = self.unread();
        let room = STREAM_EVENTS_MAX - unread.events.len();
        unread.events.extend(told.take(room).map(|told| (now, told)));
        unread.heard = now;
        let full = told.next().is_some();
        if full {
            unread.end = Some(Status::aborted("its client reads too slowly"));
        }
        let tell = last || full || unread.events.len() >= unread.told_at;
        (if tell { unread.reader.take() } else { None }, full)
    }

    fn end(&self, end: &Status) {
        let mut unread = self.unread();
        unread.end = Some(end.clone());
        let reader = unread.reader.take();
        drop(unread);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl Letters {
    /// The next event; an error is the last word.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<News, Status>> {
        if let Some(news) = self.taken.pop_front() {
            return Poll::Ready(Ok(news));
        }
        let mut unread = self.inbox.unread();
        std::mem::swap(&mut self.taken, &mut unread.events);
        if let Some(news) = self.taken.pop_front() {
            return Poll::Ready(Ok(news));
        }
        if let Some(end) = &unread.end {
            return Poll::Ready(Err(end.clone()));
        }
        match &mut unread.reader {
            Some(reader) => reader.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// What ends the request from outside.
    pub(crate) fn scissors(&self) -> Cut {
        Cut { id: self.id, link: Arc::downgrade(&self.link), inbox: Arc::downgrade(&self.inbox) }
    }

    /// When there was news last, taken or not.
    pub(crate) fn heard(&self) -> Instant {
        self.inbox.unread().heard
    }

    /// From now on its reader is woken when so many events wait, or the last.
    pub(crate) fn tell_at(&self, events: usize) {
        self.inbox.unread().told_at = events;
    }
}

impl Drop for Letters {
    fn drop(&mut self) {
        self.link.requests.forget(self.id, &self.inbox);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tonic::Code;

    use super::*;
    use crate::limits::HELD_EVENTS_MAX;

    /// A link whose other end is the test.
    fn link() -> (Arc<Link>, mpsc::UnboundedReceiver<Said>) {
        let (asks, asked) = mpsc::unbounded_channel();
        let requests = Arc::new(Requests { asks: asks.downgrade(), open: Mutex::default() });
        let listener = tokio::spawn(std::future::pending::<()>()).abort_handle();
        let room = Arc::new(Semaphore::new(2));
        (Arc::new(Link { asks, room, requests, listener }), asked)
    }

    fn ended(id: u32) -> v1::News {
        let event = Some(Event::Finished(v1::FinishReason::Stop.into()));
        v1::News { ends: vec![v1::RunEvent { id, event }], ..Default::default() }
    }

    /// Bare tokens of one request.
    fn tokens(id: u32, indices: std::ops::Range<u32>) -> v1::News {
        let mut tokens = v1::Tokens::default();
        indices.for_each(|index| tokens.push(id, index, index));
        v1::News { tokens: Some(tokens), ..Default::default() }
    }

    fn send(link: &Arc<Link>) -> Letters {
        link.send(v1::RunRequest::default(), Suspect::default())
    }

    fn next(letters: &mut Letters) -> Option<Result<Told, Status>> {
        let news = std::future::poll_fn(|context| letters.poll(context)).now_or_never()?;
        Some(news.map(|(_, event)| event))
    }

    fn asked(asks: &mut mpsc::UnboundedReceiver<Said>) -> Vec<Ask> {
        std::iter::from_fn(|| Some(asks.try_recv().ok()?.0)).collect()
    }

    #[tokio::test]
    async fn a_leader_that_does_not_read_is_told_of_so_many_names() {
        let (link, mut asks) = link();
        (0..3).for_each(|key| link.supersede([key; 32]));
        let keys = [0, 1].map(|key| Ask::Superseded(vec![key; 32]));
        assert_eq!(asked(&mut asks), keys);
        link.supersede([3; 32]);
        assert_eq!(asked(&mut asks).len(), 1, "it has read the others");
    }

    #[tokio::test]
    async fn each_request_gets_its_own_news() {
        let (link, mut asks) = link();
        let mut letters = [0, 1].map(|_| send(&link));
        assert!(matches!(&asked(&mut asks)[..], [Ask::Run(a), Ask::Run(b)] if (a.id, b.id) == (0, 1)));
        let mut news = tokens(1, 0..1);
        let told = news.tokens.as_mut().unwrap();
        told.push(7, 0, 70);
        told.push(0, 5, 50);
        news.ends = ended(0).ends;
        let first = Event::Token(v1::RunToken { index: 4, ..Default::default() });
        news.events.push(v1::RunEvent { id: 0, event: Some(first) });
        link.requests.deliver(news).unwrap();
        assert!(matches!(next(&mut letters[0]), Some(Ok(Told::Token(token))) if token.index == 4));
        assert!(matches!(next(&mut letters[0]), Some(Ok(Told::Bare(5, 50)))));
        assert!(matches!(next(&mut letters[0]), Some(Ok(Told::Finished(_)))));
        assert!(matches!(next(&mut letters[1]), Some(Ok(Told::Bare(0, 0)))));
        assert!(next(&mut letters[1]).is_none());
        drop(letters);
        assert!(matches!(asked(&mut asks)[..], [Ask::Cancel(1)]), "the other one has ended");
    }

    #[tokio::test]
    async fn who_does_not_read_is_cut_and_cancelled_and_nobody_else_notices() {
        let (link, mut asks) = link();
        let (mut slow, mut other) = (send(&link), send(&link));
        asked(&mut asks);
        let mut news = tokens(0, 0..STREAM_EVENTS_MAX as u32 + 1);
        news.tokens.as_mut().unwrap().push(1, 0, 0);
        link.requests.deliver(news).unwrap();
        assert!(matches!(asked(&mut asks)[..], [Ask::Cancel(0)]));
        for _ in 0..STREAM_EVENTS_MAX {
            next(&mut slow).unwrap().unwrap();
        }
        assert_eq!(next(&mut slow).unwrap().unwrap_err().code(), Code::Aborted);
        assert!(next(&mut other).unwrap().is_ok());
        drop(slow);
        assert!(asked(&mut asks).is_empty(), "it is cancelled once");
    }

    #[tokio::test]
    async fn the_end_of_a_link_is_told_behind_what_came_and_to_all_that_follow() {
        let (link, _asks) = link();
        let mut letters = send(&link);
        link.requests.deliver(tokens(0, 0..1)).unwrap();
        link.requests.end(&Status::unavailable("gone"));
        assert!(link.ended());
        assert!(next(&mut letters).unwrap().is_ok());
        assert_eq!(next(&mut letters).unwrap().unwrap_err().code(), Code::Unavailable);
        let mut late = send(&link);
        assert_eq!(next(&mut late).unwrap().unwrap_err().code(), Code::Unavailable);
    }

    /// A client that does not read must not make the others wait for their turns.
    #[tokio::test]
    async fn a_suspect_gives_its_turn_back_when_it_is_innocent_or_over_whoever_reads() {
        let turns = Arc::new(tokio::sync::Semaphore::new(1));
        let suspect = || Suspect { turn: turns.clone().try_acquire_owned().ok(), ..Suspect::default() };
        let begun = |id| v1::News {
            events: vec![v1::RunEvent { id, event: Some(Event::Begun(v1::Begun {})) }],
            ..Default::default()
        };
        let (link, _asks) = link();
        let mut unread = Vec::new();
        let few = INNOCENT_TOKENS as u32 - 1;
        for (id, over) in [(0, tokens(0, few..few + 1)), (1, ended(1))] {
            unread.push(link.send(v1::RunRequest::default(), suspect()));
            link.requests.deliver(begun(id)).unwrap();
            link.requests.deliver(tokens(id, 0..few)).unwrap();
            assert_eq!((turns.available_permits(), link.suspects(0), link.suspects(1)), (0, 1, 0));
            link.requests.deliver(over).unwrap();
            assert_eq!((turns.available_permits(), link.suspects(0)), (1, 0));
        }
        unread.push(link.send(v1::RunRequest::default(), suspect()));
        link.requests.deliver(begun(2)).unwrap();
        link.requests.end(&Status::unavailable("gone"));
        assert_eq!((turns.available_permits(), link.suspects(0)), (1, 1), "it died of one of them");
    }

    #[tokio::test]
    async fn who_wants_the_whole_is_told_of_the_last_or_of_many() {
        let (link, _asks) = link();
        let mut letters = send(&link);
        letters.tell_at(HELD_EVENTS_MAX);
        let counter = Arc::new(Counter::default());
        let waker = Waker::from(counter.clone());
        let mut context = Context::from_waker(&waker);
        let count = || counter.0.load(std::sync::atomic::Ordering::Relaxed);
        assert!(letters.poll(&mut context).is_pending());
        link.requests.deliver(tokens(0, 0..1)).unwrap();
        assert_eq!(count(), 0);
        link.requests.deliver(tokens(0, 1..HELD_EVENTS_MAX as u32)).unwrap();
        assert_eq!(count(), 1);
        while letters.poll(&mut context).is_ready() {}
        link.requests.deliver(ended(0)).unwrap();
        assert_eq!(count(), 2);
    }

    #[derive(Default)]
    struct Counter(std::sync::atomic::AtomicUsize);

    impl std::task::Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

//! One exchange between all ranks: each shows the others a payload of bounded length. Every call of the
//! collective is a sequence of exchanges.
//!
//! A rank writes its payload into its own segment once; ranks of its host read it there, to the others it goes
//! by TCP. It waits, in this order, for its own slot to be free, for the sockets, for the peers of its host. No
//! deadlock can arise: by induction over k, every rank comes to exchange k, and there each wait is for something
//! that a peer does before it waits itself.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::abort::Bell;
use crate::message::{HEADER_BYTES, Header, Operation, describe};
use crate::segment::Segment;
use crate::spin::Spin;
use crate::stream::Stream;
use crate::wait::timespec;
use crate::{AbortHandle, CollectiveError, bytes};

/// How long to wait, when a data connection has ended, for the control connection to tell why.
const VERDICT_WAIT: Duration = Duration::from_millis(100);

/// The way to one rank.
#[derive(Debug)]
pub(crate) enum Link {
    /// This rank.
    Own,
    /// A rank of this host: its segment.
    Memory(Segment),
    /// A rank of another host.
    Stream(Stream),
}

/// The bytes of payloads that one exchange moves, by rank; `None`: that rank neither gets nor gives anything.
/// What a rank sends to a peer is what the peer expects of it.
pub(crate) struct Route<S, R>
where
    S: Fn(usize) -> Option<Range<usize>>,
    R: Fn(usize) -> Option<Range<usize>>,
{
    /// The part of this rank's payload for a rank.
    pub(crate) send: S,
    /// The part of a rank's payload for this one.
    pub(crate) receive: R,
}

/// Who and what an exchange is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) root: usize,
    pub(crate) message_bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Mesh {
    rank: usize,
    links: Vec<Link>,
    bell: Arc<Bell>,
    abort: AbortHandle,
    timeout: Duration,
    spin: Spin,
    /// The exchange in progress.
    sequence: u64,
    /// Between `begin` and `exchange`: nobody reads this rank's slot.
    writing: bool,
    /// Between `exchange` and `finish`: one bit for each rank whose payload may be read.
    shown: u64,
}

impl Mesh {
    pub(crate) fn new(
        rank: usize,
        links: Vec<Link>,
        bell: Arc<Bell>,
        abort: AbortHandle,
        timeout: Duration,
        spin: Spin,
    ) -> Self {
        Self { rank, links, bell, abort, timeout, spin, sequence: 0, writing: false, shown: 0 }
    }

    fn own(&self) -> &Segment {
        &self.bell.segment
    }

    /// Begins the next exchange: waits until the peers have read what stood in its slot.
    pub(crate) fn begin(&mut self, call: Call) -> Result<(), CollectiveError> {
        self.abort.check()?;
        self.sequence += 1;
        let overwritten = self.sequence.saturating_sub(2);
        for peer in 0..self.links.len() {
            self.wait_for(peer, call.operation, |theirs| {
                theirs.finished().load(Ordering::Acquire) >= overwritten
            })?;
        }
        self.writing = true;
        Ok(())
    }

    /// Writes numbers into this rank's payload, `start` numbers after its beginning. After `begin`.
    pub(crate) fn write(&mut self, start: usize, values: &[f32]) {
        self.write_bytes(start * size_of::<f32>(), bytes::of(values));
    }

    /// Writes bytes into this rank's payload. After `begin`.
    pub(crate) fn write_bytes(&mut self, start: usize, values: &[u8]) {
        assert!(self.writing, "payloads are written between begin and exchange");
        // SAFETY: the segment is this rank's own. `begin` has waited for the readers of this slot, none comes before
        // `exchange` posts it, and `&mut self` keeps away the slices that `payload` gave out.
        unsafe { self.own().write(self.sequence, start, values) };
    }

    /// Moves the payloads. Afterwards `payload` shows what `route.receive` asked for, until `finish`.
    pub(crate) fn exchange<S, R>(&mut self, call: Call, route: &Route<S, R>) -> Result<(), CollectiveError>
    where
        S: Fn(usize) -> Option<Range<usize>>,
        R: Fn(usize) -> Option<Range<usize>>,
    {
        let header = Header {
            sequence: self.sequence,
            message_bytes: call.message_bytes as u64,
            operation: call.operation,
            root: call.root as u16,
        };
        let header = header.encode();
        assert!(self.writing, "every exchange begins with begin");
        // SAFETY: as in `write_bytes`.
        unsafe { self.own().write_header(self.sequence, &header) };
        self.writing = false;
        self.own().posted().store(self.sequence, Ordering::Release);
        self.wake_peers();
        self.exchange_streams(call.operation, &header, route)?;
        for peer in 0..self.links.len() {
            if (route.receive)(peer).is_some() {
                self.await_post(peer, call.operation, &header)?;
                self.shown |= 1 << peer;
            }
        }
        Ok(())
    }

    /// Ends the exchange: what the peers showed may be overwritten.
    pub(crate) fn finish(&mut self) {
        self.shown = 0;
        self.own().finished().store(self.sequence, Ordering::Release);
        self.wake_peers();
    }

    /// The payload of a rank, this one's own included, valid where `route.receive` asked for it. Between `exchange`
    /// and `finish`.
    pub(crate) fn payload(&self, rank: usize) -> &[u8] {
        assert!(self.shown & 1 << rank != 0, "rank {rank} was not asked for its payload");
        match &self.links[rank] {
            // SAFETY: own, and posted by `exchange`; written again only through `&mut self`.
            Link::Own => unsafe { self.own().payload(self.sequence) },
            // SAFETY: `exchange` has seen the post, and `finish` takes `&mut self`.
            Link::Memory(theirs) => unsafe { theirs.payload(self.sequence) },
            Link::Stream(stream) => stream.payload(),
        }
    }

    fn wake_peers(&self) {
        for link in &self.links {
            if let Link::Memory(theirs) = link {
                theirs.wake_if_awaited(self.rank);
            }
        }
    }

    /// Waits for the message of a rank of this host.
    fn await_post(
        &mut self,
        peer: usize,
        operation: Operation,
        expected: &[u8; HEADER_BYTES],
    ) -> Result<(), CollectiveError> {
        let sequence = self.sequence;
        self.wait_for(peer, operation, |theirs| theirs.posted().load(Ordering::Acquire) >= sequence)?;
        let Link::Memory(theirs) = &self.links[peer] else { return Ok(()) };
        // SAFETY: posted, as just seen, and not finished here.
        let received = unsafe { theirs.header(sequence) };
        expect_header(peer, expected, &received)
    }

    /// Waits until `ready` of the segment of `peer`; not at all if the peer is of another host.
    fn wait_for(
        &mut self,
        peer: usize,
        operation: Operation,
        ready: impl Fn(&Segment) -> bool,
    ) -> Result<(), CollectiveError> {
        let Link::Memory(theirs) = &self.links[peer] else { return Ok(()) };
        if self.spin.until(|| ready(theirs)) {
            return Ok(());
        }
        let deadline = Instant::now() + self.timeout;
        loop {
            // In this order: what a peer published before it closed stands.
            let over = self.abort.cause_for(peer);
            if ready(theirs) {
                return Ok(());
            }
            if let Some(cause) = over {
                return Err(cause);
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(CollectiveError::Timeout { rank: peer, operation, waited: self.timeout });
            }
            self.own().sleep(peer, rest, || ready(theirs) || self.abort.is_over(peer));
        }
    }

    /// Moves what goes by TCP, in both directions and with all peers at a time.
    fn exchange_streams<S, R>(
        &mut self,
        operation: Operation,
        header: &[u8; HEADER_BYTES],
        route: &Route<S, R>,
    ) -> Result<(), CollectiveError>
    where
        S: Fn(usize) -> Option<Range<usize>>,
        R: Fn(usize) -> Option<Range<usize>>,
    {
        for (rank, link) in self.links.iter_mut().enumerate() {
            if let Link::Stream(stream) = link {
                stream.begin((route.send)(rank), (route.receive)(rank));
            }
        }
        let mut deadline = None;
        loop {
            let mut moved = false;
            for rank in 0..self.links.len() {
                moved |= self.advance(rank, header)?;
            }
            let Some(waiting_for) = self.first_pending() else { return Ok(()) };
            if moved {
                deadline = None;
                continue;
            }
            let now = Instant::now();
            let rest = deadline.get_or_insert(now + self.timeout).saturating_duration_since(now);
            if rest.is_zero() {
                return Err(CollectiveError::Timeout { rank: waiting_for, operation, waited: self.timeout });
            }
            self.poll_streams(rest)?;
        }
    }

    /// Whether anything moved to or from `rank`.
    fn advance(&mut self, rank: usize, header: &[u8; HEADER_BYTES]) -> Result<bool, CollectiveError> {
        let Link::Stream(stream) = &mut self.links[rank] else { return Ok(false) };
        // SAFETY: own, and posted; written again only after this exchange.
        let payload = unsafe { self.bell.segment.payload(self.sequence) };
        let moved = stream.advance(header, payload);
        if let Some(received) = stream.header() {
            expect_header(rank, header, received)?;
        }
        moved.map_err(|_| self.verdict(rank))
    }

    fn first_pending(&self) -> Option<usize> {
        self.links.iter().position(|link| match link {
            Link::Stream(stream) => stream.pending() != (false, false),
            Link::Own | Link::Memory(_) => false,
        })
    }

    /// Waits until a socket is ready or the epoch is over.
    fn poll_streams(&self, timeout: Duration) -> Result<(), CollectiveError> {
        let mut polled = vec![PollFd::new(&self.bell.over, PollFlags::IN)];
        for link in &self.links {
            if let Link::Stream(stream) = link {
                let mut events = PollFlags::empty();
                let (sending, receiving) = stream.pending();
                events.set(PollFlags::OUT, sending);
                events.set(PollFlags::IN, receiving);
                if !events.is_empty() {
                    polled.push(PollFd::new(&stream.socket, events));
                }
            }
        }
        match poll(&mut polled, Some(&timespec(timeout))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => self.abort.check(),
            Err(error) => Err(CollectiveError::system("wait for sockets")(error)),
        }
    }

    /// Why the data connection to `rank` ended, which only the monitor can tell.
    fn verdict(&self, rank: usize) -> CollectiveError {
        let deadline = Instant::now() + VERDICT_WAIT;
        loop {
            if let Some(cause) = self.abort.cause_for(rank) {
                return cause;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return CollectiveError::Lost { rank };
            }
            self.own().sleep(rank, rest, || self.abort.is_over(rank));
        }
    }
}

fn expect_header(
    rank: usize,
    expected: &[u8; HEADER_BYTES],
    received: &[u8; HEADER_BYTES],
) -> Result<(), CollectiveError> {
    if expected == received {
        return Ok(());
    }
    Err(CollectiveError::OutOfStep { rank, expected: describe(expected), received: describe(received) })
}

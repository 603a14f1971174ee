//! The network between simulated processes: connections as TCP gives them, over links that may be slow, or cut in one
//! direction or both. What is sent over a cut link arrives when it is whole again, as by retransmission; an end that
//! dies closes its connections, which the other end hears of if the link lets it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use galerne_tls::Dial;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::machine::Dice;

/// Bytes that wait at a receiver before its sender is held up.
const WINDOW_BYTES: usize = 64 << 10;

/// Bytes on their way in one direction.
const FLIGHT_BYTES_MAX: usize = 256 << 10;

/// The longest that a message takes on a link with nothing wrong, in milliseconds.
const DELAY_MS: u64 = 4;

/// A machine, by its number; `10.0.HOST.x` is one of its addresses.
pub(super) type Host = u8;

/// Connections as a server takes them.
pub(super) type Incoming = UnboundedReceiverStream<io::Result<DuplexStream>>;

/// All links and what is on them.
#[derive(Clone)]
pub(super) struct Net(Arc<Mutex<Inner>>);

struct Inner {
    now: u64,
    dice: Dice,
    lines: Vec<Option<Line>>,
    /// Lines with something under way.
    busy: BTreeSet<usize>,
    /// Lines at whose ends something has happened.
    woken: Arc<Mutex<Vec<usize>>>,
    calls: VecDeque<Call>,
    ears: BTreeMap<String, Ear>,
    cuts: BTreeSet<(Host, Host)>,
    dark: BTreeSet<Host>,
    slow: BTreeMap<(Host, Host), u64>,
}

/// A connection.
struct Line {
    ends: [End; 2],
}

struct End {
    host: Host,
    /// The network's side; none once the process has reset it.
    stream: Option<DuplexStream>,
    /// What it has sent and the other end has not got.
    sent: VecDeque<(u64, Part)>,
    sent_bytes: usize,
    /// When the last of it is due: nothing overtakes.
    last_due: u64,
    has_closed: bool,
    waker: Waker,
}

enum Part {
    Bytes(Vec<u8>),
    End,
}

/// Who waits for connections.
struct Ear {
    process: u32,
    connections: mpsc::UnboundedSender<io::Result<DuplexStream>>,
}

/// A connection in the making: on its way there, or back.
struct Call {
    due: u64,
    from: Host,
    to: Host,
    stage: Stage,
    reply: oneshot::Sender<io::Result<DuplexStream>>,
}

enum Stage {
    There(String),
    Back(io::Result<DuplexStream>),
}

struct Tell {
    line: usize,
    woken: Arc<Mutex<Vec<usize>>>,
}

impl Wake for Tell {
    fn wake(self: Arc<Self>) {
        lock(&self.woken).push(self.line);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine that an address is one of.
pub(super) fn host_of(address: &str) -> Host {
    address.split('.').nth(2).and_then(|part| part.parse().ok()).expect("an address of the simulation")
}

impl Net {
    pub(super) fn new(dice: Dice) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            now: 0,
            dice,
            lines: Vec::new(),
            busy: BTreeSet::new(),
            woken: Arc::default(),
            calls: VecDeque::new(),
            ears: BTreeMap::new(),
            cuts: BTreeSet::new(),
            dark: BTreeSet::new(),
            slow: BTreeMap::new(),
        })))
    }

    /// How processes of a machine call others.
    pub(super) fn dial(&self, from: Host) -> Dial {
        let net = self.clone();
        Arc::new(move |uri| {
            let address = uri.authority().map(ToString::to_string).unwrap_or_default();
            let (reply, answer) = oneshot::channel();
            net.inner().call(from, address, reply);
            Box::pin(
                async move { answer.await.unwrap_or_else(|_| Err(io::ErrorKind::ConnectionReset.into())) },
            )
        })
    }

    /// Connections to an address.
    pub(super) fn listen(&self, process: u32, address: &str) -> Incoming {
        let (connections, taken) = mpsc::unbounded_channel();
        self.inner().ears.insert(address.to_owned(), Ear { process, connections });
        UnboundedReceiverStream::new(taken)
    }

    /// The process has ended: nobody listens at its addresses.
    pub(super) fn forget(&self, process: u32) {
        self.inner().ears.retain(|_, ear| ear.process != process);
    }

    /// Whether nothing that one machine sends reaches another.
    pub(super) fn is_cut(&self, from: Host, to: Host) -> bool {
        self.inner().is_cut(from, to)
    }

    pub(super) fn cut(&self, from: Host, to: Host) {
        self.inner().cuts.insert((from, to));
    }

    pub(super) fn mend(&self, from: Host, to: Host) {
        self.inner().cuts.remove(&(from, to));
    }

    /// The machine is off, or back.
    pub(super) fn darken(&self, host: Host, off: bool) {
        let mut inner = self.inner();
        if off {
            inner.dark.insert(host)
        } else {
            inner.dark.remove(&host)
        };
    }

    /// Whatever goes from one machine to the other takes up to so much longer; 0 ends it.
    pub(super) fn slow(&self, from: Host, to: Host, delay_ms: u64) {
        self.inner().slow.insert((from, to), delay_ms);
    }

    /// Resets the connections to an address one in so many of which is hit.
    pub(super) fn reset(&self, host: Host, one_in: u64) {
        let mut inner = self.inner();
        for index in 0..inner.lines.len() {
            if inner.lines[index].as_ref().is_some_and(|line| line.ends[1].host == host)
                && inner.dice.one_in(one_in)
            {
                inner.lines[index] = None;
            }
        }
    }

    pub(super) fn mend_all(&self) {
        let mut inner = self.inner();
        inner.cuts.clear();
        inner.dark.clear();
        inner.slow.clear();
    }

    /// Carries on until `now`.
    pub(super) fn carry(&self, now: u64) {
        let mut inner = self.inner();
        inner.now = now;
        inner.connect();
        let woken = std::mem::take(&mut *lock(&inner.woken));
        inner.busy.extend(woken);
        for index in std::mem::take(&mut inner.busy) {
            inner.carry_line(index);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

impl Inner {
    fn is_cut(&self, from: Host, to: Host) -> bool {
        let off = self.dark.contains(&from) || self.dark.contains(&to);
        off || from != to && self.cuts.contains(&(from, to))
    }

    fn due(&mut self, from: Host, to: Host) -> u64 {
        let more = self.slow.get(&(from, to)).copied().unwrap_or_default();
        self.now + 1 + self.dice.roll(DELAY_MS + more)
    }

    fn call(&mut self, from: Host, address: String, reply: oneshot::Sender<io::Result<DuplexStream>>) {
        let to = host_of(&address);
        let due = self.due(from, to);
        self.calls.push_back(Call { due, from, to, stage: Stage::There(address), reply });
    }

    /// Makes the connections that are due.
    fn connect(&mut self) {
        for _ in 0..self.calls.len() {
            let Some(call) = self.calls.pop_front() else { break };
            if call.due > self.now || self.is_cut(call.from, call.to) {
                if !call.reply.is_closed() {
                    self.calls.push_back(call);
                }
                continue;
            }
            let Call { from, to, stage, reply, .. } = call;
            match stage {
                Stage::Back(made) => drop(reply.send(made)),
                Stage::There(address) => {
                    let made = self.make(from, to, &address);
                    let due = self.due(to, from);
                    self.calls.push_back(Call { due, from: to, to: from, stage: Stage::Back(made), reply });
                }
            }
        }
    }

    /// The caller's end of a new connection.
    fn make(&mut self, from: Host, to: Host, address: &str) -> io::Result<DuplexStream> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let ear = self.ears.get(address).ok_or_else(refused)?;
        let ((theirs, near), (called, far)) = (duplex(WINDOW_BYTES), duplex(WINDOW_BYTES));
        ear.connections.send(Ok(called)).map_err(|_| refused())?;
        let line = self.lines.len();
        let woken = self.woken.clone();
        let waker = Waker::from(Arc::new(Tell { line, woken }));
        let end = |host, stream| End {
            host,
            stream: Some(stream),
            sent: VecDeque::new(),
            sent_bytes: 0,
            last_due: 0,
            has_closed: false,
            waker: waker.clone(),
        };
        self.lines.push(Some(Line { ends: [end(from, near), end(to, far)] }));
        self.busy.insert(line);
        Ok(theirs)
    }

    fn carry_line(&mut self, index: usize) {
        let Some(mut line) = self.lines[index].take() else { return };
        for side in 0..2 {
            let (from, to) = (line.ends[side].host, line.ends[1 - side].host);
            let due = self.due(from, to);
            line.ends[side].collect(due);
            if !self.is_cut(from, to) {
                line.deliver(side, self.now);
            }
        }
        let over = |end: &End| end.stream.is_none() || (end.has_closed && end.sent.is_empty());
        if line.ends.iter().all(over) {
            return;
        }
        if line.ends.iter().any(|end| !end.sent.is_empty()) {
            self.busy.insert(index);
        }
        self.lines[index] = Some(line);
    }
}

impl Line {
    /// Gives the other end what is due.
    fn deliver(&mut self, side: usize, now: u64) {
        loop {
            let [one, other] = &mut self.ends;
            let (sender, receiver) = if side == 0 { (one, other) } else { (other, one) };
            let Some((due, part)) = sender.sent.front_mut() else { return };
            if *due > now {
                return;
            }
            let Some(stream) = &mut receiver.stream else {
                sender.sent.clear();
                sender.stream = None; // nobody is there: a reset
                return;
            };
            let mut context = Context::from_waker(&receiver.waker);
            match part {
                Part::End => drop(Pin::new(stream).poll_shutdown(&mut context)),
                Part::Bytes(bytes) => match Pin::new(stream).poll_write(&mut context, bytes) {
                    Poll::Pending => return,
                    Poll::Ready(Ok(count)) if count < bytes.len() => {
                        sender.sent_bytes -= count;
                        bytes.drain(..count);
                        continue;
                    }
                    Poll::Ready(Ok(count)) => sender.sent_bytes -= count,
                    Poll::Ready(Err(_)) => {
                        receiver.stream = None;
                        continue;
                    }
                },
            }
            sender.sent.pop_front();
        }
    }
}

impl End {
    /// Takes what the process has written.
    fn collect(&mut self, due: u64) {
        let Some(stream) = &mut self.stream else { return };
        let mut context = Context::from_waker(&self.waker);
        let mut room = [0; 4096];
        while !self.has_closed && self.sent_bytes < FLIGHT_BYTES_MAX {
            let mut buffer = ReadBuf::new(&mut room);
            let read = Pin::new(&mut *stream).poll_read(&mut context, &mut buffer);
            if read.is_pending() {
                return;
            }
            self.last_due = self.last_due.max(due);
            let bytes = buffer.filled().to_vec();
            self.sent_bytes += bytes.len();
            self.has_closed = bytes.is_empty();
            self.sent
                .push_back((self.last_due, if bytes.is_empty() { Part::End } else { Part::Bytes(bytes) }));
        }
    }
}

//! A connection's bytes, with an eye on the time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Protocol, ServerLimits, refusal};

/// Time for a client to read the last answer of a connection that is closed before it has sent everything.
const LINGER_MS_MAX: Duration = Duration::from_millis(500);

/// Bytes that are read and thrown away meanwhile.
const LINGER_BYTES_MAX: usize = 1 << 20;

/// What a connection's bytes and its requests tell each other.
pub(super) struct Pulse {
    began: Instant,
    /// Requests that have come.
    begun: AtomicU64,
    /// Requests whose answers have been handed over to the connection, or given up.
    ended: AtomicU64,
    /// When the last one ended, in microseconds since the connection began.
    ended_us: AtomicU64,
    /// Rings when the connection has been without a request for too long.
    pub(super) idle: Notify,
}

/// One request under way.
pub(super) struct Turn(Arc<Pulse>);

impl Pulse {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            ended_us: AtomicU64::new(0),
            idle: Notify::new(),
        })
    }

    pub(super) fn begin(self: &Arc<Self>) -> Turn {
        self.begun.fetch_add(1, Relaxed);
        Turn(self.clone())
    }

    fn running(&self) -> bool {
        self.ended.load(Relaxed) < self.begun.load(Relaxed)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.ended_us.store(self.0.began.elapsed().as_micros() as u64, Relaxed);
        self.0.ended.fetch_add(1, Relaxed);
    }
}

/// A stream that ends by itself when its peer sends nothing while a request is due, or reads nothing of an answer.
pub(super) struct Watched<IO> {
    io: IO,
    protocol: Protocol,
    limits: ServerLimits,
    pulse: Arc<Pulse>,
    /// Requests seen so far.
    begun: u64,
    /// When the first bytes of the next request came.
    speaks: Option<Instant>,
    /// The idle time has passed once: HTTP/2 says goodbye first.
    warned: bool,
    patience: Pin<Box<Sleep>>,
    /// Runs while the peer takes nothing.
    stall: Option<Pin<Box<Sleep>>>,
    /// What is sent instead of what hyper wrote, and how much of it has been.
    instead: Option<(Vec<u8>, usize)>,
    /// Bytes read after the last answer.
    lingered: usize,
    peer_ended: bool,
}

impl<IO> Watched<IO> {
    pub(super) fn new(io: IO, protocol: Protocol, limits: &ServerLimits, pulse: Arc<Pulse>) -> Self {
        Self {
            io,
            protocol,
            limits: limits.clone(),
            pulse,
            begun: 0,
            speaks: None,
            warned: false,
            patience: Box::pin(sleep_until(Instant::now() + limits.header_s_max)),
            stall: None,
            instead: None,
            lingered: 0,
            peer_ended: false,
        }
    }

    /// Whether a request runs. What came before it is forgotten.
    fn running(&mut self) -> bool {
        let (begun, running) = (self.pulse.begun.load(Relaxed), self.pulse.running());
        if running || begun != self.begun {
            self.begun = begun;
            self.speaks = None;
            self.warned = false;
        }
        running
    }

    /// When the connection has waited long enough for the next request to be there.
    fn due(&self) -> Instant {
        let ServerLimits { header_s_max, idle_s_max, .. } = self.limits;
        match self.speaks {
            Some(since) if self.protocol == Protocol::Http1 && self.begun > 0 => since + header_s_max,
            None if self.begun == 0 => self.pulse.began + header_s_max,
            Some(_) if self.protocol == Protocol::Http1 => self.pulse.began + header_s_max,
            _ => {
                let idle = if self.warned { idle_s_max * 2 } else { idle_s_max };
                self.pulse.began + Duration::from_micros(self.pulse.ended_us.load(Relaxed)) + idle
            }
        }
    }

    /// Ready when the next request is overdue.
    fn poll_overdue(&mut self, cx: &mut Context<'_>, running: bool) -> Poll<()> {
        let due = if running { Instant::now() + self.limits.idle_s_max } else { self.due() };
        // Nobody asks again when a request ends: while one runs, the alarm is only kept from being too late.
        let late = self.patience.deadline() > due || self.patience.is_elapsed();
        if (running && late) || (!running && self.patience.deadline() != due) {
            self.patience.as_mut().reset(due);
        }
        self.patience.as_mut().poll(cx)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let (running, before) = (this.running(), buf.filled().len());
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Ready(read) => {
                this.peer_ended = buf.filled().len() == before;
                if !running && this.speaks.is_none() {
                    this.speaks = Some(Instant::now());
                }
                return Poll::Ready(read);
            }
            Poll::Pending => {}
        }
        while this.poll_overdue(cx, running).is_ready() {
            match this.protocol {
                _ if running => continue,
                Protocol::Http2 if this.begun > 0 && !this.warned => {
                    this.warned = true;
                    this.pulse.idle.notify_one();
                    continue;
                }
                Protocol::Http1 if this.speaks.is_some() => {
                    let answer = refusal::head_too_slow(&this.limits);
                    // Nothing else waits to be written, so that it fits, or the peer does not read.
                    let _ = Pin::new(&mut this.io).poll_write(cx, &answer);
                }
                _ => {}
            }
            return Poll::Ready(Ok(())); // the end, as if the peer had left
        }
        Poll::Pending
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Watched<IO> {
    /// Passes a write on, and fails it when the peer takes nothing for too long.
    fn poll_progress<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut IO>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(written) = write(Pin::new(&mut self.io), cx) {
            self.stall = None;
            return Poll::Ready(written);
        }
        let time = self.limits.write_stall_s_max;
        let stall = self.stall.get_or_insert_with(|| Box::pin(tokio::time::sleep(time)));
        ready!(stall.as_mut().poll(cx));
        let message = format!("the peer took nothing for {} s", time.as_secs_f64());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }

    /// Sends other words than hyper's, which are taken as sent with the last of them.
    fn poll_instead(&mut self, cx: &mut Context<'_>, bare_bytes: usize) -> Poll<io::Result<usize>> {
        while let Some((words, sent)) = self.instead.take().filter(|(words, sent)| *sent < words.len()) {
            let written = self.poll_progress(cx, |io, cx| io.poll_write(cx, &words[sent..]));
            let more = match &written {
                Poll::Ready(Ok(bytes)) => *bytes,
                _ => 0,
            };
            self.instead = Some((words, sent + more));
            if ready!(written)? == 0 {
                return Poll::Ready(Ok(0));
            }
        }
        Poll::Ready(Ok(bare_bytes))
    }

    /// Whether `bare` is hyper's own refusal of a head; if so, there are better words for it.
    fn refuses(&mut self, bare: &[u8]) -> bool {
        if self.instead.is_none() && self.protocol == Protocol::Http1 && !self.pulse.running() {
            self.instead = refusal::in_words(bare, &self.limits).map(|words| (words, 0));
        }
        self.instead.is_some()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.refuses(buf) {
            return self.poll_instead(cx, buf.len());
        }
        self.poll_progress(cx, |io, cx| io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [bare] = bufs
            && self.refuses(bare)
        {
            return self.poll_instead(cx, bare.len());
        }
        self.poll_progress(cx, |io, cx| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_progress(cx, |io, cx| io.poll_flush(cx))
    }

    /// Ends our side, then reads what the peer still sends: bytes left unread would turn the end into a reset, which
    /// takes the last answer with it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.poll_progress(cx, |io, cx| io.poll_shutdown(cx)))?;
        if this.lingered == 0 {
            this.lingered = 1;
            this.patience.as_mut().reset(Instant::now() + LINGER_MS_MAX);
        }
        let mut space = [0; 4096];
        while !this.peer_ended && this.lingered < LINGER_BYTES_MAX {
            let mut sink = ReadBuf::new(&mut space);
            match Pin::new(&mut this.io).poll_read(cx, &mut sink) {
                Poll::Ready(Ok(())) if !sink.filled().is_empty() => this.lingered += sink.filled().len(),
                Poll::Ready(_) => break,
                Poll::Pending => return this.patience.as_mut().poll(cx).map(Ok),
            }
        }
        Poll::Ready(Ok(()))
    }
}

//! HTTP/2 streams, each cut when its own reader takes nothing for too long.
//!
//! Flow control stops a stream whose reader does not read, and nothing else of its connection. hyper then does not
//! ask for more of the answer, and would wait for ever: its task is watched from outside.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::Sleep;

tokio::task_local! {
    static PACE: Arc<Pace>;
}

/// How far one stream's answer has come.
#[derive(Default)]
pub(super) struct Pace {
    /// Frames that were handed over to be sent.
    frames: AtomicU64,
    /// No other has been asked for since the last.
    sending: AtomicBool,
}

impl Pace {
    /// The pace of the stream whose task this is; none under HTTP/1.1, where a stream is a connection.
    pub(super) fn current() -> Option<Arc<Self>> {
        PACE.try_with(Arc::clone).ok()
    }

    /// Takes down what the answer's body said when it was asked for a frame.
    pub(super) fn asked<T>(&self, frame: &Poll<Option<T>>) {
        let sending = matches!(frame, Poll::Ready(Some(_)));
        self.frames.fetch_add(sending.into(), Relaxed);
        self.sending.store(sending, Relaxed);
    }
}

/// Runs hyper's streams.
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) write_stall_s_max: Duration,
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let pace = Arc::new(Pace::default());
        let paced = Paced {
            stream: Box::pin(stream),
            pace: pace.clone(),
            seen: 0,
            stall: None,
            patience: self.write_stall_s_max,
        };
        tokio::spawn(PACE.scope(pace, paced));
    }
}

struct Paced<F> {
    stream: Pin<Box<F>>,
    pace: Arc<Pace>,
    /// The frame at which `stall` began.
    seen: u64,
    stall: Option<Pin<Box<Sleep>>>,
    patience: Duration,
}

impl<F: Future<Output = ()>> Future for Paced<F> {
    type Output = ();

    /// Ends early, which resets the stream, when its reader takes nothing.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let (frames, sending) = (self.pace.frames.load(Relaxed), self.pace.sending.load(Relaxed));
        if frames != self.seen || !sending {
            self.seen = frames;
            self.stall = None;
        }
        if !sending {
            return Poll::Pending;
        }
        let patience = self.patience;
        let stall = self.stall.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        let cut = stall.as_mut().poll(cx);
        if cut.is_ready() {
            tracing::debug!("a stream is cut: its reader took nothing for {} s", patience.as_secs_f64());
        }
        cut
    }
}

//! The pause between two writes to a stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

use crate::limits::WRITE_PAUSE_MS;

/// Lets writes through, but not two within [`WRITE_PAUSE_MS`].
#[derive(Default)]
pub(super) struct Pause {
    /// When the next write may be, once there was one.
    next: Option<Instant>,
    /// Made when the first write comes too soon.
    timer: Option<Pin<Box<Sleep>>>,
    /// A write waits for the timer.
    on: bool,
}

impl Pause {
    /// Whether a write waits.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// Ready when a write may be, which is then taken to be; one that is `full` need not wait.
    pub(super) fn poll(&mut self, full: bool, context: &mut Context<'_>) -> Poll<()> {
        let now = Instant::now();
        if let Some(next) = self.next.filter(|next| !full && now < *next) {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if !std::mem::replace(&mut self.on, true) {
                timer.as_mut().reset(next);
            }
            ready!(timer.as_mut().poll(context));
        }
        self.on = false;
        self.next = Some(now + WRITE_PAUSE_MS);
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_write_right_behind_another_waits_and_a_late_one_does_not() {
        tokio::time::pause();
        let mut pause = Pause::default();
        for _ in 0..3 {
            assert!(poll_fn(|context| pause.poll(false, context)).now_or_never().is_some() && !pause.is_on());
            let began = Instant::now();
            assert!(poll_fn(|context| pause.poll(false, context)).now_or_never().is_none() && pause.is_on());
            poll_fn(|context| pause.poll(false, context)).await;
            assert!(!pause.is_on() && began.elapsed() >= WRITE_PAUSE_MS);
            tokio::time::advance(Duration::from_millis(5)).await;
        }
    }

    /// Else nobody would end the pause, and single tokens would not be told of any more.
    #[tokio::test]
    async fn a_full_write_ends_a_pause() {
        tokio::time::pause();
        let mut pause = Pause::default();
        poll_fn(|context| pause.poll(false, context)).await;
        assert!(poll_fn(|context| pause.poll(false, context)).now_or_never().is_none() && pause.is_on());
        assert!(poll_fn(|context| pause.poll(true, context)).now_or_never().is_some() && !pause.is_on());
    }
}

//! The pause between two writes to a stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::time::{Instant, Sleep, sleep_until};

use crate::limits::{WRITE_PAUSE_MS_MAX, WRITE_PAUSE_PER_TOKEN_MS};

/// Lets writes through, but none within the [time](WRITE_PAUSE_PER_TOKEN_MS) that the tokens of the last one deserve.
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

    /// Ready when a write of so many tokens may be, which is then taken to be; one that is `full` need not wait.
    pub(super) fn poll(&mut self, tokens: u32, full: bool, context: &mut Context<'_>) -> Poll<()> {
        let now = Instant::now();
        if let Some(next) = self.next.filter(|next| !full && now < *next) {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if !std::mem::replace(&mut self.on, true) {
                timer.as_mut().reset(next);
            }
            ready!(timer.as_mut().poll(context));
        }
        self.on = false;
        let pause = WRITE_PAUSE_PER_TOKEN_MS.saturating_mul(tokens).min(WRITE_PAUSE_MS_MAX);
        self.next = Some(now + pause);
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    /// Milliseconds that a write of so many tokens waits.
    async fn waits(pause: &mut Pause, tokens: u32) -> u128 {
        let began = Instant::now();
        let at_once = poll_fn(|context| pause.poll(tokens, false, context)).now_or_never().is_some();
        assert_eq!(pause.is_on(), !at_once);
        if !at_once {
            poll_fn(|context| pause.poll(tokens, false, context)).await;
        }
        assert!(!pause.is_on());
        began.elapsed().as_millis()
    }

    #[tokio::test]
    async fn a_write_right_behind_another_waits_as_long_as_that_was_and_a_late_one_does_not() {
        tokio::time::pause();
        let mut pause = Pause::default();
        let mut waited = Vec::new();
        for tokens in [1, 3, 3, 1000, 1] {
            waited.push(waits(&mut pause, tokens).await);
        }
        let timers_tick = |(waited, least): (&u128, u128)| (least..=least + 1).contains(waited);
        assert!(waited.iter().zip([0, 2, 6, 6, 8]).all(timers_tick), "{waited:?}");
        for _ in 0..3 {
            tokio::time::advance(Duration::from_millis(3)).await;
            assert_eq!(waits(&mut pause, 1).await, 0, "a token each 3 ms is written when it comes");
        }
    }

    /// Else nobody would end the pause, and single tokens would not be told of any more.
    #[tokio::test]
    async fn a_full_write_ends_a_pause() {
        tokio::time::pause();
        let mut pause = Pause::default();
        poll_fn(|context| pause.poll(1, false, context)).await;
        assert!(poll_fn(|context| pause.poll(1, false, context)).now_or_never().is_none() && pause.is_on());
        assert!(poll_fn(|context| pause.poll(9, true, context)).now_or_never().is_some() && !pause.is_on());
    }
}

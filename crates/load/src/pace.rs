//! Requests when they are due: an open loop's schedule.
//!
//! A thread of its own sleeps by the system's clock, which is exact to some 50 µs; the runtime's timers are exact to a
//! millisecond, which would be added to every latency.

use std::time::Duration;

use galerne_workload::Planned;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::replay::Due;
use crate::write::Writer;

/// Requests that are due and not yet taken; more wait in the thread, and are late by as much as shows.
const DUE_MAX: usize = 64;

/// How soon the thread sees that nobody listens any more.
const NAP: Duration = Duration::from_millis(100);

/// Hands over each request as soon as it is due, counted from `start`, and none before. Ends with the requests, or with
/// the receiver.
pub(crate) fn start(
    requests: impl Iterator<Item = Planned> + Send + 'static,
    writer: Writer,
    start: Instant,
) -> mpsc::Receiver<Due> {
    let (due, taken) = mpsc::channel(DUE_MAX);
    std::thread::spawn(move || {
        for planned in requests {
            let at = planned.due;
            let body = writer.write(planned);
            loop {
                let left = at.saturating_sub(start.elapsed());
                if due.is_closed() {
                    return;
                }
                if left.is_zero() {
                    break;
                }
                std::thread::sleep(left.min(NAP));
            }
            if due.blocking_send(Due { at, body }).is_err() {
                return;
            }
        }
    });
    taken
}

#[cfg(test)]
mod tests {
    use galerne_workload::{Prompt, TokenIds};

    use super::*;
    use crate::options::{Api, Endpoint, TargetOptions};

    fn paced(
        due_ms: impl IntoIterator<Item = u64, IntoIter: Send + 'static>,
    ) -> (Instant, mpsc::Receiver<Due>) {
        let target = TargetOptions {
            endpoint: Endpoint::parse("http://host", Api::Chat).unwrap(),
            model: None,
            api_key: None,
            tls: None,
            temperature: 0.0,
            ignore_eos: true,
            token_ids: TokenIds { first: 1, last: 2 },
        };
        let requests = due_ms.into_iter().map(|due_ms| Planned {
            number: 0,
            due: Duration::from_millis(due_ms),
            prompt: Prompt::Text("Why?".to_owned()),
            output_tokens: 1,
            seed: 1,
        });
        let now = Instant::now();
        (now, start(requests, Writer::new(&target, 1), now))
    }

    #[tokio::test]
    async fn no_request_comes_before_it_is_due() {
        let due_ms = [0, 1, 5, 5, 20, 150];
        let (start, mut taken) = paced(due_ms);
        for due_ms in due_ms {
            let due = taken.recv().await.unwrap();
            assert_eq!(due.at, Duration::from_millis(due_ms));
            assert!(start.elapsed() >= due.at, "{:?} is too early for {:?}", start.elapsed(), due.at);
        }
        assert!(taken.recv().await.is_none());
    }

    #[tokio::test]
    async fn nobody_waits_for_a_request_that_nobody_wants() {
        let (sender, dropped) = std::sync::mpsc::channel::<()>();
        let hours = std::iter::repeat_with(move || {
            let _ = &sender;
            3_600_000
        });
        let (_, taken) = paced(hours);
        drop(taken);
        // The thread owns the sender, and ends.
        let ended = tokio::task::spawn_blocking(move || dropped.recv_timeout(Duration::from_secs(60)));
        assert_eq!(ended.await.unwrap(), Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }
}

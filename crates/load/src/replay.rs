//! The loop that starts requests and counts what comes of them.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use galerne_workload::{Answer, ErrorKind, Failure, Outcome, Planned, Tally};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::stopwatch::Stopwatch;
use crate::write::{Body, Writer};

/// Between two looks for those who watch.
const LOOK: Duration = Duration::from_millis(500);

/// A request that is due.
#[derive(Debug)]
pub(crate) struct Due {
    /// Since when, from the start of the run on.
    pub(crate) at: Duration,
    pub(crate) body: Body,
}

/// Where requests come from.
pub(crate) enum Source {
    /// From a schedule.
    Open(mpsc::Receiver<Due>),
    /// As soon as there is room for one.
    Closed {
        requests: Box<dyn Iterator<Item = Planned> + Send>,
        writer: Writer,
        /// None from then on.
        duration: Duration,
    },
}

/// How a run goes on.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Since its start.
    pub elapsed: Duration,
    /// Requests that were sent.
    pub sent: u64,
    /// Those that are open now.
    pub open: usize,
    /// Those that were answered, without the warm-up.
    pub answered: u64,
    /// Those that failed, without the warm-up.
    pub failed: u64,
    /// Tokens a second since the last look.
    pub tokens_per_s: f64,
    /// Median time to the first token so far.
    pub ttft_p50: Option<Duration>,
    /// Its 99th percentile.
    pub ttft_p99: Option<Duration>,
}

/// A run.
pub(crate) struct Replay {
    pub(crate) start: Instant,
    /// Requests that may be open at once.
    pub(crate) in_flight_max: usize,
    /// Time that each may take.
    pub(crate) request_s_max: Duration,
    pub(crate) tally: Tally,
    /// Of all requests so far.
    pub(crate) tokens: Arc<AtomicU64>,
    pub(crate) progress: watch::Sender<Progress>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Requests that were given up.
    pub(crate) unfinished: usize,
    /// Requests that were open at once.
    pub(crate) in_flight_peak: usize,
}

impl Replay {
    /// Sends all requests by way of `ask` and waits for their ends, or until `stop`.
    pub(crate) async fn run<A, F>(
        mut self,
        mut source: Source,
        ask: A,
        stop: &CancellationToken,
    ) -> (Tally, Ended)
    where
        A: Fn(Body, Stopwatch) -> F,
        F: Future<Output = Result<Answer, Failure>> + Send + 'static,
    {
        let (mut open, mut sent, mut peak, mut more) = (JoinSet::new(), 0, 0, true);
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut seen = (Instant::now(), 0);
        while more || !open.is_empty() {
            tokio::select! {
                () = stop.cancelled() => break,
                due = source.next(self.start), if more && open.len() < self.in_flight_max => match due {
                    Some(Due { at, body }) => {
                        let asked = ask(body, Stopwatch::new(self.start, self.tokens.clone()));
                        open.spawn(self.one(at, asked));
                        sent += 1;
                        peak = peak.max(open.len());
                    }
                    None => more = false,
                },
                Some(ended) = open.join_next() => {
                    // A request that panicked is a defect of ours, and no result.
                    self.tally.record(&ended.expect("no panic in a request"));
                }
                _ = looks.tick() => self.look(sent, open.len(), &mut seen),
            }
        }
        let unfinished = open.len();
        open.shutdown().await;
        (self.tally, Ended { unfinished, in_flight_peak: peak })
    }

    fn one<F>(&self, due: Duration, asked: F) -> impl Future<Output = Outcome> + Send + use<F>
    where
        F: Future<Output = Result<Answer, Failure>> + Send + 'static,
    {
        let (start, limit) = (self.start, self.request_s_max);
        async move {
            let sent = start.elapsed();
            let late = |_| {
                let message = format!("no end after {limit:?} (--request-s-max)");
                Err(Failure { kind: ErrorKind::Late, message })
            };
            let result = timeout(limit, asked).await.unwrap_or_else(late);
            Outcome { due, sent, end: start.elapsed(), result }
        }
    }

    /// Tells those who watch how it goes.
    fn look(&self, sent: u64, open: usize, (at, tokens): &mut (Instant, u64)) {
        let (now, counted) = (Instant::now(), self.tokens.load(Ordering::Relaxed));
        let since = (now - *at).as_secs_f64().max(1e-3);
        self.progress.send_replace(Progress {
            elapsed: self.start.elapsed(),
            sent,
            open,
            answered: self.tally.answered(),
            failed: self.tally.failed(),
            tokens_per_s: (counted - *tokens) as f64 / since,
            ttft_p50: self.tally.ttft().percentile(50),
            ttft_p99: self.tally.ttft().percentile(99),
        });
        (*at, *tokens) = (now, counted);
    }
}

impl Source {
    async fn next(&mut self, start: Instant) -> Option<Due> {
        match self {
            Self::Open(due) => due.recv().await,
            Self::Closed { duration, .. } if start.elapsed() >= *duration => None,
            Self::Closed { requests, writer, .. } => {
                let body = writer.write(requests.next()?);
                Some(Due { at: start.elapsed(), body })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use galerne_workload::{Generator, Report, Rules};

    use super::*;

    const REQUESTS: u64 = 400;
    const STALL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
    const SERVICE: Duration = Duration::from_millis(5);

    /// A request each 10 ms, in virtual time, from a server that answers each in 5 ms, but none between 1 and 2 s.
    async fn stalled(in_flight_max: usize, stop_after: Duration) -> (Report, Ended) {
        let start = Instant::now();
        let (due, taken) = mpsc::channel(1);
        tokio::spawn(async move {
            for number in 0..REQUESTS {
                let at = Duration::from_millis(10) * number as u32;
                tokio::time::sleep_until(start + at).await;
                if due.send(Due { at, body: Body::Json(Bytes::new()) }).await.is_err() {
                    return;
                }
            }
        });
        let lag_max = Some(Duration::from_millis(20));
        let replay = Replay {
            start,
            in_flight_max,
            request_s_max: Duration::from_secs(10),
            tally: Tally::new(Rules { warm_up: Duration::ZERO, slo: None, slo_share: 1.0, lag_max }),
            tokens: Arc::default(),
            progress: watch::channel(Progress::default()).0,
        };
        let ask = move |_, mut watch: Stopwatch| async move {
            tokio::time::sleep(SERVICE).await;
            if (STALL.0..STALL.1).contains(&start.elapsed()) {
                tokio::time::sleep_until(start + STALL.1).await;
            }
            watch.tokens(1);
            Ok(watch.answer(None, Some(1)))
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::time::sleep(stop_after).await;
            stopped.cancel();
        });
        let (tally, ended) = replay.run(Source::Open(taken), ask, &stop).await;
        let generator = Generator {
            in_flight_peak: ended.in_flight_peak as u64,
            in_flight_max: in_flight_max as u64,
            ..Generator::default()
        };
        (tally.report(ended.unfinished as u64, generator), ended)
    }

    #[tokio::test(start_paused = true)]
    async fn all_that_is_due_during_a_stall_is_sent_and_waits() {
        let (report, ended) = stalled(1000, Duration::MAX).await;
        assert!(report.valid, "{:?}", report.problems);
        assert_eq!(report.requests.answered, REQUESTS);
        assert!((100..=101).contains(&ended.in_flight_peak), "{ended:?}");
        // Those due from 1.00 to 1.99 s are answered at 2 s, after 1000, 990, … 10 ms; all others after 5 ms. So the 360th
        // of 400 waits 600 ms, and the 396th 960 ms.
        let [p50, p90, p99] = [report.ttft_ms.p50, report.ttft_ms.p90, report.ttft_ms.p99];
        for (found, exact) in [(p50, 5.0), (p90, 600.0), (p99, 960.0), (report.ttft_ms.max, 1000.0)] {
            assert!((found - exact).abs() <= 2.0, "{found} for {exact}"); // the runtime's timers: 1 ms
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_generator_without_room_tells_the_same_latencies_or_longer_and_is_not_valid() {
        let (report, ended) = stalled(1, Duration::MAX).await;
        assert_eq!((report.requests.answered, ended.in_flight_peak), (REQUESTS, 1));
        assert!(report.ttft_ms.max >= 1000.0 && report.ttft_ms.p90 >= 600.0, "{:?}", report.ttft_ms);
        assert!(!report.valid && report.problems[0].contains("all of --in-flight-max 1 were open"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_is_stopped_tells_what_it_has_seen() {
        let (report, ended) = stalled(1000, Duration::from_millis(1500)).await;
        assert_eq!(report.requests.answered, 100, "those before the stall");
        assert!((49..=51).contains(&ended.unfinished), "{ended:?}");
        assert_eq!(report.requests.unfinished, ended.unfinished as u64);
    }
}

//! Replays a workload against a live endpoint: OpenAI's API over HTTP, or ours over gRPC.
//!
//! In an open loop a thread of its own ([`pace`]) writes each request before it is due, sleeps until then and hands it
//! over, whatever the server does; in a closed loop so many requests are open at any time, each followed by the next.
//! Either way one loop ([`replay`]) starts them, and gives what became of each to the tally of `galerne-workload`, which
//! knows all the arithmetic.

mod error;
mod options;
mod pace;
mod replay;
mod stopwatch;
mod target;
mod trace;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use galerne_workload::{Generator, Report, Tally};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use error::LoadError;
pub use options::{Api, Endpoint, Limits, Mode, Options, TargetOptions};
pub use replay::Progress;
pub use trace::read_trace;

use replay::{Replay, Source};
use stopwatch::Stopwatch;
use target::Target;
use write::Writer;

/// Runs a load to its end, or until `stop`, and tells what came of it.
///
/// # Errors
/// Only before the first request: when the endpoint cannot be reached.
pub async fn run(
    options: Options,
    stop: CancellationToken,
    progress: watch::Sender<Progress>,
) -> Result<Report, LoadError> {
    let target = Arc::new(Target::open(&options.target, &options.limits).await?);
    let writer = Writer::new(&options.target, options.workload.seed());
    let (start, cpu_s) = (Instant::now(), cpu_s());
    let (in_flight_max, source) = match options.mode {
        Mode::Open { in_flight_max } => {
            let (workload, duration) = (options.workload, options.duration);
            let requests = workload.take_while(move |planned| planned.due < duration);
            let requests = requests.take(options.requests_max);
            (in_flight_max, Source::Open(pace::start(requests, writer, start)))
        }
        Mode::Closed { concurrency } => {
            let requests = Box::new(options.workload.take(options.requests_max));
            (concurrency, Source::Closed { requests, writer, duration: options.duration })
        }
    };
    let tokens = Arc::new(AtomicU64::new(0));
    let replay = Replay {
        start,
        in_flight_max,
        request_s_max: options.limits.request_s_max,
        tally: Tally::new(options.rules),
        tokens: tokens.clone(),
        progress,
    };
    let ask = |body, watch: Stopwatch| {
        let target = target.clone();
        async move { target.ask(body, watch).await }
    };
    let (tally, ended) = replay.run(source, ask, &stop).await;
    let cpu_s = self::cpu_s() - cpu_s;
    let generator = Generator {
        cpu_s,
        cpu_us_per_token: cpu_s * 1e6 / tokens.load(Ordering::Relaxed).max(1) as f64,
        in_flight_peak: ended.in_flight_peak as u64,
        in_flight_max: in_flight_max as u64,
    };
    Ok(tally.report(ended.unfinished as u64, generator))
}

/// Processor time of this process, user and system.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

//! What this router counts of the requests that come: for whoever decides how many groups there should be.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_types::{Moments, RouterRecord};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::limits::{TELL_MS_MIN, TELL_S_MAX};
use crate::serve::Router;

/// Counts since the router began. Answers touch it when they begin, at their first token and at their end.
#[derive(Debug, Default)]
pub(crate) struct Demand {
    counts: Mutex<Counts>,
    /// Rings when a request finds nobody who serves.
    waits: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    arrivals: u64,
    prompts: Moments,
    answers: Moments,
    held: u32,
}

/// A request that waits for a group, until it is dropped.
pub(crate) struct Held(Arc<Demand>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.current().held -= 1;
    }
}

impl Demand {
    /// So many answers are asked for, by somebody who may.
    pub(crate) fn arrived(&self, answers: u32) {
        self.current().arrivals += u64::from(answers);
    }

    /// So many tokens of an answer's prompt had to be computed.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.current().prompts.add(tokens);
    }

    /// An answer has ended after so many tokens.
    pub(crate) fn answer(&self, tokens: usize) {
        self.current().answers.add(tokens);
    }

    /// A request waits because no group serves.
    pub(crate) fn hold(self: &Arc<Self>) -> Held {
        self.current().held += 1;
        self.waits.notify_one();
        Held(self.clone())
    }

    fn current(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells what is counted, for ever: now and then if it has changed, and soon when a request finds nobody who serves.
pub(crate) async fn tell(router: Arc<Router>, told: watch::Sender<RouterRecord>) -> Infallible {
    let demand = &router.metrics.demand;
    loop {
        let Counts { arrivals, prompts, answers, held } = *demand.current();
        let groups = router.metrics.loads.told();
        let uptime_ms = u64::try_from(router.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let now = RouterRecord { uptime_ms, arrivals, prompts, answers, held, groups };
        told.send_if_modified(|before| {
            let news = *before != RouterRecord { uptime_ms: before.uptime_ms, ..now.clone() };
            if news {
                *before = now;
            }
            news
        });
        sleep(TELL_MS_MIN).await;
        let _ = timeout(TELL_S_MAX, demand.waits.notified()).await;
    }
}

//! Requests that are sent again: how many, and which are not.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use galerne_dispatch::{Bans, Digest, RetryBudget, Suspicion};
use galerne_types::{Request, Sampling, hex};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::gate::sha256;
use crate::limits::BANS_UNTOLD_MAX;

/// What there is to share among the suspects.
const TURNS: u32 = 64;

/// A request on its way to a leader, and what is held against it.
#[derive(Debug, Default)]
pub(crate) struct Suspect {
    pub(crate) suspicion: Suspicion,
    /// Its turn, until it is innocent or has ended.
    pub(crate) turn: Option<OwnedSemaphorePermit>,
}

/// Requests on which groups die are refused by all routers: whoever sends one again may reach another one.
#[derive(Clone, Debug)]
pub struct SharedBans {
    pub(crate) seen: watch::Receiver<BTreeSet<String>>,
    pub(crate) told: mpsc::Sender<String>,
}

impl SharedBans {
    /// `seen`: digests of what any router has told of, in hexadecimal digits. What this one tells comes out of the other end, and
    /// is to be seen by all for [`BAN_S`](galerne_dispatch::BAN_S).
    pub fn new(seen: watch::Receiver<BTreeSet<String>>) -> (Self, mpsc::Receiver<String>) {
        let (told, telling) = mpsc::channel(BANS_UNTOLD_MAX);
        (Self { seen, told }, telling)
    }
}

/// What this router has seen of requests that were lost.
pub(crate) struct Again {
    budget: Mutex<RetryBudget>,
    bans: Mutex<Bans>,
    /// To be told of what is refused, if there are other routers.
    told: Option<mpsc::Sender<String>>,
    /// Requests on which groups were lost are tried few at a time: one on which they die is found among those on which they
    /// happened to.
    turns: Arc<Semaphore>,
    /// Time counts from here.
    began: Instant,
}

impl Again {
    pub(crate) fn new(told: Option<mpsc::Sender<String>>) -> Self {
        let turns = Arc::new(Semaphore::new(TURNS as usize));
        Self { budget: Mutex::default(), bans: Mutex::default(), told, turns, began: Instant::now() }
    }

    /// Counts a request; false if it is refused because groups were lost on it just now.
    pub(crate) fn request(&self, model: &str, request: &Request) -> bool {
        let now = self.began.elapsed();
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).request(now);
        !self.bans().refuses(|| digest(model, request), now)
    }

    /// Counts a retry of a request that no leader has accepted; false if there have been too many.
    pub(crate) fn retry(&self) -> bool {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).retry(self.began.elapsed())
    }

    /// Waits for a request's turn, if anything is held against it.
    pub(crate) async fn turn(&self, suspicion: Suspicion) -> Suspect {
        let Some(at_once) = suspicion.at_once() else { return Suspect::default() };
        let share = TURNS / at_once.min(TURNS);
        Suspect { suspicion, turn: self.turns.clone().acquire_many_owned(share).await.ok() }
    }

    /// Refuses a request from now on, and has the other routers refuse it.
    pub(crate) fn ban(&self, model: &str, request: &Request) {
        let (digest, now) = (digest(model, request), self.began.elapsed());
        let told = self.told.as_ref().map(|told| told.try_send(hex(&digest)));
        if matches!(told, Some(Err(_))) {
            tracing::warn!("the other routers are not told of a request on which groups were lost");
        }
        self.bans().ban(digest, now);
    }

    /// Refuses what any router does, for ever. Each ban ends here by this router's clock: what tells of it may be away by then.
    pub(crate) async fn heed(&self, mut seen: watch::Receiver<BTreeSet<String>>) {
        let mut before = BTreeSet::new();
        loop {
            let now = seen.borrow_and_update().clone();
            for digest in now.difference(&before).filter_map(|digest| sha256(digest)) {
                self.bans().ban(digest, self.began.elapsed());
            }
            before = now;
            if seen.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Requests that are refused.
    pub(crate) fn banned(&self) -> usize {
        self.bans().count(self.began.elapsed())
    }

    fn bans(&self) -> MutexGuard<'_, Bans> {
        self.bans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that ranks see of a request but its seed, which is another one each time for most clients.
fn digest(model: &str, request: &Request) -> Digest {
    let mut digest = Sha256::new();
    let sampling = Sampling { seed: 0, ..request.sampling.clone() };
    for part in [model.as_bytes(), format!("{sampling:?}{:?}", request.grammar).as_bytes()] {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    request.prompt.iter().for_each(|token| digest.update(token.to_le_bytes()));
    digest.finalize().into()
}

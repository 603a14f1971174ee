//! Requests that are sent again: how many, and which are not.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use galerne_dispatch::{Bans, Digest, RetryBudget, Suspicion};
use galerne_types::{Request, Sampling};
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What there is to share among the suspects.
const TURNS: u32 = 64;

/// A request on its way to a leader, and what is held against it.
#[derive(Debug, Default)]
pub(crate) struct Suspect {
    pub(crate) suspicion: Suspicion,
    /// Its turn, until it is innocent or has ended.
    pub(crate) turn: Option<OwnedSemaphorePermit>,
}

/// What this router has seen of requests that were lost.
pub(crate) struct Again {
    budget: Mutex<RetryBudget>,
    bans: Mutex<Bans>,
    /// Requests on which groups were lost are tried few at a time: one on which they die is found among those on which they
    /// happened to.
    turns: Arc<Semaphore>,
    /// Time counts from here.
    began: Instant,
}

impl Again {
    pub(crate) fn new() -> Self {
        let turns = Arc::new(Semaphore::new(TURNS as usize));
        Self { budget: Mutex::default(), bans: Mutex::default(), turns, began: Instant::now() }
    }

    /// Counts a request; false if it is refused because groups were lost on it just now.
    pub(crate) fn request(&self, model: &str, request: &Request) -> bool {
        let now = self.began.elapsed();
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).request(now);
        !self.bans.lock().unwrap_or_else(PoisonError::into_inner).refuses(|| digest(model, request), now)
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

    /// Refuses a request from now on.
    pub(crate) fn ban(&self, model: &str, request: &Request) {
        let (digest, now) = (digest(model, request), self.began.elapsed());
        self.bans.lock().unwrap_or_else(PoisonError::into_inner).ban(digest, now);
    }

    /// Requests that are refused.
    pub(crate) fn banned(&self) -> usize {
        self.bans.lock().unwrap_or_else(PoisonError::into_inner).count(self.began.elapsed())
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

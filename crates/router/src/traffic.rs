//! The requests that this router works on: how many at most, since when, how far each has come.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, watch};

use crate::failure::Failure;

/// The requests under way, and whether more are taken.
pub(crate) struct Traffic {
    requests_max: usize,
    running: Mutex<Running>,
    draining: watch::Sender<bool>,
    /// Rings when the last request ends while no more are taken.
    emptied: Notify,
}

#[derive(Default)]
struct Running {
    next: u64,
    requests: BTreeMap<u64, Arc<Progress>>,
}

/// How far one request has come.
pub(crate) struct Progress {
    pub(crate) began: Instant,
    pub(crate) model: String,
    pub(crate) prompt_tokens: AtomicUsize,
    /// Tokens of its answer so far.
    pub(crate) tokens: AtomicUsize,
    /// The group that works on it, as soon as one does.
    group: Mutex<Option<String>>,
}

/// One request's leave to run; it has ended when this is dropped.
pub(crate) struct Passage {
    traffic: Arc<Traffic>,
    number: u64,
    progress: Arc<Progress>,
}

impl Traffic {
    pub(crate) fn new(requests_max: usize) -> Arc<Self> {
        let (running, draining, emptied) = Default::default();
        Arc::new(Self { requests_max, running, draining, emptied })
    }

    /// Begins a request for `model`, unless there are too many or none are taken any more.
    pub(crate) fn enter(self: &Arc<Self>, model: &str) -> Result<Passage, Failure> {
        let mut running = self.running();
        self.room(&running)?;
        let progress = Arc::new(Progress {
            began: Instant::now(),
            model: model.to_owned(),
            prompt_tokens: AtomicUsize::new(0),
            tokens: AtomicUsize::new(0),
            group: Mutex::default(),
        });
        let number = running.next;
        running.next += 1;
        running.requests.insert(number, progress.clone());
        drop(running);
        Ok(Passage { traffic: self.clone(), number, progress })
    }

    /// Whether a request would be let in now.
    pub(crate) fn admits(&self) -> Result<(), Failure> {
        self.room(&self.running())
    }

    fn room(&self, running: &Running) -> Result<(), Failure> {
        if self.draining() {
            return Err(Failure::Closing);
        }
        let max = self.requests_max;
        if running.requests.len() < max {
            return Ok(());
        }
        let message = format!("this router works on {max} requests, and takes no more at once: retry later");
        Err(Failure::Overloaded(message))
    }

    /// Takes no more requests, or takes them again.
    pub(crate) fn drain(&self, draining: bool) {
        let before = self.draining.send_replace(draining);
        if before != draining {
            tracing::warn!(draining, "an operator drains this router, or lets it go on");
        }
        self.emptied.notify_one();
    }

    pub(crate) fn draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Tells when `draining` changes.
    pub(crate) fn watch(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// Waits until no more requests are taken and the last has ended.
    pub(crate) async fn drained(&self) {
        loop {
            if self.draining() && self.running().requests.is_empty() {
                return;
            }
            self.emptied.notified().await;
        }
    }

    /// All requests under way, oldest first.
    pub(crate) fn list(&self) -> Vec<Arc<Progress>> {
        self.running().requests.values().cloned().collect()
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// The group that works on it, as soon as one does.
    pub(crate) fn group(&self) -> MutexGuard<'_, Option<String>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Passage {
    /// Its prompt is known, and a group works on it.
    pub(crate) fn placed(&self, prompt_tokens: usize, group: &str) {
        self.progress.prompt_tokens.store(prompt_tokens, Relaxed);
        *self.progress.group() = Some(group.to_owned());
    }

    /// So many tokens of its answer have come.
    pub(crate) fn tokens(&self, tokens: usize) {
        self.progress.tokens.store(tokens, Relaxed); // nobody else writes it
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        let mut running = self.traffic.running();
        running.requests.remove(&self.number);
        if running.requests.is_empty() && self.traffic.draining() {
            self.traffic.emptied.notify_one();
        }
    }
}

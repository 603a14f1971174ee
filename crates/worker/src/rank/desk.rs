//! The desk beside the model: works out the masks of grammars on a thread of its own.
//!
//! After a step the compute thread hands in what it drew, and goes on with the next forward pass. Meanwhile the desk
//! takes each token into its request's grammar and works out the mask of the next draw. At that draw the mask mostly
//! is there; else the compute thread waits. A grammar that fails ends its own request and no other.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use galerne_grammar::{Constraint, GrammarError};
use galerne_types::{RequestId, Sampled, Step, TokenId};

use super::stats::thread_cpu_time;
use crate::error::WorkerError;

/// How long the compute thread waits for a mask before the request is ended. The limits of grammars keep a mask to
/// some tens of milliseconds.
const MASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Processor time that the masks of a request may take for each of its tokens, on average: one that needs more holds
/// up all that are in the same steps. The limits of grammars keep a single mask to some three times that.
const MASK_TIME_EACH: Duration = Duration::from_millis(5);

/// What they may take beyond that, in all.
const MASK_TIME_MORE: Duration = Duration::from_millis(250);

/// Stack of the desk's thread, in bytes: a parser may follow a long expression by recursion.
const STACK_BYTES: usize = 16 << 20;

/// The compute thread's and the leader's way to the desk. The thread ends with the last of them.
#[derive(Clone)]
pub(crate) struct Desk {
    papers: Arc<Papers>,
    work: mpsc::Sender<Work>,
}

/// What is on the desk, by request.
#[derive(Default)]
struct Papers {
    all: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    papers: BTreeMap<RequestId, Paper>,
    /// Requests to end, and why, until the leader takes them.
    failed: Vec<(RequestId, String)>,
}

/// How far the mask of a request's next draw is.
enum Paper {
    /// The thread will come to it, or is at it.
    Waiting,
    Ready {
        held: Box<Held>,
        mask: Arc<[u32]>,
    },
    Failed,
}

/// A request's grammar, and what it has cost.
struct Held {
    constraint: Box<Constraint>,
    masks: u32,
    spent: Duration,
}

impl Held {
    /// Counts a mask; one that is too much ends the request.
    fn pay(&mut self, spent: Duration) -> Result<(), GrammarError> {
        self.masks = self.masks.saturating_add(1);
        self.spent += spent;
        let may = MASK_TIME_EACH.saturating_mul(self.masks) + MASK_TIME_MORE;
        if self.spent <= may {
            return Ok(());
        }
        let (spent, may) = (self.spent.as_millis(), may.as_millis());
        let says = format!("the masks of {} tokens took {spent} ms, and {may} are taken", self.masks);
        Err(GrammarError::Failed(says))
    }
}

/// What the thread does next. There is at most one entry for each open request and each closed one.
enum Work {
    Mask(RequestId, Box<Held>, Option<TokenId>),
    /// Frees what a grammar held, which takes a while.
    Drop(Box<Held>),
}

impl Desk {
    /// Starts the thread.
    pub(crate) fn start() -> Result<Self, WorkerError> {
        let (work, inbox) = mpsc::channel();
        let papers = Arc::new(Papers::default());
        let theirs = Arc::clone(&papers);
        let thread = std::thread::Builder::new().name("desk".into()).stack_size(STACK_BYTES);
        thread
            .spawn(move || inbox.into_iter().for_each(|work| theirs.work(work)))
            .map_err(WorkerError::Spawn)?;
        Ok(Self { papers, work })
    }

    /// Takes in a request's grammar, and begins its first mask.
    pub(crate) fn open(&self, request: RequestId, constraint: Box<Constraint>) {
        self.papers.lock().papers.insert(request, Paper::Waiting);
        let held = Box::new(Held { constraint, masks: 0, spent: Duration::ZERO });
        self.send(Work::Mask(request, held, None));
    }

    /// The tokens that the request's next draw may take. Waits for the thread if it must. A request that is not
    /// here, because it was given up while a step held it, or that has failed, gets an empty mask: the sampler takes
    /// that for none, and nobody is told what it draws.
    pub(crate) fn mask(&self, request: RequestId) -> Arc<[u32]> {
        let inner = self.papers.lock();
        let waits = |inner: &mut Inner| matches!(inner.papers.get(&request), Some(Paper::Waiting));
        let waited = self.papers.changed.wait_timeout_while(inner, MASK_TIMEOUT, waits);
        let (mut inner, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let says = format!("a mask of the grammar took longer than {} s", MASK_TIMEOUT.as_secs());
            inner.fail(request, says);
        }
        match inner.papers.get(&request) {
            Some(Paper::Ready { mask, .. }) => Arc::clone(mask),
            _ => Arc::new([]),
        }
    }

    /// Takes in what a step drew, and begins the next masks.
    pub(crate) fn drawn(&self, step: &Step, sampled: &Sampled) {
        for (slice, token) in step.slices.iter().zip(&sampled.tokens) {
            let request = slice.draw.as_ref().and_then(|draw| draw.grammar);
            let (Some(request), Some(token)) = (request, token) else { continue };
            let mut inner = self.papers.lock();
            let Some(paper) = inner.papers.get_mut(&request) else { continue };
            match std::mem::replace(paper, Paper::Waiting) {
                Paper::Ready { held, .. } => {
                    drop(inner);
                    self.send(Work::Mask(request, held, Some(token.id)));
                }
                Paper::Failed => *paper = Paper::Failed,
                Paper::Waiting => inner.fail(request, "a token was drawn before its mask was there".into()),
            }
        }
    }

    /// The request has ended, one way or the other.
    pub(crate) fn close(&self, request: RequestId) {
        let paper = self.papers.lock().papers.remove(&request);
        if let Some(Paper::Ready { held, .. }) = paper {
            self.send(Work::Drop(held));
        }
        self.papers.changed.notify_all();
    }

    /// All requests have ended with their epoch.
    pub(crate) fn clear(&self) {
        let requests: Vec<RequestId> = self.papers.lock().papers.keys().copied().collect();
        requests.into_iter().for_each(|request| self.close(request));
    }

    /// Requests that cannot go on under their grammar, and why. Each is told before anything that was drawn for it
    /// afterwards.
    pub(crate) fn take_failed(&self) -> Vec<(RequestId, String)> {
        std::mem::take(&mut self.papers.lock().failed)
    }

    fn send(&self, work: Work) {
        // The thread outlives its senders; were it gone, the mask's deadline would end the request.
        let _ = self.work.send(work);
    }
}

impl Papers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, work: Work) {
        let (request, mut held, token) = match work {
            Work::Mask(request, held, token) => (request, held, token),
            Work::Drop(held) => return drop(held),
        };
        let begun = thread_cpu_time();
        let mask = catch_unwind(AssertUnwindSafe(|| {
            token.map_or(Ok(()), |token| held.constraint.drawn(token))?;
            held.constraint.mask()
        }));
        let mask = mask.unwrap_or_else(|_| Err(GrammarError::Failed("its parser panicked".into())));
        let mask = held.pay(thread_cpu_time().saturating_sub(begun)).and(mask);
        let mut inner = self.lock();
        // A request that has been closed meanwhile is forgotten, one whose time was up stays failed.
        if let Some(paper @ Paper::Waiting) = inner.papers.get_mut(&request) {
            match mask {
                Ok(mask) => *paper = Paper::Ready { held, mask },
                Err(error) => inner.fail(request, error.to_string()),
            }
        }
        drop(inner);
        self.changed.notify_all();
    }
}

impl Inner {
    fn fail(&mut self, request: RequestId, says: String) {
        self.papers.insert(request, Paper::Failed);
        self.failed.push((request, says));
    }
}

#[cfg(test)]
mod tests {
    use galerne_grammar::{Limits, Vocabulary};
    use galerne_types::{Draw, Epoch, Grammar, Input, Sampling, Slice, TokenOut};

    use super::*;

    const ID: RequestId = RequestId(7);
    const END: TokenId = 256;
    const A: TokenId = b'a' as TokenId;
    const B: TokenId = b'b' as TokenId;
    const Z: TokenId = b'z' as TokenId;

    fn constraint(regex: &str) -> Box<Constraint> {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let token = |id: u32| bytes.get(id as usize).map_or((&[][..], true), |bytes| (&bytes[..], false));
        let vocabulary = Vocabulary::new(257, &[END], token).unwrap();
        Box::new(vocabulary.compile(&Grammar::Regex(regex.into()), &Limits::default()).unwrap())
    }

    fn draw(desk: &Desk, token: TokenId) {
        let draw = Draw { grammar: Some(ID), ..Draw::new(Sampling::greedy(), 0) };
        let slice = Slice {
            slot: 0,
            start: 0,
            input: Input::Last,
            first_block: 0,
            blocks: vec![],
            draw: Some(draw),
            score: None,
        };
        let token = TokenOut::unreported(token);
        let sampled = Sampled { tokens: vec![Some(token)], ..Sampled::default() };
        desk.drawn(&Step { epoch: Epoch(1), number: 1, slices: vec![slice], traces: vec![] }, &sampled);
    }

    fn allowed(mask: &[u32]) -> Vec<TokenId> {
        (0..mask.len() as u32 * 32)
            .filter(|&token| mask[token as usize / 32] >> (token % 32) & 1 == 1)
            .collect()
    }

    #[test]
    fn a_mask_for_every_draw_also_after_the_end() {
        let desk = Desk::start().unwrap();
        desk.open(ID, constraint("ab?"));
        assert_eq!(allowed(&desk.mask(ID)), [A]);
        draw(&desk, A);
        assert_eq!(allowed(&desk.mask(ID)), [B, END]);
        draw(&desk, END);
        assert_eq!(allowed(&desk.mask(ID)), [END], "a step under way may ask once more");
        draw(&desk, END);
        desk.close(ID);
        assert!(desk.mask(ID).is_empty(), "nobody looks at this draw");
        draw(&desk, 0);
        assert!(desk.take_failed().is_empty());
    }

    #[test]
    fn a_request_pays_for_its_masks() {
        let mut held = Held { constraint: constraint("a*"), masks: 0, spent: Duration::ZERO };
        for _ in 0..1000 {
            held.pay(MASK_TIME_EACH).unwrap();
        }
        held.pay(MASK_TIME_EACH + MASK_TIME_MORE).unwrap();
        let error = held.pay(MASK_TIME_EACH + Duration::from_millis(1)).unwrap_err().to_string();
        assert!(error.contains("the masks of 1002 tokens took 5261 ms, and 5260 are taken"), "{error}");
    }

    #[test]
    fn a_grammar_that_fails_is_told_once_and_holds_nobody_up() {
        let desk = Desk::start().unwrap();
        desk.open(ID, constraint("ab"));
        desk.mask(ID);
        draw(&desk, Z);
        assert!(desk.mask(ID).is_empty());
        let failed = desk.take_failed();
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, ID);
        assert!(failed[0].1.contains("against the grammar"), "{}", failed[0].1);
        draw(&desk, A);
        assert!(desk.mask(ID).is_empty());
        assert!(desk.take_failed().is_empty());
        desk.clear();
        assert!(desk.papers.lock().papers.is_empty());
    }
}

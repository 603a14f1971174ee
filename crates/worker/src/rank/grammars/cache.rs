//! Grammars that have been compiled: requests with the same one share the work.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_grammar::Constraint;
use galerne_types::{Epoch, Grammar};
use tokio::sync::OnceCell;

/// Grammars that are kept; the one that was not asked for the longest goes first.
const GRAMMARS_MAX: usize = 256;

/// Bytes of all grammars that are kept, as sent and compiled.
const BYTES_MAX: usize = 64 << 20;

/// Where a grammar is, or will be once the first request for it has compiled it.
pub(super) type Place = Arc<OnceCell<Arc<Constraint>>>;

/// The grammars that were asked for last.
#[derive(Default)]
pub(crate) struct Cache(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    kept: BTreeMap<Grammar, Kept>,
    bytes: usize,
    /// Counts requests, to tell which of two grammars was asked for later.
    clock: u64,
    counts: Counts,
    /// The epoch that is counted in, and what was counted before it.
    epoch: Option<(Epoch, Counts)>,
}

struct Kept {
    place: Place,
    asked: u64,
    /// 0 until it is compiled.
    bytes: usize,
}

/// How often a grammar was there, or about to be, when it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

impl Cache {
    /// The place of a grammar; it is new if nobody compiles it yet.
    pub(super) fn place(&self, grammar: &Grammar) -> Place {
        let inner = &mut *self.lock();
        inner.clock += 1;
        if let Some(kept) = inner.kept.get_mut(grammar) {
            inner.counts.hits += 1;
            kept.asked = inner.clock;
            return Arc::clone(&kept.place);
        }
        inner.counts.misses += 1;
        let place = Place::default();
        let kept = Kept { place: Arc::clone(&place), asked: inner.clock, bytes: 0 };
        inner.kept.insert(grammar.clone(), kept);
        inner.shrink(GRAMMARS_MAX, BYTES_MAX);
        place
    }

    /// Takes note of what became of a grammar: one that could not be compiled is not kept.
    pub(super) fn settle(&self, grammar: &Grammar, place: &Place) {
        let inner = &mut *self.lock();
        let Some(kept) = inner.kept.get_mut(grammar).filter(|kept| Arc::ptr_eq(&kept.place, place)) else {
            return;
        };
        let Some(compiled) = place.get() else {
            inner.forget(grammar);
            return;
        };
        if kept.bytes == 0 {
            kept.bytes = compiled.bytes() + grammar.bytes();
            inner.bytes += kept.bytes;
            inner.shrink(GRAMMARS_MAX, BYTES_MAX);
        }
    }

    /// What was counted since that epoch was first asked for.
    pub(crate) fn counts(&self, epoch: Epoch) -> Counts {
        let inner = &mut *self.lock();
        let before = match inner.epoch {
            Some((counted, before)) if counted == epoch => before,
            _ => inner.epoch.insert((epoch, inner.counts)).1,
        };
        Counts { hits: inner.counts.hits - before.hits, misses: inner.counts.misses - before.misses }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Forgets the grammars that were not asked for the longest, until there are no more than that.
    fn shrink(&mut self, grammars_max: usize, bytes_max: usize) {
        while self.kept.len() > grammars_max || self.bytes > bytes_max {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.asked);
            let Some(oldest) = oldest.map(|(grammar, _)| grammar.clone()) else { return };
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, grammar: &Grammar) {
        if let Some(kept) = self.kept.remove(grammar) {
            self.bytes -= kept.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use galerne_grammar::{Limits, Vocabulary};

    use super::*;

    fn grammar(number: usize) -> Grammar {
        Grammar::Choice(vec![format!("{number}")])
    }

    fn compiled() -> Arc<Constraint> {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let token = |id: u32| bytes.get(id as usize).map_or((&[][..], true), |bytes| (&bytes[..], false));
        let vocabulary = Vocabulary::new(257, &[256], token).unwrap();
        Arc::new(vocabulary.compile(&grammar(0), &Limits::default()).unwrap())
    }

    #[test]
    fn what_is_asked_for_is_kept_and_the_rest_is_forgotten() {
        let (cache, compiled) = (Cache::default(), compiled());
        for number in 0..GRAMMARS_MAX {
            let place = cache.place(&grammar(number));
            place.set(Arc::clone(&compiled)).unwrap();
            cache.settle(&grammar(number), &place);
        }
        assert!(cache.place(&grammar(0)).initialized(), "asked for again");
        assert!(!cache.place(&grammar(GRAMMARS_MAX)).initialized(), "a new one, for which the second goes");
        assert!(cache.place(&grammar(0)).initialized());
        assert!(!cache.place(&grammar(1)).initialized());
        assert_eq!(cache.lock().kept.len(), GRAMMARS_MAX);
        let misses = GRAMMARS_MAX as u64 + 2;
        assert_eq!(cache.lock().counts, Counts { hits: 2, misses });

        assert_eq!(cache.counts(Epoch(7)), Counts::default(), "an epoch counts from its beginning");
        cache.place(&grammar(0));
        assert_eq!(cache.counts(Epoch(7)), Counts { hits: 1, misses: 0 });
        assert_eq!(cache.counts(Epoch(8)), Counts::default());
    }

    #[test]
    fn bytes_are_counted_and_failures_are_not_kept() {
        let (cache, compiled) = (Cache::default(), compiled());
        let each = compiled.bytes() + 1;
        for number in 0..3 {
            let place = cache.place(&grammar(number));
            place.set(Arc::clone(&compiled)).unwrap();
            cache.settle(&grammar(number), &place);
            cache.settle(&grammar(number), &place);
        }
        assert_eq!(cache.lock().bytes, 3 * each);
        cache.lock().shrink(GRAMMARS_MAX, 2 * each);
        assert_eq!(cache.lock().bytes, 2 * each);
        assert_eq!(cache.lock().kept.len(), 2);
        let failed = cache.place(&grammar(9));
        cache.settle(&grammar(9), &failed);
        assert!(!cache.lock().kept.contains_key(&grammar(9)));
        assert!(each > 1000, "a compiled grammar is larger than its text: {each}");
    }
}

//! What there is, and what has happened to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use crate::kinds::{self, Kind};
use crate::status::Failure;

/// Changes that are remembered: who watches from before them has to list again.
const HISTORY_MAX: usize = 100_000;

/// Group and plural, namespace (empty if it has none), name.
pub(crate) type Place = (String, String, String);

/// Everything that the server holds. Cheap to ask; every change is one revision.
pub struct Store {
    state: Mutex<State>,
    version: watch::Sender<u64>,
    counts: Tallies,
}

#[derive(Default)]
struct Tallies {
    reads: AtomicU64,
    writes: AtomicU64,
    watches: AtomicU64,
}

/// Requests so far, without those for leases, which are renewed all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Gets and lists.
    pub reads: u64,
    /// Everything that could change something, whether it did or not.
    pub writes: u64,
    /// Watches that were begun.
    pub watches: u64,
}

/// All that is there, under one lock.
pub(crate) struct State {
    pub(crate) version: u64,
    pub(crate) kinds: Vec<Arc<Kind>>,
    pub(crate) objects: BTreeMap<Place, Arc<Value>>,
    /// Uids of all that is there.
    pub(crate) uids: BTreeSet<String>,
    /// What says that it is owned, by its owners' uids.
    pub(crate) owned: BTreeMap<String, BTreeSet<Place>>,
    history: VecDeque<Change>,
    /// Changes up to this one are forgotten.
    forgotten: u64,
    names: u64,
}

/// One change of one object.
#[derive(Clone)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) place: Place,
    pub(crate) before: Option<Arc<Value>>,
    /// `None`: it is gone.
    pub(crate) after: Option<Arc<Value>>,
}

impl Store {
    pub(crate) fn new() -> Self {
        let state = State {
            version: 1,
            kinds: kinds::built_in(),
            objects: BTreeMap::new(),
            uids: BTreeSet::new(),
            owned: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: 0,
            names: 0,
        };
        Self { state: Mutex::new(state), version: watch::Sender::new(1), counts: Tallies::default() }
    }

    pub(crate) fn current(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and lets those who watch know.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.current();
        let result = change(&mut state);
        let version = state.version;
        drop(state);
        self.version.send_if_modified(|known| std::mem::replace(known, version) != version);
        result
    }

    /// The version as it becomes.
    pub(crate) fn versions(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Forgets all changes so far: watches from before now end with 410 Gone.
    pub fn compact(&self) {
        let mut state = self.current();
        state.history.clear();
        state.forgotten = state.version;
    }

    /// Requests so far.
    pub fn counts(&self) -> Counts {
        let Tallies { reads, writes, watches } = &self.counts;
        Counts { reads: reads.load(Relaxed), writes: writes.load(Relaxed), watches: watches.load(Relaxed) }
    }

    pub(crate) fn count(&self, read: bool, watch: bool) {
        let Tallies { reads, writes, watches } = &self.counts;
        let counter = if watch {
            watches
        } else if read {
            reads
        } else {
            writes
        };
        counter.fetch_add(1, Relaxed);
    }

    /// All objects of a resource, such as `apps/statefulsets` or `/pods`.
    pub fn all(&self, resource: &str) -> Vec<Arc<Value>> {
        let state = self.current();
        state.of(resource, None).map(|(_, object)| object.clone()).collect()
    }
}

impl State {
    /// Objects of a resource, in one namespace or in all.
    pub(crate) fn of<'a>(
        &'a self,
        resource: &'a str,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = (&'a Place, &'a Arc<Value>)> {
        self.of_from(resource, namespace, (namespace.unwrap_or_default(), ""))
    }

    /// The same from a namespace and name on.
    pub(crate) fn of_from<'a>(
        &'a self,
        resource: &'a str,
        namespace: Option<&'a str>,
        from: (&str, &str),
    ) -> impl Iterator<Item = (&'a Place, &'a Arc<Value>)> {
        let range = self.objects.range((resource.to_owned(), from.0.to_owned(), from.1.to_owned())..);
        range.take_while(move |((of, in_namespace, _), _)| {
            of == resource && namespace.is_none_or(|namespace| in_namespace == namespace)
        })
    }

    pub(crate) fn kind(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        let fits =
            |kind: &&Arc<Kind>| kind.group == group && kind.version == version && kind.plural == plural;
        self.kinds.iter().find(fits).cloned()
    }

    /// Writes an object, or removes it, as the next version. What was removed is told as it was last.
    pub(crate) fn commit(&mut self, place: &Place, after: Option<Value>) -> Arc<Value> {
        self.version += 1;
        let before = self.objects.get(place).cloned();
        self.index(place, before.as_deref(), after.as_ref());
        let version = Value::from(self.version.to_string());
        let (shown, kept) = match after {
            Some(mut object) => {
                object["metadata"]["resourceVersion"] = version;
                let object = Arc::new(object);
                self.objects.insert(place.clone(), object.clone());
                (object.clone(), Some(object))
            }
            None => {
                self.objects.remove(place);
                let mut last = before.as_deref().cloned().unwrap_or_default();
                last["metadata"]["resourceVersion"] = version;
                (Arc::new(last), None)
            }
        };
        let before = before.map(|before| if kept.is_none() { shown.clone() } else { before });
        self.history.push_back(Change { version: self.version, place: place.clone(), before, after: kept });
        if self.history.len() > HISTORY_MAX
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.version;
        }
        shown
    }

    /// Notes who is there, and who owns whom.
    fn index(&mut self, place: &Place, before: Option<&Value>, after: Option<&Value>) {
        if let Some(object) = before {
            object["metadata"]["uid"].as_str().map(|uid| self.uids.remove(uid));
            for owner in owners(object) {
                if let Some(owned) = self.owned.get_mut(owner) {
                    owned.remove(place);
                }
            }
        }
        if let Some(object) = after {
            object["metadata"]["uid"].as_str().map(|uid| self.uids.insert(uid.to_owned()));
            for owner in owners(object) {
                self.owned.entry(owner.to_owned()).or_default().insert(place.clone());
            }
        }
        for owner in before.into_iter().flat_map(owners) {
            if self.owned.get(owner).is_some_and(BTreeSet::is_empty) {
                self.owned.remove(owner);
            }
        }
    }

    /// Changes after `version`.
    pub(crate) fn since(&self, version: u64) -> Result<impl Iterator<Item = &Change>, Failure> {
        if version < self.forgotten {
            return Err(Failure::gone(self.forgotten, version));
        }
        let first = self.history.partition_point(|change| change.version <= version);
        Ok(self.history.range(first..))
    }

    /// A name that nothing has had yet.
    pub(crate) fn fresh(&mut self) -> u64 {
        self.names += 1;
        self.names
    }
}

/// Uids of an object's owners.
pub(crate) fn owners(object: &Value) -> impl Iterator<Item = &str> {
    let references = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    references.filter_map(|owner| owner["uid"].as_str())
}

//! What the watches have shown, in the few words that are needed of it, by cluster. Our own writes are in it at once: a pass that
//! follows another one must not decide again because a watch is late.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::sync::watch;

/// A cluster: its namespace and name.
pub(crate) type Key = (String, String);

/// Everything of one kind that belongs to a cluster.
pub(crate) struct Index<V> {
    /// What is in it, for the log.
    pub(crate) what: &'static str,
    state: Mutex<State<V>>,
    ready: watch::Sender<bool>,
}

struct State<V> {
    clusters: BTreeMap<Key, BTreeMap<String, Entry<V>>>,
    /// Uids that we have deleted: a watch that is late must not bring them back.
    gone: BTreeSet<String>,
    /// What has been listed since a listing began.
    listed: Option<BTreeSet<(Key, String)>>,
}

struct Entry<V> {
    uid: String,
    version: u64,
    value: V,
}

impl<V: Clone + PartialEq> Index<V> {
    pub(crate) fn new(what: &'static str) -> Self {
        let state = State { clusters: BTreeMap::new(), gone: BTreeSet::new(), listed: None };
        Self { what, state: Mutex::new(state), ready: watch::Sender::new(false) }
    }

    /// All of a cluster, by name.
    pub(crate) fn of(&self, cluster: &Key) -> BTreeMap<String, V> {
        let state = self.current();
        let entries = state.clusters.get(cluster).into_iter().flatten();
        entries.map(|(name, entry)| (name.clone(), entry.value.clone())).collect()
    }

    /// Clusters of which there is something that is `like` this.
    pub(crate) fn clusters(&self, like: impl Fn(&V) -> bool) -> Vec<Key> {
        let state = self.current();
        let with =
            state.clusters.iter().filter(|(_, entries)| entries.values().any(|entry| like(&entry.value)));
        with.map(|(key, _)| key.clone()).collect()
    }

    /// Takes in what a watch or a write has shown. Tells whether that is news.
    pub(crate) fn put(&self, cluster: &Key, meta: &ObjectMeta, value: V) -> bool {
        let (name, uid) = (meta.name.clone().unwrap_or_default(), meta.uid.clone().unwrap_or_default());
        let version = meta.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0);
        let mut state = self.current();
        if let Some(listed) = &mut state.listed {
            listed.insert((cluster.clone(), name.clone()));
        }
        if state.gone.contains(&uid) {
            return false;
        }
        let entries = state.clusters.entry(cluster.clone()).or_default();
        match entries.get(&name) {
            // One of the same version is the same.
            Some(known) if known.uid == uid && known.version >= version.max(1) => false,
            known => {
                let news = known.is_none_or(|known| known.uid != uid || known.value != value);
                entries.insert(name, Entry { uid, version, value });
                news
            }
        }
    }

    /// It is gone, as a watch tells.
    pub(crate) fn removed(&self, cluster: &Key, meta: &ObjectMeta) -> bool {
        let (name, uid) = (meta.name.as_deref().unwrap_or_default(), meta.uid.as_deref().unwrap_or_default());
        let mut state = self.current();
        state.gone.remove(uid);
        state.remove(cluster, name, Some(uid))
    }

    /// We have deleted it: from now on it is not there.
    pub(crate) fn deleted(&self, cluster: &Key, name: &str) {
        let mut state = self.current();
        let entry = state.clusters.get(cluster).and_then(|entries| entries.get(name));
        if let Some(uid) = entry.map(|entry| entry.uid.clone()) {
            state.gone.insert(uid);
            state.remove(cluster, name, None);
        }
    }

    /// A listing begins: what it does not show is gone.
    pub(crate) fn listing(&self) {
        self.current().listed = Some(BTreeSet::new());
    }

    /// A listing is complete. Tells whose things are gone.
    pub(crate) fn complete(&self) -> Vec<Key> {
        let mut state = self.current();
        let listed = state.listed.take().unwrap_or_default();
        let all = state
            .clusters
            .iter()
            .flat_map(|(key, entries)| entries.keys().map(|name| (key.clone(), name.clone())));
        let missing: Vec<(Key, String)> = all.filter(|place| !listed.contains(place)).collect();
        for (key, name) in &missing {
            state.remove(key, name, None);
        }
        state.gone.clear();
        drop(state);
        self.ready.send_replace(true);
        missing.into_iter().map(|(key, _)| key).collect()
    }

    /// Returns once the first listing is complete.
    pub(crate) async fn ready(&self) {
        // The sender lives as long as this does.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn current(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> State<V> {
    fn remove(&mut self, cluster: &Key, name: &str, uid: Option<&str>) -> bool {
        let Some(entries) = self.clusters.get_mut(cluster) else { return false };
        let same = |entry: &Entry<V>| uid.is_none_or(|uid| entry.uid == uid);
        let there = entries.get(name).is_some_and(same);
        if there {
            entries.remove(name);
        }
        if entries.is_empty() {
            self.clusters.remove(cluster);
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(name: &str, uid: &str, version: &str) -> ObjectMeta {
        let some = |text: &str| Some(text.to_owned());
        ObjectMeta {
            name: some(name),
            uid: some(uid),
            resource_version: some(version),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn a_write_is_seen_at_once_and_a_late_watch_does_not_undo_it() {
        let (index, key) = (Index::new("things"), ("n".to_owned(), "c".to_owned()));
        assert!(index.put(&key, &meta("a", "1", "5"), "old"));
        assert!(index.put(&key, &meta("a", "1", "7"), "ours"));
        assert!(!index.put(&key, &meta("a", "1", "6"), "late"));
        assert_eq!(index.of(&key)["a"], "ours");
        index.deleted(&key, "a");
        assert!(!index.put(&key, &meta("a", "1", "8"), "on its way out"));
        assert!(index.of(&key).is_empty());
        assert!(index.put(&key, &meta("a", "2", "9"), "another"));
        assert!(!index.removed(&key, &meta("a", "1", "10")));
        assert_eq!(index.of(&key)["a"], "another");
    }

    #[test]
    fn what_a_listing_does_not_show_is_gone() {
        let (index, key) = (Index::new("things"), ("n".to_owned(), "c".to_owned()));
        index.put(&key, &meta("a", "1", "1"), 1);
        index.put(&key, &meta("b", "2", "2"), 2);
        index.listing();
        index.put(&key, &meta("b", "2", "2"), 2);
        assert_eq!(index.complete(), std::slice::from_ref(&key));
        assert_eq!(index.of(&key).into_keys().collect::<Vec<_>>(), ["b"]);
    }
}

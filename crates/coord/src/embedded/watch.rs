//! Watchers of one stream. Pure.
//!
//! A watcher is a range and the revision to go on from; its events come out of the store's history when the
//! stream has room for them.

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{EventType, WatchFilterType};

use super::range::KeyRange;
use super::refusal::Refusal;
use super::store::{Store, event_bytes};
use super::{WATCH_ANSWER_BYTES_MAX, WATCHERS_MAX};

/// etcd's id for answers that are about no watcher.
const NO_WATCHER: i64 = -1;

/// What a client wants to see.
pub(crate) struct Watcher {
    pub(crate) range: KeyRange,
    /// The first revision that it has not seen; 0 for the next one, whichever that is.
    pub(crate) next: i64,
    pub(crate) prev_kv: bool,
    /// `WatchFilterType`s of events that it does not want.
    pub(crate) filters: Vec<i32>,
    pub(crate) progress_notify: bool,
}

/// All watchers of a stream.
#[derive(Default)]
pub(crate) struct Watchers {
    table: BTreeMap<i64, Watcher>,
    next_id: i64,
    /// Watchers that had events since the last progress notification need none.
    busy: BTreeSet<i64>,
}

impl Watchers {
    /// Adds a watcher under the asked id, or else (0) under the next free one.
    pub(crate) fn create(&mut self, store: &Store, id: i64, mut watcher: Watcher) -> PbWatchResponse {
        let refused = if id != 0 && self.table.contains_key(&id) {
            Some("mvcc: duplicate watch ID provided on the WatchStream")
        } else if self.table.len() >= WATCHERS_MAX {
            Some("the embedded store has too many watchers on this stream")
        } else {
            None
        };
        let response = PbWatchResponse { header: store.header(), created: true, ..Default::default() };
        if let Some(reason) = refused {
            let cancel_reason = reason.into();
            return PbWatchResponse { watch_id: NO_WATCHER, canceled: true, cancel_reason, ..response };
        }
        if watcher.next <= 0 {
            watcher.next = store.revision() + 1;
        }
        let watch_id = if id == 0 { self.free_id() } else { id };
        self.table.insert(watch_id, watcher);
        PbWatchResponse { watch_id, ..response }
    }

    pub(crate) fn cancel(&mut self, store: &Store, id: i64) -> Option<PbWatchResponse> {
        self.table.remove(&id)?;
        Some(PbWatchResponse { header: store.header(), watch_id: id, canceled: true, ..Default::default() })
    }

    /// The next answer that some watcher waits for: a batch of whole revisions, or its cancellation because
    /// what it has not seen was compacted.
    pub(crate) fn next(&mut self, store: &Store) -> Option<PbWatchResponse> {
        let lagging = |(id, watcher): (&i64, &Watcher)| (watcher.next <= store.revision()).then_some(*id);
        while let Some(id) = self.table.iter().find_map(lagging) {
            let watcher = self.table.get_mut(&id)?;
            if watcher.next < store.compacted() {
                self.table.remove(&id);
                return Some(PbWatchResponse {
                    header: store.header(),
                    watch_id: id,
                    canceled: true,
                    compact_revision: store.compacted(),
                    cancel_reason: Refusal::Compacted.to_string(),
                    ..Default::default()
                });
            }
            let events = watcher.advance(store);
            if !events.is_empty() {
                self.busy.insert(id);
                let header = store.header_at(watcher.next - 1);
                return Some(PbWatchResponse { header, watch_id: id, events, ..Default::default() });
            }
        }
        None
    }

    /// The answer to a client that asks how far all its watchers have seen.
    pub(crate) fn progress(&self, store: &Store) -> PbWatchResponse {
        let next = self.table.values().map(|watcher| watcher.next).min();
        let seen = next.map_or(store.revision(), |next| store.revision().min(next - 1));
        PbWatchResponse { header: store.header_at(seen), watch_id: NO_WATCHER, ..Default::default() }
    }

    /// Tells those who asked for it, and have had no events since the last time, how far they have seen.
    pub(crate) fn notify_progress(&mut self, store: &Store) -> Vec<PbWatchResponse> {
        let busy = std::mem::take(&mut self.busy);
        let idle = self.table.iter().filter(|(id, watcher)| {
            watcher.progress_notify && watcher.next > store.revision() && !busy.contains(id)
        });
        idle.map(|(id, _)| PbWatchResponse { header: store.header(), watch_id: *id, ..Default::default() })
            .collect()
    }

    fn free_id(&mut self) -> i64 {
        while self.table.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }
}

impl Watcher {
    /// Takes events of whole revisions up to the limit of an answer.
    fn advance(&mut self, store: &Store) -> Vec<PbEvent> {
        let (mut events, mut bytes, mut last) = (Vec::new(), 0, 0);
        for (revision, event) in store.events_from(self.next) {
            if revision != last && bytes > WATCH_ANSWER_BYTES_MAX {
                self.next = revision;
                return events;
            }
            last = revision;
            if self.wants(event) {
                bytes += event_bytes(event);
                let prev_kv = event.prev_kv.clone().filter(|_| self.prev_kv);
                events.push(PbEvent { prev_kv, ..event.clone() });
            }
        }
        self.next = store.revision() + 1;
        events
    }

    fn wants(&self, event: &PbEvent) -> bool {
        let is_put = event.r#type == EventType::Put as i32;
        let unwanted = if is_put { WatchFilterType::NoPut } else { WatchFilterType::NoDelete };
        !self.filters.contains(&(unwanted as i32))
            && event.kv.as_ref().is_some_and(|kv| self.range.contains(&kv.key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watcher(next: i64) -> Watcher {
        Watcher {
            range: KeyRange::new(b"k", b"l"),
            next,
            prev_kv: false,
            filters: Vec::new(),
            progress_notify: false,
        }
    }

    fn put(store: &mut Store, key: &str, value: &str) {
        store.write(|store| store.put_key(key.into(), value.into(), 0));
    }

    /// Key, value and replaced value of each event.
    fn events(response: Option<PbWatchResponse>) -> Vec<(String, String, Option<String>)> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let events = response.map(|response| response.events).unwrap_or_default().into_iter();
        events
            .map(|event| {
                let kv = event.kv.unwrap();
                (text(kv.key), text(kv.value), event.prev_kv.map(|before| text(before.value)))
            })
            .collect()
    }

    #[test]
    fn a_watcher_goes_on_from_its_revision() {
        let mut store = Store::new();
        let mut watchers = Watchers::default();
        put(&mut store, "k1", "old"); // 2
        put(&mut store, "k2", "old"); // 3
        let past = watchers.create(&store, 0, watcher(3)).watch_id;
        let now = watchers.create(&store, 0, Watcher { prev_kv: true, ..watcher(0) }).watch_id;
        assert_eq!((past, now), (0, 1));
        assert_eq!(events(watchers.next(&store)), [("k2".into(), "old".into(), None)]);
        assert_eq!(watchers.next(&store), None);

        put(&mut store, "other", "");
        assert_eq!(watchers.next(&store), None);
        put(&mut store, "k2", "new");
        assert_eq!(events(watchers.next(&store)), [("k2".into(), "new".into(), None)]);
        assert_eq!(events(watchers.next(&store)), [("k2".into(), "new".into(), Some("old".into()))]);
        assert_eq!(watchers.progress(&store).header.unwrap().revision, store.revision());

        assert!(watchers.cancel(&store, past).unwrap().canceled);
        assert_eq!(watchers.cancel(&store, past), None);
    }

    #[test]
    fn filters_drop_what_is_not_wanted() {
        let mut store = Store::new();
        let mut watchers = Watchers::default();
        watchers.create(&store, 0, Watcher { filters: vec![WatchFilterType::NoPut as i32], ..watcher(0) });
        put(&mut store, "k", "v");
        assert_eq!(watchers.next(&store), None);
        store.write(|store| store.delete_key(b"k"));
        assert_eq!(events(watchers.next(&store)), [("k".into(), String::new(), None)]);
    }

    #[test]
    fn one_that_falls_behind_compaction_is_cancelled() {
        let mut store = Store::new();
        let mut watchers = Watchers::default();
        watchers.create(&store, 7, watcher(2));
        for value in ["1", "2", "3"] {
            put(&mut store, "k", value);
        }
        store.compact(3).unwrap();
        let cancelled = watchers.next(&store).unwrap();
        assert_eq!((cancelled.watch_id, cancelled.canceled, cancelled.compact_revision), (7, true, 3));
        assert_eq!(watchers.next(&store), None);
    }

    #[test]
    fn answers_are_whole_revisions_of_bounded_size() {
        let mut store = Store::new();
        let mut watchers = Watchers::default();
        watchers.create(&store, 0, watcher(0));
        let large = "x".repeat(WATCH_ANSWER_BYTES_MAX / 2);
        for _ in 0..2 {
            store.write(|store| {
                for key in ["k1", "k2", "k3"] {
                    store.put_key(key.into(), large.clone().into(), 0);
                }
            });
        }
        assert_eq!(watchers.progress(&store).header.unwrap().revision, 1);
        let first = watchers.next(&store).unwrap();
        assert_eq!((first.events.len(), first.header.unwrap().revision), (3, 2));
        assert_eq!(watchers.next(&store).unwrap().events.len(), 3);
        assert_eq!(watchers.next(&store), None);
    }

    #[test]
    fn progress_is_told_to_the_idle_who_asked() {
        let mut store = Store::new();
        let mut watchers = Watchers::default();
        watchers.create(&store, 0, watcher(0));
        watchers.create(&store, 0, Watcher { progress_notify: true, ..watcher(0) });
        put(&mut store, "k", "v");
        while watchers.next(&store).is_some() {}
        assert_eq!(watchers.notify_progress(&store), [], "it had events");
        let told = watchers.notify_progress(&store);
        assert_eq!(told.iter().map(|response| response.watch_id).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn watchers_that_cannot_be_are_refused() {
        let store = Store::new();
        let mut watchers = Watchers::default();
        assert_eq!(watchers.create(&store, 1, watcher(0)).watch_id, 1);
        let twice = watchers.create(&store, 1, watcher(0));
        assert_eq!((twice.watch_id, twice.canceled), (NO_WATCHER, true));
        for _ in 1..WATCHERS_MAX {
            assert!(!watchers.create(&store, 0, watcher(0)).canceled);
        }
        assert!(watchers.create(&store, 0, watcher(0)).canceled);
    }
}

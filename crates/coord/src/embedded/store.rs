//! Revisions: the live keys, and the history of how they came to be. Pure.
//!
//! The history is a list of events that know what they replaced, so a past revision is the live keys with the
//! later events undone.

use std::collections::{BTreeMap, VecDeque};

use etcd_client::EventType;
use etcd_client::proto::{PbEvent, PbKeyValue, PbResponseHeader};

use super::lease::Leases;
use super::range::KeyRange;
use super::refusal::Refusal;
use super::{HISTORY_BYTES_MAX, HISTORY_REVISIONS_MAX};

/// The one member of the one cluster that a store is.
pub(crate) const MEMBER_ID: u64 = 1;

/// Keys and their values.
pub(crate) type Live = BTreeMap<Vec<u8>, PbKeyValue>;

/// What an etcd holds.
pub(crate) struct Store {
    revision: i64,
    compacted: i64,
    live: Live,
    live_bytes: usize,
    history: VecDeque<PbEvent>,
    history_bytes: usize,
    history_revisions: usize,
    pub(super) leases: Leases,
}

impl Store {
    /// An empty store, at etcd's first revision.
    pub(crate) fn new() -> Self {
        Self {
            revision: 1,
            compacted: 0,
            live: Live::new(),
            live_bytes: 0,
            history: VecDeque::new(),
            history_bytes: 0,
            history_revisions: 0,
            leases: Leases::default(),
        }
    }

    /// The last revision.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// The oldest revision that can still be read, and watched from.
    pub(crate) fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The keys now.
    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// Keys and values now, in bytes.
    pub(crate) fn live_bytes(&self) -> usize {
        self.live_bytes
    }

    pub(crate) fn header(&self) -> Option<PbResponseHeader> {
        self.header_at(self.revision)
    }

    pub(crate) fn header_at(&self, revision: i64) -> Option<PbResponseHeader> {
        Some(PbResponseHeader { cluster_id: MEMBER_ID, member_id: MEMBER_ID, revision, raft_term: 1 })
    }

    /// The keys of `range` as they were at a past `revision`.
    pub(crate) fn past(&self, range: &KeyRange, revision: i64) -> Result<Live, Refusal> {
        if revision > self.revision {
            return Err(Refusal::Future);
        }
        if revision < self.compacted {
            return Err(Refusal::Compacted);
        }
        let mut past: Live =
            self.live.range::<[u8], _>(range.bounds()).map(|(key, kv)| (key.clone(), kv.clone())).collect();
        for event in self.history.iter().rev().take_while(|event| revision_of(event) > revision) {
            let Some(key) = event.kv.as_ref().map(|kv| &kv.key).filter(|key| range.contains(key)) else {
                continue;
            };
            match &event.prev_kv {
                Some(before) => drop(past.insert(key.clone(), before.clone())),
                None => drop(past.remove(key)),
            }
        }
        Ok(past)
    }

    /// Events from revision `from` on, oldest first. What is compacted is missing.
    pub(crate) fn events_from(&self, from: i64) -> impl Iterator<Item = (i64, &PbEvent)> {
        let first = self.history.partition_point(|event| revision_of(event) < from);
        self.history.range(first..).map(|event| (revision_of(event), event))
    }

    /// Runs a transaction: all that `write` puts and deletes gets one new revision; if it does neither, there
    /// is none.
    pub(crate) fn write<T>(&mut self, write: impl FnOnce(&mut Self) -> T) -> T {
        let answer = write(self);
        if self.history.back().is_some_and(|event| revision_of(event) > self.revision) {
            self.revision += 1;
            self.history_revisions += 1;
            self.trim();
        }
        answer
    }

    /// Within a transaction: writes a key. The lease, if any, must exist.
    pub(super) fn put_key(&mut self, key: Vec<u8>, value: Vec<u8>, lease: i64) -> Option<PbKeyValue> {
        let mod_revision = self.revision + 1;
        let before = self.remove_live(&key);
        let (create_revision, version) =
            before.as_ref().map_or((mod_revision, 1), |kv| (kv.create_revision, kv.version + 1));
        self.leases.attach(lease, &key);
        let kv = PbKeyValue { key, create_revision, mod_revision, version, value, lease };
        self.live_bytes += bytes_of(&kv);
        self.live.insert(kv.key.clone(), kv.clone());
        self.record(EventType::Put, kv, before.clone());
        before
    }

    /// Within a transaction: deletes a key.
    pub(super) fn delete_key(&mut self, key: &[u8]) -> Option<PbKeyValue> {
        let before = self.remove_live(key)?;
        let mod_revision = self.revision + 1;
        let kv = PbKeyValue { key: key.to_vec(), mod_revision, ..PbKeyValue::default() };
        self.record(EventType::Delete, kv, Some(before.clone()));
        Some(before)
    }

    /// Forgets what was before `revision`.
    pub(crate) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision > self.revision {
            return Err(Refusal::Future);
        }
        if revision <= self.compacted {
            return Err(Refusal::Compacted);
        }
        self.forget_before(revision);
        Ok(())
    }

    fn remove_live(&mut self, key: &[u8]) -> Option<PbKeyValue> {
        let kv = self.live.remove(key)?;
        self.live_bytes -= bytes_of(&kv);
        self.leases.detach(kv.lease, key);
        Some(kv)
    }

    fn record(&mut self, kind: EventType, kv: PbKeyValue, prev_kv: Option<PbKeyValue>) {
        let event = PbEvent { r#type: kind as i32, kv: Some(kv), prev_kv };
        self.history_bytes += event_bytes(&event);
        self.history.push_back(event);
    }

    /// Keeps the history within its limits; the last revision always stays.
    fn trim(&mut self) {
        while self.history_revisions > 1
            && (self.history_revisions > HISTORY_REVISIONS_MAX || self.history_bytes > HISTORY_BYTES_MAX)
        {
            let Some(oldest) = self.history.front().map(revision_of) else { return };
            self.forget_before(oldest + 1);
        }
    }

    fn forget_before(&mut self, revision: i64) {
        let mut last = 0;
        while let Some(event) = self.history.pop_front_if(|event| revision_of(event) < revision) {
            self.history_bytes -= event_bytes(&event);
            self.history_revisions -= usize::from(revision_of(&event) != last);
            last = revision_of(&event);
        }
        self.compacted = revision;
    }
}

fn revision_of(event: &PbEvent) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

pub(crate) fn event_bytes(event: &PbEvent) -> usize {
    event.kv.iter().chain(&event.prev_kv).map(bytes_of).sum()
}

fn bytes_of(kv: &PbKeyValue) -> usize {
    kv.key.len() + kv.value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &mut Store, key: &str, value: &str) {
        store.write(|store| store.put_key(key.into(), value.into(), 0));
    }

    fn at(store: &Store, revision: i64) -> Result<Vec<(String, String)>, Refusal> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let past = store.past(&KeyRange::new(b"\0", b"\0"), revision)?;
        Ok(past.values().map(|kv| (text(&kv.key), text(&kv.value))).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn any_revision_that_is_not_compacted_can_be_read() {
        let mut store = Store::new();
        put(&mut store, "a", "1"); // revision 2
        put(&mut store, "b", "1"); // 3
        store.write(|store| {
            store.put_key("a".into(), "2".into(), 0);
            store.delete_key(b"b");
        }); // 4
        store.write(|store| store.delete_key(b"absent"));
        assert_eq!(store.revision(), 4, "nothing deleted is no revision");
        assert_eq!(at(&store, 1), Ok(vec![]));
        assert_eq!(at(&store, 2), Ok(pairs(&[("a", "1")])));
        assert_eq!(at(&store, 3), Ok(pairs(&[("a", "1"), ("b", "1")])));
        assert_eq!(at(&store, 4), Ok(pairs(&[("a", "2")])));
        assert_eq!(at(&store, 5), Err(Refusal::Future));

        assert_eq!(store.compact(3), Ok(()));
        assert_eq!(store.compact(3), Err(Refusal::Compacted));
        assert_eq!(store.compact(5), Err(Refusal::Future));
        assert_eq!(at(&store, 2), Err(Refusal::Compacted));
        assert_eq!(at(&store, 3), Ok(pairs(&[("a", "1"), ("b", "1")])));
        assert_eq!(store.events_from(0).map(|(revision, _)| revision).collect::<Vec<_>>(), [3, 4, 4]);
    }

    #[test]
    fn history_is_bounded_in_revisions_and_in_bytes() {
        let mut store = Store::new();
        for count in 0..HISTORY_REVISIONS_MAX + 10 {
            put(&mut store, "a", &count.to_string());
        }
        assert_eq!(store.history_revisions, HISTORY_REVISIONS_MAX);
        assert_eq!(store.history.len(), HISTORY_REVISIONS_MAX);
        assert_eq!(store.compacted(), 12);

        let large = "x".repeat(HISTORY_BYTES_MAX / 4);
        for _ in 0..4 {
            put(&mut store, "a", &large);
        }
        assert!(store.history_bytes <= HISTORY_BYTES_MAX);
        put(&mut store, "a", &"x".repeat(HISTORY_BYTES_MAX));
        assert_eq!(store.history_revisions, 1, "the last revision stays, however large");
        assert_eq!(store.compacted(), store.revision());
        assert!(store.past(&KeyRange::new(b"a", b""), store.revision()).is_ok());
    }
}

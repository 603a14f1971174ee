//! The fleet, and the routers, as folds over keys and values. Pure.

use std::collections::{BTreeMap, BTreeSet};

use galerne_types::{Drain, Epoch, EpochRecord, Fleet, Group, Health, Hold, RankRecord, RouterRecord};
use serde::de::DeserializeOwned;

use crate::keys::{Keys, Place};

/// How a key and what it holds change a view; tells whether they do.
pub(crate) type Apply<V> = fn(&mut V, &Keys, &[u8], Option<Value<'_>>) -> bool;

/// What a key holds now.
#[derive(Clone, Copy)]
pub(crate) struct Value<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) mod_revision: i64,
}

/// `key` holds `value` now, or nothing. Tells whether the fleet has changed by it.
///
/// A value that is not to be believed is taken for absent: an older one is not true any more either.
pub(crate) fn apply(fleet: &mut Fleet, keys: &Keys, key: &[u8], value: Option<Value<'_>>) -> bool {
    let Some(place) = keys.place(key) else { return false };
    let (Place::Rank(id, _) | Place::Epoch(id) | Place::Health(id) | Place::Drain(id) | Place::Hold(id)) =
        &place;
    let group = fleet.groups.entry(id.clone()).or_default();
    let changed = match &place {
        Place::Rank(_, rank) => {
            let record = parse::<RankRecord>(key, value, |record| record.group == *id && record.id == *rank);
            let changed = group.ranks.get(rank) != record.as_ref();
            match record {
                Some(record) => drop(group.ranks.insert(rank.clone(), record)),
                None => drop(group.ranks.remove(rank)),
            }
            changed
        }
        Place::Epoch(_) => {
            let record = parse::<EpochRecord>(key, value, |record| record.group == *id);
            let epoch = value.map(|value| Epoch(value.mod_revision.unsigned_abs()));
            replace(&mut group.epoch, epoch.zip(record))
        }
        Place::Health(_) => {
            replace(&mut group.health, parse::<Health>(key, value, |record| record.group == *id))
        }
        Place::Drain(_) => {
            let revision = value.map_or(0, |value| value.mod_revision.unsigned_abs());
            let drain = parse::<Drain>(key, value, |_| true);
            replace(&mut group.drain, drain.map(|drain| Drain { revision, ..drain }))
        }
        Place::Hold(_) => replace(&mut group.hold, parse::<Hold>(key, value, |_| true)),
    };
    if *group == Group::default() {
        fleet.groups.remove(id);
    }
    changed
}

/// What routers tell, by their names.
pub(crate) type Routers = BTreeMap<String, RouterRecord>;

/// The same for the routers' records.
pub(crate) fn apply_router(routers: &mut Routers, keys: &Keys, key: &[u8], value: Option<Value<'_>>) -> bool {
    let Some(name) = keys.router_name(key) else { return false };
    match parse::<RouterRecord>(key, value, |_| true) {
        Some(record) => routers.insert(name.to_owned(), record.clone()) != Some(record),
        None => routers.remove(name).is_some(),
    }
}

/// Digests of the requests that are refused.
pub(crate) type Bans = BTreeSet<String>;

/// The same for these.
pub(crate) fn apply_ban(bans: &mut Bans, keys: &Keys, key: &[u8], value: Option<Value<'_>>) -> bool {
    let Some(digest) = keys.banned(key) else { return false };
    if value.is_some() { bans.insert(digest.to_owned()) } else { bans.remove(digest) }
}

fn replace<T: PartialEq>(slot: &mut Option<T>, value: Option<T>) -> bool {
    let changed = *slot != value;
    *slot = value;
    changed
}

fn parse<T: DeserializeOwned>(
    key: &[u8],
    value: Option<Value<'_>>,
    belongs_here: impl Fn(&T) -> bool,
) -> Option<T> {
    match serde_json::from_slice(value?.bytes) {
        Ok(record) if belongs_here(&record) => Some(record),
        Ok(_) => {
            tracing::warn!(key = %key.escape_ascii(), "etcd holds a record under a key that is not its own");
            None
        }
        Err(error) => {
            // Not the error's text: it may quote the value, and an epoch's value holds its secret.
            let (line, column) = (error.line(), error.column());
            tracing::warn!(key = %key.escape_ascii(), line, column, "etcd holds a value that is not a record");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formation::fixtures::{epoch_of, group_id, rank};

    fn put(fleet: &mut Fleet, key: &str, record: &impl serde::Serialize, mod_revision: i64) -> bool {
        let bytes = serde_json::to_vec(record).unwrap();
        apply(fleet, &keys(), key.as_bytes(), Some(Value { bytes: &bytes, mod_revision }))
    }

    fn keys() -> Keys {
        Keys::new("c").unwrap()
    }

    #[test]
    fn puts_and_deletes_fold_into_groups() {
        let mut fleet = Fleet::default();
        let record = rank("a", 0);
        let epoch = epoch_of(&[&record]);
        let (rank_key, epoch_key) = (keys().rank(&group_id(), &record.id), keys().epoch(&group_id()));
        assert!(put(&mut fleet, &rank_key, &record, 5));
        assert!(put(&mut fleet, &epoch_key, &epoch, 7));
        assert!(!put(&mut fleet, &rank_key, &record, 8), "nothing new");
        let group = &fleet.groups[&group_id()];
        assert_eq!(group.ranks[&record.id], record);
        assert_eq!(group.epoch, Some((Epoch(7), epoch)));

        assert!(apply(&mut fleet, &keys(), rank_key.as_bytes(), None));
        assert!(fleet.groups[&group_id()].ranks.is_empty());
        assert!(apply(&mut fleet, &keys(), epoch_key.as_bytes(), None));
        assert_eq!(fleet, Fleet::default());
    }

    #[test]
    fn routers_come_change_and_go() {
        let (mut routers, key) = (BTreeMap::new(), keys().router("r"));
        let mut put = |record: Option<&[u8]>| {
            let value = record.map(|bytes| Value { bytes, mod_revision: 3 });
            (apply_router(&mut routers, &keys(), key.as_bytes(), value), routers.len())
        };
        let record = serde_json::to_vec(&RouterRecord { arrivals: 7, ..RouterRecord::default() }).unwrap();
        assert_eq!(put(Some(&record)), (true, 1));
        assert_eq!(put(Some(&record)), (false, 1), "nothing new");
        assert_eq!(put(Some(b"not a record")), (true, 0));
        assert_eq!(put(None), (false, 0));
        assert!(!apply_router(&mut BTreeMap::new(), &keys(), keys().groups().as_bytes(), None));
    }

    #[test]
    fn what_is_not_a_record_is_taken_for_absent() {
        let mut fleet = Fleet::default();
        let record = rank("a", 0);
        let rank_key = keys().rank(&group_id(), &record.id);
        put(&mut fleet, &rank_key, &record, 5);
        assert!(put(&mut fleet, &rank_key, &"not a record", 6));
        assert_eq!(fleet, Fleet::default());

        let other_place = keys().rank(&group_id(), &rank("b", 0).id);
        assert!(!put(&mut fleet, &other_place, &record, 7));
        assert!(!put(&mut fleet, "/galerne/c/groups/g/unknown", &record, 8));
        assert!(!apply(&mut fleet, &keys(), b"\xff", None));
        assert_eq!(fleet, Fleet::default());
    }
}

//! The cluster as etcd holds it.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use etcd_client::{Compare, CompareOp, KeyValue, PutOptions, Txn, TxnOp};
use galerne_failpoint::{self as failpoint, Point};
use galerne_types::limits::PAST_EPOCHS_MAX;
use galerne_types::{
    Drain, Epoch, EpochRecord, Fleet, Group, GroupId, Hold, Past, RankId, RankRecord, RankState, RouterRecord,
};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tonic::transport::Channel;

use crate::access::EtcdAccess;
use crate::error::CoordError;
use crate::etcd::{Etcd, Listing, revision};
use crate::fleet::{fleet_of, follow};
use crate::formation::{Formation, formation};
use crate::keys::{Keys, check_name, check_rank};
use crate::limits::DEAD_TTL_S;
use crate::registration::Registration;
use crate::telling;
use crate::view::{self, Bans, Routers};

/// A cluster's records in etcd. Clones share one connection.
#[derive(Clone)]
pub struct Coord {
    pub(crate) etcd: Etcd,
    pub(crate) keys: Keys,
    pub(crate) fleet: Arc<OnceLock<watch::Receiver<Fleet>>>,
    pub(crate) routers: Arc<OnceLock<watch::Receiver<Routers>>>,
}

impl Coord {
    /// Connects to the members at `endpoints` (`HOST:PORT` or `http://HOST:PORT`) and makes sure that etcd
    /// answers within `timeout`.
    ///
    /// # Errors
    /// One sentence that names the endpoints, or the name that is no name.
    pub async fn connect(endpoints: &[String], cluster: &str, timeout: Duration) -> Result<Self, CoordError> {
        Self::connect_as(&EtcdAccess::default(), endpoints, cluster, timeout).await
    }

    /// Does the same under TLS (`HOST:PORT` or `https://HOST:PORT`), or with a name and a password.
    ///
    /// # Errors
    /// One sentence that names the endpoints, the file, or the name that is wrong.
    pub async fn connect_as(
        access: &EtcdAccess,
        endpoints: &[String],
        cluster: &str,
        timeout: Duration,
    ) -> Result<Self, CoordError> {
        let keys = Keys::new(cluster)?;
        let etcd = Etcd::connect(endpoints, access, keys.groups(), timeout).await?;
        Ok(Self { etcd, keys, fleet: Arc::default(), routers: Arc::default() })
    }

    /// Does the same over a channel that somebody else has made, to an etcd that wants to know nobody's name.
    ///
    /// # Errors
    /// One sentence: what the channel says, or the name that is no name.
    pub async fn over(channel: Channel, cluster: &str, timeout: Duration) -> Result<Self, CoordError> {
        let keys = Keys::new(cluster)?;
        let etcd = Etcd::over(channel, keys.groups(), timeout).await?;
        Ok(Self { etcd, keys, fleet: Arc::default(), routers: Arc::default() })
    }

    /// Registers a rank under a lease of its own, taking the place of an earlier process of the same id, and
    /// keeps the lease alive. `record.left` is set to the last epoch: this process is in none so far.
    ///
    /// # Errors
    /// When etcd cannot be reached, or a name cannot be part of a key.
    pub async fn register(&self, record: RankRecord) -> Result<Registration, CoordError> {
        check_name("group", &record.group.0)?;
        check_rank(&record.id)?;
        let prefix = self.keys.group(&record.group);
        let view = follow(self.etcd.clone(), self.keys.clone(), prefix, view::apply);
        Registration::new(self.clone(), view, record).await
    }

    /// Says of a dead process that it is dead, rather than that its lease ends some time, and takes the health of an epoch
    /// away that it was a member of. For the supervisor that saw it die.
    ///
    /// Returns false when process `pid` is not registered there.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn evict(&self, group: &GroupId, rank: &RankId, pid: u32) -> Result<bool, CoordError> {
        loop {
            let seen = self.group(group).await?;
            if let Some(evicted) = self.evict_as_seen(&seen, group, rank, pid).await? {
                return Ok(evicted);
            }
        }
    }

    /// The same by what was seen; `None` if that is not so any more. Survivors may have formed without the rank by now: the word of
    /// their leader stays.
    async fn evict_as_seen(
        &self,
        seen: &Seen,
        group: &GroupId,
        rank: &RankId,
        pid: u32,
    ) -> Result<Option<bool>, CoordError> {
        let record =
            seen.group.ranks.get(rank).filter(|record| record.pid == pid && record.state != RankState::Dead);
        let Some(record) = record else { return Ok(Some(false)) };
        let lease = self.etcd.lease(DEAD_TTL_S).await?;
        let (key, epoch_key) = (self.keys.rank(group, rank), self.keys.epoch(group));
        let dead = RankRecord { state: RankState::Dead, memory_bytes: 0, ..record.clone() };
        let mut ops = vec![TxnOp::put(&*key, json(&dead), Some(PutOptions::new().with_lease(lease)))];
        let mut members = seen.group.epoch.iter().flat_map(|(_, record)| &record.members);
        if members.any(|member| member.id == *rank && member.pid == pid) {
            ops.push(TxnOp::delete(self.keys.health(group), None));
        }
        let txn = Txn::new().when([seen.same_registration(&key), seen.unchanged(&epoch_key)]).and_then(ops);
        Ok(self.etcd.exchange("evict a rank", &txn).await?.succeeded().then_some(true))
    }

    /// Writes the group's next epoch if `me` is the rank to do so, when the group has been in need of it for `waited`: see
    /// [`formation`]. One transaction, which
    /// holds only if nobody else wrote an epoch meanwhile and every member's registration still stands; it
    /// takes the last epoch's health away. Its revision is the epoch.
    ///
    /// Returns `None` when there is nothing to write, or when another rank was faster.
    ///
    /// # Errors
    /// When etcd cannot be reached, or the system gives no random bytes.
    pub async fn propose(
        &self,
        group: &GroupId,
        me: &RankId,
        waited: Duration,
    ) -> Result<Option<(Epoch, EpochRecord)>, CoordError> {
        let seen = self.group(group).await?;
        let Some(formed) = formation(&seen.group, me, waited) else { return Ok(None) };
        let epoch_key = self.keys.epoch(group);
        let standing =
            formed.members.iter().map(|member| seen.same_registration(&self.keys.rank(group, &member.id)));
        let compares: Vec<Compare> = std::iter::once(seen.unchanged(&epoch_key)).chain(standing).collect();
        let record = next(&seen.group, group, formed, now_ms())?;
        let txn = Txn::new().when(compares).and_then([
            TxnOp::put(epoch_key, json(&record), None),
            TxnOp::delete(self.keys.health(group), None),
        ]);
        let answer = self.etcd.exchange("form a group", &txn).await?;
        if !answer.succeeded() {
            return Ok(None);
        }
        failpoint::meet(Point::Written);
        Ok(Some((Epoch(revision(&answer).unsigned_abs()), record)))
    }

    /// Asks a group to take nothing new, to finish what it has within `grace`, and to end: its ranks' processes exit.
    ///
    /// # Errors
    /// When etcd cannot be reached, or the name cannot be part of a key.
    pub async fn drain(&self, group: &GroupId, grace: Duration) -> Result<(), CoordError> {
        check_name("group", &group.0)?;
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let wish = TxnOp::put(self.keys.drain(group), json(&Drain { revision: 0, grace_ms }), None);
        self.etcd.txn("drain a group", &Txn::new().and_then([wish])).await.map(drop)
    }

    /// Takes the wish back, and forgets the group if no rank of it is left.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn drained(&self, group: &GroupId) -> Result<(), CoordError> {
        let seen = self.group(group).await?;
        let (drain, epoch) = (self.keys.drain(group), self.keys.epoch(group));
        let forget = [TxnOp::delete(drain, None), TxnOp::delete(self.keys.hold(group), None)];
        let gone = seen.group.ranks.values().all(|rank| rank.state == RankState::Dead);
        let txn = match gone {
            true => Txn::new()
                .when([seen.unchanged(&epoch)])
                .and_then([&forget[..], &[TxnOp::delete(epoch, None)]].concat())
                .or_else(forget),
            false => Txn::new().and_then(forget),
        };
        self.etcd.txn("forget a drained group", &txn).await.map(drop)
    }

    /// Asks routers to give a group no requests, whether it is there yet or not, and says `why`; or takes that back.
    ///
    /// # Errors
    /// When etcd cannot be reached, or the name cannot be part of a key.
    pub async fn hold(&self, group: &GroupId, why: Option<&str>) -> Result<(), CoordError> {
        check_name("group", &group.0)?;
        let key = self.keys.hold(group);
        let wish = match why {
            Some(why) => TxnOp::put(key, json(&Hold { why: why.to_owned() }), None),
            None => TxnOp::delete(key, None),
        };
        self.etcd.txn("hold a group", &Txn::new().and_then([wish])).await.map(drop)
    }

    /// The fleet as it is now.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn fleet(&self) -> Result<Fleet, CoordError> {
        Ok(fleet_of(&self.keys, &self.etcd.list(self.keys.groups()).await?))
    }

    /// Makes sure that etcd answers and has a quorum, by a read of one key, however large the fleet is.
    ///
    /// # Errors
    /// When etcd cannot be reached.
    pub async fn answers(&self) -> Result<(), CoordError> {
        self.etcd.probe(self.keys.groups()).await
    }

    /// The fleet as it becomes. The first change is the first listing; while etcd is away, the last view
    /// stays. All callers share one watch. Must be called within a tokio runtime.
    pub fn watch_fleet(&self) -> watch::Receiver<Fleet> {
        let (etcd, keys) = (self.etcd.clone(), self.keys.clone());
        let start = || follow(etcd, keys, self.keys.groups().to_owned(), view::apply);
        self.fleet.get_or_init(start).clone()
    }

    /// What the routers tell of their requests, by the routers' names, as it becomes. The first change is the first listing.
    /// Must be called within a tokio runtime.
    pub fn watch_routers(&self) -> watch::Receiver<Routers> {
        let (etcd, keys) = (self.etcd.clone(), self.keys.clone());
        let start = || follow(etcd, keys, self.keys.routers().to_owned(), view::apply_router);
        self.routers.get_or_init(start).clone()
    }

    /// Tells what router `name` counts, under a lease, as `records` changes, until its sender is dropped. Whatever etcd does,
    /// this goes on.
    ///
    /// # Errors
    /// When the name cannot be part of a key.
    pub async fn tell(&self, name: &str, records: watch::Receiver<RouterRecord>) -> Result<(), CoordError> {
        check_name("router", name)?;
        telling::keep(self, &self.keys.router(name), records).await;
        Ok(())
    }

    /// Digests of the requests that routers have [banned](Self::tell_bans), as it becomes. The first change is the first listing.
    /// Must be called within a tokio runtime.
    pub fn watch_bans(&self) -> watch::Receiver<Bans> {
        let prefix = self.keys.bans().to_owned();
        follow(self.etcd.clone(), self.keys.clone(), prefix, view::apply_ban)
    }

    /// Shows all routers that requests are refused, as their digests come, each for so many seconds, until the sender is
    /// dropped. One that etcd does not take is lost: only whoever sent it refuses it.
    pub async fn tell_bans(&self, mut digests: mpsc::Receiver<String>, seconds: i64) {
        while let Some(digest) = digests.recv().await {
            if let Err(error) = self.ban(&digest, seconds).await {
                tracing::warn!(%error, "the other routers are not told of a request on which groups were lost");
            }
        }
    }

    async fn ban(&self, digest: &str, seconds: i64) -> Result<(), CoordError> {
        check_name("digest", digest)?;
        let lease = self.etcd.lease(seconds).await?;
        let put = TxnOp::put(self.keys.ban(digest), [], Some(PutOptions::new().with_lease(lease)));
        self.etcd.txn("ban a request", &Txn::new().and_then([put])).await.map(drop)
    }

    pub(crate) async fn group(&self, group: &GroupId) -> Result<Seen, CoordError> {
        let listing = self.etcd.list(&self.keys.group(group)).await?;
        let group = fleet_of(&self.keys, &listing).groups.remove(group).unwrap_or_default();
        Ok(Seen { group, listing })
    }
}

/// The record of a group's next epoch.
fn next(seen: &Group, group: &GroupId, formed: Formation, now_ms: u64) -> Result<EpochRecord, CoordError> {
    let Formation { shards, members, loss } = formed;
    let (mut past, mut reformations) = (Vec::new(), BTreeMap::new());
    if let Some(((epoch, before), loss)) = seen.epoch.as_ref().zip(loss) {
        (past, reformations) = (before.past.clone(), before.reformations.clone());
        *reformations.entry(loss.kind).or_default() += 1;
        let ranks = before.shards.world_size() as u16;
        past.push(Past { epoch: *epoch, ranks, began_ms: before.began_ms, ended_ms: now_ms, loss });
        past.drain(..past.len().saturating_sub(PAST_EPOCHS_MAX));
    }
    Ok(EpochRecord {
        began_ms: now_ms,
        past,
        reformations,
        ..EpochRecord::new(group.clone(), shards, members, secret()?)
    })
}

/// Unix time by this machine's clock.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A group at one moment, with what a transaction compares.
pub(crate) struct Seen {
    pub(crate) group: Group,
    pub(crate) listing: Listing,
}

impl Seen {
    /// Holds while the rank of `key` is registered as it was seen: every registration has a lease of its own,
    /// and updates keep it.
    pub(crate) fn same_registration(&self, key: &str) -> Compare {
        Compare::lease(key, CompareOp::Equal, self.lease(key))
    }

    /// What `key` hangs on; 0 if that is nothing, or if it is absent.
    pub(crate) fn lease(&self, key: &str) -> i64 {
        self.find(key).map_or(0, KeyValue::lease)
    }

    /// Holds while `key` is as it was seen.
    pub(crate) fn unchanged(&self, key: &str) -> Compare {
        Compare::mod_revision(key, CompareOp::Equal, self.modified(key))
    }

    /// Revision at which `key` was last written; 0 if it is absent, which is what etcd compares it to.
    pub(crate) fn modified(&self, key: &str) -> i64 {
        self.find(key).map_or(0, KeyValue::mod_revision)
    }

    fn find(&self, key: &str) -> Option<&KeyValue> {
        self.listing.kvs.iter().find(|kv| kv.key() == key.as_bytes())
    }
}

/// A record as etcd holds it.
pub(crate) fn json(record: &impl Serialize) -> Vec<u8> {
    // Records are structs of plain fields and string keys: JSON has a form for all of them.
    serde_json::to_vec(record).expect("a record has a JSON form")
}

fn secret() -> Result<String, CoordError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use galerne_types::{Health, Loss, LossKind};
    use tokio::net::TcpListener;

    use super::*;
    use crate::formation::fixtures::{group_id, rank};

    /// A cluster in an embedded store of its own.
    pub(crate) async fn connected() -> Coord {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoints = [listener.local_addr().unwrap().to_string()];
        tokio::spawn(crate::embedded::serve(listener, std::future::pending()));
        Coord::connect(&endpoints, "c", Duration::from_secs(5)).await.unwrap()
    }

    #[tokio::test]
    async fn who_evicts_late_leaves_the_survivors_word_alone() {
        let coord = connected().await;
        let (group, living, dead) = (group_id(), rank("a", 0), rank("b", 0));
        let dying = coord.register(dead.clone()).await.unwrap();
        let survivor = coord.register(living.clone()).await.unwrap();
        let (first, _) = tokio::join!(survivor.form(), dying.form());
        let first = first.unwrap().epoch;
        let seen = coord.group(&group).await.unwrap();
        survivor.leave(first, Loss { kind: LossKind::Died, rank: Some(dead.id.clone()) });
        let alone = survivor.form().await.unwrap();
        let health = Health {
            group: group.clone(),
            epoch: alone.epoch,
            leader: living.address,
            model: living.model,
            kv_blocks: 1,
            sequences_max: 1,
            step_tokens_max: 1,
            draining: false,
        };
        survivor.declare(health.clone()).await.unwrap();

        assert_eq!(coord.evict_as_seen(&seen, &group, &dead.id, dead.pid).await.unwrap(), None);
        assert!(coord.evict(&group, &dead.id, dead.pid).await.unwrap());
        assert_eq!(coord.fleet().await.unwrap().groups[&group].health, Some(health));
    }
}

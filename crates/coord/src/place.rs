//! A rank's keys in etcd and the lease that they hang on; the task that keeps them true.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use etcd_client::{Client, Compare, CompareOp, Error as EtcdError, PutOptions, Txn, TxnOp, TxnOpResponse};
use galerne_types::{Epoch, Health, RankRecord};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::coord::{Coord, Seen, json};
use crate::error::CoordError;
use crate::etcd::is_not_found;
use crate::limits::{KEEP_ALIVE_INTERVAL, LEASE_TTL_S};

/// What the keeper and its callers share.
pub(crate) struct Place {
    pub(crate) coord: Coord,
    rank_key: String,
    epoch_key: String,
    health_key: String,
    state: Mutex<State>,
    /// Held while etcd is told: an answer then says what etcd holds.
    turn: AsyncMutex<()>,
    changed: Notify,
    pub(crate) replaced: CancellationToken,
}

struct State {
    lease: i64,
    /// Revision at which this process came.
    arrived: u64,
    record: RankRecord,
    /// etcd does not hold `record` yet.
    record_is_news: bool,
    health: Option<Health>,
    /// etcd does not know yet that `health` is declared, or that it is withdrawn.
    health_is_news: bool,
}

/// Whether a process comes or comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arrival {
    First,
    Again,
}

/// Whether the rank's key hangs on the rank's lease.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    Held,
    Lost,
}

impl Place {
    /// Registers `record`, in place of whoever held its key.
    pub(crate) async fn take(coord: Coord, record: RankRecord) -> Result<Self, CoordError> {
        let place = Self {
            rank_key: coord.keys.rank(&record.group, &record.id),
            epoch_key: coord.keys.epoch(&record.group),
            health_key: coord.keys.health(&record.group),
            coord,
            state: Mutex::new(State {
                lease: 0,
                arrived: 0,
                record,
                record_is_news: true,
                health: None,
                health_is_news: false,
            }),
            turn: AsyncMutex::default(),
            changed: Notify::new(),
            replaced: CancellationToken::new(),
        };
        place.register(Arrival::First).await?;
        Ok(place)
    }

    /// Renews the lease and writes what is new, for ever, or until another process holds the place.
    pub(crate) async fn keep(self: Arc<Self>) {
        let mut ticks = interval(KEEP_ALIVE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut away = false;
        loop {
            let is_tick = tokio::select! {
                _ = ticks.tick() => true,
                () = self.changed.notified() => false,
            };
            let kept = self.attend(is_tick).await;
            match &kept {
                Err(CoordError::Replaced { .. }) => return self.replaced.cancel(),
                Err(error) if !away => tracing::warn!(%error, "the registration is at risk"),
                Ok(()) if away => tracing::info!("the registration stands again"),
                _ => {}
            }
            away = kept.is_err();
        }
    }

    /// The lease that the rank hangs on.
    pub(crate) fn lease(&self) -> i64 {
        self.state().lease
    }

    /// Revision at which this process came.
    pub(crate) fn arrival(&self) -> u64 {
        self.state().arrived
    }

    pub(crate) fn record(&self) -> RankRecord {
        self.state().record.clone()
    }

    /// Changes what etcd should hold, and has it written.
    pub(crate) fn change(&self, change: impl FnOnce(&mut RankRecord, &mut Option<Health>)) {
        let state = &mut *self.state();
        let (record, health) = (state.record.clone(), state.health.clone());
        change(&mut state.record, &mut state.health);
        state.record_is_news |= state.record != record;
        state.health_is_news |= state.health != health;
        if state.record_is_news || state.health_is_news {
            self.changed.notify_one();
        }
    }

    /// Writes the leader's word, now and again under a new lease. It is noted first, so that whatever becomes of
    /// this call, what etcd may hold will be put right.
    pub(crate) async fn declare(&self, health: Health) -> Result<(), CoordError> {
        self.change(|_, declared| *declared = Some(health.clone()));
        let _turn = self.turn.lock().await;
        let written = self.write_health(&health).await;
        match &written {
            Ok(()) => self.told(&health, Some(&health)),
            Err(_) => self.change(|_, declared| *declared = None),
        }
        written
    }

    /// Revokes the lease; one that is gone already is no error.
    pub(crate) async fn give_up(&self) -> Result<(), CoordError> {
        let lease = self.state().lease;
        let revoke = |mut client: Client| async move {
            match client.lease_revoke(lease).await {
                Err(EtcdError::GRpcStatus(status)) if is_not_found(&status) => Ok(()),
                other => other.map(drop),
            }
        };
        self.coord.etcd.call("give a lease up", revoke).await
    }

    pub(crate) fn replaced_error(&self) -> CoordError {
        let RankRecord { group, id: rank, .. } = self.record();
        CoordError::Replaced { group, rank }
    }

    async fn attend(&self, is_tick: bool) -> Result<(), CoordError> {
        let _turn = self.turn.lock().await;
        let hold = if is_tick { self.renew().await? } else { Hold::Held };
        if hold == Hold::Lost || self.write().await? == Hold::Lost {
            self.register(Arrival::Again).await?;
        }
        Ok(())
    }

    /// Registers under a new lease. The transaction compares what was seen, so that neither an epoch nor
    /// another process can come between; if one did, it looks again.
    async fn register(&self, arrival: Arrival) -> Result<(), CoordError> {
        let etcd = &self.coord.etcd;
        let group = self.record().group;
        let grant = |mut client: Client| async move { client.lease_grant(LEASE_TTL_S, None).await };
        let lease = etcd.call("get a lease", grant).await?.id();
        loop {
            let seen = self.coord.group(&group).await?;
            if arrival == Arrival::Again && self.is_taken(&seen) {
                return Err(self.replaced_error());
            }
            let record = self.arriving(arrival, &seen);
            let unchanged = [&self.epoch_key, &self.rank_key]
                .map(|key| Compare::mod_revision(&**key, CompareOp::Equal, seen.modified(key)));
            let txn = Txn::new().when(unchanged).and_then([put(&self.rank_key, json(&record), lease)]);
            let answer = etcd.txn("register a rank", &txn).await?;
            if answer.succeeded() {
                self.arrived(lease, &record);
                if arrival == Arrival::First {
                    self.state().arrived =
                        answer.header().map_or(0, |header| header.revision().unsigned_abs());
                }
                return self.write().await.map(drop);
            }
        }
    }

    /// Whether another process is registered in this place.
    fn is_taken(&self, seen: &Seen) -> bool {
        let mine = self.record();
        let holder = seen.group.ranks.get(&mine.id);
        holder.is_some_and(|holder| holder.pid != mine.pid || holder.address != mine.address)
    }

    /// The record to register with.
    fn arriving(&self, arrival: Arrival, seen: &Seen) -> RankRecord {
        let record = &mut self.state().record;
        // A store that was wiped counts from 1 again: no epoch of the old count will come back.
        let wiped = seen.listing.revision.unsigned_abs() < record.left.0;
        if arrival == Arrival::First || wiped {
            // This process is in no epoch that was there before it.
            record.left = Epoch(seen.modified(&self.epoch_key).unsigned_abs());
        }
        record.clone()
    }

    fn arrived(&self, lease: i64, record: &RankRecord) {
        let state = &mut *self.state();
        state.lease = lease;
        state.record_is_news = state.record != *record;
        // The old lease took the old word with it.
        state.health_is_news = state.health.is_some();
    }

    async fn renew(&self) -> Result<Hold, CoordError> {
        let lease = self.state().lease;
        Ok(if self.coord.etcd.renew_lease(lease).await? { Hold::Held } else { Hold::Lost })
    }

    /// Sees to it that the rank's key still hangs on the lease, and writes what is new.
    async fn write(&self) -> Result<Hold, CoordError> {
        let (lease, news, record) = {
            let state = self.state();
            (state.lease, state.record_is_news, state.record.clone())
        };
        let puts = if news { vec![put(&self.rank_key, json(&record), lease)] } else { Vec::new() };
        let txn = Txn::new().when([self.hold(lease)]).and_then(puts);
        if !self.coord.etcd.txn("update a rank", &txn).await?.succeeded() {
            return Ok(Hold::Lost);
        }
        let (health, news) = {
            let state = &mut *self.state();
            state.record_is_news = state.record != record;
            (state.health.clone(), state.health_is_news)
        };
        match health {
            _ if !news => {}
            None => self.delete_health().await?,
            Some(health) => match self.write_health(&health).await {
                Ok(()) => self.told(&health, Some(&health)),
                Err(CoordError::Superseded { .. }) => self.told(&health, None),
                Err(CoordError::Unregistered { .. }) => return Ok(Hold::Lost),
                Err(error) => return Err(error),
            },
        }
        Ok(Hold::Held)
    }

    /// Writes a leader's word, if its epoch is the last one and the rank's lease holds.
    async fn write_health(&self, health: &Health) -> Result<(), CoordError> {
        let lease = self.state().lease;
        let epoch = i64::try_from(health.epoch.0).unwrap_or(i64::MAX);
        let last = Compare::mod_revision(&*self.epoch_key, CompareOp::Equal, epoch);
        let txn = Txn::new()
            .when([last, self.hold(lease)])
            .and_then([put(&self.health_key, json(health), lease)])
            .or_else([TxnOp::get(&*self.epoch_key, None)]);
        let answer = self.coord.etcd.txn("declare a group's health", &txn).await?;
        if answer.succeeded() {
            return Ok(());
        }
        let responses = answer.op_responses();
        let last = match responses.first() {
            Some(TxnOpResponse::Get(get)) => get.kvs().first().map_or(0, |kv| kv.mod_revision()),
            _ => 0,
        };
        let RankRecord { group, id: rank, .. } = self.record();
        Err(if last == epoch {
            CoordError::Unregistered { group, rank }
        } else {
            CoordError::Superseded { group, epoch: health.epoch }
        })
    }

    /// Deletes the leader's word if it is this rank's.
    async fn delete_health(&self) -> Result<(), CoordError> {
        let mine = Compare::lease(&*self.health_key, CompareOp::Equal, self.state().lease);
        let txn = Txn::new().when([mine]).and_then([TxnOp::delete(&*self.health_key, None)]);
        self.coord.etcd.txn("withdraw a group's health", &txn).await?;
        let mut state = self.state();
        state.health_is_news = state.health.is_some();
        Ok(())
    }

    /// etcd holds `now` where `before` was to be written; if there is nothing newer, that is that.
    fn told(&self, before: &Health, now: Option<&Health>) {
        let state = &mut *self.state();
        if state.health.as_ref() == Some(before) {
            state.health = now.cloned();
            state.health_is_news = false;
        }
    }

    fn hold(&self, lease: i64) -> Compare {
        Compare::lease(&*self.rank_key, CompareOp::Equal, lease)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No holder of the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put(key: &str, value: Vec<u8>, lease: i64) -> TxnOp {
    TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coord::tests::connected;
    use crate::formation::fixtures::{group_id, rank};

    #[tokio::test]
    async fn an_epoch_that_is_left_while_its_rank_registers_again_is_told() {
        let coord = connected().await;
        let place = Place::take(coord.clone(), rank("a", 0)).await.unwrap();
        let (told, lease) = (place.record(), place.lease());
        place.change(|record, _| record.left = Epoch(9));
        place.arrived(lease, &told);
        assert!(place.write().await.unwrap() == Hold::Held);
        let group = coord.fleet().await.unwrap().groups.remove(&group_id()).unwrap();
        assert_eq!(group.ranks[&told.id].left, Epoch(9));
    }
}

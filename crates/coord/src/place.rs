//! A rank's keys in etcd and the lease that they hang on; the task that keeps them true.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use etcd_client::{
    Client, Compare, CompareOp, Error as EtcdError, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
    TxnResponse,
};
use galerne_types::{Epoch, Health, RankRecord};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::coord::{Coord, Seen, json};
use crate::error::CoordError;
use crate::etcd::{is_not_found, revision};
use crate::formation::ended;
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
    /// Revision of what etcd holds under the rank's key.
    record_at: i64,
    health: Option<Health>,
    /// etcd does not know yet that `health` is declared, or that it is withdrawn.
    health_is_news: bool,
    /// Revision of the word that etcd was told last.
    health_at: i64,
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
                record_at: 0,
                health: None,
                health_is_news: false,
                health_at: 0,
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
            Ok(revision) => self.told(&health, Some(*revision)),
            Err(_) => self.change(|_, declared| *declared = None),
        }
        written.map(drop)
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
        self.coord.etcd.ask("give a lease up", revoke).await
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
        let lease = etcd.lease(LEASE_TTL_S).await?;
        loop {
            let seen = self.coord.group(&group).await?;
            if arrival == Arrival::Again && self.is_taken(&seen) {
                return Err(self.replaced_error());
            }
            let record = self.arriving(arrival, &seen);
            let unchanged = [&self.epoch_key, &self.rank_key].map(|key| seen.unchanged(key));
            let txn = Txn::new().when(unchanged).and_then([put(&self.rank_key, json(&record), lease)]);
            let answer = etcd.exchange("register a rank", &txn).await?;
            if answer.succeeded() {
                self.arrived(arrival, lease, &record, revision(&answer));
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

    fn arrived(&self, arrival: Arrival, lease: i64, record: &RankRecord, revision: i64) {
        let state = &mut *self.state();
        if arrival == Arrival::First {
            state.arrived = revision.unsigned_abs();
        }
        (state.lease, state.record_at) = (lease, revision);
        state.record_is_news = state.record != *record;
        // The old lease took the old word with it.
        state.health_is_news = state.health.is_some();
    }

    async fn renew(&self) -> Result<Hold, CoordError> {
        let lease = self.state().lease;
        Ok(if self.coord.etcd.renew_lease(lease).await? { Hold::Held } else { Hold::Lost })
    }

    /// Sees to it that the rank's key still hangs on the lease and that etcd holds what it was told, and writes what is new.
    async fn write(&self) -> Result<Hold, CoordError> {
        loop {
            let (record, txn) = self.update();
            let answer = self.coord.etcd.exchange("update a rank", &txn).await?;
            if answer.succeeded() {
                self.updated(&record, &answer);
                return self.write_word().await;
            }
            if self.look(&answer) == Hold::Lost {
                return Ok(Hold::Lost);
            }
        }
    }

    /// The record, and a transaction that writes it if it is news, while etcd holds what it was told.
    fn update(&self) -> (RankRecord, Txn) {
        let state = self.state();
        let at = |key: &str, revision| Compare::mod_revision(key, CompareOp::Equal, revision);
        let lease = Compare::lease(&*self.rank_key, CompareOp::Equal, state.lease);
        let mut as_told = vec![lease, at(&self.rank_key, state.record_at)];
        if state.health.is_some() && !state.health_is_news {
            as_told.push(at(&self.health_key, state.health_at));
        }
        let news = state.record_is_news.then(|| put(&self.rank_key, json(&state.record), state.lease));
        let keys = [&self.rank_key, &self.health_key].map(|key| TxnOp::get(&**key, None));
        (state.record.clone(), Txn::new().when(as_told).and_then(Vec::from_iter(news)).or_else(keys))
    }

    /// Takes note that etcd holds `record`.
    fn updated(&self, record: &RankRecord, answer: &TxnResponse) {
        let state = &mut *self.state();
        if !answer.op_responses().is_empty() {
            state.record_at = revision(answer);
        }
        state.record_is_news = state.record != *record;
    }

    /// Takes note of what etcd holds instead of what it was told: an answer may have been lost, or etcd has lost its last
    /// writes, or was put back to an earlier state, or somebody took the leader's word away.
    fn look(&self, answer: &TxnResponse) -> Hold {
        let responses = answer.op_responses();
        let mut found = responses.iter().map(|response| match response {
            TxnOpResponse::Get(get) => get.kvs().first(),
            _ => None,
        });
        let (rank, health) = (found.next().flatten(), found.next().flatten());
        let state = &mut *self.state();
        let Some(rank) = rank.filter(|rank| rank.lease() == state.lease) else { return Hold::Lost };
        if rank.mod_revision() != state.record_at {
            tracing::info!(rank = %state.record.id, "etcd holds another record of this rank; it is told again");
            (state.record_at, state.record_is_news) = (rank.mod_revision(), true);
        }
        let word_at = health.map_or(0, KeyValue::mod_revision);
        state.health_is_news |= state.health.is_some() && word_at != state.health_at;
        Hold::Held
    }

    /// Writes the leader's word if it is news.
    async fn write_word(&self) -> Result<Hold, CoordError> {
        let (health, news) = {
            let state = self.state();
            (state.health.clone(), state.health_is_news)
        };
        match health {
            _ if !news => {}
            None => self.delete_health().await?,
            Some(health) => match self.write_health(&health).await {
                Ok(revision) => self.told(&health, Some(revision)),
                Err(CoordError::Over { .. }) => self.told(&health, None),
                Err(CoordError::Unregistered { .. }) => return Ok(Hold::Lost),
                Err(error) => return Err(error),
            },
        }
        Ok(Hold::Held)
    }

    /// Writes a leader's word, if its epoch is the last one and goes on, and the rank's lease holds. Returns its revision.
    async fn write_health(&self, health: &Health) -> Result<i64, CoordError> {
        let (RankRecord { group, id: rank, .. }, lease) = (self.record(), self.lease());
        loop {
            let seen = self.coord.group(&group).await?;
            if let Some(ended) = ended(&seen.group, health.epoch, &rank) {
                return Err(CoordError::Over { group, epoch: health.epoch, ended });
            }
            if seen.lease(&self.rank_key) != lease {
                return Err(CoordError::Unregistered { group, rank });
            }
            let members = seen.group.epoch.iter().flat_map(|(_, record)| &record.members);
            let standing =
                members.map(|member| seen.same_registration(&self.coord.keys.rank(&group, &member.id)));
            let unchanged = [&self.epoch_key, &self.health_key].map(|key| seen.unchanged(key));
            let word = put(&self.health_key, json(health), lease);
            let txn = Txn::new().when(Vec::from_iter(standing.chain(unchanged))).and_then([word]);
            let answer = self.coord.etcd.exchange("declare a group's health", &txn).await?;
            if answer.succeeded() {
                return Ok(revision(&answer));
            }
        }
    }

    /// Deletes the leader's word if it is this rank's.
    async fn delete_health(&self) -> Result<(), CoordError> {
        let (group, lease) = (self.record().group, self.lease());
        loop {
            let seen = self.coord.group(&group).await?;
            if seen.lease(&self.health_key) != lease {
                break;
            }
            let delete = TxnOp::delete(&*self.health_key, None);
            let txn = Txn::new().when([seen.unchanged(&self.health_key)]).and_then([delete]);
            if self.coord.etcd.exchange("withdraw a group's health", &txn).await?.succeeded() {
                break;
            }
        }
        let mut state = self.state();
        state.health_is_news = state.health.is_some();
        Ok(())
    }

    /// etcd holds `word` since that revision, or does not take it; if there is nothing newer, that is that.
    fn told(&self, word: &Health, at: Option<i64>) {
        let state = &mut *self.state();
        if state.health.as_ref() == Some(word) {
            match at {
                Some(revision) => state.health_at = revision,
                None => state.health = None,
            }
            state.health_is_news = false;
        }
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
        let (told, lease, at) = (place.record(), place.lease(), place.state().record_at);
        place.change(|record, _| record.left = Epoch(9));
        place.arrived(Arrival::Again, lease, &told, at);
        assert!(place.write().await.unwrap() == Hold::Held);
        let group = coord.fleet().await.unwrap().groups.remove(&group_id()).unwrap();
        assert_eq!(group.ranks[&told.id].left, Epoch(9));
    }
}

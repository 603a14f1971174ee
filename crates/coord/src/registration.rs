//! A rank's place in the cluster: held under a lease, kept by a task.

use std::sync::Arc;
use std::time::Duration;

use galerne_types::{Epoch, EpochRecord, Fleet, Group, Health, Loss, LossKind, RankRecord, RankState};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::coord::Coord;
use crate::error::CoordError;
use crate::formation::{Ended, Need, ended, formation, missed, need};
use crate::limits::LOOK_INTERVAL;
use crate::place::Place;

/// A registered rank. A task renews the lease, writes changes, and registers anew when the lease was lost.
/// Dropped without [`close`](Self::close), it ends with its lease.
pub struct Registration {
    place: Arc<Place>,
    view: watch::Receiver<Fleet>,
    keeper: AbortOnDropHandle<()>,
}

/// An epoch that this process is a member of.
#[derive(Clone, Debug, PartialEq)]
pub struct Formed {
    /// Its number.
    pub epoch: Epoch,
    /// Its members and its secret.
    pub record: EpochRecord,
    /// This process's index among the members; 0 leads.
    pub rank: usize,
}

impl Registration {
    pub(crate) async fn new(
        coord: Coord,
        view: watch::Receiver<Fleet>,
        record: RankRecord,
    ) -> Result<Self, CoordError> {
        let place = Arc::new(Place::take(coord, record).await?);
        let keeper = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&place).keep()));
        Ok(Self { place, view, keeper })
    }

    /// Tells what the rank is doing. Written soon; of several changes the last one counts.
    pub fn update(&self, state: RankState, memory_bytes: u64) {
        self.place.change(|record, _| {
            record.state = state;
            record.memory_bytes = memory_bytes;
        });
    }

    /// Waits, for as long as it takes, for an epoch that stands, that this process is a member of, and that
    /// is newer than every one it has left. Writes the epoch itself when that is this rank's part.
    ///
    /// # Errors
    /// Only [`CoordError::Replaced`].
    pub async fn form(&self) -> Result<Formed, CoordError> {
        let mut view = self.view.clone();
        let mut backoff = Backoff::new();
        // Under another lease it waits anew: etcd was away, and others may not be back yet.
        let mut needed: (Option<(Need, Option<Epoch>, i64)>, Instant) = (None, Instant::now());
        loop {
            let me = self.place.record();
            let group = last(&mut view, &me);
            if let Some(formed) = membership(&group, &me) {
                return Ok(formed);
            }
            if let Some(epoch) = missed(&group, &me) {
                self.leave(epoch, Loss { kind: LossKind::Failed, rank: None });
            }
            let now = need(&group)
                .map(|need| (need, group.epoch.as_ref().map(|(epoch, _)| *epoch), self.place.lease()));
            if now != needed.0 {
                needed = (now, Instant::now());
            }
            let waited = needed.1.elapsed();
            let campaigns = formation(&group, &me.id, waited).is_some();
            if campaigns && let Err(error) = self.place.coord.propose(&me.group, &me.id, waited).await {
                tracing::warn!(%error, group = %me.group, "the group cannot be formed yet");
            }
            tokio::select! {
                Ok(()) = view.changed() => {}
                () = sleep(if campaigns { backoff.pause() } else { LOOK_INTERVAL }), if now.is_some() => {}
                () = self.replaced() => return Err(self.place.replaced_error()),
            }
        }
    }

    /// Waits until `epoch`, of which this process is a member, is over.
    pub async fn ended(&self, epoch: Epoch) -> Ended {
        let mut view = self.view.clone();
        let me = self.place.record();
        loop {
            if let Some(reason) = ended(&last(&mut view, &me), epoch, &me.id) {
                return reason;
            }
            if view.changed().await.is_err() {
                return Ended::Forgotten;
            }
        }
    }

    /// Waits until somebody wants this rank's group to end; says how long running answers may take.
    pub async fn drained(&self) -> Duration {
        let mut view = self.view.clone();
        let me = self.place.record();
        loop {
            let wish = last(&mut view, &me).drain.filter(|drain| drain.revision > self.place.arrival());
            if let Some(drain) = wish {
                return Duration::from_millis(drain.grace_ms);
            }
            if view.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Gives `epoch` up: its health is withdrawn, the rank waits, and the group must form again. A rank that
    /// cannot join should pause before it leaves: each leave makes the others form anew.
    pub fn leave(&self, epoch: Epoch, loss: Loss) {
        self.place.change(|record, health| {
            record.state = RankState::Waiting;
            record.left = record.left.max(epoch);
            record.loss = Some(loss);
            *health = None;
        });
    }

    /// The leader's word that its group serves, under this rank's lease. It is kept up when the lease is lost
    /// and renewed, until the rank [leaves](Self::leave) the epoch.
    ///
    /// # Errors
    /// [`CoordError::Over`] when `health.epoch` is not the group's last one or cannot go on,
    /// [`CoordError::Unregistered`] when the lease is lost, and when etcd cannot be reached.
    pub async fn declare(&self, health: Health) -> Result<(), CoordError> {
        self.place.declare(health).await
    }

    /// Waits until another process has taken this rank's place: time to end.
    pub async fn replaced(&self) {
        self.place.replaced.cancelled().await;
    }

    /// Gives the lease up: the rank and its health are gone at once.
    ///
    /// # Errors
    /// When etcd cannot be reached; the lease ends by itself then.
    pub async fn close(self) -> Result<(), CoordError> {
        self.keeper.abort();
        self.place.give_up().await
    }
}

/// The group of `me` as seen last.
fn last(view: &mut watch::Receiver<Fleet>, me: &RankRecord) -> Group {
    view.borrow_and_update().groups.get(&me.group).cloned().unwrap_or_default()
}

/// The last epoch, if it stands and `me` is in it.
pub(crate) fn membership(group: &Group, me: &RankRecord) -> Option<Formed> {
    let (epoch, record) = group.epoch.as_ref().filter(|_| group.stands())?;
    let rank = record.members.iter().position(|member| member.is(me))?;
    (me.left < *epoch).then(|| Formed { epoch: *epoch, record: record.clone(), rank })
}

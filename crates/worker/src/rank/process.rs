//! A rank's life after its registration: one epoch after the other.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use galerne_coord::limits::GONE_AFTER;
use galerne_coord::{CoordError, Ended, Formed, Registration};
use galerne_failpoint::{self as failpoint, Point};
use galerne_sched::Scheduler;
use galerne_tls::Way;
use galerne_types::{Epoch, EpochRecord, Fleet, Health, Loss, LossKind, Member, ModelCard, RankState};
use galerne_wire::v1::engine_server::EngineServer;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic_health::server::HealthReporter;
use tracing::Span;

use super::compute::{Compute, Engaged, Phase, Steps};
use super::desk::Desk;
use super::door::Door;
use super::engine::{CALLS_MAX, Call, EngineService, Inbox};
use super::error::EpochError;
use super::follower::{Seat, follow};
use super::followers::Followers;
use super::leader::Leader;
use super::neighbours::silence;
use super::setup::Setup;
use super::trace;
use crate::backoff::Backoff;
use crate::error::WorkerError;
use crate::supervisor::COORD_TIMEOUT;

/// How long the compute thread may take to let go of an epoch that was aborted. One that takes longer hangs
/// where no abort reaches it: the process must end.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(15);

/// Pause between two reports of progress, so that etcd is not flooded.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// A rank that has been in no epoch for so long is a spare.
const STAND_BY_AFTER: Duration = Duration::from_secs(2);

/// How often a rank that does nothing new reports its memory.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// A registered rank process.
pub(crate) struct Process {
    pub(crate) setup: Arc<Setup>,
    /// `IP:PORT` of its gRPC server.
    pub(crate) address: String,
    pub(crate) registration: Registration,
    pub(crate) fleet: watch::Receiver<Fleet>,
    /// How it calls other ranks.
    pub(crate) way: Way,
    pub(crate) compute: Compute,
    pub(crate) desk: Desk,
    pub(crate) engine_door: Door<Inbox>,
    pub(crate) rank_door: Door<Seat>,
    pub(crate) health: HealthReporter,
    /// How much memory it has resident, in bytes.
    pub(crate) memory: fn() -> u64,
}

/// Why an epoch ended here.
enum End {
    /// The group has gone on without it, or cannot go on with it.
    Over(Ended),
    /// It failed at this rank.
    Failed(EpochError),
}

impl Process {
    /// Serves epochs until the group is drained; returns only what must end the process.
    pub(crate) async fn live(&self) -> WorkerError {
        let (mut backoff, mut left) = (Backoff::new(), None);
        loop {
            let formed = tokio::select! {
                biased;
                _ = self.registration.drained() => return WorkerError::Drained,
                () = self.named_slow(left) => return WorkerError::Slow,
                formed = self.registration.form() => formed,
                never = self.stand_by() => match never {},
            };
            let formed = match formed {
                Ok(formed) => formed,
                Err(error) => return error.into(),
            };
            let epoch = formed.epoch;
            tracing::info!(
                epoch = epoch.0,
                rank = formed.rank,
                of = formed.record.members.len(),
                "epoch begins"
            );
            failpoint::meet(Point::Forming(formed.rank));
            let engaged = self.compute.engage(epoch, formed.record.clone(), formed.rank);
            let phase = engaged.phase();
            let end = self.epoch(&formed, engaged).await;
            self.health.set_not_serving::<EngineServer<EngineService>>().await;
            let loss = match end {
                End::Over(reason) => {
                    tracing::info!(epoch = epoch.0, %reason, "epoch is over");
                    reason.loss()
                }
                End::Failed(EpochError::Drained) => {
                    self.registration.leave(epoch, Loss { kind: LossKind::Drained, rank: None });
                    return WorkerError::Drained;
                }
                End::Failed(EpochError::Model(error)) => return WorkerError::Model(error),
                End::Failed(error @ EpochError::Options { .. }) => {
                    return WorkerError::Options(error.to_string());
                }
                End::Failed(error) => {
                    // What has served may be lost at any time; what never did would be lost again at once.
                    let served = *phase.borrow() == Phase::Ready;
                    let wait = if served { Duration::ZERO } else { backoff.after(Duration::ZERO) };
                    tracing::warn!(epoch = epoch.0, %error, pause_ms = wait.as_millis(), "epoch failed");
                    sleep(wait).await;
                    error.loss(&formed.record.members)
                }
            };
            if loss == (Loss { kind: LossKind::Slow, rank: Some(self.setup.options.id()) }) {
                return WorkerError::Slow;
            }
            failpoint::meet(Point::Leaving(formed.rank));
            self.registration.leave(epoch, loss);
            if let Err(error) = let_go(phase).await {
                return error;
            }
            left = Some(epoch);
        }
    }

    /// A rank that no group needs sees to it that it could load its share at once.
    async fn stand_by(&self) -> Infallible {
        sleep(STAND_BY_AFTER).await;
        if self.setup.options.rehearse.is_some() {
            std::future::pending::<()>().await; // it has no weights
        }
        let setup = Arc::clone(&self.setup);
        let warmed = tokio::task::spawn_blocking(move || setup.checkpoint.warm()).await;
        if let Ok(Err(error)) = warmed {
            tracing::warn!(%error, "this rank stands by, and will have to read its weights from disk");
        }
        std::future::pending().await
    }

    /// Waits until the leader of that epoch says that it has ended it because all others waited for this rank.
    async fn named_slow(&self, left: Option<Epoch>) {
        let slow = Some(Loss { kind: LossKind::Slow, rank: Some(self.setup.options.id()) });
        let named = |fleet: &Fleet| {
            let group = fleet.groups.get(&self.setup.options.group);
            let mut ranks = group.into_iter().flat_map(|group| group.ranks.values());
            ranks.any(|rank| Some(rank.left) == left && rank.loss == slow)
        };
        if left.is_none() || self.fleet.clone().wait_for(named).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives up the registration.
    pub(crate) async fn end(self) {
        match timeout(COORD_TIMEOUT, self.registration.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot give up the lease; it will expire"),
            Err(_) => tracing::warn!("etcd is silent: cannot give up the lease; it will expire"),
        }
    }

    /// Serves one epoch to its end. What is dropped here tells the compute thread, the collective's peers, the
    /// leader or the followers, and the clients.
    async fn epoch(&self, formed: &Formed, mut engaged: Engaged) -> End {
        let phase = engaged.phase();
        tokio::select! {
            error = self.serve(formed, &mut engaged) => match error {
                EpochError::Coord(CoordError::Over { ended, .. }) => End::Over(ended),
                error => End::Failed(error),
            },
            reason = self.registration.ended(formed.epoch) => End::Over(reason),
            never = self.report(phase) => match never {},
        }
    }

    async fn serve(&self, formed: &Formed, engaged: &mut Engaged) -> EpochError {
        let (visits, visited) = mpsc::channel(1);
        let seat = Seat { secret: formed.record.secret.clone(), visits };
        let _seat = (formed.rank > 0).then(|| self.rank_door.open(seat));
        let forming = (formed.rank == 0).then(|| trace::forming(formed.epoch, &formed.record));
        let mut silence = pin!(silence(&formed.record, formed.rank, &self.way));
        let joined = tokio::select! {
            joined = self.join(formed, engaged) => joined,
            error = &mut silence => Err(error),
        };
        let steps = match joined {
            Ok(steps) => steps,
            Err(error) => return error,
        };
        let outcome = match forming {
            Some(forming) => self.lead(formed, steps, silence, forming).await,
            None => follow(formed.epoch, visited, steps, silence).await,
        };
        match outcome {
            Ok(never) => match never {},
            Err(error) => engaged.explain(error).await,
        }
    }

    /// Brings the compute thread to the point where it runs steps.
    async fn join(&self, formed: &Formed, engaged: &mut Engaged) -> Result<Steps, EpochError> {
        engaged.reach(Phase::Loaded).await?;
        self.all_loaded(&formed.record).await?;
        engaged.meet();
        engaged.reach(Phase::Ready).await?;
        engaged.steps.take().ok_or(EpochError::Ended)
    }

    /// Waits until all members hold their weights: the time that they may take to meet is short, and starts now.
    /// Whose registration is gone for too long is taken for lost.
    async fn all_loaded(&self, record: &EpochRecord) -> Result<(), EpochError> {
        let mut fleet = self.fleet.clone();
        let mut gone_since: Option<(usize, Instant)> = None;
        loop {
            let waits_for = self.not_loaded(record, &fleet.borrow_and_update());
            let Some((rank, gone)) = waits_for else { return Ok(()) };
            let since = gone_since.filter(|(before, _)| *before == rank && gone).map(|(_, since)| since);
            gone_since = gone.then(|| (rank, since.unwrap_or_else(Instant::now)));
            let due = gone_since.map(|(_, since)| since + GONE_AFTER);
            tokio::select! {
                changed = fleet.changed() => if changed.is_err() {
                    tracing::warn!("the fleet is watched no more: meeting the others without knowing them ready");
                    return Ok(());
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    return Err(EpochError::Vanished { rank });
                }
            }
        }
    }

    /// The first other member that does not hold its weights, and whether it is not even registered.
    fn not_loaded(&self, record: &EpochRecord, fleet: &Fleet) -> Option<(usize, bool)> {
        let group = fleet.groups.get(&record.group);
        let others = record.members.iter().enumerate().filter(|(_, member)| member.address != self.address);
        let state =
            |member: &Member| Some(group?.ranks.get(&member.id).filter(|rank| member.is(rank))?.state);
        let mut waiting = others.filter_map(|(rank, member)| match state(member) {
            Some(RankState::Joining | RankState::Ready) => None,
            state => Some((rank, state.is_none())),
        });
        waiting.next()
    }

    /// Leads the epoch; until the followers' streams stand, `silence` tells of one that does not live.
    async fn lead(
        &self,
        formed: &Formed,
        steps: Steps,
        silence: impl Future<Output = EpochError>,
        forming: Span,
    ) -> Result<Infallible, EpochError> {
        let shards = formed.record.shards;
        let shape = self.setup.shape(shards.world_size());
        let limits = &shape.ok_or_else(|| EpochError::Record("this rank has no room".into()))?.limits;
        let followers = tokio::select! {
            opened = Followers::open(&formed.record, &self.way) => opened?,
            error = silence => return Err(error),
        };
        let scheduler = Scheduler::new(formed.epoch, limits.clone());
        let (calls, inbox) = mpsc::channel(CALLS_MAX);
        let drain_calls = calls.clone();
        let mut leader = Leader::new(formed.epoch, scheduler, steps, followers, self.desk.clone());
        let (secret, load) = (formed.record.secret.clone(), leader.reports());
        let _door = self.engine_door.open(Inbox { epoch: formed.epoch, secret, calls, load });
        let health = Health {
            group: formed.record.group.clone(),
            epoch: formed.epoch,
            leader: self.address.clone(),
            model: ModelCard { shards, ..self.setup.card.clone() },
            kv_blocks: limits.kv_blocks,
            sequences_max: limits.sequences_max,
            step_tokens_max: limits.step_tokens_max,
            draining: false,
        };
        self.registration.declare(health.clone()).await?;
        failpoint::meet(Point::Declared);
        self.health.set_serving::<EngineServer<EngineService>>().await;
        trace::formed(forming);
        tracing::info!(epoch = formed.epoch.0, group = %formed.record.group, "group serves");
        tokio::select! {
            outcome = leader.lead(inbox) => outcome,
            never = self.drain(health, drain_calls) => match never {},
        }
    }

    /// Tells routers and the leader's loop when the group is to end.
    async fn drain(&self, health: Health, calls: mpsc::Sender<Call>) -> Infallible {
        let grace = self.registration.drained().await;
        failpoint::meet(Point::Draining);
        let due = Instant::now() + grace;
        tracing::info!(epoch = health.epoch.0, grace_ms = grace.as_millis(), "the group is drained");
        if let Err(error) = self.registration.declare(Health { draining: true, ..health }).await {
            tracing::warn!(%error, "routers cannot be told yet that the group is drained");
        }
        let _ = calls.send(Call::Drain(due)).await; // if nobody listens the epoch is over
        std::future::pending().await
    }

    /// Tells what the rank is doing, and its memory.
    async fn report(&self, mut phase: watch::Receiver<Phase>) -> Infallible {
        loop {
            let now = *phase.borrow_and_update();
            self.registration.update(state(now), (self.memory)());
            let change = if matches!(now, Phase::Loading(_)) {
                let loaded = phase.wait_for(|phase| !matches!(phase, Phase::Loading(_)));
                timeout(REPORT_INTERVAL, loaded).await.map(|changed| changed.is_ok())
            } else {
                timeout(MEMORY_INTERVAL, phase.changed()).await.map(|changed| changed.is_ok())
            };
            if change == Ok(false) {
                std::future::pending::<()>().await; // the thread has let go: `serve` is about to end
            }
        }
    }
}

/// Waits until the compute thread has let go of an epoch that was dropped. What it is loading it may finish: the
/// next epoch most likely wants the same.
async fn let_go(mut phase: watch::Receiver<Phase>) -> Result<(), WorkerError> {
    let let_go = async |phase: &mut watch::Receiver<Phase>| while phase.changed().await.is_ok() {};
    while matches!(*phase.borrow_and_update(), Phase::Loading(_)) {
        if phase.changed().await.is_err() {
            return Ok(());
        }
    }
    let gone = timeout(LET_GO_TIMEOUT, let_go(&mut phase)).await;
    gone.map_err(|_| WorkerError::Hung(LET_GO_TIMEOUT))
}

fn state(phase: Phase) -> RankState {
    match phase {
        Phase::Loading(percent) => RankState::Loading { percent },
        Phase::Loaded | Phase::Joining => RankState::Joining,
        Phase::Ready => RankState::Ready,
    }
}

//! A rank's life after its registration: one epoch after the other.

use std::convert::Infallible;
use std::time::Duration;

use galerne_coord::{Ended, Formed, Registration};
use galerne_sched::Scheduler;
use galerne_types::{EpochRecord, Fleet, Health, RankState};
use galerne_wire::v1::engine_server::EngineServer;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic_health::server::HealthReporter;

use super::compute::{Compute, Engaged, Phase, Steps};
use super::desk::Desk;
use super::door::Door;
use super::engine::{CALLS_MAX, EngineService, Inbox};
use super::error::EpochError;
use super::follower::{Seat, follow};
use super::followers::Followers;
use super::leader::Leader;
use super::memory;
use super::setup::Setup;
use crate::backoff::Backoff;
use crate::error::WorkerError;
use crate::supervisor::COORD_TIMEOUT;

/// How long the compute thread may take to let go of an epoch that was aborted. One that takes longer hangs
/// where no abort reaches it: the process must end.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(15);

/// Pause between two reports of progress, so that etcd is not flooded.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// How often a rank that does nothing new reports its memory.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// A registered rank process.
pub(crate) struct Process<'a> {
    pub(crate) setup: &'a Setup,
    /// `IP:PORT` of its gRPC server.
    pub(crate) address: String,
    pub(crate) registration: Registration,
    pub(crate) fleet: watch::Receiver<Fleet>,
    pub(crate) compute: Compute,
    pub(crate) desk: Desk,
    pub(crate) engine_door: Door<Inbox>,
    pub(crate) rank_door: Door<Seat>,
    pub(crate) health: HealthReporter,
}

/// Why an epoch ended here.
enum End {
    /// The group has gone on without it, or cannot go on with it.
    Over(Ended),
    /// It failed at this rank.
    Failed(EpochError),
}

impl Process<'_> {
    /// Serves epochs; returns only what must end the process.
    pub(crate) async fn live(&self) -> WorkerError {
        let mut backoff = Backoff::new();
        loop {
            let formed = match self.registration.form().await {
                Ok(formed) => formed,
                Err(error) => return error.into(),
            };
            let began = Instant::now();
            let epoch = formed.epoch;
            tracing::info!(
                epoch = epoch.0,
                rank = formed.rank,
                of = formed.record.members.len(),
                "epoch begins"
            );
            let engaged = self.compute.engage(epoch, formed.record.clone(), formed.rank);
            let phase = engaged.phase();
            let end = self.epoch(&formed, engaged).await;
            self.registration.update(RankState::Waiting, memory::resident_bytes());
            self.withdraw(&formed).await;
            match end {
                End::Over(reason) => tracing::info!(epoch = epoch.0, %reason, "epoch is over"),
                End::Failed(EpochError::Model(error)) => return WorkerError::Model(error),
                End::Failed(error @ EpochError::Options { .. }) => {
                    return WorkerError::Options(error.to_string());
                }
                End::Failed(error) => {
                    let wait = backoff.after(began.elapsed());
                    tracing::warn!(epoch = epoch.0, %error, pause_ms = wait.as_millis(), "epoch failed");
                    sleep(wait).await;
                }
            }
            self.registration.leave(epoch);
            if let Err(error) = let_go(phase).await {
                return error;
            }
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
    async fn epoch(&self, formed: &Formed, engaged: Engaged) -> End {
        let phase = engaged.phase();
        tokio::select! {
            error = self.serve(formed, engaged) => End::Failed(error),
            reason = self.registration.ended(formed.epoch) => End::Over(reason),
            never = self.report(phase) => match never {},
        }
    }

    async fn serve(&self, formed: &Formed, mut engaged: Engaged) -> EpochError {
        let (visits, visited) = mpsc::channel(1);
        let seat = Seat { secret: formed.record.secret.clone(), visits };
        let _seat = (formed.rank > 0).then(|| self.rank_door.open(seat));
        let steps = match self.join(formed, &mut engaged).await {
            Ok(steps) => steps,
            Err(error) => return error,
        };
        let outcome = if formed.rank == 0 {
            self.lead(formed, steps).await
        } else {
            follow(formed.epoch, visited, steps).await
        };
        match outcome {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Brings the compute thread to the point where it runs steps.
    async fn join(&self, formed: &Formed, engaged: &mut Engaged) -> Result<Steps, EpochError> {
        engaged.reach(Phase::Loaded).await?;
        self.all_loaded(&formed.record).await;
        engaged.meet();
        engaged.reach(Phase::Ready).await?;
        engaged.steps.take().ok_or(EpochError::Ended)
    }

    /// Waits until all members hold their weights: the time that they may take to meet is short, and starts now.
    /// If one never does, the epoch ends when its registration does.
    async fn all_loaded(&self, record: &EpochRecord) {
        let mut fleet = self.fleet.clone();
        let loaded = |fleet: &Fleet| {
            let Some(group) = fleet.groups.get(&record.group) else { return false };
            record.members.iter().filter(|member| member.address != self.address).all(|member| {
                let rank = group.ranks.get(&member.id).filter(|rank| member.is(rank));
                rank.is_some_and(|rank| matches!(rank.state, RankState::Joining | RankState::Ready))
            })
        };
        if fleet.wait_for(loaded).await.is_err() {
            tracing::warn!("the fleet is watched no more: meeting the others without knowing them ready");
        }
    }

    async fn lead(&self, formed: &Formed, steps: Steps) -> Result<Infallible, EpochError> {
        let Setup { card, limits, .. } = self.setup;
        let followers =
            Followers::open(&formed.record, self.setup.tls.as_ref().map(|(_, client)| client)).await?;
        let scheduler = Scheduler::new(formed.epoch, limits.clone());
        let (calls, inbox) = mpsc::channel(CALLS_MAX);
        let mut leader = Leader::new(formed.epoch, scheduler, steps, followers, self.desk.clone());
        let (secret, load) = (formed.record.secret.clone(), leader.reports());
        let _door = self.engine_door.open(Inbox { epoch: formed.epoch, secret, calls, load });
        let health = Health {
            group: formed.record.group.clone(),
            epoch: formed.epoch,
            leader: self.address.clone(),
            model: card.clone(),
            kv_blocks: limits.kv_blocks,
            sequences_max: limits.sequences_max,
            draining: false,
        };
        self.registration.declare(health).await?;
        self.health.set_serving::<EngineServer<EngineService>>().await;
        tracing::info!(epoch = formed.epoch.0, group = %formed.record.group, "group serves");
        leader.lead(inbox).await
    }

    /// The leader's word does not outlive its epoch.
    async fn withdraw(&self, formed: &Formed) {
        if formed.rank > 0 {
            return;
        }
        self.health.set_not_serving::<EngineServer<EngineService>>().await;
        match timeout(COORD_TIMEOUT, self.registration.withdraw()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot withdraw the group's health yet"),
            Err(_) => tracing::warn!("etcd is silent: cannot withdraw the group's health yet"),
        }
    }

    /// Tells what the rank is doing, and its memory.
    async fn report(&self, mut phase: watch::Receiver<Phase>) -> Infallible {
        loop {
            let now = *phase.borrow_and_update();
            self.registration.update(state(now), memory::resident_bytes());
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

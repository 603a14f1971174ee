//! The compute thread: it owns the weights and, epoch after epoch, the model's state; gRPC and etcd never wait
//! for it, nor it for them.

use std::sync::Arc;
use std::time::Duration;

use galerne_collective::{AbortHandle, CollectiveError};
use galerne_types::limits::STEPS_IN_FLIGHT_MAX;
use galerne_types::{Epoch, EpochRecord, Sampled, Step};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::desk::Desk;
use super::engagement::{Engagement, Held};
use super::error::EpochError;
use super::pulse::Pulse;
use super::setup::Setup;
use crate::error::WorkerError;

/// A process that dies closes its streams one after the other.
const EXPLAIN_TIMEOUT: Duration = Duration::from_millis(50);

/// How often it is looked whether the collective knows more.
const EXPLAIN_INTERVAL: Duration = Duration::from_millis(2);

/// The thread, and the queue of epochs that it works through.
pub(crate) struct Compute {
    engagements: mpsc::Sender<Engagement>,
    ended: CancellationToken,
    pulse: Pulse,
}

/// How far the thread is with an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It reads its weights; percent of bytes.
    Loading(u8),
    /// It holds its weights, and meets the others when it is told to.
    Loaded,
    /// It meets the others and tries the collective and the model.
    Joining,
    /// It runs steps.
    Ready,
}

/// Steps to the compute thread and what they drew, in order.
pub(crate) struct Steps {
    pub(crate) to: mpsc::Sender<Step>,
    pub(crate) answers: mpsc::Receiver<Result<Done, EpochError>>,
}

/// What a step drew, and how long this rank computed for it.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) sampled: Sampled,
    pub(crate) busy: Duration,
}

/// One epoch as the compute thread runs it. Dropping it aborts the collective, here and at the peers.
pub(crate) struct Engaged {
    phase: watch::Receiver<Phase>,
    meet: Option<oneshot::Sender<()>>,
    /// Taken by the leader's or follower's loop.
    pub(crate) steps: Option<Steps>,
    abort: AbortHandle,
}

impl Compute {
    /// What others see of a thread that works the queue off.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Engagement>) {
        let (engagements, queue) = mpsc::channel(1);
        (Self { engagements, ended: CancellationToken::new(), pulse: Pulse::new() }, queue)
    }

    /// Starts the thread.
    pub(crate) fn start(setup: Arc<Setup>, desk: Desk) -> Result<Self, WorkerError> {
        let (compute, mut queue) = Self::new();
        let (ends, felt) = (compute.ended().drop_guard(), compute.pulse());
        let body = move || {
            let _tells_of_a_panic = ends;
            let mut held: Option<Held> = None;
            while let Some(engagement) = queue.blocking_recv() {
                engagement.run(&setup, &desk, &felt, &mut held);
                felt.waits_uncounted();
            }
        };
        std::thread::Builder::new().name("compute".into()).spawn(body).map_err(WorkerError::Spawn)?;
        Ok(compute)
    }

    /// Begins the work of rank `rank` in an epoch. The thread must have let go of the one before.
    pub(crate) fn engage(&self, epoch: Epoch, record: EpochRecord, rank: usize) -> Engaged {
        let (phase_now, phase) = watch::channel(Phase::Loading(0));
        let (meet, may_meet) = oneshot::channel();
        let (to, steps) = mpsc::channel(STEPS_IN_FLIGHT_MAX);
        let (answer, answers) = mpsc::channel(STEPS_IN_FLIGHT_MAX + 1);
        let abort = AbortHandle::new();
        let engagement = Engagement {
            epoch,
            record,
            rank,
            phase: phase_now,
            may_meet: Some(may_meet),
            steps,
            answers: answer,
            abort: abort.clone(),
        };
        // One that is not taken is dropped, and with it the other ends of these channels: that is told as
        // `EpochError::Ended`.
        if self.engagements.try_send(engagement).is_err() {
            tracing::error!(epoch = epoch.0, "the compute thread takes no more epochs");
        }
        Engaged { phase, meet: Some(meet), steps: Some(Steps { to, answers }), abort }
    }

    /// What the thread is doing.
    pub(crate) fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Cancelled when the thread has ended, which only a panic brings about.
    pub(crate) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }
}

impl Engaged {
    /// Waits until the thread has come to `wanted`.
    pub(crate) async fn reach(&mut self, wanted: Phase) -> Result<(), EpochError> {
        if self.phase.wait_for(|phase| *phase == wanted).await.is_ok() {
            return Ok(());
        }
        let Some(steps) = &mut self.steps else { return Err(EpochError::Ended) };
        Err(steps.answer().await.err().unwrap_or(EpochError::Ended))
    }

    /// What the collective says of an error of a stream between ranks, if it knows more: who closed without a word.
    pub(crate) async fn explain(&self, error: EpochError) -> EpochError {
        if !matches!(error, EpochError::Leader(_) | EpochError::Follower { .. }) {
            return error;
        }
        let known = async {
            loop {
                match self.abort.cause() {
                    Some(cause) => return cause,
                    None => sleep(EXPLAIN_INTERVAL).await,
                }
            }
        };
        match timeout(EXPLAIN_TIMEOUT, known).await {
            Ok(cause @ CollectiveError::Lost { .. }) => EpochError::Collective(cause),
            _ => error,
        }
    }

    /// Lets the thread meet the other ranks.
    pub(crate) fn meet(&mut self) {
        if let Some(meet) = self.meet.take() {
            // If nobody listens the thread has ended this epoch; its error waits among the answers.
            let _ = meet.send(());
        }
    }

    /// What the thread is doing; closed when it has let go of this epoch.
    pub(crate) fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }
}

impl Drop for Engaged {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

impl Steps {
    /// Hands over a step.
    pub(crate) fn submit(&self, step: Step) -> Result<(), EpochError> {
        // There is room for all steps that may be in flight; a closed channel has its error among the answers.
        self.to.try_send(step).map_err(|_| EpochError::Ended)
    }

    /// What the oldest unanswered step drew, or what broke the epoch.
    pub(crate) async fn answer(&mut self) -> Result<Done, EpochError> {
        self.answers.recv().await.unwrap_or(Err(EpochError::Ended))
    }
}

//! The follower's face and loop: `Rank.Follow`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt as _};
use galerne_types::limits::STEPS_IN_FLIGHT_MAX;
use galerne_types::{Epoch, Step};
use galerne_wire::{shows_secret, v1};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::compute::{Done, Steps};
use super::digest::digest;
use super::door::Door;
use super::error::EpochError;
use super::followers::{BEAT_INTERVAL, FRAMES_MAX, QUIET_BEATS_MAX};

/// How long the leader may take to open its stream once the ranks have met.
const LEADER_TIMEOUT: Duration = Duration::from_secs(20);

/// A follower's loop of one epoch, as seen from outside.
#[derive(Clone)]
pub(crate) struct Seat {
    /// The epoch's secret, as the leader shows it.
    pub(crate) secret: String,
    pub(crate) visits: mpsc::Sender<Visit>,
}

/// The leader's stream, authenticated.
pub(crate) struct Visit {
    pub(crate) steps: BoxStream<'static, Result<v1::Step, Status>>,
    pub(crate) done: mpsc::Sender<Result<v1::StepDone, Status>>,
}

/// The service: open while this rank waits for the leader of its epoch.
pub(crate) struct RankService {
    pub(crate) door: Door<Seat>,
}

#[tonic::async_trait]
impl v1::rank_server::Rank for RankService {
    type FollowStream = ReceiverStream<Result<v1::StepDone, Status>>;

    async fn follow(
        &self,
        request: Request<Streaming<v1::Step>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        // The same answer for no epoch, another epoch and a wrong secret: a stranger learns nothing.
        let seat = self.door.enter().filter(|seat| shows_secret(&request, &seat.secret));
        let seat = seat.ok_or_else(|| Status::unauthenticated("not the secret of this rank's epoch"))?;
        let (done, answers) = mpsc::channel(FRAMES_MAX);
        let visit = Visit { steps: request.into_inner().boxed(), done };
        seat.visits.try_send(visit).map_err(|_| Status::failed_precondition("this epoch has its leader"))?;
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// Runs the leader's steps until something breaks the epoch, which the leader is told. Until the leader has opened its stream
/// `silence` tells of a rank that does not live.
pub(crate) async fn follow(
    epoch: Epoch,
    mut visited: mpsc::Receiver<Visit>,
    mut steps: Steps,
    silence: impl Future<Output = EpochError>,
) -> Result<Infallible, EpochError> {
    let late = |_| EpochError::Deadline { what: "the leader's first word".into(), deadline: LEADER_TIMEOUT };
    let visit = tokio::select! {
        visit = timeout(LEADER_TIMEOUT, visited.recv()) => visit.map_err(late)?,
        early = steps.answer() => return Err(early.err().unwrap_or(EpochError::Ended)),
        error = silence => return Err(error),
    };
    visited.close(); // an epoch has one leader: a second visitor is refused
    let Visit { steps: orders, done } = visit.ok_or(EpochError::Ended)?;
    let mut beat_due = interval(BEAT_INTERVAL);
    beat_due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let running = VecDeque::new();
    let mut follower = Follower { epoch, orders, done, steps, last: 0, running, beat_due, quiet: 0 };
    loop {
        if let Err(error) = follower.turn().await {
            let status = match &error {
                EpochError::Leader(reason) => Status::failed_precondition(reason.clone()),
                other => Status::aborted(other.to_string()),
            };
            // The leader may be gone, or behind: it sees the end of the stream in any case.
            let _ = follower.done.try_send(Err(status));
            return Err(error);
        }
    }
}

struct Follower {
    epoch: Epoch,
    orders: BoxStream<'static, Result<v1::Step, Status>>,
    done: mpsc::Sender<Result<v1::StepDone, Status>>,
    steps: Steps,
    /// Number of the last step that was taken in.
    last: u64,
    running: VecDeque<Step>,
    beat_due: Interval,
    /// Intervals since the leader was last heard.
    quiet: usize,
}

impl Follower {
    async fn turn(&mut self) -> Result<(), EpochError> {
        tokio::select! {
            order = self.orders.next() => {
                self.quiet = 0;
                let Some(step) = self.check(order)? else { return Ok(()) };
                self.running.push_back(step.clone());
                self.steps.submit(step)
            }
            done = self.steps.answer() => {
                let Done { sampled, busy } = done?;
                let step = self.running.pop_front().ok_or(EpochError::Ended)?;
                let busy_us = u64::try_from(busy.as_micros()).unwrap_or(u64::MAX);
                let answer = v1::StepDone { number: step.number, hash: digest(&step, &sampled), busy_us };
                let sent = self.done.try_send(Ok(answer));
                sent.map_err(|_| EpochError::Leader("nobody takes this rank's answers".into()))
            }
            _ = self.beat_due.tick() => self.beat(),
        }
    }

    /// Tells that this rank lives; finds out when the leader has not been heard for too long.
    fn beat(&mut self) -> Result<(), EpochError> {
        self.quiet += 1;
        if self.quiet > QUIET_BEATS_MAX {
            return Err(EpochError::Silent { rank: 0, silence: BEAT_INTERVAL * QUIET_BEATS_MAX as u32 });
        }
        // Answers that it has not read yet tell as much.
        let _ = self.done.try_send(Ok(v1::StepDone::default()));
        Ok(())
    }

    /// The step, if it is the next one of this epoch; none if the leader only lives.
    fn check(&mut self, order: Option<Result<v1::Step, Status>>) -> Result<Option<Step>, EpochError> {
        let order = match order {
            None => return Err(EpochError::Leader("it has closed its stream".into())),
            Some(Err(status)) => return Err(EpochError::Leader(status.message().into())),
            Some(Ok(order)) => order,
        };
        if order.number == 0 {
            return Ok(None);
        }
        let step = Step::try_from(order).map_err(|error| EpochError::Leader(error.to_string()))?;
        if step.epoch != self.epoch {
            let says = format!("a step of epoch {} in epoch {}", step.epoch.0, self.epoch.0);
            return Err(EpochError::Leader(says));
        }
        if self.running.len() == STEPS_IN_FLIGHT_MAX {
            return Err(EpochError::Leader(format!("more than {STEPS_IN_FLIGHT_MAX} steps at once")));
        }
        if step.number != self.last + 1 {
            let says = format!("step {} after step {}", step.number, self.last);
            return Err(EpochError::Leader(says));
        }
        self.last = step.number;
        Ok(Some(step))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use galerne_types::{Input, Sampled, Slice};

    use super::*;

    const EPOCH: Epoch = Epoch(5);

    fn order(epoch: u64, number: u64) -> v1::Step {
        let slice = Slice {
            slot: 0,
            start: 0,
            input: Input::Last,
            first_block: 0,
            blocks: vec![0],
            draw: None,
            score: None,
        };
        v1::Step::from(&Step { epoch: Epoch(epoch), number, slices: vec![slice], traces: Vec::new() })
    }

    /// Runs a follower that is sent `orders`; returns what it answers and why it ends.
    async fn run(orders: Vec<v1::Step>) -> (Vec<Result<v1::StepDone, Status>>, EpochError) {
        let (to, mut taken) = mpsc::channel::<Step>(STEPS_IN_FLIGHT_MAX);
        let (answer, answers) = mpsc::channel(STEPS_IN_FLIGHT_MAX + 1);
        tokio::spawn(async move {
            while let Some(step) = taken.recv().await {
                let sampled = Sampled { tokens: vec![None; step.slices.len()], ..Sampled::default() };
                if answer.send(Ok(Done { sampled, busy: Duration::ZERO })).await.is_err() {
                    return;
                }
            }
        });
        let (visits, visited) = mpsc::channel(1);
        let (done, mut told) = mpsc::channel(8);
        let (orders_to, orders_in) = mpsc::channel(1);
        let steps = ReceiverStream::new(orders_in).boxed();
        visits.send(Visit { steps, done }).await.unwrap();
        let leader = async move {
            let mut answers = Vec::new();
            for order in orders {
                orders_to.send(Ok(order)).await.unwrap();
                answers.extend(answer_of(&mut told).await);
            }
            drop(orders_to);
            answers.extend(answer_of(&mut told).await);
            answers
        };
        let (answers, outcome) =
            tokio::join!(leader, follow(EPOCH, visited, Steps { to, answers }, pending()));
        (answers, outcome.unwrap_err())
    }

    /// The next answer that is no beat.
    async fn answer_of(
        told: &mut mpsc::Receiver<Result<v1::StepDone, Status>>,
    ) -> Option<Result<v1::StepDone, Status>> {
        loop {
            let answer = told.recv().await?;
            if !matches!(&answer, Ok(done) if done.number == 0) {
                return Some(answer);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn steps_are_answered_until_the_leader_goes() {
        let (answers, error) = run(vec![order(5, 1), order(5, 2)]).await;
        let numbers: Vec<u64> = answers[..2].iter().map(|answer| answer.as_ref().unwrap().number).collect();
        assert_eq!(numbers, [1, 2]);
        assert_ne!(answers[0].as_ref().unwrap().hash, answers[1].as_ref().unwrap().hash);
        assert!(matches!(error, EpochError::Leader(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_epoch_and_a_skipped_step_are_refused() {
        for (bad, says) in
            [(order(4, 2), "a step of epoch 4 in epoch 5"), (order(5, 3), "step 3 after step 1")]
        {
            let (answers, error) = run(vec![order(5, 1), bad]).await;
            let status = answers[1].as_ref().unwrap_err();
            assert_eq!((status.code(), status.message()), (tonic::Code::FailedPrecondition, says));
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_falls_silent_ends_the_epoch_within_a_second() {
        let (visits, visited) = mpsc::channel(1);
        let (done, mut told) = mpsc::channel(FRAMES_MAX);
        let (orders, orders_in) = mpsc::channel(FRAMES_MAX);
        visits.send(Visit { steps: ReceiverStream::new(orders_in).boxed(), done }).await.unwrap();
        let (to, _taken) = mpsc::channel(1);
        let (_answer, answers) = mpsc::channel(1);
        let began = tokio::time::Instant::now();
        let beats = async {
            for _ in 0..50 {
                tokio::time::sleep(BEAT_INTERVAL).await;
                orders.send(Ok(order(5, 0))).await.unwrap();
                assert_eq!(told.recv().await.unwrap().unwrap().number, 0);
            }
            pending::<()>().await;
        };
        tokio::select! {
            outcome = follow(EPOCH, visited, Steps { to, answers }, pending()) => {
                let error = outcome.unwrap_err();
                assert!(matches!(error, EpochError::Silent { rank: 0, .. }), "{error}");
            }
            () = beats => {}
        }
        let silence = began.elapsed() - 50 * BEAT_INTERVAL;
        let least = BEAT_INTERVAL * QUIET_BEATS_MAX as u32;
        assert!(silence >= least && silence < Duration::from_secs(1), "{silence:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_never_comes_ends_the_epoch() {
        let (_visits, visited) = mpsc::channel(1);
        let (to, _taken) = mpsc::channel(1);
        let (_answer, answers) = mpsc::channel(1);
        let error = follow(EPOCH, visited, Steps { to, answers }, pending()).await.unwrap_err();
        assert!(matches!(error, EpochError::Deadline { .. }), "{error}");
    }
}

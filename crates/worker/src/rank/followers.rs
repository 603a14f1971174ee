//! The leader's streams to the other ranks of its epoch.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{BoxStream, Stream as _, StreamExt as _};
use galerne_tls::Way;
use galerne_types::limits::{GRPC_MESSAGE_BYTES_MAX, STEPS_IN_FLIGHT_MAX};
use galerne_types::{Epoch, EpochRecord, Step};
use galerne_wire::{show_secret, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::error::EpochError;
use crate::grpc;

/// How long a follower may take to open its stream: it has met all others in the collective by then.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How often leader and followers tell each other that they live.
pub(crate) const BEAT_INTERVAL: Duration = Duration::from_millis(100);

/// Who has heard nothing for so many of its own intervals takes the other one for lost. Time in which this process did not
/// run does not count.
pub(crate) const QUIET_BEATS_MAX: usize = 8;

/// Room for steps and beats that the other side has not read yet.
pub(crate) const FRAMES_MAX: usize = STEPS_IN_FLIGHT_MAX + QUIET_BEATS_MAX + 1;

/// All followers of one epoch.
#[derive(Default)]
pub(crate) struct Followers {
    links: Vec<Link>,
    /// Which link is asked first for its answers: each in turn.
    turn: usize,
}

/// One follower: steps to it, answers from it.
pub(crate) struct Link {
    pub(crate) rank: usize,
    pub(crate) steps: mpsc::Sender<v1::Step>,
    pub(crate) done: BoxStream<'static, Result<v1::StepDone, Status>>,
    /// Intervals since it was last heard.
    pub(crate) quiet: usize,
}

impl Followers {
    pub(crate) fn new(links: Vec<Link>) -> Self {
        Self { links, turn: 0 }
    }

    /// Opens a stream to every member but the first.
    pub(crate) async fn open(record: &EpochRecord, way: &Way) -> Result<Self, EpochError> {
        let mut links = Vec::new();
        for (rank, member) in record.members.iter().enumerate().skip(1) {
            let link = open(rank, &member.address, &record.secret, way);
            let late = EpochError::Deadline {
                what: format!("opening the step stream of follower {rank}"),
                deadline: OPEN_TIMEOUT,
            };
            links.push(tokio::time::timeout(OPEN_TIMEOUT, link).await.map_err(|_| late)??);
        }
        Ok(Self::new(links))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.links.len()
    }

    /// Sends a step to all.
    pub(crate) fn send(&self, step: &Step) -> Result<(), EpochError> {
        self.links.iter().try_for_each(|link| {
            // There is room for all steps that may be in flight: a full queue is a follower that is gone.
            let sent = link.steps.try_send(step.into());
            sent.map_err(|_| ended(link.rank, "its stream of steps is closed"))
        })
    }

    /// Tells all that the leader lives; finds out who has not been heard for too long.
    pub(crate) fn beat(&mut self, epoch: Epoch) -> Result<(), EpochError> {
        self.links.iter_mut().try_for_each(|link| {
            link.quiet += 1;
            if link.quiet > QUIET_BEATS_MAX {
                return Err(EpochError::Silent {
                    rank: link.rank,
                    silence: BEAT_INTERVAL * QUIET_BEATS_MAX as u32,
                });
            }
            // Steps that are under way tell as much.
            let _ = link.steps.try_send(v1::Step { epoch: epoch.0, ..Default::default() });
            Ok(())
        })
    }

    /// The next answer of any follower; waits for ever when there are none. An ended stream is an error.
    pub(crate) async fn answer(&mut self) -> Result<(usize, v1::StepDone), EpochError> {
        poll_fn(|context| self.poll_answer(context)).await
    }

    fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<Result<(usize, v1::StepDone), EpochError>> {
        let count = self.links.len();
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            let link = &mut self.links[index];
            if let Poll::Ready(answer) = Pin::new(&mut link.done).poll_next(context) {
                link.quiet = 0;
                match answer {
                    // It lives, no more; there may be more to read.
                    Some(Ok(v1::StepDone { number: 0, .. })) => {
                        context.waker().wake_by_ref();
                        continue;
                    }
                    answer => {
                        self.turn = index + 1;
                        return Poll::Ready(match answer {
                            Some(Ok(done)) => Ok((link.rank, done)),
                            Some(Err(status)) => Err(ended(link.rank, status.message())),
                            None => Err(ended(link.rank, "it has ended its stream")),
                        });
                    }
                }
            }
        }
        Poll::Pending
    }
}

async fn open(rank: usize, address: &str, secret: &str, way: &Way) -> Result<Link, EpochError> {
    let channel =
        grpc::connect(address, way).await.map_err(|reason| EpochError::Unreachable { rank, reason })?;
    let mut client = v1::rank_client::RankClient::new(channel)
        .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
    let (steps, receiver) = mpsc::channel(FRAMES_MAX);
    let mut request = Request::new(ReceiverStream::new(receiver));
    show_secret(&mut request, secret).map_err(|status| EpochError::Record(status.message().into()))?;
    let answer = client.follow(request).await.map_err(|status| ended(rank, status.message()))?;
    Ok(Link { rank, steps, done: answer.into_inner().boxed(), quiet: 0 })
}

fn ended(rank: usize, reason: &str) -> EpochError {
    EpochError::Follower { rank, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    #[tokio::test]
    async fn who_answers_is_heard_whoever_else_hangs() {
        for hangs in 0..3 {
            let link = |rank| {
                let told = [v1::StepDone::default(), v1::StepDone { number: 1, ..Default::default() }];
                let told = stream::iter(told.map(Ok)).chain(stream::pending());
                let done = if rank == hangs { stream::pending().boxed() } else { told.boxed() };
                Link { rank, steps: mpsc::channel(1).0, done, quiet: 0 }
            };
            let mut followers = Followers { links: (0..3).map(link).collect(), turn: 0 };
            let mut heard = [followers.answer().await.unwrap().0, followers.answer().await.unwrap().0];
            heard.sort_unstable();
            assert_eq!(heard.to_vec(), (0..3).filter(|rank| *rank != hangs).collect::<Vec<_>>());
        }
    }
}

//! The compute thread of a simulated rank, as a task: it does what the real one does, in the same order and with the same
//! deadlines, on a [`Toy`] model. Its collective is a [`Meeting`] that the network's links decide about.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_collective::{AbortHandle, CollectiveError};
use galerne_types::{EpochRecord, Sampled};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::ledger::Ledger;
use super::net::{Host, Net};
use super::toy::Toy;
use crate::rank::compute::{Done, Phase};
use crate::rank::engagement::Engagement;
use crate::rank::error::EpochError;
use crate::rank::execute::Execute as _;
use crate::rank::pulse::Pulse;

/// How long the ranks may take to meet, as for real ones.
const MEET_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a rank waits for its peers in one operation, as for real ones.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long weights take to load.
const LOAD: Duration = Duration::from_millis(150);
/// How long a step takes.
const STEP: Duration = Duration::from_millis(20);

/// All epochs in which ranks meet.
#[derive(Clone, Default)]
pub(super) struct Meetings(Arc<Mutex<BTreeMap<u64, Meeting>>>);

/// The ranks of one epoch that have come.
struct Meeting {
    seats: Vec<Option<Seat>>,
}

struct Seat {
    process: u32,
    host: Host,
    abort: AbortHandle,
    /// The operation that it has come to, and the last one that is done for it.
    at: u64,
    done: u64,
    changed: Arc<Notify>,
    gone: Option<Gone>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Gone {
    Died,
    Left,
}

/// A rank in its epoch's meeting. Dropping it leaves.
struct Member {
    meetings: Meetings,
    epoch: u64,
    rank: usize,
    abort: AbortHandle,
    changed: Arc<Notify>,
    at: u64,
}

impl Meetings {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Meeting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, who: &Who, epoch: u64, rank: usize, ranks: usize, abort: &AbortHandle) -> Member {
        let changed = Arc::new(Notify::new());
        let seat = Seat {
            process: who.process,
            host: who.host,
            abort: abort.clone(),
            at: 0,
            done: 0,
            changed: changed.clone(),
            gone: None,
        };
        let mut all = self.lock();
        let meeting = all.entry(epoch).or_insert_with(|| Meeting { seats: Vec::new() });
        meeting.seats.resize_with(ranks, || None);
        meeting.seats[rank] = Some(seat);
        Member { meetings: self.clone(), epoch, rank, abort: abort.clone(), changed, at: 0 }
    }

    /// A process is dead: its peers see their connections close.
    pub(super) fn died(&self, process: u32) {
        for meeting in self.lock().values_mut() {
            for seat in meeting.seats.iter_mut().flatten().filter(|seat| seat.process == process) {
                seat.gone = Some(Gone::Died);
            }
        }
    }

    /// Completes what all have come to, and tells of who is gone, as far as links let anybody know.
    pub(super) fn carry(&self, net: &Net) {
        let mut all = self.lock();
        for meeting in all.values_mut() {
            for rank in 0..meeting.seats.len() {
                meeting.carry(rank, net);
            }
        }
        all.retain(|_, meeting| meeting.seats.iter().flatten().any(|seat| seat.gone.is_none()));
    }
}

impl Meeting {
    fn carry(&mut self, rank: usize, net: &Net) {
        let Some(mine) = self.seats[rank].as_ref().filter(|seat| seat.gone.is_none()) else { return };
        let (mut done, mut cause) = (mine.at, None);
        for (other, seat) in self.seats.iter().enumerate().filter(|(other, _)| *other != rank) {
            let Some(seat) = seat.as_ref().filter(|seat| !net.is_cut(seat.host, mine.host)) else {
                done = 0;
                continue;
            };
            done = done.min(seat.at);
            cause = cause.or(match seat.gone {
                Some(Gone::Died) => Some(CollectiveError::Lost { rank: other }),
                Some(Gone::Left) => Some(CollectiveError::AbortedBy { rank: other }),
                None => None,
            });
        }
        let seat = self.seats[rank].as_mut().expect("it was there before");
        if let Some(cause) = cause
            && seat.abort.cause().is_none()
        {
            seat.abort.raise(cause);
            seat.changed.notify_one();
        } else if done > seat.done {
            seat.done = done;
            seat.changed.notify_one();
        }
    }
}

impl Member {
    /// Meets the others in the next operation.
    async fn meet(&mut self, deadline: Duration) -> Result<(), CollectiveError> {
        self.at += 1;
        let at = self.at;
        self.with(|seat| seat.at = at);
        let met = async {
            loop {
                if let Some(cause) = self.abort.cause() {
                    return Err(cause);
                }
                if self.with(|seat| seat.done) >= at {
                    return Ok(());
                }
                self.changed.notified().await;
            }
        };
        timeout(deadline, met).await.unwrap_or_else(|_| Err(self.abort.raise(self.missing(deadline))))
    }

    /// Who has not come.
    fn missing(&self, waited: Duration) -> CollectiveError {
        let all = self.meetings.lock();
        let behind = |seat: &Option<Seat>| seat.as_ref().is_none_or(|seat| seat.at < self.at);
        let rank = all.get(&self.epoch).and_then(|meeting| meeting.seats.iter().position(behind));
        let (rank, address) = (rank.unwrap_or_default(), ([10, 0, 0, 0], 1).into());
        CollectiveError::NotMet { rank, address, epoch: self.epoch, waited }
    }

    fn with<T: Default>(&self, f: impl FnOnce(&mut Seat) -> T) -> T {
        let mut all = self.meetings.lock();
        let seat = all.get_mut(&self.epoch).and_then(|meeting| meeting.seats[self.rank].as_mut());
        seat.map(f).unwrap_or_default()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.with(|seat| seat.gone = seat.gone.or(Some(Gone::Left)));
    }
}

/// What is wrong with a process's computing, until it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ill {
    /// A step never ends.
    Hangs,
    /// A step draws other tokens than at the other ranks.
    Errs,
    /// Steps take this many times as long, as long as the process lives, or until all is well.
    Slow(u32),
}

/// Who is ill.
#[derive(Clone, Default)]
pub(super) struct Ills(Arc<Mutex<BTreeMap<u32, Ill>>>);

impl Ills {
    pub(super) fn strike(&self, process: u32, ill: Ill) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(process, ill);
    }

    /// Nobody is slow any more.
    pub(super) fn quicken(&self) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, ill| !matches!(ill, Ill::Slow(_)));
    }

    fn of(&self, process: u32) -> Option<Ill> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get(&process) {
            Some(Ill::Errs) => all.remove(&process),
            ill => ill.copied(),
        }
    }
}

/// Whose thread it is.
#[derive(Clone)]
pub(super) struct Who {
    pub(super) ills: Ills,
    pub(super) process: u32,
    pub(super) host: Host,
    pub(super) ledger: Ledger,
    pub(super) meetings: Meetings,
}

/// Works through the epochs of a rank.
pub(super) async fn compute(who: Who, pulse: Pulse, mut queue: mpsc::Receiver<Engagement>) {
    while let Some(mut engagement) = queue.recv().await {
        who.ledger.begins(who.process, engagement.epoch.0, engagement.rank, &engagement.record);
        let answers = engagement.answers.clone();
        let outcome = tokio::select! {
            outcome = work(&who, &pulse, &mut engagement) => outcome,
            () = answers.closed() => Ok(()), // it was given up from outside
        };
        engagement.abort.abort();
        if let Err(error) = outcome {
            let _ = answers.send(Err(error)).await;
        }
        pulse.waits_uncounted();
    }
}

async fn work(who: &Who, pulse: &Pulse, engagement: &mut Engagement) -> Result<(), EpochError> {
    sleep(LOAD).await;
    engagement.phase.send_replace(Phase::Loaded);
    let Some(may_meet) = engagement.may_meet.take() else { return Ok(()) };
    if may_meet.await.is_err() {
        return Ok(());
    }
    engagement.phase.send_replace(Phase::Joining);
    let (epoch, rank) = (engagement.epoch.0, engagement.rank);
    let EpochRecord { members, .. } = &engagement.record;
    let mut member = who.meetings.join(who, epoch, rank, members.len(), &engagement.abort);
    member.meet(MEET_TIMEOUT).await?;
    let mut toy = Toy::new();
    engagement.phase.send_replace(Phase::Ready);
    while let Some(step) = engagement.steps.recv().await {
        pulse.take_busy();
        pulse.begins(step.tokens());
        who.ledger.obeys(who.process, epoch, &step);
        let ill = if step.slices.is_empty() { None } else { who.ills.of(who.process) };
        match ill {
            Some(Ill::Hangs) => std::future::pending().await,
            Some(Ill::Slow(times)) => sleep(STEP * times).await,
            _ if step.slices.is_empty() => {}
            _ => sleep(STEP).await,
        }
        pulse.waits();
        member.meet(OPERATION_TIMEOUT).await?;
        let mut sampled =
            if step.slices.is_empty() { Sampled::default() } else { toy.run(&step, &mut |_| None)? };
        // One that is alone has nobody who would notice.
        if ill == Some(Ill::Errs)
            && members.len() > 1
            && let Some(token) = sampled.tokens.iter_mut().flatten().next()
        {
            token.id = who.process; // an error of its own
        }
        if engagement.answers.send(Ok(Done { sampled, busy: pulse.take_busy() })).await.is_err() {
            break;
        }
    }
    Ok(())
}

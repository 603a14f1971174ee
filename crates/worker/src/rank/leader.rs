//! The leader's loop: requests in, steps out to all ranks, tokens out to the clients.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use galerne_failpoint::{self as failpoint, Point};
use galerne_sched::Scheduler;
use galerne_types::{Epoch, Event, RequestId, Sampled, Step};
use galerne_wire::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::{Code, Status};

use super::compute::{Done, Steps};
use super::desk::Desk;
use super::digest::digest;
use super::engine::{Call, Run, refused};
use super::error::EpochError;
use super::followers::{BEAT_INTERVAL, Followers};
use super::paces::Paces;
use super::stats::{StepStats, Work};
use super::streams::Streams;

/// How long a step may take, apart from its tokens.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// How long each token of a step may take: a slow machine with a large model runs a few tokens a second.
const STEP_TOKEN_TIMEOUT: Duration = Duration::from_millis(250);

/// How often routers are told the load.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// How long the ranks may have nothing to do before they meet all the same.
const IDLE_MAX: Duration = Duration::from_millis(500);

/// How long they may take for that.
const MEET_TIMEOUT: Duration = Duration::from_secs(3);

/// The leader of one epoch. It plans the next step while one runs; a step is committed when all ranks have run
/// it and agree on what it drew. Dropping it fails the open streams.
pub(crate) struct Leader {
    epoch: Epoch,
    scheduler: Scheduler,
    steps: Steps,
    followers: Followers,
    streams: Streams,
    desk: Desk,
    /// Set while the group is drained: until when running answers may finish.
    drain_due: Option<tokio::time::Instant>,
    in_flight: VecDeque<InFlight>,
    /// Since when the oldest step in flight has been the oldest.
    oldest_since: tokio::time::Instant,
    paces: Paces,
    beat_due: Interval,
    stats: StepStats,
    reports: watch::Sender<v1::LoadReport>,
    report_due: Interval,
}

/// A step that not all ranks have answered yet.
struct InFlight {
    step: Step,
    /// What this rank drew, and its digest.
    own: Option<(Sampled, u64)>,
    /// The followers' digests, as they come.
    theirs: Vec<(usize, u64)>,
}

/// What the loop waits for.
enum News {
    Call(Call),
    Own(Done),
    Follower(usize, v1::StepDone),
    BeatDue,
    ReportDue,
}

impl Leader {
    pub(crate) fn new(
        epoch: Epoch,
        scheduler: Scheduler,
        steps: Steps,
        followers: Followers,
        desk: Desk,
    ) -> Self {
        let stats = StepStats::default();
        let every = |period| {
            let mut due = interval(period);
            due.set_missed_tick_behavior(MissedTickBehavior::Delay);
            due
        };
        Self {
            epoch,
            reports: watch::Sender::new(stats.report(&scheduler.load())),
            report_due: every(REPORT_INTERVAL),
            beat_due: every(BEAT_INTERVAL),
            paces: Paces::new(1 + followers.count()),
            scheduler,
            steps,
            followers,
            streams: Streams::default(),
            desk,
            drain_due: None,
            in_flight: VecDeque::new(),
            oldest_since: tokio::time::Instant::now(),
            stats,
        }
    }

    /// The load, as it is told to routers.
    pub(crate) fn reports(&self) -> watch::Receiver<v1::LoadReport> {
        self.reports.subscribe()
    }

    /// Serves `calls` until something breaks the epoch.
    pub(crate) async fn lead(&mut self, mut calls: mpsc::Receiver<Call>) -> Result<Infallible, EpochError> {
        loop {
            let news = self.news(&mut calls).await?;
            let work = Work::begin();
            self.work(news, &mut calls)?;
            let (time, cpu) = work.end();
            self.stats.worked(time, cpu);
        }
    }

    async fn news(&mut self, calls: &mut mpsc::Receiver<Call>) -> Result<News, EpochError> {
        let deadline = self.in_flight.front().map(|oldest| step_timeout(&oldest.step));
        let due = self.oldest_since + deadline.unwrap_or_default();
        tokio::select! {
            Some(call) = calls.recv() => Ok(News::Call(call)),
            own = self.steps.answer() => own.map(News::Own),
            done = self.followers.answer() => done.map(|(rank, done)| News::Follower(rank, done)),
            _ = self.beat_due.tick() => Ok(News::BeatDue),
            _ = self.report_due.tick() => Ok(News::ReportDue),
            () = until(self.drain_due) => Err(EpochError::Drained),
            () = tokio::time::sleep_until(due), if deadline.is_some() => {
                Err(EpochError::Deadline { what: "a step".into(), deadline: deadline.unwrap_or_default() })
            }
        }
    }

    /// All that there is to do without waiting.
    fn work(&mut self, news: News, calls: &mut mpsc::Receiver<Call>) -> Result<(), EpochError> {
        match news {
            News::Call(call) => self.call(call),
            News::Own(done) => self.own_answer(done)?,
            News::BeatDue => self.followers.beat(self.epoch)?,
            News::Follower(rank, done) => self.follower_answer(rank, &done)?,
            News::ReportDue => {
                self.reports.send_replace(self.stats.report(&self.scheduler.load()));
            }
        }
        while let Ok(call) = calls.try_recv() {
            self.call(call);
        }
        self.end_failed();
        self.commit()?;
        self.streams.flush();
        if self.drain_due.is_some() && self.streams.is_empty() {
            return Err(EpochError::Drained);
        }
        self.plan()?;
        self.meet_if_idle()
    }

    fn call(&mut self, call: Call) {
        match call {
            Call::Run(run) => self.submit(*run),
            Call::Cancel(request) => {
                self.streams.forget(request);
                self.cancel(request); // which is nothing, if it has ended meanwhile
            }
            Call::Superseded(key) => {
                if let Some(request) = self.streams.of(&key) {
                    self.supersede(request);
                }
            }
            Call::Left(link) => {
                for request in self.streams.left(link) {
                    self.cancel(request);
                }
            }
            Call::Drain(due) => self.drain_due = Some(due),
        }
    }

    fn submit(&mut self, run: Run) {
        let Run { request, accepted, key, constraint, link, traced } = run;
        let id = request.id;
        if self.streams.holds(id) {
            // Which of the two is meant by the next news, nobody could say.
            link.end(Status::invalid_argument("two requests of this stream have one id"));
            return;
        }
        self.streams.open(id, link, traced);
        if self.drain_due.is_some() {
            let says = "this group is drained: send the request to another one";
            return self.fail(id, v1::Failed::new(Code::FailedPrecondition, says.to_owned()));
        }
        let before = key.and_then(|key| self.streams.name(id, key)).filter(|_| !accepted);
        if let Some(before) = before {
            self.supersede(before);
        }
        let submit = if accepted { Scheduler::take_over } else { Scheduler::submit };
        match submit(&mut self.scheduler, request) {
            Ok(()) => {
                if let Some(constraint) = constraint {
                    self.desk.open(id, constraint);
                }
            }
            Err(refusal) => {
                self.fail(id, refused(&refusal));
            }
        }
    }

    fn supersede(&mut self, request: RequestId) {
        self.fail(request, v1::Failed::new(Code::Cancelled, "its client has sent it again".to_owned()));
        self.cancel(request);
    }

    fn own_answer(&mut self, Done { sampled, busy }: Done) -> Result<(), EpochError> {
        self.paces.computed(0, busy);
        let entry = self.in_flight.iter_mut().find(|entry| entry.own.is_none()).ok_or(EpochError::Ended)?;
        let digest = digest(&entry.step, &sampled);
        entry.own = Some((sampled, digest));
        Ok(())
    }

    fn follower_answer(&mut self, rank: usize, done: &v1::StepDone) -> Result<(), EpochError> {
        let entry = self.in_flight.iter_mut().find(|entry| entry.step.number == done.number);
        let entry = entry.filter(|entry| entry.theirs.iter().all(|&(heard, _)| heard != rank));
        let entry = entry.ok_or_else(|| EpochError::Follower {
            rank,
            reason: format!("it answers step {}, which it was not asked", done.number),
        })?;
        entry.theirs.push((rank, done.hash));
        self.paces.computed(rank, Duration::from_micros(done.busy_us));
        Ok(())
    }

    /// Commits the steps that all ranks have run, in order.
    fn commit(&mut self) -> Result<(), EpochError> {
        let count = self.followers.count();
        let done = |entry: &InFlight| entry.own.is_some() && entry.theirs.len() == count;
        while self.in_flight.front().is_some_and(done) {
            let Some(InFlight { step, own: Some((sampled, digest)), theirs }) = self.in_flight.pop_front()
            else {
                break;
            };
            let now = tokio::time::Instant::now();
            let took = now - std::mem::replace(&mut self.oldest_since, now);
            if let Some(&(rank, _)) = theirs.iter().find(|(_, hash)| *hash != digest) {
                return Err(EpochError::Diverged { rank, number: step.number });
            }
            for event in self.scheduler.commit(&step, &sampled) {
                if let Event::Finished { request, .. } = event {
                    self.desk.close(request);
                }
                for request in self.streams.emit(event) {
                    self.cancel(request);
                }
            }
            if step.slices.is_empty() {
                continue; // the ranks have met: there is nothing to learn of it
            }
            failpoint::meet(Point::Committed);
            self.scheduler.took(&step, took);
            self.stats.drafted(&step, &sampled);
            self.stats.step_done(step.tokens(), self.scheduler.keys(&step), took);
            if let Some(rank) = self.paces.step(took) {
                return Err(EpochError::Slow { rank });
            }
        }
        Ok(())
    }

    fn fail(&mut self, request: RequestId, failed: v1::Failed) {
        for left in self.streams.fail(request, failed) {
            self.cancel(left);
        }
    }

    fn cancel(&mut self, request: RequestId) {
        self.scheduler.cancel(request);
        self.desk.close(request);
    }

    /// Ends the requests that cannot go on under their grammar, before what was drawn for them since is told.
    fn end_failed(&mut self) {
        for (request, says) in self.desk.take_failed() {
            self.fail(request, v1::Failed::new(Code::Internal, says));
            self.cancel(request);
        }
    }

    /// Hands out as many steps as may be in flight.
    fn plan(&mut self) -> Result<(), EpochError> {
        while let Some(step) = self.scheduler.plan() {
            let admitted = self.scheduler.take_admitted();
            self.stats.admitted(&admitted);
            for request in self.streams.admitted(&admitted) {
                self.cancel(request);
            }
            self.stats.preempted(self.scheduler.take_preempted().len());
            self.send(step)?;
        }
        Ok(())
    }

    /// A group that has nothing to do shows now and then that it could.
    fn meet_if_idle(&mut self) -> Result<(), EpochError> {
        if self.in_flight.is_empty() && self.oldest_since.elapsed() >= IDLE_MAX {
            let step = self.scheduler.beat();
            self.send(step)?;
        }
        Ok(())
    }

    fn send(&mut self, step: Step) -> Result<(), EpochError> {
        if self.in_flight.is_empty() {
            self.oldest_since = tokio::time::Instant::now();
        }
        self.followers.send(&step)?;
        failpoint::meet(Point::Planned);
        self.steps.submit(step.clone())?;
        self.in_flight.push_back(InFlight { step, own: None, theirs: Vec::new() });
        Ok(())
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.stats.log(self.epoch);
        self.desk.clear();
    }
}

/// Waits until then, or for ever.
async fn until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

fn step_timeout(step: &Step) -> Duration {
    if step.slices.is_empty() {
        return MEET_TIMEOUT;
    }
    STEP_TIMEOUT + STEP_TOKEN_TIMEOUT * u32::try_from(step.tokens()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use galerne_sched::Limits;
    use galerne_types::limits::STEPS_IN_FLIGHT_MAX;
    use galerne_types::{FinishReason, Request, Sampling, TenantId, TokenOut};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;
    use crate::rank::followers::{FRAMES_MAX, Link};
    use crate::rank::link::{LinkReceiver, link};
    use crate::rank::streams::request_id;

    const EPOCH: Epoch = Epoch(5);
    const LIMITS: Limits = Limits {
        kv_blocks: 512,
        sequences_max: 16,
        step_tokens_max: 64,
        context_tokens_max: 1024,
        window_tokens: None,
        vocab: 1024,
        waiting_max: 64,
        prefix_cache: true,
        speculation: true,
        itl_target: None,
    };

    /// Every draw is the token's index.
    fn sample(step: &Step) -> Sampled {
        let token = |id| TokenOut::unreported(id);
        Sampled {
            tokens: step
                .slices
                .iter()
                .map(|slice| slice.draw.as_ref().map(|draw| token(draw.index)))
                .collect(),
            ..Sampled::default()
        }
    }

    /// A compute thread that runs `steps` steps and then hangs.
    fn compute(steps: usize) -> Steps {
        let (to, mut taken) = mpsc::channel::<Step>(STEPS_IN_FLIGHT_MAX);
        let (answer, answers) = mpsc::channel(STEPS_IN_FLIGHT_MAX + 1);
        tokio::spawn(async move {
            for _ in 0..steps {
                let Some(step) = taken.recv().await else { return };
                if answer.send(Ok(Done { sampled: sample(&step), busy: Duration::ZERO })).await.is_err() {
                    return;
                }
            }
            answer.closed().await;
        });
        Steps { to, answers }
    }

    /// A follower whose answers to steps from `diverges_at` on are wrong.
    fn follower(rank: usize, diverges_at: u64) -> Link {
        let (to, mut taken) = mpsc::channel::<v1::Step>(FRAMES_MAX);
        let (answer, answers) = mpsc::channel(FRAMES_MAX);
        tokio::spawn(async move {
            while let Some(step) = taken.recv().await {
                let step = Step::try_from(step).unwrap();
                let hash = digest(&step, &sample(&step)) ^ u64::from(step.number >= diverges_at);
                if answer.send(Ok(v1::StepDone { number: step.number, hash, busy_us: 0 })).await.is_err() {
                    return;
                }
            }
        });
        Link { rank, steps: to, done: ReceiverStream::new(answers).boxed(), quiet: 0 }
    }

    fn leader(steps: Steps, followers: Vec<Link>) -> Leader {
        Leader::new(
            EPOCH,
            Scheduler::new(EPOCH, LIMITS),
            steps,
            Followers::new(followers),
            Desk::start().unwrap(),
        )
    }

    /// A request on a link of its own.
    fn call(number: u32, tokens: u32) -> (Call, LinkReceiver) {
        let request = Request {
            id: request_id(number, 0),
            prompt: vec![1; 100],
            first_index: 0,
            sampling: Sampling::greedy(),
            max_tokens: tokens,
            min_tokens: 0,
            stop_tokens: Vec::new(),
            tenant: TenantId::default(),
            prompt_logprobs: None,
            grammar: None,
            cache_salt: Some(0),
            priority: 0,
            trace: None,
        };
        let (link, events) = link();
        let run = Run { request, accepted: false, key: None, constraint: None, link, traced: None };
        (Call::Run(Box::new(run)), events)
    }

    /// The indices of all tokens, and the reason of the end.
    async fn read(mut events: LinkReceiver) -> (Vec<u32>, Result<i32, Status>) {
        let mut indices = Vec::new();
        loop {
            let news = match events.next().await.expect("a last word") {
                Ok(news) => news,
                Err(status) => return (indices, Err(status)),
            };
            for event in news.into_events().unwrap() {
                match event.event.unwrap() {
                    v1::run_event::Event::Begun(_) => {}
                    v1::run_event::Event::Token(token) => indices.push(token.index),
                    v1::run_event::Event::Finished(reason) => return (indices, Ok(reason)),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[tokio::test]
    async fn tokens_reach_their_streams_in_order() {
        let mut leader = leader(compute(usize::MAX), vec![follower(1, u64::MAX), follower(2, u64::MAX)]);
        let (calls, inbox) = mpsc::channel(16);
        let mut streams = Vec::new();
        for id in 0..8 {
            let (call, events) = call(id, 200);
            calls.send(call).await.unwrap();
            streams.push(events);
        }
        tokio::select! {
            error = leader.lead(inbox) => panic!("{error:?}"),
            outcomes = futures_util::future::join_all(streams.into_iter().map(read)) => {
                for (indices, last) in outcomes {
                    assert_eq!(indices, (0..200).collect::<Vec<_>>());
                    assert_eq!(last.unwrap(), v1::FinishReason::from(FinishReason::Length) as i32);
                }
            }
        }
        assert_eq!(leader.scheduler.load().kv_blocks_free, LIMITS.kv_blocks);
    }

    #[tokio::test(start_paused = true)]
    async fn the_load_is_told() {
        let mut leader = leader(compute(usize::MAX), Vec::new());
        let mut reports = leader.reports();
        let (calls, inbox) = mpsc::channel(16);
        let (call, events) = call(1, 200);
        calls.send(call).await.unwrap();
        let told = async {
            assert_eq!(read(events).await.0.len(), 200);
            reports.wait_for(|report| report.steps == 201).await.unwrap().clone()
        };
        tokio::select! {
            error = leader.lead(inbox) => panic!("{error:?}"),
            report = told => {
                // The prompt of 100 takes steps of 64 and 36 tokens.
                assert_eq!((report.running, report.step_tokens), (0, 100 + 199));
                assert_eq!((report.kv_blocks, report.kv_blocks_free), (512, 512));
                assert_eq!(report.steps_by_tokens[6], 2);
            }
        }
    }

    #[tokio::test]
    async fn a_client_or_a_router_that_leaves_frees_its_blocks() {
        let mut leader = leader(compute(usize::MAX), Vec::new());
        let (calls, inbox) = mpsc::channel(16);
        let (cancelled, mut events) = call(1, 900);
        let (of_another_router, _events) = call(2, 900);
        let (stays, other_events) = call(3, 200);
        for call in [cancelled, of_another_router, stays] {
            calls.send(call).await.unwrap();
        }
        let client = async {
            events.next().await.unwrap().unwrap();
            calls.send(Call::Cancel(request_id(1, 0))).await.unwrap();
            calls.send(Call::Left(2)).await.unwrap();
            read(other_events).await
        };
        tokio::select! {
            error = leader.lead(inbox) => panic!("{error:?}"),
            (indices, _) = client => assert_eq!(indices.len(), 200),
        }
        let load = leader.scheduler.load();
        assert_eq!((load.running, load.kv_blocks_free), (0, LIMITS.kv_blocks));
    }

    #[tokio::test]
    async fn a_rank_that_diverges_ends_the_epoch_before_its_tokens_are_told() {
        let mut leader = leader(compute(usize::MAX), vec![follower(1, u64::MAX), follower(2, 3)]);
        let (calls, inbox) = mpsc::channel(16);
        let (call, events) = call(1, 200); // its prompt takes steps 1 and 2
        calls.send(call).await.unwrap();
        let error = leader.lead(inbox).await.unwrap_err();
        assert!(matches!(error, EpochError::Diverged { rank: 2, number: 3 }), "{error}");
        drop(leader);
        let (indices, last) = read(events).await;
        assert_eq!(indices, [0]);
        assert_eq!(last.unwrap_err().code(), tonic::Code::Unavailable);
    }

    #[tokio::test]
    async fn a_follower_that_ends_its_stream_ends_the_epoch() {
        let (steps, done) = (mpsc::channel(2).0, futures_util::stream::empty().boxed());
        let mut leader = leader(compute(usize::MAX), vec![Link { rank: 1, steps, done, quiet: 0 }]);
        let (_calls, inbox) = mpsc::channel(16);
        let error = leader.lead(inbox).await.unwrap_err();
        assert!(matches!(error, EpochError::Follower { rank: 1, .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_that_says_nothing_ends_the_epoch_within_a_second() {
        let (to, _unread) = mpsc::channel::<v1::Step>(FRAMES_MAX);
        let silent = Link { rank: 1, steps: to, done: futures_util::stream::pending().boxed(), quiet: 0 };
        let mut leader = leader(compute(usize::MAX), vec![silent]);
        let (_calls, inbox) = mpsc::channel(16);
        let began = tokio::time::Instant::now();
        let error = leader.lead(inbox).await.unwrap_err();
        assert!(matches!(error, EpochError::Silent { rank: 1, .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn ranks_without_work_meet_now_and_then() {
        let mut leader = leader(compute(3), Vec::new());
        let reports = leader.reports();
        let (_calls, inbox) = mpsc::channel(16);
        let error = leader.lead(inbox).await.unwrap_err();
        assert!(matches!(error, EpochError::Deadline { .. }), "the fourth time one does not come: {error}");
        assert_eq!(reports.borrow().steps, 0, "that is no work");
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_hangs_ends_the_epoch() {
        let mut leader = leader(compute(1), Vec::new());
        let (calls, inbox) = mpsc::channel(16);
        let (call, _events) = call(1, 200);
        calls.send(call).await.unwrap();
        let error = leader.lead(inbox).await.unwrap_err();
        assert!(matches!(error, EpochError::Deadline { .. }), "{error}");
    }
}

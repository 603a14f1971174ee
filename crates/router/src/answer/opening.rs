//! On the way to a leader that goes on with an answer's next token, whichever leader that is.

use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use galerne_dispatch::{Suspicion, Want, full_jitter};
use galerne_types::{GroupId, Request, TokenId};
use galerne_wire::v1;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument as _, Span};

use super::run::{Missed, Run, Trouble};
use crate::ask::random_seed;
use crate::failure::Failure;
use crate::groups::{Place, Watch};
use crate::limits::{ATTEMPTS_MAX, RETRY_MS_MAX, RETRY_MS_MIN, RequestLimits};
use crate::model::Model;
use crate::repeats::Claim;
use crate::serve::Router;

/// An answer that is to be begun, or to go on.
pub(super) struct Opening {
    pub(super) router: Arc<Router>,
    pub(super) model: Arc<Model>,
    /// As it was asked, from token 0.
    pub(super) request: Arc<Request>,
    /// Its number among all that its client gets.
    pub(super) number: u32,
    /// Everything drawn so far.
    pub(super) tokens: Vec<TokenId>,
    /// The numerics under which it was begun; any will do if it was not.
    pub(super) begun: Option<String>,
    /// A leader has had it: now a group is waited for that goes on with it.
    pub(super) accepted: bool,
    /// What is held against it.
    pub(super) suspicion: Suspicion,
    /// To be told of every leader that has it.
    pub(super) claim: Option<Arc<Claim>>,
}

/// An opening under way, whether or not anybody asks how far it is: a client that does not read must not hold what others wait
/// for. Dropping it ends it.
pub(super) struct Opened(AbortOnDropHandle<Result<Run, Failure>>);

impl Future for Opened {
    type Output = Result<Run, Failure>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let opened = ready!(Pin::new(&mut self.0).poll(context));
        Poll::Ready(opened.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => Err(Failure::Closing),
        }))
    }
}

/// How far the tries have come.
struct Tries {
    seen: Watch,
    /// When the next token is due.
    due: Instant,
    /// When the wait for a group ends: of a new request for the first one, of another after each loss.
    recovers: Instant,
    /// The most that the next pause takes.
    pause: Duration,
    /// Leaders that could not be told of it.
    unheard: usize,
    /// Who has refused it last.
    refused: Option<GroupId>,
}

impl Opening {
    /// Finds a group; ready when its first token is there.
    pub(super) fn start(self, span: Span) -> Opened {
        Opened(AbortOnDropHandle::new(tokio::spawn(self.open().instrument(span))))
    }

    async fn open(mut self) -> Result<Run, Failure> {
        let &RequestLimits { first_token_s_max, next_token_s_max, hold_s_max, recovery_s_max, .. } =
            &self.router.requests;
        let (now, seen) = (Instant::now(), self.router.groups.watch());
        let waits = if self.accepted { recovery_s_max } else { hold_s_max };
        let (due, recovers) = (now + first_token_s_max, now + waits);
        let mut tries = Tries { seen, due, recovers, pause: RETRY_MS_MIN, unheard: 0, refused: None };
        if self.accepted {
            tries.pause().await;
        }
        loop {
            let asked = Instant::now();
            let suspect = timeout_at(due, self.router.again.turn(self.suspicion)).await;
            let suspect = suspect.map_err(|_| self.failure(Trouble::Due))?;
            tries.recovers += asked.elapsed(); // it waited for others, and not for a group
            let place = match self.router.groups.place(self.want(&tries)) {
                Err(refusal) if self.waits() => {
                    drop(suspect); // others may try in the meantime
                    self.changed(refusal, &mut tries).await?;
                    continue;
                }
                placed => placed?,
            };
            let claim = self.claim.as_deref();
            if claim.is_some_and(Claim::is_over) {
                return Err(Failure::Superseded);
            }
            if let Some(claim) = claim.filter(|_| !self.accepted) {
                self.router.groups.supersede(&place, claim.key(self.number));
            }
            match Run::open(place, self.message(), suspect, claim, due, next_token_s_max).await {
                Ok(run) => {
                    self.router.groups.succeeded(&run.place);
                    return Ok(run);
                }
                Err(missed) => self.missed(missed, &mut tries).await?,
            }
        }
    }

    /// The groups that go on with it.
    fn want<'a>(&'a self, tries: &'a Tries) -> Want<'a> {
        let most = self.request.prompt.len() as u32 + self.request.max_tokens;
        let begun = self.begun.as_deref().map(|numerics| (numerics, most));
        Want { model: &self.model.name, begun, not: tries.refused.as_ref() }
    }

    /// Waits for another fleet than the one in which no group takes it.
    async fn changed(&self, refusal: Failure, tries: &mut Tries) -> Result<(), Failure> {
        let _held = self.router.metrics.demand.hold();
        let changed = timeout_at(tries.end(), self.router.groups.changed(&mut tries.seen)).await;
        changed.map_err(|_| match refusal {
            _ if self.accepted => self.failure(tries.over()),
            Failure::NoGroup { model, .. } => Failure::NoGroup { model, begun: self.begun.is_some() },
            refusal => refusal,
        })?;
        if self.accepted && self.router.groups.takes(self.want(tries)) {
            tries.recovers = Instant::now() + self.router.requests.recovery_s_max; // it may be lost before its turn
        }
        Ok(())
    }

    /// Whether a group is waited for where none takes it.
    fn waits(&self) -> bool {
        let serves = || self.router.groups.card(&self.model.name).is_some();
        self.accepted || self.begun.is_some() || !serves()
    }

    /// What is sent to a leader.
    fn message(&self) -> v1::RunRequest {
        let mut request = v1::RunRequest::new(&self.request);
        if !self.tokens.is_empty() {
            request.prompt_logprobs = None; // they were told before the first token
        }
        request.prompt.extend(&self.tokens);
        request.first_index = self.tokens.len() as u32;
        request.accepted = self.accepted;
        request.repeat_key = self.claim.as_ref().map_or(Vec::new(), |claim| claim.key(self.number).to_vec());
        request
    }

    /// A leader did not go on with it: fails if nobody will.
    async fn missed(&mut self, missed: Missed, tries: &mut Tries) -> Result<(), Failure> {
        let Missed { trouble, begun, place } = missed;
        let (groups, metrics) = (&self.router.groups, &self.model.metrics);
        if trouble.is_the_groups_fault() {
            groups.failed(&place);
        }
        match &trouble {
            Trouble::Final(failure) if !self.is_tried_elsewhere(failure) => return Err(self.failure(trouble)),
            Trouble::Due | Trouble::Silent => return Err(self.failure(trouble)),
            Trouble::Drained => {
                metrics.retry_drained.inc_by(u64::from(self.tokens.is_empty()));
                groups.drains(&place);
            }
            Trouble::Final(_) => tries.refused = Some(place.group.clone()),
            Trouble::Lost | Trouble::Unheard => {
                metrics.retry_lost.inc_by(u64::from(self.tokens.is_empty()));
                groups.lost(&place);
                self.accepted |= matches!(trouble, Trouble::Lost);
                if begun {
                    lost_on(&self.router, &self.model, &self.request, &place, &mut self.suspicion, 0)?;
                }
                if self.accepted {
                    tries.recovers = Instant::now() + self.router.requests.recovery_s_max;
                }
            }
            Trouble::Stale => {
                metrics.retry_epoch.inc_by(u64::from(self.tokens.is_empty()));
                if !groups.moved(&place).await {
                    groups.lost(&place);
                }
            }
        }
        let drained = matches!(trouble, Trouble::Drained);
        drop(place);
        tries.unheard += usize::from(!self.accepted && !drained);
        if tries.unheard >= ATTEMPTS_MAX {
            return Err(self.failure(Trouble::Lost));
        }
        if self.accepted {
            tries.pause().await;
        }
        // A group that is drained is asked once.
        let affordable = self.accepted || drained || self.router.again.retry();
        if !affordable || self.accepted && Instant::now() >= tries.end() {
            return Err(self.failure(tries.over()));
        }
        Ok(())
    }

    /// Whether somebody else, or the same leader later, may take what a leader has refused: it was taken once, and so
    /// its client is not told that there is no room for it.
    fn is_tried_elsewhere(&self, failure: &Failure) -> bool {
        match failure {
            Failure::Overloaded(_) => self.accepted,
            Failure::Invalid { .. } => !self.tokens.is_empty(),
            _ => false,
        }
    }

    fn failure(&self, trouble: Trouble) -> Failure {
        trouble.failure(self.tokens.len(), &self.router.requests)
    }
}

/// A group was lost while its ranks worked on a request, of which it had given so many tokens.
///
/// # Errors
/// If the request is taken for the reason.
pub(super) fn lost_on(
    router: &Router,
    model: &Model,
    request: &Request,
    place: &Place,
    suspicion: &mut Suspicion,
    tokens: usize,
) -> Result<(), Failure> {
    if !router.groups.convicts(place, suspicion, tokens) {
        return Ok(());
    }
    router.again.ban(&model.name, request);
    tracing::warn!(deaths = suspicion.deaths(), "groups were lost on a request: it is refused for a while");
    Err(Failure::KillsGroups)
}

impl Tries {
    /// When waiting ends.
    fn end(&self) -> Instant {
        self.recovers.min(self.due)
    }

    /// Why they have ended then.
    fn over(&self) -> Trouble {
        if self.due < self.recovers { Trouble::Due } else { Trouble::Lost }
    }

    /// Waits, each time longer: all requests of a group are lost at once.
    async fn pause(&mut self) {
        let pause = full_jitter(self.pause, random_seed());
        self.pause = (self.pause * 2).min(RETRY_MS_MAX);
        sleep_until((Instant::now() + pause).min(self.end())).await;
    }
}

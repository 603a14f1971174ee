//! On the way to a leader that goes on with an answer's next token, whichever leader that is.

use std::sync::Arc;
use std::time::Duration;

use galerne_dispatch::{Want, full_jitter};
use galerne_types::{GroupId, ModelCard, Request, TokenId};
use galerne_wire::v1;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::run::{Missed, Run, Trouble};
use crate::ask::random_seed;
use crate::failure::Failure;
use crate::groups::{Place, Watch};
use crate::limits::{
    ATTEMPTS_MAX, RETRY_MS_MAX, RETRY_MS_MIN, RequestLimits, SUSPICION_ELSEWHERE_MAX, SUSPICION_MAX,
};
use crate::model::Model;
use crate::repeats::Claim;
use crate::serve::Router;

/// An answer that is to be begun, or to go on.
pub(super) struct Opening {
    pub(super) router: Arc<Router>,
    pub(super) model: Arc<Model>,
    /// As it was asked, from token 0.
    pub(super) request: Arc<Request>,
    /// Everything drawn so far.
    pub(super) tokens: Vec<TokenId>,
    /// The card under which it was begun; any will do if it was not.
    pub(super) begun: Option<ModelCard>,
    /// A leader has had it: now a group is waited for that goes on with it.
    pub(super) accepted: bool,
    /// To be told of every leader that has it.
    pub(super) claim: Option<Arc<Claim>>,
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
    /// Groups in a row that were lost while their ranks worked on it.
    deaths: u32,
    /// How likely it is the reason: each of k requests without a token at a group that is lost by a k-th.
    suspicion: f32,
    /// Groups that had been lost before the first of these.
    losses_before: u64,
    /// Who has refused it last.
    refused: Option<GroupId>,
}

impl Opening {
    /// Finds a group, and returns when its first token is there.
    pub(super) async fn open(mut self) -> Result<Run, Failure> {
        let &RequestLimits { first_token_s_max, next_token_s_max, hold_s_max, recovery_s_max, .. } =
            &self.router.requests;
        let (now, seen) = (Instant::now(), self.router.groups.watch());
        let waits = if self.accepted { recovery_s_max } else { hold_s_max };
        let (due, recovers) = (now + first_token_s_max, now + waits);
        let mut tries = Tries {
            seen,
            due,
            recovers,
            pause: RETRY_MS_MIN,
            unheard: 0,
            deaths: 0,
            suspicion: 0.0,
            losses_before: 0,
            refused: None,
        };
        if self.accepted {
            tries.pause().await;
        }
        loop {
            let probation = timeout_at(tries.end(), self.router.again.probation(tries.deaths)).await;
            let probation = probation.map_err(|_| self.failure(tries.over()))?;
            let place = self.place(&mut tries).await?;
            let claim = self.claim.as_deref();
            if claim.is_some_and(Claim::is_over) {
                return Err(Failure::Superseded);
            }
            match Run::open(place, self.message(), claim, due, next_token_s_max).await {
                Ok(run) => {
                    self.router.groups.succeeded(&run.place);
                    return Ok(run);
                }
                Err(missed) => {
                    drop(probation);
                    self.missed(missed, &mut tries).await?;
                }
            }
        }
    }

    /// A place at a group. What a leader has had waits for one, and so does what comes while none serves.
    async fn place(&self, tries: &mut Tries) -> Result<Place, Failure> {
        let (groups, request) = (&self.router.groups, &self.request);
        let most = request.prompt.len() as u32 + request.max_tokens;
        loop {
            let begun = self.begun.as_ref().map(|card| (card, most));
            let want = Want { model: &self.model.name, begun, not: tries.refused.as_ref() };
            match groups.place(want) {
                Err(refusal) if self.accepted || groups.card(&self.model.name).is_none() => {
                    let _held = self.router.metrics.demand.hold();
                    let changed = timeout_at(tries.end(), groups.changed(&mut tries.seen)).await;
                    let over = |_| if self.accepted { self.failure(tries.over()) } else { refusal };
                    changed.map_err(over)?;
                }
                placed => return placed,
            }
        }
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
                    if tries.deaths == 0 {
                        tries.losses_before = groups.losses() - 1;
                    }
                    tries.deaths += 1;
                    tries.suspicion += 1.0 / place.link.suspects().max(1) as f32;
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
        // Where groups are lost without it, too, it takes more to be sure.
        let always = groups.losses() - tries.losses_before == u64::from(tries.deaths);
        if tries.suspicion >= if always { SUSPICION_MAX } else { SUSPICION_ELSEWHERE_MAX } {
            self.router.again.ban(&self.model.name, &self.request);
            tracing::warn!(deaths = tries.deaths, "groups were lost on a request: it is refused for a while");
            return Err(Failure::KillsGroups);
        }
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

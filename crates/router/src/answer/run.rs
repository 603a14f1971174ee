//! A request at a leader: what is sent there, what comes back, and when it is not waited for any longer.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use galerne_dispatch::Suspicion;
use galerne_types::TokenOut;
use galerne_wire::v1;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::{Code, Status};
use tracing::Span;

use crate::again::Suspect;
use crate::failure::Failure;
use crate::groups::Place;
use crate::limits::RequestLimits;
use crate::link::{Letters, News, Told};
use crate::repeats::Claim;
use crate::trace;

/// A request at a leader. Dropping it cancels the request there.
pub(super) struct Run {
    pub(super) place: Place,
    letters: Letters,
    /// The first event behind the prompt's scores, which was awaited before the leader was believed in.
    first: Option<News>,
    /// What came of the prompt's log probabilities, from its second token on.
    pub(super) scores: Vec<TokenOut>,
    /// The ranks work on it.
    pub(super) begun: bool,
    /// The first token that was asked for.
    pub(super) first_index: usize,
    /// What was held against it when it was sent.
    pub(super) suspicion: Suspicion,
    silence: Silence,
    /// Ends with it.
    _span: Span,
}

/// Ends a wait for news that do not come. One timer a request, not one an event: it is only looked at when it rings.
struct Silence {
    timer: Pin<Box<Sleep>>,
    /// How long after any news it rings; `None` until the first token, which has its own time.
    patience: Option<Duration>,
}

/// A request that did not get its next token.
pub(super) struct Missed {
    pub(super) trouble: Trouble,
    /// The ranks of that group had begun to work on it.
    pub(super) begun: bool,
    pub(super) place: Place,
}

/// Why a leader did not go on.
pub(super) enum Trouble {
    /// It could not be told of the request.
    Unheard,
    /// It cannot be reached any more, or says that its group is lost.
    Lost,
    /// It leads another incarnation than the fleet's view shows.
    Stale,
    /// It finishes what it has, and takes nothing new.
    Drained,
    /// It has not sent the first token in time.
    Due,
    /// It has sent nothing for too long.
    Silent,
    /// No other group would do better.
    Final(Failure),
}

impl Run {
    /// Sends a request to its place's leader and waits for the first token, until it is due; afterwards, it may be silent
    /// for so long.
    pub(super) async fn open(
        place: Place,
        mut request: v1::RunRequest,
        suspect: Suspect,
        claim: Option<&Claim>,
        due: Instant,
        silence_s_max: Duration,
    ) -> Result<Self, Missed> {
        let (prompt_tokens, first_index) = (request.prompt.len(), request.first_index as usize);
        let (span, suspicion) = (trace::run(&mut request, &place), suspect.suspicion);
        let letters = place.link.send(request, suspect);
        if let Some(claim) = claim {
            claim.sent(letters.scissors());
        }
        let silence = Silence { timer: Box::pin(sleep_until(due)), patience: None };
        let mut run = Self {
            place,
            letters,
            first: None,
            scores: Vec::new(),
            begun: false,
            first_index,
            suspicion,
            silence,
            _span: span,
        };
        loop {
            match poll_fn(|context| run.poll_next(context)).await {
                Ok((_, Told::Scored(scored))) => {
                    if let Err(trouble) = add_scores(&mut run.scores, *scored, prompt_tokens) {
                        return Err(Missed { trouble, begun: run.begun, place: run.place });
                    }
                }
                Ok(first) => {
                    run.silence.timer.as_mut().reset(first.0 + silence_s_max);
                    run.silence.patience = Some(silence_s_max);
                    run.first = Some(first);
                    return Ok(run);
                }
                Err(Trouble::Lost) if !run.place.link.heard() => {
                    return Err(Missed { trouble: Trouble::Unheard, begun: false, place: run.place });
                }
                Err(trouble) => return Err(Missed { trouble, begun: run.begun, place: run.place }),
            }
        }
    }

    /// The next event, and when it came.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<News, Trouble>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Ok(first));
        }
        match self.letters.poll(context) {
            Poll::Ready(Ok((_, Told::Failed(failed)))) => Poll::Ready(Err(Trouble::said(*failed))),
            Poll::Ready(Ok((_, Told::Begun))) => {
                self.begun = true;
                self.poll_next(context)
            }
            Poll::Ready(Ok(news)) => Poll::Ready(Ok(news)),
            Poll::Ready(Err(status)) => Poll::Ready(Err(Trouble::of(&status))),
            Poll::Pending => Poll::Ready(Err(ready!(self.silence.poll(&self.letters, context)))),
        }
    }

    /// From now on its reader is woken when so many events wait, or the last.
    pub(super) fn tell_at(&self, events: usize) {
        self.letters.tell_at(events);
    }
}

impl Silence {
    fn poll(&mut self, letters: &Letters, context: &mut Context<'_>) -> Poll<Trouble> {
        loop {
            ready!(self.timer.as_mut().poll(context));
            let Some(patience) = self.patience else { return Poll::Ready(Trouble::Due) };
            let rings = letters.heard() + patience;
            if rings <= self.timer.deadline() {
                return Poll::Ready(Trouble::Silent);
            }
            self.timer.as_mut().reset(rings);
        }
    }
}

/// Scores come in order; a leader that had to begin again sends some of them twice.
fn add_scores(all: &mut Vec<TokenOut>, scored: v1::Scored, prompt_tokens: usize) -> Result<(), Trouble> {
    let at = (scored.position as usize).wrapping_sub(1);
    if at > all.len() || at + scored.scores.len() >= prompt_tokens {
        let says = format!("it scored the prompt from token {} on, out of turn", scored.position);
        return Err(Trouble::Final(Failure::Engine(says)));
    }
    all.truncate(at);
    all.extend(scored.scores.into_iter().map(TokenOut::from));
    Ok(())
}

impl Trouble {
    /// Whether a group may be broken that does so again and again. One that is lost is counted as such.
    pub(super) fn is_the_groups_fault(&self) -> bool {
        matches!(self, Self::Silent | Self::Final(Failure::Engine(_)))
    }

    /// What the client of an answer of so many tokens is told when nobody goes on with it.
    pub(super) fn failure(self, tokens: usize, limits: &RequestLimits) -> Failure {
        match self {
            Self::Lost | Self::Unheard | Self::Stale | Self::Drained => Failure::Lost { tokens },
            Self::Due if tokens == 0 => Failure::Queued { wait: limits.first_token_s_max },
            Self::Due => Failure::Stalled { wait: limits.first_token_s_max, tokens },
            Self::Silent => Failure::Stalled { wait: limits.next_token_s_max, tokens },
            Self::Final(Failure::TooSlow { .. }) => Failure::TooSlow { tokens },
            Self::Final(failure) => failure,
        }
    }

    /// What the end of all news means.
    fn of(status: &Status) -> Self {
        if std::error::Error::source(status).is_some() {
            return Self::Lost; // the transport failed; no leader said this
        }
        if status.code() == Code::FailedPrecondition {
            return Self::Stale;
        }
        Self::said(status.clone().into())
    }

    /// What a leader said of a request.
    fn said(failed: v1::Failed) -> Self {
        let field = failed.blames();
        let status = failed.status();
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable => Self::Lost,
            Code::FailedPrecondition => Self::Drained,
            Code::ResourceExhausted => Self::Final(Failure::Overloaded(message)),
            Code::InvalidArgument => Self::Final(Failure::Invalid { field, message }),
            Code::Cancelled => Self::Final(Failure::Superseded), // nobody else cuts a request
            Code::Aborted => Self::Final(Failure::TooSlow { tokens: 0 }),
            _ => Self::Final(Failure::Engine(message)),
        }
    }
}

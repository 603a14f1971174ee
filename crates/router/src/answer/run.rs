//! A request at a leader: what is sent there, what comes back, and when it is not waited for any longer.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use galerne_types::TokenOut;
use galerne_wire::v1::run_event::Event;
use galerne_wire::{blamed, show_secret, v1};
use tokio::time::{Instant, Sleep, sleep, timeout_at};
use tonic::{Code, Status, Streaming};
use tracing::Span;

use crate::failure::Failure;
use crate::groups::Place;
use crate::trace;

/// A request at a leader. Dropping it cancels the request there.
pub(super) struct Run {
    pub(super) place: Place,
    events: Streaming<v1::RunEvent>,
    /// The first event behind the prompt's scores, which was awaited before the leader was believed in.
    first: Option<Event>,
    /// What came of the prompt's log probabilities, from its second token on.
    pub(super) scores: Vec<TokenOut>,
    silence: Silence,
    /// Ends with it.
    _span: Span,
}

/// Ends a wait for news that do not come. One timer a request, not one an event: it is only looked at when it rings,
/// and so a leader is given up after one to two times the limit.
struct Silence {
    timer: Pin<Box<Sleep>>,
    s_max: Duration,
    /// There were news since it was set.
    broken: bool,
}

/// Why a leader did not go on.
pub(super) enum Trouble {
    /// It cannot be reached, or says that its group is lost.
    Lost,
    /// It leads another incarnation than the fleet's view shows.
    Stale,
    /// It has not sent the first token in time.
    Due,
    /// It has sent nothing for too long.
    Silent,
    /// No other group would do better.
    Final(Failure),
}

impl Run {
    /// Sends a request to its place's leader and waits for the first token, until it is due; afterwards, it may be silent
    /// for so long. The place comes back with a trouble.
    pub(super) async fn open(
        mut place: Place,
        request: v1::RunRequest,
        due: Instant,
        silence_s_max: Duration,
    ) -> Result<Self, (Trouble, Place)> {
        let prompt_tokens = request.prompt.len();
        let mut request = tonic::Request::new(request);
        if let Err(status) = show_secret(&mut request, &place.secret) {
            return Err((Trouble::of(&status), place));
        }
        let span = trace::call(&mut request, &place);
        let begun = async {
            let mut events =
                place.leader.run(request).await.map_err(|status| Trouble::of(&status))?.into_inner();
            let mut scores = Vec::new();
            loop {
                match Trouble::sort(events.message().await)? {
                    Event::Scored(scored) => add_scores(&mut scores, scored, prompt_tokens)?,
                    first => return Ok((events, scores, first)),
                }
            }
        };
        match timeout_at(due, begun).await.unwrap_or(Err(Trouble::Due)) {
            Ok((events, scores, first)) => {
                let silence =
                    Silence { timer: Box::pin(sleep(silence_s_max)), s_max: silence_s_max, broken: false };
                Ok(Self { place, events, first: Some(first), scores, silence, _span: span })
            }
            Err(trouble) => Err((trouble, place)),
        }
    }

    /// The next event.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Event, Trouble>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Ok(first));
        }
        match Pin::new(&mut self.events).poll_next(context) {
            Poll::Ready(event) => {
                self.silence.broken = true;
                Poll::Ready(Trouble::sort(event.transpose()))
            }
            Poll::Pending => {
                ready!(self.silence.poll(context));
                Poll::Ready(Err(Trouble::Silent))
            }
        }
    }
}

impl Silence {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(context));
            if !std::mem::take(&mut self.broken) {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(Instant::now() + self.s_max);
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
    /// The event in what a leader's stream gave.
    fn sort(event: Result<Option<v1::RunEvent>, Status>) -> Result<Event, Self> {
        match event {
            Ok(Some(v1::RunEvent { event: Some(event) })) => Ok(event),
            Ok(Some(v1::RunEvent { event: None })) => {
                Err(Self::Final(Failure::Engine("it sent an event that says nothing".to_owned())))
            }
            Ok(None) => Err(Self::Lost), // a leader ends a stream with an event or a status
            Err(status) => Err(Self::of(&status)),
        }
    }

    fn of(status: &Status) -> Self {
        let message = status.message().to_owned();
        if std::error::Error::source(status).is_some() {
            return Self::Lost; // the transport failed; no leader said this
        }
        match status.code() {
            Code::Unavailable => Self::Lost,
            Code::FailedPrecondition => Self::Stale,
            Code::ResourceExhausted => Self::Final(Failure::Overloaded(message)),
            Code::InvalidArgument => Self::Final(Failure::Invalid { field: blamed(status), message }),
            Code::Aborted => Self::Final(Failure::TooSlow { tokens: 0 }),
            _ => Self::Final(Failure::Engine(message)),
        }
    }
}

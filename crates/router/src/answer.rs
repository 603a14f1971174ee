//! The pipeline of one answer: tokens of the prompt → a group → tokens of the answer → text.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use galerne_text::Detokenizer;
use galerne_types::{FinishReason, ModelCard, Request, TokenId, TokenOut};
use galerne_wire::v1::run_event::Event;
use galerne_wire::{show_secret, v1};
use tokio::time::timeout;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Code, Status, Streaming};
use tracing::{Instrument as _, Span};

use crate::ask::{Ask, Caller, Options, Prompt};
use crate::failure::Failure;
use crate::groups::Place;
use crate::limits::{ATTEMPTS_MAX, FIRST_TOKEN_S_MAX, NEXT_TOKEN_S_MAX};
use crate::metrics::Meter;
use crate::model::Model;
use crate::serve::Router;
use crate::trace;

/// An answer under way. Dropping it cancels the request at its leader and gives the place there back.
pub(crate) struct Answer {
    caller: Caller,
    progress: Progress,
    detokenizer: Detokenizer,
    /// What the answering group serves.
    card: ModelCard,
    /// Where it runs; `None` once it has ended.
    run: Option<Run>,
    /// Resolves when running answers have to end; kept, because to register anew for each token costs a lock.
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    meter: Meter,
}

/// Everything that a leader needs to go on with the next token, whichever leader it is.
struct Progress {
    router: Arc<Router>,
    model: Arc<Model>,
    /// As it was asked, from token 0.
    request: Request,
    /// Everything drawn so far.
    tokens: Vec<TokenId>,
}

/// A request at a leader.
struct Run {
    place: Place,
    events: Streaming<v1::RunEvent>,
    /// The first event, which was awaited before the leader was believed in.
    first: Option<Event>,
    /// Ends with it.
    _span: Span,
}

/// What one event adds to an answer.
#[derive(Debug)]
pub(crate) struct Delta {
    /// Text that is certain now; may be empty.
    pub(crate) text: String,
    /// The token that was drawn; none in the last delta of an answer that the engine ended.
    pub(crate) token: Option<TokenOut>,
    /// Set in the last delta.
    pub(crate) finish: Option<FinishReason>,
}

/// Why a leader did not go on.
enum Trouble {
    /// It cannot be reached, or says that its group is lost.
    Lost,
    /// It leads another incarnation than the fleet's view shows.
    Stale,
    /// No other group would do better.
    Final(Failure),
}

impl Answer {
    /// Begins an answer, and returns when its first token is there: until then another group is tried when one is
    /// lost, and every failure has a status of its own instead of breaking a stream.
    pub(crate) async fn start(router: &Arc<Router>, ask: Ask) -> Result<Self, Failure> {
        let Ask { model, prompt, options, caller } = ask;
        let model = router.model(&model)?;
        caller.begin()?;
        let mut meter = Meter::new(model.metrics.clone());
        let mut closing = Box::pin(router.closing.clone().cancelled_owned());
        let span = meter.span();
        let begun = async {
            let progress = Progress::new(router, model, prompt, &options, &caller).await?;
            let run = progress.open().instrument(span).await?;
            Ok((progress, run))
        };
        let begun = tokio::select! {
            begun = begun => begun,
            () = &mut closing => Err(Failure::Closing),
        };
        let (progress, run) = begun.inspect_err(|_| meter.end(FinishReason::Error))?;
        let request = &progress.request;
        meter.prompt(request.prompt.len());
        caller.used(request.prompt.len() as u64);
        let tokenizer = progress.model.tokenizer.clone();
        let detokenizer = Detokenizer::new(tokenizer, &request.prompt, options.stop, options.skip_special)
            .with_min_tokens(request.min_tokens as usize);
        Ok(Self {
            caller,
            progress,
            detokenizer,
            card: run.place.model.clone(),
            run: Some(run),
            closing,
            meter,
        })
    }

    /// What the answering group serves.
    pub(crate) fn card(&self) -> &ModelCard {
        &self.card
    }

    pub(crate) fn model(&self) -> &Model {
        &self.progress.model
    }

    pub(crate) fn prompt(&self) -> &[TokenId] {
        &self.progress.request.prompt
    }

    /// Tokens generated so far, the one that ends the answer included.
    pub(crate) fn generated(&self) -> usize {
        self.progress.tokens.len()
    }

    /// The next delta, or an error, which is the last that comes; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Delta, Failure>> {
        let run = self.run.as_mut()?;
        let event = tokio::select! {
            event = run.next(NEXT_TOKEN_S_MAX) => event,
            () = &mut self.closing => Err(Trouble::Final(Failure::Closing)),
        };
        if let Err(Trouble::Lost) = event {
            self.progress.router.groups.lost(&run.place); // for the requests to come; this one may not start over yet
        }
        let delta = match event {
            Ok(Event::Token(token)) => self.token(token),
            Ok(Event::Finished(reason)) => self.finished(reason),
            Ok(Event::Scored(_)) => Err(Failure::Engine("it sent scores that were not asked for".to_owned())),
            Err(trouble) => Err(self.progress.failure(trouble)),
        };
        let end = match &delta {
            Ok(delta) => delta.finish,
            Err(_) => Some(FinishReason::Error),
        };
        if let Some(reason) = end {
            self.run = None;
            self.meter.end(reason);
        }
        Some(delta)
    }

    fn token(&mut self, token: v1::RunToken) -> Result<Delta, Failure> {
        let (index, expected) = (token.index as usize, self.progress.tokens.len());
        let token: TokenOut = token.token.unwrap_or_default().into();
        if index != expected {
            return Err(Failure::Engine(format!("it sent token {index} where token {expected} was due")));
        }
        self.progress.tokens.push(token.id);
        self.meter.token();
        self.caller.used(1);
        if self.progress.request.stop_tokens.contains(&token.id) {
            // The engine ends the answer with it, and it is no part of the text.
            return Ok(Delta { text: String::new(), token: Some(token), finish: None });
        }
        let piece = self.detokenizer.push(token.id);
        let finish = piece.stopped.then_some(FinishReason::Stop);
        Ok(Delta { text: piece.text, token: Some(token), finish })
    }

    fn finished(&mut self, reason: i32) -> Result<Delta, Failure> {
        let reason = v1::FinishReason::try_from(reason).ok().and_then(v1::FinishReason::into_type);
        match reason {
            Some(reason @ (FinishReason::Stop | FinishReason::Length)) => {
                Ok(Delta { text: self.detokenizer.finish(), token: None, finish: Some(reason) })
            }
            Some(FinishReason::Cancelled | FinishReason::Error) | None => {
                Err(Failure::Engine("it gave the request up".to_owned()))
            }
        }
    }
}

impl Progress {
    async fn new(
        router: &Arc<Router>,
        model: Arc<Model>,
        prompt: Prompt,
        options: &Options,
        caller: &Caller,
    ) -> Result<Self, Failure> {
        options.check()?;
        let card = router.groups.card(&model.name);
        let card = card.ok_or_else(|| Failure::NoGroup { model: model.name.clone() })?;
        let prompt = router.tokenize(&model, prompt).await?;
        let request = options.request(&model, prompt, card.context_tokens_max, caller)?;
        caller.reserve(options.estimate(&request))?;
        Ok(Self { router: router.clone(), model, request, tokens: Vec::new() })
    }

    /// Finds a group that goes on with the answer, from the prompt and the tokens so far.
    async fn open(&self) -> Result<Run, Failure> {
        let groups = &self.router.groups;
        for _ in 0..ATTEMPTS_MAX {
            let place = groups.place(&self.model.name)?;
            let mut request = v1::RunRequest::new(place.epoch, &self.request);
            request.prompt.extend(&self.tokens);
            request.first_index = self.tokens.len() as u32;
            match Run::open(place, request).await {
                Ok(run) => return Ok(run),
                Err((Trouble::Final(failure), _)) => return Err(failure),
                Err((Trouble::Lost, place)) => {
                    self.model.metrics.retry_lost.inc();
                    groups.lost(&place);
                }
                Err((Trouble::Stale, place)) => {
                    self.model.metrics.retry_epoch.inc();
                    if !groups.moved(&place).await {
                        groups.lost(&place);
                    }
                }
            }
        }
        Err(self.failure(Trouble::Lost))
    }

    /// What the client is told when the answer does not go on.
    fn failure(&self, trouble: Trouble) -> Failure {
        let tokens = self.tokens.len();
        match trouble {
            Trouble::Lost | Trouble::Stale => Failure::Lost { tokens },
            Trouble::Final(Failure::TooSlow { .. }) => Failure::TooSlow { tokens },
            Trouble::Final(failure) => failure,
        }
    }
}

impl Run {
    /// Sends a request to its place's leader and waits for the first event. The place comes back with a trouble.
    async fn open(mut place: Place, request: v1::RunRequest) -> Result<Self, (Trouble, Place)> {
        let mut request = tonic::Request::new(request);
        if let Err(status) = show_secret(&mut request, &place.secret) {
            return Err((Trouble::of(&status), place));
        }
        let span = trace::call(&mut request, &place);
        let events = match timeout(FIRST_TOKEN_S_MAX, place.leader.run(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Err((Trouble::of(&status), place)),
            Err(_) => return Err((Trouble::silent(FIRST_TOKEN_S_MAX), place)),
        };
        let mut run = Self { place, events, first: None, _span: span };
        match run.next(FIRST_TOKEN_S_MAX).await {
            Ok(first) => {
                run.first = Some(first);
                Ok(run)
            }
            Err(trouble) => Err((trouble, run.place)),
        }
    }

    async fn next(&mut self, wait: Duration) -> Result<Event, Trouble> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        match timeout(wait, self.events.message()).await {
            Ok(Ok(Some(v1::RunEvent { event: Some(event) }))) => Ok(event),
            Ok(Ok(Some(v1::RunEvent { event: None }))) => {
                Err(Trouble::Final(Failure::Engine("it sent an event that says nothing".to_owned())))
            }
            Ok(Ok(None)) => Err(Trouble::Lost), // a leader ends a stream with an event or a status
            Ok(Err(status)) => Err(Trouble::of(&status)),
            Err(_) => Err(Trouble::silent(wait)),
        }
    }
}

impl Trouble {
    fn of(status: &Status) -> Self {
        let message = status.message().to_owned();
        if std::error::Error::source(status).is_some() {
            return Self::Lost; // the transport failed; no leader said this
        }
        match status.code() {
            Code::Unavailable => Self::Lost,
            Code::FailedPrecondition => Self::Stale,
            Code::ResourceExhausted => Self::Final(Failure::Overloaded(message)),
            Code::InvalidArgument => Self::Final(Failure::Invalid { field: None, message }),
            Code::Aborted => Self::Final(Failure::TooSlow { tokens: 0 }),
            _ => Self::Final(Failure::Engine(message)),
        }
    }

    fn silent(wait: Duration) -> Self {
        Self::Final(Failure::Engine(format!("it sent no token for {} s", wait.as_secs())))
    }
}

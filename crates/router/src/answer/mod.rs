//! The pipeline of one answer: tokens of the prompt → a group → tokens of the answer → text.

mod opening;
mod run;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use compact_str::CompactString;
use galerne_dispatch::Suspicion;
use galerne_failpoint::{self as failpoint, Point};
use galerne_text::Detokenizer;
use galerne_types::{FinishReason, ModelCard, Request, TokenId, TokenOut};
use galerne_wire::v1;
use tokio::time::Instant;
use tokio_util::sync::WaitForCancellationFutureOwned;

use self::opening::{Opened, Opening, lost_on};
use self::run::{Run, Trouble};
use crate::ask::{Ask, Caller, MaxTokens, Options, Prompt, Resume};
use crate::failure::Failure;
use crate::limits::HELD_EVENTS_MAX;
use crate::link::{News, Told};
use crate::metrics::Meter;
use crate::model::Model;
use crate::serve::Router;
use crate::traffic::Passage;

/// An answer under way. Dropping it cancels the request at its leader and gives the place there back.
pub(crate) struct Answer {
    caller: Caller,
    progress: Progress,
    detokenizer: Detokenizer,
    /// What the answering group serves.
    card: ModelCard,
    stage: Stage,
    /// Its reader is woken when so many events wait, or the last.
    told_at: usize,
    /// The log probabilities of the prompt's tokens, from its second one on.
    scores: Vec<TokenOut>,
    /// Tokens of the prompt that the group had kept, and did not compute again.
    cached_tokens: usize,
    /// It ends with its first token, which is not shown.
    silent: bool,
    /// The model's end-of-sequence tokens end it only if its client named them.
    ignore_eos: bool,
    /// What stops it is part of its text.
    include_stop: bool,
    /// Resolves when running answers have to end; kept, because to register anew for each token costs a lock.
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Resolves when its client has sent it again, if it has a name.
    superseded: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// Tokens that its client had before it began.
    resumed: usize,
    meter: Meter,
    /// Counts as a request under way.
    passage: Passage,
}

/// What happens to an answer.
#[expect(clippy::large_enum_variant, reason = "nearly all of them run")]
enum Stage {
    Running(Run),
    /// Its group was lost, and another one is to go on with it, or the same once it is back.
    Moving(Opened),
    /// It has ended with what its client had before.
    Complete(v1::FinishReason),
    Ended,
}

/// What the answers to one prompt have in common.
pub(crate) struct Common {
    router: Arc<Router>,
    model: Arc<Model>,
    options: Arc<Options>,
    caller: Caller,
    /// The first one's.
    request: Request,
    /// What one of the groups serves.
    card: ModelCard,
    /// The number of its first answer among all that its client gets.
    first: u32,
}

/// Everything that a leader needs to go on with the next token, whichever leader it is.
struct Progress {
    router: Arc<Router>,
    model: Arc<Model>,
    /// As it was asked, from token 0.
    request: Arc<Request>,
    /// Its number among all that its client gets.
    number: u32,
    /// Everything drawn so far.
    tokens: Vec<TokenId>,
}

/// What one event adds to an answer.
#[derive(Debug)]
pub(crate) struct Delta {
    /// Text that is certain now; may be empty.
    pub(crate) text: CompactString,
    /// The token that was drawn; none in the last delta of an answer that the engine ended.
    pub(crate) token: Option<TokenOut>,
    /// Set in the last delta.
    pub(crate) finish: Option<FinishReason>,
    /// What stopped the answer; set in the last delta of one that was stopped, unless its grammar was complete.
    pub(crate) stopped: Option<Stopped>,
}

/// What stopped an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// One of the model's end-of-sequence tokens.
    Eos(TokenId),
    /// A token of the client's.
    Token(TokenId),
    /// A string of the client's.
    Text(String),
}

impl Common {
    /// Turns a prompt into the request that is sent to leaders, once for each of its answers.
    pub(crate) async fn new(
        router: &Arc<Router>,
        model: &Arc<Model>,
        prompt: Prompt,
        options: &Arc<Options>,
        each: u32,
        caller: &Caller,
    ) -> Result<Self, Failure> {
        router.traffic.admits()?; // before the work of tokenizing
        let card = match router.groups.card(&model.name) {
            Some(card) => Some(card),
            None => {
                let _held = router.metrics.demand.hold();
                router.groups.card_within(&model.name, router.requests.hold_s_max).await
            }
        };
        let card = card.ok_or_else(|| Failure::NoGroup { model: model.name.clone(), begun: false })?;
        let prompt = router.tokenize(model, prompt).await?;
        let request = options.request(model, prompt, card.context_tokens_max, caller, &router.requests)?;
        caller.reserve(options.estimate(&request, each))?;
        router.metrics.demand.arrived(each);
        let (router, model, options) = (router.clone(), model.clone(), options.clone());
        Ok(Self { router, model, options, caller: caller.clone(), request, card, first: 0 })
    }

    /// As the prompt of that number, each with so many answers.
    pub(crate) fn at(self, number: usize, each: u32) -> Self {
        Self { first: number as u32 * each, ..self }
    }
}

impl Answer {
    /// Begins an answer, and returns when its first token is there: until then every failure has a status of its own
    /// instead of breaking a stream.
    pub(crate) async fn start(router: &Arc<Router>, ask: Ask) -> Result<Self, Failure> {
        let Ask { model, prompt, mut options, mut caller, resume } = ask;
        let model = router.model(&model)?;
        caller.begin()?;
        let mut meter = Meter::new(model.metrics.clone());
        caller.claim(&router.repeats).inspect_err(|failure| meter.fail(failure))?;
        options.draw_seed(&caller);
        let options = Arc::new(options);
        let common = async {
            options.check_resume(&resume, &caller)?;
            options.check(&router.requests)?;
            Common::new(router, &model, prompt, &options, 1, &caller).await
        };
        let common = common.await.inspect_err(|failure| meter.fail(failure))?;
        caller.release(); // its body has become tokens
        Self::open(&common, 0, meter, resume).await
    }

    /// Begins the answer of that number to a prompt, and returns when its first token is there; `resume`: the beginning
    /// that its client has.
    pub(crate) async fn open(
        common: &Common,
        number: u32,
        mut meter: Meter,
        resume: Resume,
    ) -> Result<Self, Failure> {
        let Common { router, model, options, caller, request, card, first } = common;
        let mut request = request.clone();
        request.sampling.seed = request.sampling.seed.wrapping_add(number.into());
        meter.prompt(request.prompt.len(), request.max_tokens);
        let request = Arc::new(request);
        let progress = Progress {
            router: router.clone(),
            model: model.clone(),
            request,
            number: first + number,
            tokens: resume.tokens,
        };
        if !router.again.request(&model.name, &progress.request) {
            let failure = Failure::KillsGroups;
            meter.fail(&failure);
            return Err(failure);
        }
        let passage = router.traffic.enter(&model.name).inspect_err(|_| meter.end(FinishReason::Error))?;
        let (prompt, stop) = (&progress.request.prompt, options.stop.clone());
        let detokenizer = Detokenizer::new(model.tokenizer.clone(), prompt, stop, options.skip_special)
            .with_min_tokens(progress.request.min_tokens as usize)
            .spelling_out(&options.spelled_out)
            .including_stop(options.include_stop);
        let mut answer = Self {
            caller: caller.clone(),
            resumed: progress.tokens.len(),
            progress,
            detokenizer,
            card: card.clone(),
            stage: Stage::Ended,
            told_at: 1,
            scores: Vec::new(),
            cached_tokens: 0,
            silent: matches!(options.max_tokens, MaxTokens::Nothing),
            ignore_eos: options.ignore_eos,
            include_stop: options.include_stop,
            closing: Box::pin(router.closing.clone().cancelled_owned()),
            superseded: caller.claimed().map(|claim| Box::pin(claim.superseded().cancelled_owned())),
            meter,
            passage,
        };
        let begun = answer.begin(resume.numerics).await.map_err(|failure| options.blame(failure));
        begun.inspect_err(|failure| answer.meter.fail(failure))?;
        if number == 0 {
            caller.used(answer.prompt().len() as u64); // once, as in a client's usage
        }
        Ok(answer)
    }

    /// Takes in what its client has of it, and finds a group that goes on, of these numerics if they are known.
    async fn begin(&mut self, numerics: Option<String>) -> Result<(), Failure> {
        if let Some(reason) = self.take_up()? {
            self.stage = Stage::Complete(reason);
            return Ok(());
        }
        let opening = self.progress.opening(&self.caller, numerics, false, Suspicion::default());
        let opening = opening.start(self.meter.span());
        let superseded = self.superseded.as_mut();
        let mut run = tokio::select! {
            run = opening => run?,
            () = &mut self.closing => return Err(Failure::Closing),
            () = async { superseded.expect("asked before").await }, if superseded.is_some() => {
                return Err(Failure::Superseded);
            }
        };
        self.passage.placed(self.progress.request.prompt.len(), &run.place.group.0);
        self.card = run.place.model.clone();
        self.scores = std::mem::take(&mut run.scores);
        self.stage = Stage::Running(run);
        Ok(())
    }

    /// Brings the text to where its client has it; why there is no more, if that is all.
    fn take_up(&mut self) -> Result<Option<v1::FinishReason>, Failure> {
        let (tokens, vocab) = (&self.progress.tokens, self.model().vocab);
        let most = self.progress.request.max_tokens as usize;
        if tokens.len() > most || tokens.iter().any(|&token| token as usize >= vocab) {
            let says = format!("resume must be at most {most} tokens of the vocabulary of {vocab}");
            return Err(Failure::invalid("resume", says));
        }
        let stops = &self.progress.request.stop_tokens;
        let before_last = &tokens[..tokens.len().saturating_sub(1)];
        if let Some(at) = before_last.iter().position(|token| stops.contains(token)) {
            let says = format!(
                "resume has token {} at {at}, which ends an answer, and more behind it: resume with the tokens of this \
                 request's own stream, with the same stop_token_ids and ignore_eos",
                tokens[at]
            );
            return Err(Failure::invalid("resume", says));
        }
        for &token in &self.progress.tokens {
            let ends = self.progress.request.stop_tokens.contains(&token) && !self.include_stop;
            if !ends && self.detokenizer.push(token).stopped {
                return Ok(Some(v1::FinishReason::Stop));
            }
        }
        Ok(self.end_due())
    }

    /// Its client wants it whole: it is looked at less often, unless its end depends on the text.
    pub(crate) fn hold(&mut self) {
        if !self.detokenizer.may_stop() {
            self.tell_at(HELD_EVENTS_MAX);
        }
    }

    /// From now on its reader is woken when so many events wait, or the last.
    pub(crate) fn tell_at(&mut self, events: usize) {
        self.told_at = events;
        if let Stage::Running(run) = &self.stage {
            run.tell_at(events);
        }
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

    /// The log probabilities of the prompt's tokens, from its second one on; empty if nobody asked for them.
    pub(crate) fn prompt_scores(&self) -> &[TokenOut] {
        &self.scores
    }

    /// Tokens of the prompt that were not computed again, as far as the first token has told.
    pub(crate) fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Whether the engine ends the answer behind this token, which it drew last.
    pub(crate) fn ends_with(&self, token: TokenId) -> bool {
        let request = &self.progress.request;
        request.stop_tokens.contains(&token) || self.generated() >= request.max_tokens as usize
    }

    /// Tokens that its client had before.
    pub(crate) fn resumed(&self) -> usize {
        self.resumed
    }

    /// Tokens generated so far, the one that ends the answer included.
    pub(crate) fn generated(&self) -> usize {
        self.progress.tokens.len()
    }

    /// Whether the prompt and the answer so far fill the model's context.
    pub(crate) fn fills_context(&self) -> bool {
        self.prompt().len() + self.generated() >= self.card.context_tokens_max as usize
    }

    /// The next delta, or an error, which is the last that comes; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Delta, Failure>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`next`](Self::next).
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Delta, Failure>>> {
        let event = match self.poll_event(context) {
            Poll::Ready(None) => return Poll::Ready(None),
            _ if self.poll_superseded(context).is_ready() => Err(Trouble::Final(Failure::Superseded)),
            Poll::Ready(Some(event)) => event,
            Poll::Pending if self.closing.as_mut().poll(context).is_ready() => {
                Err(Trouble::Final(Failure::Closing))
            }
            Poll::Pending => {
                self.meter.settle();
                return Poll::Pending;
            }
        };
        let delta = match event {
            Ok((_, Told::Bare(..) | Told::Token(_))) if self.silent => Ok(Delta::end(FinishReason::Length)),
            Ok((came, Told::Bare(index, token))) => {
                self.token(index, TokenOut::unreported(token), None, came)
            }
            Ok((came, Told::Token(token))) => {
                let v1::RunToken { index, token, timing } = *token;
                self.token(index, token.unwrap_or_default().into(), timing, came)
            }
            Ok((_, Told::Finished(reason))) => self.finished(reason),
            Ok((_, Told::Begun | Told::Scored(_) | Told::Failed(_))) => {
                Err(Failure::Engine("it scored the prompt behind a token".to_owned()))
            }
            Err(trouble) => Err(trouble.failure(self.generated(), &self.progress.router.requests)),
        };
        match &delta {
            Ok(Delta { finish: None, .. }) => return Poll::Ready(Some(delta)),
            Ok(Delta { finish: Some(reason), .. }) => self.meter.end(*reason),
            Err(failure) => self.meter.fail(failure),
        }
        self.stage = Stage::Ended;
        Poll::Ready(Some(delta))
    }

    /// The next event of whoever works on it.
    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<News, Trouble>>> {
        loop {
            let event = match &mut self.stage {
                Stage::Running(run) => ready!(run.poll_next(context)),
                Stage::Moving(opened) => match ready!(Pin::new(opened).poll(context)) {
                    Ok(run) => {
                        self.passage.placed(self.prompt().len(), &run.place.group.0);
                        run.tell_at(self.told_at);
                        self.stage = Stage::Running(run);
                        continue;
                    }
                    Err(failure) => Err(Trouble::Final(failure)),
                },
                Stage::Complete(reason) => Ok((Instant::now(), Told::Finished((*reason).into()))),
                Stage::Ended => return Poll::Ready(None),
            };
            match event {
                Err(trouble @ (Trouble::Lost | Trouble::Stale)) => {
                    if let Some(reason) = self.end_due() {
                        return Poll::Ready(Some(Ok((Instant::now(), Told::Finished(reason.into())))));
                    }
                    if let Err(failure) = self.move_on(&trouble) {
                        return Poll::Ready(Some(Err(Trouble::Final(failure))));
                    }
                }
                event => {
                    if let (Err(trouble), Stage::Running(run)) = (&event, &self.stage)
                        && trouble.is_the_groups_fault()
                    {
                        self.progress.router.groups.failed(&run.place);
                    }
                    return Poll::Ready(Some(event));
                }
            }
        }
    }

    fn poll_superseded(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.superseded.as_mut().map_or(Poll::Pending, |superseded| superseded.as_mut().poll(context))
    }

    /// How its group would have ended it behind its last token, had it not been lost before it said so.
    fn end_due(&self) -> Option<v1::FinishReason> {
        let (request, last) = (&self.progress.request, self.progress.tokens.last()?);
        if request.stop_tokens.contains(last) {
            return Some(v1::FinishReason::Stop);
        }
        (self.generated() >= request.max_tokens as usize).then_some(v1::FinishReason::Length)
    }

    /// Leaves a group that was lost; fails if that was because of this very request.
    fn move_on(&mut self, trouble: &Trouble) -> Result<(), Failure> {
        let Stage::Running(run) = std::mem::replace(&mut self.stage, Stage::Ended) else { return Ok(()) };
        let Run { place, begun, first_index, mut suspicion, .. } = run;
        let (Progress { router, model, request, .. }, had) = (&self.progress, self.generated() - first_index);
        let stale = matches!(trouble, Trouble::Stale);
        if !stale {
            router.groups.lost(&place);
        }
        if begun && !stale {
            lost_on(router, model, request, &place, &mut suspicion, had)?;
        }
        self.meter.migrates(if stale { "epoch" } else { "lost" }, &place);
        drop(place);
        let opening = self.progress.opening(&self.caller, Some(self.card.numerics()), true, suspicion);
        self.stage = Stage::Moving(opening.start(self.meter.span()));
        Ok(())
    }

    fn token(
        &mut self,
        index: u32,
        token: TokenOut,
        timing: Option<v1::Timing>,
        came: Instant,
    ) -> Result<Delta, Failure> {
        let (index, expected) = (index as usize, self.progress.tokens.len());
        if let (true, Some(timing)) = (expected == self.resumed, &timing) {
            self.cached_tokens = self.prompt().len().min(timing.cached_tokens as usize);
        }
        if index != expected {
            return Err(Failure::Engine(format!("it sent token {index} where token {expected} was due")));
        }
        failpoint::meet(Point::Relayed);
        self.progress.tokens.push(token.id);
        self.meter.token(timing, came);
        self.caller.used(1);
        self.passage.tokens(self.progress.tokens.len());
        if self.progress.request.stop_tokens.contains(&token.id) && !self.include_stop {
            // The engine ends the answer with it, and it is no part of the text.
            return Ok(Delta {
                text: CompactString::default(),
                token: Some(token),
                finish: None,
                stopped: None,
            });
        }
        let piece = self.detokenizer.push(token.id);
        let finish = piece.stopped.then_some(FinishReason::Stop);
        let stopped = self.detokenizer.stopped().map(|stop| Stopped::Text(stop.to_owned()));
        Ok(Delta { text: piece.text, token: Some(token), finish, stopped })
    }

    /// What made the engine stop: the last token, unless a grammar was complete.
    fn stopped(&self) -> Option<Stopped> {
        let token = *self.progress.tokens.last()?;
        if !self.progress.request.stop_tokens.contains(&token) {
            return None;
        }
        let eos = self.model().eos.contains(&token) && !self.ignore_eos;
        Some(if eos { Stopped::Eos(token) } else { Stopped::Token(token) })
    }

    fn finished(&mut self, reason: i32) -> Result<Delta, Failure> {
        let reason = v1::FinishReason::try_from(reason).ok().and_then(v1::FinishReason::into_type);
        match reason {
            Some(reason @ (FinishReason::Stop | FinishReason::Length)) => {
                let text = self.detokenizer.stopped().map(|stop| Stopped::Text(stop.to_owned()));
                let stopped =
                    if reason == FinishReason::Stop { text.or_else(|| self.stopped()) } else { None };
                Ok(Delta { text: self.detokenizer.finish().into(), stopped, ..Delta::end(reason) })
            }
            Some(FinishReason::Cancelled | FinishReason::Error) | None => {
                Err(Failure::Engine("it gave the request up".to_owned()))
            }
        }
    }
}

impl Delta {
    fn end(reason: FinishReason) -> Self {
        Self { text: CompactString::default(), token: None, finish: Some(reason), stopped: None }
    }
}

impl Progress {
    /// The way to a group that goes on with the answer, from the prompt and the tokens so far; `begun`: the numerics under
    /// which it had these. `accepted`: a leader has had it.
    fn opening(
        &self,
        caller: &Caller,
        begun: Option<String>,
        accepted: bool,
        suspicion: Suspicion,
    ) -> Opening {
        Opening {
            router: self.router.clone(),
            model: self.model.clone(),
            request: self.request.clone(),
            number: self.number,
            tokens: self.tokens.clone(),
            accepted,
            begun: begun.filter(|_| !self.tokens.is_empty()),
            suspicion,
            claim: caller.claimed().cloned(),
        }
    }
}

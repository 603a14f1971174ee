//! What the dialects of vLLM's routers have in common: a call has a name by which it can be ended, and several
//! answers, each of which tells exactly what stopped it.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_types::{FinishReason, TenantId, TokenId, TokenOut};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;

use super::deadline::Deadline;
use super::errors::Fields;
use crate::answer::{Answer, Delta, Stopped};
use crate::ask::Several;
use crate::choices::Choices;
use crate::serve::Router;

/// The calls that run, by their names. Whoever does not know a name cannot end it, and another tenant's is unknown.
#[derive(Default)]
pub(super) struct Names(Mutex<Running>);

#[derive(Default)]
struct Running {
    began: u64,
    calls: HashMap<(TenantId, String), Vec<(u64, CancellationToken)>>,
}

/// A running call's name; it is free again when this is dropped.
pub(super) struct Named {
    names: Arc<Names>,
    key: (TenantId, String),
    number: u64,
    aborted: CancellationToken,
}

impl Names {
    /// Several calls of one name end together.
    pub(super) fn take(self: &Arc<Self>, tenant: TenantId, name: String) -> Named {
        let (key, aborted) = ((tenant, name), CancellationToken::new());
        let mut running = self.lock();
        running.began += 1;
        let number = running.began;
        running.calls.entry(key.clone()).or_default().push((number, aborted.clone()));
        drop(running);
        Named { names: self.clone(), key, number, aborted }
    }

    /// Ends calls; names that are not known have ended.
    pub(super) fn abort(&self, tenant: TenantId, names: Vec<String>) {
        for name in names {
            let calls = self.lock().calls.remove(&(tenant, name));
            for (_, aborted) in calls.into_iter().flatten() {
                aborted.cancel();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let mut running = self.names.lock();
        if let Some(calls) = running.calls.get_mut(&self.key) {
            calls.retain(|(number, _)| *number != self.number);
            if calls.is_empty() {
                running.calls.remove(&self.key);
            }
        }
    }
}

/// Answers under way. Dropping them ends them at their leaders.
pub(super) struct Call {
    choices: Option<Choices>,
    /// Tokens of the prompt; 0 if the call was aborted before it had any.
    prompt_tokens: u32,
    /// Answers that have not ended.
    open: VecDeque<usize>,
    /// The last token of an answer, which waits for the word that ends it.
    last: Vec<Option<Delta>>,
    deadline: Deadline,
    aborted: Pin<Box<WaitForCancellationFutureOwned>>,
    fields: Fields,
    _name: Named,
}

/// What one token adds to an answer, or its end.
pub(super) struct News {
    /// Which answer.
    pub(super) at: usize,
    pub(super) text: String,
    pub(super) token: Option<TokenOut>,
    pub(super) end: Option<End>,
}

/// How an answer ended.
pub(super) enum End {
    Length,
    /// By one of the model's end-of-sequence tokens.
    Eos(TokenId),
    /// By a token of the client's.
    Token(TokenId),
    /// By a string of the client's.
    Text(String),
    /// By the engine's own decision: a grammar that is complete.
    Complete,
    Aborted,
}

impl Call {
    /// Begins, and returns when the first token of one answer is there, or the call was aborted.
    pub(super) async fn start(
        router: &Arc<Router>,
        several: Several,
        mut deadline: Deadline,
        name: Named,
        fields: Fields,
    ) -> Result<Self, Status> {
        let count = several.each as usize;
        let mut aborted = Box::pin(name.aborted.clone().cancelled_owned());
        let choices = tokio::select! {
            begun = deadline.limit(Choices::start(router, several)) => Some(begun?.map_err(|failure| fields.name(failure))?),
            () = &mut aborted => None,
        };
        let last = (0..count).map(|_| None).collect();
        let prompt_tokens = choices.as_ref().and_then(any).map_or(0, |answer| answer.prompt().len() as u32);
        Ok(Self {
            choices,
            prompt_tokens,
            open: (0..count).collect(),
            last,
            deadline,
            aborted,
            fields,
            _name: name,
        })
    }

    /// An answer that has begun, for what they all have in common; none after an abort.
    pub(super) fn any(&self) -> Option<&Answer> {
        self.choices.as_ref().and_then(any)
    }

    /// Tokens of the prompt, also of a call that was aborted since.
    pub(super) fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens
    }

    /// Tokens of the prompt that an answer's group did not compute again; 0 until that has begun, and after an abort.
    pub(super) fn cached_tokens(&self, at: usize) -> u32 {
        let answer = self.choices.as_ref().and_then(|choices| choices.answer(at));
        answer.map_or(0, |answer| answer.cached_tokens() as u32)
    }

    /// What comes next of any answer, or an error, which ends them all; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<Result<News, Status>> {
        loop {
            let Some(choices) = &mut self.choices else {
                let at = self.open.pop_front()?;
                return Some(Ok(News { at, text: String::new(), token: None, end: Some(End::Aborted) }));
            };
            let news = tokio::select! {
                biased;
                () = &mut self.aborted, if !self.open.is_empty() => {
                    self.choices = None; // the leaders stop, and the answers that are open end here
                    continue;
                }
                news = self.deadline.limit(choices.next()) => news,
            };
            match news {
                Err(exceeded) => {
                    self.choices = None;
                    self.open.clear();
                    return Some(Err(exceeded));
                }
                Ok(None) => return None,
                Ok(Some(Err(failure))) => {
                    self.open.clear();
                    return Some(Err(self.fields.name(failure)));
                }
                Ok(Some(Ok((at, delta)))) => {
                    if let Some(news) = self.take_in(at, delta) {
                        return Some(Ok(news));
                    }
                }
            }
        }
    }

    /// Holds a token back that the engine will call the last one in a moment.
    fn take_in(&mut self, at: usize, delta: Delta) -> Option<News> {
        let answer = self.choices.as_ref()?.answer(at)?;
        let Some(reason) = delta.finish else {
            if delta.token.as_ref().is_some_and(|token| answer.ends_with(token.id)) {
                self.last[at] = Some(delta);
                return None;
            }
            return Some(News { at, text: delta.text.into(), token: delta.token, end: None });
        };
        let (text, token) = match self.last[at].take() {
            Some(last) => (last.text.into_string() + &delta.text, last.token),
            None => (delta.text.into(), delta.token),
        };
        let end = match (reason, delta.stopped) {
            (FinishReason::Length, _) => End::Length,
            (_, Some(Stopped::Eos(id))) => End::Eos(id),
            (_, Some(Stopped::Token(id))) => End::Token(id),
            (_, Some(Stopped::Text(stop))) => End::Text(stop),
            (_, None) => End::Complete,
        };
        self.open.retain(|open| *open != at);
        Some(News { at, text, token, end: Some(end) })
    }
}

fn any(choices: &Choices) -> Option<&Answer> {
    (0..choices.len()).find_map(|at| choices.answer(at))
}

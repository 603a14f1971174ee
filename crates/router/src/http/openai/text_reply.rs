//! A text completion's answer as JSON: whole, or in chunks.

use bytes::{Bytes, BytesMut};
use galerne_types::TokenId;
use serde::Serialize;

use super::logprobs::{self, Logprobs, TextLogprobs};
use super::reply::{Beside, Form, StopReason, Usage};
use crate::answer::{Answer, Delta};
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::gather::Gathered;
use crate::http::shape::{Calls, Finish, Ids, Shaped, Shaper};
use crate::http::stream::{Dialect, Stencil};

/// A text completion has one name, whole or in chunks.
const OBJECT: &str = "text_completion";

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    /// In chunks only in the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<StopReason<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(flatten)]
    beside: Beside<'a>,
}

impl<'a> Choice<'a> {
    /// Nothing but text.
    fn plain(index: usize, text: &'a str) -> Self {
        let (logprobs, finish_reason, stop_reason, token_ids) = (None, None, None, None);
        Self { index, text, logprobs, finish_reason, stop_reason, token_ids, beside: Beside::default() }
    }
}

/// What a client wants to see of its prompts.
#[derive(Default)]
pub(in crate::http) struct Echo {
    /// Its prompts come before their answers.
    pub(in crate::http) shown: bool,
    /// As they came, if they were texts.
    pub(in crate::http) texts: Vec<Option<String>>,
}

impl Echo {
    fn text(&self, answer: &Answer, prompt: usize) -> String {
        match self.texts.get(prompt) {
            _ if !self.shown => String::new(),
            Some(Some(text)) => text.clone(),
            _ => answer.model().tokenizer.decode(answer.prompt(), true),
        }
    }
}

/// The one body of a completion that is not streamed; of the choices of each prompt, the `keep` that are most likely,
/// or all of them.
pub(in crate::http) fn whole(
    form: &Form,
    choices: &Choices,
    all: &[Gathered],
    keep: Option<usize>,
    echo: &Echo,
) -> Result<Bytes, Failure> {
    let mut order: Vec<_> = all.iter().enumerate().collect();
    if let Some(keep) = keep {
        let mut kept = Vec::with_capacity(order.len());
        for group in order.chunks_mut(choices.each()) {
            group.sort_by(|(_, a), (_, b)| b.mean_logprob().total_cmp(&a.mean_logprob()));
            kept.extend_from_slice(&group[..keep.min(group.len())]);
        }
        order = kept;
    }
    let (view, spelling) = (form.view, form.spelling(choices));
    let answers: Vec<_> =
        order.iter().filter_map(|&(at, one)| Some((at, choices.answer(at)?, one))).collect();
    let texts = answers.iter().map(|(at, answer, one)| {
        let mut text = echo.text(answer, at / choices.each());
        text.push_str(&one.text);
        text
    });
    let texts: Vec<_> = texts.collect();
    let list = answers.iter().zip(&texts).enumerate().map(|(index, ((_, answer, one), text))| Choice {
        index,
        text,
        logprobs: view.logprobs.then(|| {
            let mut logprobs = TextLogprobs::at(0);
            if echo.shown {
                logprobs.prompt(spelling, answer.prompt(), answer.prompt_scores());
            }
            one.tokens.iter().for_each(|token| logprobs.token(spelling, token));
            Logprobs::Text(logprobs)
        }),
        finish_reason: one.finish.map(Finish::name),
        stop_reason: Some(StopReason::of(one.stopped.as_ref())),
        token_ids: view.token_ids.then(|| one.tokens.iter().map(|token| token.id).collect()),
        beside: Beside {
            prompt_token_ids: view.token_ids.then(|| answer.prompt()),
            prompt_logprobs: view
                .prompt_logprobs
                .then(|| logprobs::of_prompt(spelling, answer.prompt_scores())),
        },
    });
    form.whole(OBJECT, &list.collect::<Vec<_>>(), Usage::of(choices), &Beside::default())
}

/// A completion in chunks.
pub(in crate::http) struct TextStream {
    form: Form,
    head: Bytes,
    echo: Echo,
    lines: Vec<Line>,
}

/// One choice.
struct Line {
    shaper: Shaper,
    begun: bool,
    /// Characters in the texts of the tokens so far.
    offset: usize,
    /// Its chunks of nothing but text.
    plain: Option<Stencil>,
}

impl TextStream {
    pub(in crate::http) fn new(form: Form, echo: Echo, choices: &Choices) -> Result<Self, Failure> {
        let head = form.head(OBJECT)?;
        let line = |_| {
            Ok(Line {
                shaper: Shaper::new(&Calls::Never, Ids::OpenAi)?,
                begun: false,
                offset: 0,
                plain: None,
            })
        };
        let lines = (0..choices.len()).map(line).collect::<Result<_, Failure>>()?;
        Ok(Self { form, head, echo, lines })
    }
}

impl Dialect for TextStream {
    fn delta(
        &mut self,
        at: usize,
        delta: Delta,
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure> {
        let Some(answer) = choices.answer(at) else { return Ok(()) };
        let (view, spelling) = (self.form.view, self.form.spelling(choices));
        let Line { shaper, begun, offset, plain } = &mut self.lines[at];
        let Shaped { mut text, calls: _, token, finish, stopped } = shaper.push(delta)?;
        let token = token.filter(|_| view.logprobs || view.token_ids);
        let first = !*begun;
        let echoed = first && self.echo.shown;
        if text.is_empty() && token.is_none() && finish.is_none() && !echoed {
            return Ok(()); // it would tell its client nothing
        }
        *begun = true;
        let beside = echoed || view.logprobs || view.token_ids || view.continuous_usage;
        if !beside && finish.is_none() {
            return Stencil::write(plain, &text, out, |text, out| {
                let choice = Choice::plain(at, text);
                self.form.chunk(&self.head, Some(&choice), &Beside::default(), choices, out)
            });
        }
        let mut shown = TextLogprobs::at(*offset);
        if echoed {
            text.insert_str(0, &self.echo.text(answer, at / choices.each()));
            if view.logprobs {
                shown.prompt(spelling, answer.prompt(), answer.prompt_scores());
            }
        }
        if let Some(token) = token.as_ref().filter(|_| view.logprobs) {
            shown.token(spelling, token);
        }
        let any = shown.offset() != *offset || token.is_some();
        *offset = shown.offset();
        let choice = Choice {
            logprobs: (view.logprobs && any).then_some(Logprobs::Text(shown)),
            finish_reason: finish.map(Finish::name),
            stop_reason: finish.map(|_| StopReason::of(stopped.as_ref())),
            token_ids: view.token_ids.then(|| token.iter().map(|token| token.id).collect()),
            beside: Beside {
                prompt_token_ids: (first && view.token_ids).then(|| answer.prompt()),
                prompt_logprobs: None,
            },
            ..Choice::plain(at, &text)
        };
        self.form.chunk(&self.head, Some(&choice), &Beside::default(), choices, out)
    }

    fn end(&mut self, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        self.form.end(&self.head, choices, out)
    }
}

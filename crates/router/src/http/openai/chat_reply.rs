//! A chat's answer as JSON: whole, or in chunks.

use bytes::{Bytes, BytesMut};
use galerne_text::Part;
use galerne_types::TokenId;
use serde::Serialize;

use super::logprobs::{self, Logprobs};
use super::reply::{Beside, Form, StopReason, Usage};
use crate::answer::{Answer, Delta};
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::gather::{Call, Gathered};
use crate::http::shape::{Calls, Finish, Ids, Shaped, Shaper};
use crate::http::stream::{Dialect, Stencil};

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
}

#[derive(Serialize)]
pub(in crate::http) struct ToolCall<'a> {
    id: &'a str,
    r#type: &'static str,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: ChunkDelta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    /// Only in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<StopReason<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize, Default)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallDelta<'a>>,
}

#[derive(Serialize)]
struct ToolCallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: Function<'a>,
}

/// The one body of a chat that is not streamed.
pub(in crate::http) fn whole(form: &Form, choices: &Choices, all: &[Gathered]) -> Result<Bytes, Failure> {
    let view = form.view;
    let spelling = form.spelling(choices);
    let list: Vec<_> =
        all.iter().enumerate().map(|(index, one)| Choice::new(index, one, form, choices)).collect();
    let answer = choices.answer(0);
    let scores = answer.filter(|_| view.prompt_logprobs).map(Answer::prompt_scores);
    let beside = Beside {
        prompt_token_ids: answer.filter(|_| view.token_ids).map(Answer::prompt),
        prompt_logprobs: scores.map(|scores| logprobs::of_prompt(spelling, scores)),
    };
    form.whole("chat.completion", &list, Usage::of(choices), &beside)
}

impl<'a> Choice<'a> {
    fn new(index: usize, one: &'a Gathered, form: &Form, choices: &Choices) -> Self {
        let tool_calls: Vec<_> = one.calls.iter().map(ToolCall::of).collect();
        let content = (!one.text.is_empty() || tool_calls.is_empty()).then_some(one.text.as_str());
        let view = form.view;
        Self {
            index,
            message: Message { role: "assistant", content, refusal: None, tool_calls },
            logprobs: view.logprobs.then(|| Logprobs::chat(form.spelling(choices), &one.tokens)),
            finish_reason: one.finish.map(Finish::name),
            stop_reason: StopReason::of(one.stopped.as_ref()),
            token_ids: view.token_ids.then(|| one.tokens.iter().map(|token| token.id).collect()),
        }
    }
}

impl<'a> ToolCall<'a> {
    pub(in crate::http) fn of(call: &'a Call) -> Self {
        let function = Function { name: Some(&call.name), arguments: &call.arguments };
        Self { id: &call.id, r#type: "function", function }
    }
}

/// A chat in chunks.
pub(in crate::http) struct ChatStream {
    form: Form,
    head: Bytes,
    voices: Vec<Voice>,
    /// The prompt has been shown, if anybody wanted to see it.
    begun: bool,
}

/// One choice.
struct Voice {
    shaper: Shaper,
    /// It has been said who speaks.
    begun: bool,
    /// Its chunks of nothing but words.
    words: Option<Stencil>,
}

impl ChatStream {
    pub(in crate::http) fn new(form: Form, calls: &Calls, choices: &Choices) -> Result<Self, Failure> {
        let head = form.head("chat.completion.chunk")?;
        let voice = |_| Ok(Voice { shaper: Shaper::new(calls, Ids::of(calls))?, begun: false, words: None });
        let voices = (0..choices.len()).map(voice).collect::<Result<_, Failure>>()?;
        Ok(Self { form, head, voices, begun: false })
    }

    /// Who speaks: the first chunk of a choice.
    fn opening(&mut self, index: usize, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        let delta = ChunkDelta { role: Some("assistant"), content: Some(""), ..ChunkDelta::default() };
        let choice = ChunkChoice::new(index, delta);
        let shown = self.form.view.token_ids && !std::mem::replace(&mut self.begun, true);
        let prompt = choices.answer(index).filter(|_| shown).map(Answer::prompt);
        let beside = Beside { prompt_token_ids: prompt, prompt_logprobs: None };
        self.form.chunk(&self.head, Some(&choice), &beside, choices, out)
    }

    /// A chunk of nothing but words.
    fn words(&mut self, at: usize, text: &str, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        Stencil::write(&mut self.voices[at].words, text, out, |text, out| {
            let delta = ChunkDelta { content: Some(text), ..ChunkDelta::default() };
            let choice = ChunkChoice::new(at, delta);
            self.form.chunk(&self.head, Some(&choice), &Beside::default(), choices, out)
        })
    }
}

impl Dialect for ChatStream {
    fn delta(
        &mut self,
        at: usize,
        delta: Delta,
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure> {
        let voice = &mut self.voices[at];
        let Shaped { text, calls, token, finish, stopped } = voice.shaper.push(delta)?;
        if !std::mem::replace(&mut voice.begun, true) {
            self.opening(at, choices, out)?;
        }
        let view = self.form.view;
        let token = token.as_ref().filter(|_| view.logprobs || view.token_ids);
        if text.is_empty() && calls.is_empty() && token.is_none() && finish.is_none() {
            return Ok(()); // it would tell its client nothing
        }
        let words = calls.is_empty() && token.is_none() && finish.is_none();
        if words && !view.continuous_usage {
            return self.words(at, &text, choices, out);
        }
        let ids = token.map(|token| token.id);
        let tokens = token.map_or(&[][..], std::slice::from_ref);
        let delta = ChunkDelta {
            role: None,
            content: (!text.is_empty()).then_some(text.as_str()),
            tool_calls: ToolCallDelta::all(&calls),
        };
        let mut choice = ChunkChoice {
            logprobs: (view.logprobs && !tokens.is_empty())
                .then(|| Logprobs::chat(self.form.spelling(choices), tokens)),
            token_ids: view.token_ids.then_some(ids.as_slice()),
            ..ChunkChoice::new(at, delta)
        };
        let mut write = |choice: &ChunkChoice<'_>| {
            self.form.chunk(&self.head, Some(choice), &Beside::default(), choices, out)
        };
        if finish.is_some() && !calls.is_empty() {
            // OpenAI's client misses the end of a call that ends in the last chunk.
            write(&std::mem::replace(&mut choice, ChunkChoice::new(at, ChunkDelta::default())))?;
        }
        choice.finish_reason = finish.map(Finish::name);
        choice.stop_reason = finish.map(|_| StopReason::of(stopped.as_ref()));
        write(&choice)
    }

    fn end(&mut self, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        self.form.end(&self.head, choices, out)
    }
}

impl<'a> ChunkChoice<'a> {
    /// With nothing beside its delta.
    fn new(index: usize, delta: ChunkDelta<'a>) -> Self {
        Self { index, delta, logprobs: None, finish_reason: None, stop_reason: None, token_ids: None }
    }
}

impl<'a> ToolCallDelta<'a> {
    /// What parts add to calls: an index comes once, with the arguments that follow its call at once.
    fn all(parts: &'a [Part]) -> Vec<Self> {
        let mut all = Vec::<Self>::new();
        for part in parts {
            match (part, all.last_mut()) {
                (Part::Content(_), _) => {} // words are told apart from calls before
                (Part::Call { index, id, name }, _) => all.push(Self {
                    index: *index,
                    id: Some(id),
                    r#type: Some("function"),
                    function: Function { name: Some(name), arguments: "" },
                }),
                (Part::Arguments { index, text }, Some(Self { index: of, function, .. }))
                    if of == index && function.arguments.is_empty() =>
                {
                    function.arguments = text;
                }
                (Part::Arguments { index, text }, _) => all.push(Self {
                    index: *index,
                    id: None,
                    r#type: None,
                    function: Function { name: None, arguments: text },
                }),
            }
        }
        all
    }
}

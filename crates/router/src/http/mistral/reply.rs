//! Answers as Mistral's clients read them: whole, or in chunks.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use crate::answer::{Answer, Delta};
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::gather::{Call, Gathered};
use crate::http::openai::chat_reply::ToolCall;
use crate::http::openai::logprobs::Logprobs;
use crate::http::openai::reply::{Beside, Form, Usage};
use crate::http::shape::{Calls, Finish, Ids, Shaped, Shaper};
use crate::http::stream::{Dialect, json};

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Logprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Logprobs>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Message<'a>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Logprobs>,
}

#[derive(Serialize, Default)]
struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<Vec<Indexed<'a>>>,
}

#[derive(Serialize)]
struct Indexed<'a> {
    index: usize,
    #[serde(flatten)]
    call: ToolCall<'a>,
}

/// Mistral's word for the end of an answer: it tells the context's end from the client's own limit.
fn finish_reason(finish: Finish, answer: Option<&Answer>) -> &'static str {
    match finish {
        Finish::Length if answer.is_some_and(Answer::fills_context) => "model_length",
        finish => finish.name(),
    }
}

fn tool_calls(calls: &[Call]) -> Option<Vec<Indexed<'_>>> {
    let indexed = calls.iter().enumerate();
    let all: Vec<_> = indexed.map(|(index, call)| Indexed { index, call: ToolCall::of(call) }).collect();
    (!all.is_empty()).then_some(all)
}

/// The one body of an answer that is not streamed; `lead` is what it goes on with.
pub(super) fn whole(form: &Form, choices: &Choices, all: &[Gathered], lead: &str) -> Result<Bytes, Failure> {
    let (view, spelling) = (form.view, form.spelling(choices));
    let texts: Vec<_> = all.iter().map(|one| format!("{lead}{}", one.text)).collect();
    let list = all.iter().zip(&texts).enumerate().map(|(index, (one, text))| {
        let answer = choices.answer(index);
        let message = Message { role: Some("assistant"), content: text, tool_calls: tool_calls(&one.calls) };
        let scores = answer.filter(|_| view.prompt_logprobs).map(Answer::prompt_scores);
        Choice {
            index,
            message,
            finish_reason: finish_reason(one.finish.unwrap_or(Finish::Error), answer),
            logprobs: view.logprobs.then(|| Logprobs::chat(spelling, &one.tokens)),
            prompt_logprobs: scores.map(|scores| Logprobs::chat(spelling, scores)),
        }
    });
    form.whole("chat.completion", &list.collect::<Vec<_>>(), Usage::of(choices), &Beside::default())
}

/// An answer in chunks: each call of a tool whole, and the usage in the last one, unasked.
pub(super) struct ChatStream {
    form: Form,
    head: Bytes,
    lead: String,
    voices: Vec<Voice>,
    /// Choices that have not ended.
    left: usize,
}

/// One choice.
struct Voice {
    shaper: Shaper,
    /// It has been said who speaks.
    begun: bool,
    calls: Vec<Call>,
}

impl ChatStream {
    pub(super) fn new(form: Form, calls: &Calls, lead: String, choices: &Choices) -> Result<Self, Failure> {
        let head = form.head("chat.completion.chunk")?;
        let voice =
            |_| Ok(Voice { shaper: Shaper::new(calls, Ids::Mistral)?, begun: false, calls: Vec::new() });
        let voices = (0..choices.len()).map(voice).collect::<Result<Vec<_>, Failure>>()?;
        Ok(Self { form, head, lead, left: voices.len(), voices })
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
        let Self { form, head, lead, voices, left } = self;
        let voice = &mut voices[at];
        let Shaped { text, calls, token, finish, stopped: _ } = voice.shaper.push(delta)?;
        calls.into_iter().for_each(|part| Call::add(&mut voice.calls, part));
        if !std::mem::replace(&mut voice.begun, true) {
            let delta = Message { role: Some("assistant"), content: lead, tool_calls: None };
            let choice = ChunkChoice { index: at, delta, finish_reason: None, logprobs: None };
            chunk(head, &choice, None, out)?;
        }
        let tokens = token.as_ref().filter(|_| form.view.logprobs).map_or(&[][..], std::slice::from_ref);
        if text.is_empty() && tokens.is_empty() && finish.is_none() {
            return Ok(()); // it would tell its client nothing
        }
        let tool_calls = finish.and_then(|_| tool_calls(&voice.calls));
        let choice = ChunkChoice {
            index: at,
            delta: Message { role: None, content: &text, tool_calls },
            finish_reason: finish.map(|finish| finish_reason(finish, choices.answer(at))),
            logprobs: (!tokens.is_empty()).then(|| Logprobs::chat(form.spelling(choices), tokens)),
        };
        *left -= usize::from(finish.is_some());
        chunk(head, &choice, (*left == 0).then(|| Usage::of(choices)), out)
    }

    fn end(&mut self, _: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        out.put_slice(b"data: [DONE]\n\n");
        Ok(())
    }
}

/// Writes a chunk behind a form's head.
fn chunk(
    head: &[u8],
    choice: &ChunkChoice<'_>,
    usage: Option<Usage>,
    out: &mut BytesMut,
) -> Result<(), Failure> {
    out.put_slice(head);
    json(out, choice)?;
    out.put_slice(b"]");
    if let Some(usage) = usage {
        out.put_slice(b",\"usage\":");
        json(out, &usage)?;
    }
    out.put_slice(b"}\n\n");
    Ok(())
}

//! What an answer looks like as JSON: whole, or in chunks.

use bytes::Bytes;
use galerne_types::{FinishReason, TokenId, TokenOut};
use serde::Serialize;

use super::logprobs::{Logprobs, text_of};
use super::request::View;
use crate::answer::{Answer, Delta};
use crate::failure::Failure;

/// Which of the two completions an answer is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

impl Kind {
    pub(super) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Text => "cmpl",
        }
    }

    fn object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion",
            Self::Text => TEXT_OBJECT,
        }
    }

    fn chunk_object(self) -> &'static str {
        match self {
            Self::Chat => "chat.completion.chunk",
            Self::Text => TEXT_OBJECT,
        }
    }
}

/// A text completion has one name, whole or in chunks.
const TEXT_OBJECT: &str = "text_completion";

/// What every body and chunk of one answer has in common.
pub(super) struct Form {
    pub(super) kind: Kind,
    view: View,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(super) id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    /// Weights and S, on which the bits depend, and nothing else.
    fingerprint: String,
}

#[derive(Serialize)]
struct Envelope<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    #[serde(flatten)]
    content: Content<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Content<'a> {
    Message { role: &'static str, content: &'a str, refusal: Option<()> },
    Delta(ChatDelta<'a>),
    Text(&'a str),
}

#[derive(Serialize)]
struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Clone, Copy, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

/// Deltas put together: those that make one chunk, or all of them.
#[derive(Default)]
pub(super) struct Gathered {
    text: String,
    tokens: Vec<TokenOut>,
    pub(super) finish: Option<FinishReason>,
}

impl Gathered {
    pub(super) fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.token);
        self.finish = delta.finish;
    }
}

impl Form {
    pub(super) fn new(kind: Kind, view: View, id: String, created: u64, answer: &Answer) -> Self {
        let (model, card) = (answer.model(), answer.card());
        let digest = &card.digest[..card.digest.floor_char_boundary(DIGEST_CHARS)];
        Self {
            kind,
            view,
            id,
            created,
            model: model.name.clone(),
            fingerprint: format!("fp_{digest}_s{}", card.shards.virtual_shards()),
        }
    }

    /// The one body of an answer that is not streamed.
    pub(super) fn whole(&self, all: &Gathered, answer: &Answer) -> Result<Bytes, Failure> {
        let content = match self.kind {
            Kind::Chat => Content::Message { role: "assistant", content: &all.text, refusal: None },
            Kind::Text => Content::Text(&all.text),
        };
        let choice = self.choice(content, all, 0, answer, true);
        self.envelope(self.kind.object(), &[choice], Some(Some(Usage::of(answer))), answer, true)
    }

    /// The first chunk of a streamed chat: who speaks.
    pub(super) fn opening(&self, answer: &Answer) -> Result<Bytes, Failure> {
        let content = Content::Delta(ChatDelta { role: Some("assistant"), content: Some("") });
        let choice = Choice {
            index: 0,
            content,
            logprobs: None,
            finish_reason: None,
            token_ids: None,
            prompt_token_ids: None,
        };
        self.envelope(self.kind.chunk_object(), &[choice], self.usage_so_far(answer), answer, true)
    }

    /// A chunk; `text_offset` is the number of characters in the texts of all tokens before it.
    pub(super) fn chunk(
        &self,
        part: &Gathered,
        first: bool,
        text_offset: usize,
        answer: &Answer,
    ) -> Result<Bytes, Failure> {
        let content = match self.kind {
            Kind::Chat => {
                let content = (!part.text.is_empty()).then_some(part.text.as_str());
                Content::Delta(ChatDelta { role: None, content })
            }
            Kind::Text => Content::Text(&part.text),
        };
        let choice = self.choice(content, part, text_offset, answer, first);
        self.envelope(self.kind.chunk_object(), &[choice], self.usage_so_far(answer), answer, false)
    }

    /// The chunk behind the last one, if its client asked for it.
    pub(super) fn usage_chunk(&self, answer: &Answer) -> Result<Option<Bytes>, Failure> {
        if !self.view.include_usage {
            return Ok(None);
        }
        let usage = Some(Some(Usage::of(answer)));
        self.envelope(self.kind.chunk_object(), &[], usage, answer, false).map(Some)
    }

    /// Characters in the texts of a part's tokens, if anybody will ask.
    pub(super) fn token_chars(&self, part: &Gathered, answer: &Answer) -> usize {
        if !self.view.logprobs {
            return 0;
        }
        let chars = |token: &TokenOut| text_of(&answer.model().tokenizer, token.id).chars().count();
        part.tokens.iter().map(chars).sum()
    }

    /// Whether a chunk would tell its client anything.
    pub(super) fn worth_a_chunk(&self, part: &Gathered) -> bool {
        let shows_tokens = self.view.logprobs || self.view.token_ids;
        !part.text.is_empty() || part.finish.is_some() || (shows_tokens && !part.tokens.is_empty())
    }

    fn choice<'a>(
        &self,
        content: Content<'a>,
        part: &Gathered,
        text_offset: usize,
        answer: &'a Answer,
        first: bool,
    ) -> Choice<'a> {
        let tokenizer = &answer.model().tokenizer;
        let logprobs = (self.view.logprobs && !part.tokens.is_empty()).then(|| match self.kind {
            Kind::Chat => Logprobs::chat(tokenizer, &part.tokens),
            Kind::Text => Logprobs::text(tokenizer, &part.tokens, text_offset),
        });
        let shown = self.view.token_ids && first && self.kind == Kind::Text;
        Choice {
            index: 0,
            content,
            logprobs,
            finish_reason: part.finish.map(finish_reason),
            token_ids: self.view.token_ids.then(|| part.tokens.iter().map(|token| token.id).collect()),
            prompt_token_ids: shown.then_some(answer.prompt()),
        }
    }

    /// vLLM shows a chat's prompt beside its choices, and a completion's inside its choice.
    fn envelope(
        &self,
        object: &'static str,
        choices: &[Choice<'_>],
        usage: Option<Option<Usage>>,
        answer: &Answer,
        first: bool,
    ) -> Result<Bytes, Failure> {
        let shown = self.view.token_ids && first && self.kind == Kind::Chat;
        let envelope = Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
            prompt_token_ids: shown.then_some(answer.prompt()),
        };
        serde_json::to_vec(&envelope)
            .map(Bytes::from)
            .map_err(|error| Failure::Engine(format!("its answer cannot be written as JSON: {error}")))
    }

    /// The `usage` of a chunk: absent, null until the last one, or the usage so far.
    fn usage_so_far(&self, answer: &Answer) -> Option<Option<Usage>> {
        self.view.include_usage.then(|| self.view.continuous_usage.then(|| Usage::of(answer)))
    }
}

impl Usage {
    fn of(answer: &Answer) -> Self {
        let (prompt_tokens, completion_tokens) = (answer.prompt().len(), answer.generated());
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
    }
}

/// Characters of a model's digest in a fingerprint.
const DIGEST_CHARS: usize = 12;

fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled | FinishReason::Error => "error",
    }
}

//! What all of OpenAI's answers have in common: names, dates, usage.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use galerne_types::TokenId;
use serde::Serialize;

use super::logprobs::Spelling;
use crate::answer::Stopped;
use crate::ask::random_seed;
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::name::RequestName;
use crate::http::stream::json;

/// What a client wants to see of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::http) struct View {
    /// Server-sent events instead of one body.
    pub(in crate::http) stream: bool,
    /// A last event with the usage.
    pub(in crate::http) include_usage: bool,
    /// The usage so far in every event.
    pub(in crate::http) continuous_usage: bool,
    /// vLLM's `token_ids` and `prompt_token_ids`.
    pub(in crate::http) token_ids: bool,
    /// Log probabilities.
    pub(in crate::http) logprobs: bool,
    /// Log probabilities name tokens by their ids.
    pub(in crate::http) tokens_as_ids: bool,
    /// vLLM's `prompt_logprobs`.
    pub(in crate::http) prompt_logprobs: bool,
}

/// What every body and chunk of one answer has in common.
pub(in crate::http) struct Form {
    pub(in crate::http) view: View,
    /// `chatcmpl-…` or `cmpl-…`.
    pub(in crate::http) id: String,
    /// Seconds since 1970.
    created: u64,
    model: String,
    /// Weights and S, on which the bits depend, and nothing else.
    fingerprint: String,
}

/// The fields before and around the choices.
#[derive(Serialize)]
struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    service_tier: Option<()>,
    system_fingerprint: &'a str,
    choices: &'a [C],
    usage: Usage,
    #[serde(flatten)]
    beside: &'a Beside<'a>,
}

/// What vLLM shows beside the choices of a chat and inside those of a completion.
#[derive(Serialize, Default)]
pub(in crate::http) struct Beside<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) prompt_logprobs: Option<Vec<serde_json::Value>>,
}

/// vLLM's `stop_reason`: the string or the token of the client's that stopped a choice.
#[derive(Serialize)]
#[serde(untagged)]
pub(in crate::http) enum StopReason<'a> {
    Token(TokenId),
    Text(&'a str),
}

impl<'a> StopReason<'a> {
    pub(in crate::http) fn of(stopped: Option<&'a Stopped>) -> Option<Self> {
        match stopped? {
            Stopped::Eos(_) => None,
            Stopped::Token(id) => Some(Self::Token(*id)),
            Stopped::Text(text) => Some(Self::Text(text)),
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(in crate::http) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
}

/// Characters of a model's digest in a fingerprint.
const DIGEST_CHARS: usize = 12;

impl Form {
    /// An answer to the request of that name, or else of a random one.
    pub(in crate::http) fn new(
        id_prefix: &str,
        name: RequestName,
        view: View,
        choices: &Choices,
    ) -> Result<Self, Failure> {
        let fingerprint = choices.card().map_or_else(String::new, |card| {
            let digest = &card.digest[..card.digest.floor_char_boundary(DIGEST_CHARS)];
            let quantize = card.quantize.map_or_else(String::new, |quantize| format!("_{quantize}"));
            format!("fp_{digest}{quantize}_s{}_{}_kv{}", card.shards.virtual_shards(), card.compute, card.kv)
        });
        Ok(Self {
            view,
            id: match name {
                RequestName(Some(name)) => format!("{id_prefix}-{name}"),
                RequestName(None) => format!("{id_prefix}-{:016x}{:016x}", random_seed(), random_seed()),
            },
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            model: choices.model().name.clone(),
            fingerprint,
        })
    }

    pub(in crate::http) fn spelling<'a>(&self, choices: &'a Choices) -> Spelling<'a> {
        Spelling { tokenizer: &choices.model().tokenizer, as_ids: self.view.tokens_as_ids }
    }

    /// The one body of an answer that is not streamed.
    pub(in crate::http) fn whole<C: Serialize>(
        &self,
        object: &'static str,
        list: &[C],
        usage: Usage,
        beside: &Beside<'_>,
    ) -> Result<Bytes, Failure> {
        let Self { view: _, id, created, model, fingerprint } = self;
        let envelope = Envelope {
            id,
            object,
            created: *created,
            model,
            service_tier: None,
            system_fingerprint: fingerprint,
            choices: list,
            usage,
            beside,
        };
        let mut out = BytesMut::new();
        json(&mut out, &envelope)?;
        Ok(out.freeze())
    }

    /// The beginning of every chunk, up to its choices; written once, because that is most of a chunk.
    pub(in crate::http) fn head(&self, object: &'static str) -> Result<Bytes, Failure> {
        #[derive(Serialize)]
        struct Head<'a> {
            id: &'a str,
            object: &'static str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let Self { view: _, id, created, model, fingerprint } = self;
        let head = Head { id, object, created: *created, model, system_fingerprint: fingerprint };
        let mut out = BytesMut::from(&b"data: "[..]);
        json(&mut out, &head)?;
        out.truncate(out.len() - 1); // its closing brace
        out.put_slice(b",\"choices\":[");
        Ok(out.freeze())
    }

    /// Writes a chunk with one choice, or none, behind a [`head`](Self::head).
    pub(in crate::http) fn chunk<C: Serialize>(
        &self,
        head: &[u8],
        choice: Option<&C>,
        beside: &Beside<'_>,
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure> {
        out.put_slice(head);
        if let Some(choice) = choice {
            json(out, choice)?;
        }
        out.put_slice(b"]");
        if let Some(ids) = beside.prompt_token_ids {
            out.put_slice(b",\"prompt_token_ids\":");
            json(out, &ids)?;
        }
        let View { include_usage, continuous_usage, .. } = self.view;
        if include_usage {
            out.put_slice(b",\"usage\":");
            let shown = continuous_usage || choice.is_none();
            json(out, &shown.then(|| Usage::of(choices)))?;
        }
        out.put_slice(b"}\n\n");
        Ok(())
    }

    /// Writes what follows the last chunk with a choice.
    pub(in crate::http) fn end(
        &self,
        head: &[u8],
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure> {
        if self.view.include_usage {
            self.chunk(head, None::<&()>, &Beside::default(), choices, out)?;
        }
        out.put_slice(b"data: [DONE]\n\n");
        Ok(())
    }
}

impl Usage {
    pub(in crate::http) fn of(choices: &Choices) -> Self {
        let (prompt_tokens, completion_tokens) = (choices.prompt_tokens(), choices.generated());
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: choices.cached_tokens() },
            completion_tokens_details: CompletionDetails { reasoning_tokens: 0 },
        }
    }
}

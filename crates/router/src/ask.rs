//! A request as both faces understand it, before it has become tokens.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use galerne_text::{Chat, TextError};
use galerne_types::limits::{STOP_TOKENS_MAX, TOP_LOGPROBS_MAX};
use galerne_types::{Grammar, Request, RequestId, Sampling, TokenId};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::failure::Failure;
pub(crate) use crate::gate::Caller;
use crate::limits::{ANSWER_TOKENS_EXPECTED, RequestLimits};
use crate::model::Model;

/// One answer to generate.
pub(crate) struct Ask {
    /// Empty takes the only model that there is.
    pub(crate) model: String,
    pub(crate) prompt: Prompt,
    pub(crate) options: Options,
    pub(crate) caller: Caller,
    pub(crate) resume: Resume,
}

/// The beginning of an answer, which its client has.
#[derive(Default)]
pub(crate) struct Resume {
    pub(crate) tokens: Vec<TokenId>,
    /// The numerics under which it was begun; any will do if nobody knows.
    pub(crate) numerics: Option<String>,
}

/// Several answers to generate at once.
pub(crate) struct Several {
    /// Empty takes the only model that there is.
    pub(crate) model: String,
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    /// Answers to each prompt; the seed of one is its predecessor's plus one.
    pub(crate) each: u32,
    pub(crate) options: Options,
    pub(crate) caller: Caller,
}

/// How to generate it.
pub(crate) struct Options {
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: MaxTokens,
    /// The request's field that said so.
    pub(crate) max_tokens_field: &'static str,
    pub(crate) min_tokens: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    /// Special tokens are left out of the text.
    pub(crate) skip_special: bool,
    /// Report log probabilities of the prompt's tokens, each with this many alternatives.
    pub(crate) prompt_logprobs: Option<u32>,
    /// What the answer must be.
    pub(crate) grammar: Option<Grammar>,
    /// The request's field that said so.
    pub(crate) grammar_field: &'static str,
    /// The stop string or token that ended the answer is part of its text.
    pub(crate) include_stop: bool,
    /// Special tokens that are text even when special tokens are left out: what marks a tool call.
    pub(crate) spelled_out: Vec<TokenId>,
    /// Do without some of the prompt's tokens.
    pub(crate) truncate: Option<Truncate>,
    /// Only its tenant's requests with the same salt find the prompt among what is kept; `None`: nobody does, and it is
    /// computed whole.
    pub(crate) cache_salt: Option<u64>,
    /// Before its tenant's waiting requests of a higher number.
    pub(crate) priority: i32,
    /// The client's; that of `sampling` follows from it.
    pub(crate) seed: Option<u64>,
}

/// How many tokens of a prompt to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Truncate {
    /// `None`: as many as leave room for the answer.
    keep: Option<u32>,
    /// The first ones instead of the last.
    first: bool,
}

impl Truncate {
    /// As vLLM's `truncate_prompt_tokens` says it: -1 is as many as the model can take.
    pub(crate) fn of(keep: i64, first: bool) -> Result<Self, String> {
        match u32::try_from(keep) {
            Ok(keep @ 1..) => Ok(Self { keep: Some(keep), first }),
            _ if keep == -1 => Ok(Self { keep: None, first }),
            _ => Err(format!("truncate_prompt_tokens must be -1 or a count of tokens, not {keep}")),
        }
    }

    /// The last `keep` tokens; all for 0.
    pub(crate) fn to_last(keep: u32) -> Option<Self> {
        (keep > 0).then_some(Self { keep: Some(keep), first: false })
    }

    /// Shortens a prompt behind which an answer of `max_tokens` is to have room in the context.
    fn apply(self, prompt: &mut Vec<TokenId>, max_tokens: MaxTokens, context: u32) {
        let answer = match max_tokens {
            MaxTokens::Exactly(max) | MaxTokens::UpTo(max) if max < context => max,
            _ => 1,
        };
        let keep = self.keep.unwrap_or_else(|| context.saturating_sub(answer).max(1)) as usize;
        if self.first {
            prompt.truncate(keep);
        } else {
            prompt.drain(..prompt.len().saturating_sub(keep));
        }
    }
}

/// What to continue.
pub(crate) enum Prompt {
    /// Text as it is, behind the model's begin-of-sequence token if it has one.
    Text(String),
    /// Text as it is, behind nothing.
    Bare(String),
    /// Tokens as they are.
    Tokens(Vec<TokenId>),
    /// A conversation, and the tools that its model may call.
    Chat(Chat),
    /// What stands before and behind a gap that the model fills.
    Fim { prompt: String, suffix: String },
}

/// How long the answer may become.
#[derive(Clone, Copy)]
pub(crate) enum MaxTokens {
    /// The client's word: refused when the context has less room.
    Exactly(u32),
    /// A default: the context's room, if that is less.
    UpTo(u32),
    /// Nothing is shown of an answer: the prompt is what its client wants to see, with its log probabilities.
    Nothing,
}

impl MaxTokens {
    /// How many to ask for when the context has room for so many behind the prompt; `field` is where the client said it.
    fn within(
        self,
        field: &'static str,
        room: u32,
        prompt_tokens: usize,
        context: u32,
        limits: &RequestLimits,
    ) -> Result<u32, Failure> {
        match self {
            Self::UpTo(max) => Ok(max.min(room).min(limits.answer_tokens_max)),
            Self::Nothing => Ok(1), // the engine draws one, and nobody sees it
            Self::Exactly(max) if max > limits.answer_tokens_max => {
                let most = limits.answer_tokens_max;
                let message = format!("{field} must be at most {most} at this router, not {max}");
                Err(Failure::invalid(field, message))
            }
            Self::Exactly(max) if max <= room => Ok(max),
            Self::Exactly(max) => Err(Failure::invalid(
                field,
                format!(
                    "{field} is {max}, but after the prompt's {prompt_tokens} tokens this model's context of \
                     {context} has room for {room}: lower it or shorten the prompt"
                ),
            )),
        }
    }
}

impl Prompt {
    /// Bytes of text in it; what turning it into tokens costs is in proportion.
    pub(crate) fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) | Self::Bare(text) => text.len(),
            Self::Tokens(_) => 0,
            Self::Chat(chat) => chat.messages.iter().chain(&chat.tools).map(text_bytes).sum(),
            Self::Fim { prompt, suffix } => prompt.len() + suffix.len(),
        }
    }

    /// Checks what turning it into tokens does not tell.
    pub(crate) fn check(&self, limits: &RequestLimits) -> Result<(), Failure> {
        let Self::Chat(chat) = self else { return Ok(()) };
        for (field, count, max) in [
            ("messages", chat.messages.len(), limits.messages_max),
            ("tools", chat.tools.len(), limits.tools_max),
        ] {
            if count > max {
                return Err(Failure::invalid(field, format!("{field} must be at most {max}, not {count}")));
            }
        }
        Ok(())
    }

    /// The prompt as tokens; takes time in proportion to its length.
    pub(crate) fn into_tokens(self, model: &Model) -> Result<Vec<TokenId>, Failure> {
        let tokens = match self {
            Self::Text(text) => model.tokenizer.encode(&text, true)?,
            Self::Bare(text) => model.tokenizer.encode(&text, false)?,
            Self::Tokens(tokens) => tokens,
            Self::Fim { prompt, suffix } => {
                let tokens = model.tokenizer.encode_fim(&prompt, &suffix);
                tokens.map_err(|error| Failure::invalid("suffix", error.to_string()))?
            }
            Self::Chat(mut chat) => {
                let format = model.chat.as_ref().ok_or_else(|| Failure::Invalid {
                    field: None,
                    message: format!(
                        "the model {:?} has no chat template: send it a plain prompt instead",
                        model.name
                    ),
                })?;
                if format.tool_format().is_some_and(|tools| tools.is_mistral()) {
                    shorten_ids(&mut chat.messages);
                }
                let tokens = format.encode(&model.tokenizer, &chat);
                tokens.map_err(|error| {
                    let field = if matches!(error, TextError::Tools(_)) { "tools" } else { "messages" };
                    Failure::invalid(field, error.to_string())
                })?
            }
        };
        match tokens.iter().find(|&&id| id as usize >= model.vocab) {
            Some(id) => Err(Failure::invalid(
                "prompt",
                format!(
                    "prompt has the token id {id}, but this model's vocabulary ends at {}",
                    model.vocab - 1
                ),
            )),
            None if tokens.is_empty() => {
                Err(Failure::invalid("prompt", "prompt must have at least one token"))
            }
            None => Ok(tokens),
        }
    }
}

/// Letters and digits of a call's id where Mistral's models wrote it.
const MISTRAL_ID_CHARS: usize = 9;

/// Calls that another model made have longer ids than Mistral's formats take: their last letters and digits stand for
/// them, as in vLLM.
fn shorten_ids(turns: &mut [Value]) {
    let shorten = |id: &mut Value| {
        let Some(long) = id.as_str().filter(|id| id.len() > MISTRAL_ID_CHARS) else { return };
        let own: Vec<_> = long.chars().filter(char::is_ascii_alphanumeric).collect();
        let last = own[own.len().saturating_sub(MISTRAL_ID_CHARS)..].iter().collect::<String>();
        *id = last.into();
    };
    for turn in turns {
        let calls = turn.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
        calls.filter_map(|call| call.get_mut("id")).for_each(shorten);
        turn.get_mut("tool_call_id").into_iter().for_each(shorten);
    }
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + text_bytes(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

impl Options {
    /// Sampled so, up to `max_tokens` tokens, with everything else as it is for a client that says nothing of it.
    pub(crate) fn new(sampling: Sampling, max_tokens: MaxTokens) -> Self {
        Self {
            sampling,
            max_tokens,
            max_tokens_field: "max_tokens",
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            skip_special: true,
            prompt_logprobs: None,
            grammar: None,
            grammar_field: "grammar",
            include_stop: false,
            spelled_out: Vec::new(),
            truncate: None,
            cache_salt: Some(salt("")),
            priority: 0,
            seed: None,
        }
    }

    /// Decides on the seed: the client's, or what the request's name makes of itself, or any.
    pub(crate) fn draw_seed(&mut self, caller: &Caller) {
        self.sampling.seed = self.seed.or_else(|| caller.seed()).unwrap_or_else(random_seed);
    }

    /// Checks that an answer which is resumed can go on with the tokens that it would have had.
    pub(crate) fn check_resume(&self, resume: &Resume, caller: &Caller) -> Result<(), Failure> {
        let seeded = self.seed.is_some() || caller.seed().is_some();
        if resume.tokens.is_empty() || seeded || self.sampling.temperature == 0.0 {
            return Ok(());
        }
        let says = "resume needs the seed of the stream that broke off: say sampling.seed in both requests, or name both by \
                    the same idempotency-key";
        Err(Failure::invalid("resume", says))
    }

    /// Checks what can be checked without the prompt.
    pub(crate) fn check(&self, limits: &RequestLimits) -> Result<(), Failure> {
        galerne_wire::check_sampling(&self.sampling)?;
        let &RequestLimits { stop_strings_max, stop_string_bytes_max, grammar_bytes_max, .. } = limits;
        if self.stop.len() > stop_strings_max {
            let message = format!("stop must be at most {stop_strings_max} strings, not {}", self.stop.len());
            return Err(Failure::invalid("stop", message));
        }
        if let Some(wrong) = self.stop.iter().find(|s| s.is_empty() || s.len() > stop_string_bytes_max) {
            let bytes = wrong.len();
            let message = format!("a stop string must have 1 to {stop_string_bytes_max} bytes, not {bytes}");
            return Err(Failure::invalid("stop", message));
        }
        if let Some(count) = self.prompt_logprobs.filter(|count| *count > TOP_LOGPROBS_MAX) {
            let message = format!("prompt_logprobs must be at most {TOP_LOGPROBS_MAX}, not {count}");
            return Err(Failure::invalid("prompt_logprobs", message));
        }
        if let Some(grammar) = &self.grammar {
            let bytes = grammar.bytes();
            if bytes > grammar_bytes_max {
                let field = self.grammar_field;
                let message = format!("{field} must have at most {grammar_bytes_max} bytes, not {bytes}");
                return Err(Failure::invalid(field, message));
            }
        }
        let max = match self.max_tokens {
            MaxTokens::Exactly(max) | MaxTokens::UpTo(max) => max,
            MaxTokens::Nothing => 1,
        };
        let field = self.max_tokens_field;
        if max == 0 {
            return Err(Failure::invalid(field, format!("{field} must be at least 1, not 0")));
        }
        if self.min_tokens > max {
            let message =
                format!("min_tokens must be at most {field}, which is {max}, not {}", self.min_tokens);
            return Err(Failure::invalid("min_tokens", message));
        }
        Ok(())
    }

    /// Tokens that the answers to a prompt will take of their tenant's quota, as far as that can be known before.
    pub(crate) fn estimate(&self, request: &Request, answers: u32) -> u64 {
        let answer = match self.max_tokens {
            MaxTokens::Exactly(max) => max,
            MaxTokens::UpTo(_) => request.max_tokens.min(ANSWER_TOKENS_EXPECTED),
            MaxTokens::Nothing => 0,
        };
        request.prompt.len() as u64 + u64::from(answer) * u64::from(answers)
    }

    /// Names the field of a grammar or of an answer's length that a leader refused.
    pub(crate) fn blame(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Invalid { field: Some("grammar"), message } => {
                Failure::Invalid { field: Some(self.grammar_field), message }
            }
            Failure::Invalid { field: Some("max_tokens"), message } => {
                Failure::Invalid { field: Some(self.max_tokens_field), message }
            }
            failure => failure,
        }
    }

    /// The request to a leader: `context` is the number of tokens of prompt and answer together.
    pub(crate) fn request(
        &self,
        model: &Model,
        mut prompt: Vec<TokenId>,
        context: u32,
        caller: &Caller,
        limits: &RequestLimits,
    ) -> Result<Request, Failure> {
        if let Some(truncate) = self.truncate {
            truncate.apply(&mut prompt, self.max_tokens, context);
        }
        if prompt.len() > limits.prompt_tokens_max as usize {
            let (max, tokens) = (limits.prompt_tokens_max, prompt.len());
            let message = format!("prompt must have at most {max} tokens at this router, not {tokens}");
            return Err(Failure::invalid("prompt", message));
        }
        let room = (context as usize).saturating_sub(prompt.len()) as u32;
        if room == 0 {
            let tokens = prompt.len();
            return Err(Failure::invalid(
                "prompt",
                format!(
                    "the prompt has {tokens} tokens, but this model's context holds {context}: shorten it"
                ),
            ));
        }
        let field = self.max_tokens_field;
        let max_tokens = self.max_tokens.within(field, room, prompt.len(), context, limits)?;
        if self.min_tokens > max_tokens {
            let min = self.min_tokens;
            let message = format!("min_tokens must be at most {field}, which is {max_tokens}, not {min}");
            return Err(Failure::invalid("min_tokens", message));
        }
        if let Some((id, _)) = self.sampling.logit_bias.iter().find(|(id, _)| *id as usize >= model.vocab) {
            let last = model.vocab - 1;
            let message = format!("logit_bias has {id}, but this model's vocabulary ends at {last}");
            return Err(Failure::invalid("logit_bias", message));
        }
        if let Some(id) = self.stop_token_ids.iter().find(|&&id| id as usize >= model.vocab) {
            let last = model.vocab - 1;
            let message = format!("stop_token_ids has {id}, but this model's vocabulary ends at {last}");
            return Err(Failure::invalid("stop_token_ids", message));
        }
        let mut stop_tokens = if self.ignore_eos { Vec::new() } else { model.eos.clone() };
        stop_tokens.extend(&self.stop_token_ids);
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        if stop_tokens.len() > STOP_TOKENS_MAX {
            let message = format!(
                "stop_token_ids and the model's end tokens together must be at most {STOP_TOKENS_MAX}, not {}",
                stop_tokens.len()
            );
            return Err(Failure::invalid("stop_token_ids", message));
        }
        Ok(Request {
            id: RequestId(0), // each leader gives its own
            prompt,
            first_index: 0,
            sampling: self.sampling.clone(),
            max_tokens,
            min_tokens: self.min_tokens,
            stop_tokens,
            tenant: caller.tenant,
            prompt_logprobs: self.prompt_logprobs,
            grammar: self.grammar.clone(),
            cache_salt: self.cache_salt,
            priority: self.priority,
            trace: None, // each call to a leader has a span of its own
        })
    }
}

/// The number that stands for a client's salt, the same at every router.
pub(crate) fn salt(text: &str) -> u64 {
    u64::from_le_bytes(Sha256::digest(text)[..8].try_into().expect("eight bytes"))
}

/// A number that nobody foresees, for requests without a seed and for names: a count under a keyed hash. The system is
/// asked for the key alone, since it takes longer to give a number than a router has for a token.
pub(crate) fn random_seed() -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    KEY.hash_one(COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ids_of_calls_are_as_long_as_mistrals() {
        let mut turns = [
            json!({ "role": "user", "content": "Add" }),
            json!({ "role": "assistant", "tool_calls": [{ "id": "call_0a1B2c3D4e5F" }, { "id": "a1b2c3d4e" }, { "id": "short" }] }),
            json!({ "role": "tool", "tool_call_id": "call_0a1B2c3D4e5F" }),
            json!({ "role": "tool", "tool_call_id": "toolu_12345678_9" }),
        ];
        shorten_ids(&mut turns);
        assert_eq!(
            turns[1]["tool_calls"],
            json!([{ "id": "B2c3D4e5F" }, { "id": "a1b2c3d4e" }, { "id": "short" }])
        );
        assert_eq!(
            (&turns[2]["tool_call_id"], &turns[3]["tool_call_id"]),
            (&json!("B2c3D4e5F"), &json!("123456789"))
        );
    }
}

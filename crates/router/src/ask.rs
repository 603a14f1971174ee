//! A request as both faces understand it, before it has become tokens.

use galerne_types::limits::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, STOP_TOKENS_MAX};
use galerne_types::{Grammar, Request, RequestId, Sampling, TokenId};
use serde_json::Value;

use crate::failure::Failure;
pub(crate) use crate::gate::Caller;
use crate::limits::ANSWER_TOKENS_EXPECTED;
use crate::model::Model;

/// One answer to generate.
pub(crate) struct Ask {
    /// Empty takes the only model that there is.
    pub(crate) model: String,
    pub(crate) prompt: Prompt,
    pub(crate) options: Options,
    pub(crate) caller: Caller,
}

/// How to generate it.
pub(crate) struct Options {
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: MaxTokens,
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
}

/// What to continue.
pub(crate) enum Prompt {
    /// Text as it is, behind the model's begin-of-sequence token if it has one.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<TokenId>),
    /// A conversation, each turn an object as chat templates expect it.
    Chat(Vec<Value>),
}

/// How long the answer may become.
#[derive(Clone, Copy)]
pub(crate) enum MaxTokens {
    /// The client's word: refused when the context has less room.
    Exactly(u32),
    /// A default: the context's room, if that is less.
    UpTo(u32),
}

impl Prompt {
    /// The prompt as tokens; takes time in proportion to its length.
    pub(crate) fn into_tokens(self, model: &Model) -> Result<Vec<TokenId>, Failure> {
        let tokens = match self {
            Self::Text(text) => model.tokenizer.encode(&text, true)?,
            Self::Tokens(tokens) => tokens,
            Self::Chat(messages) => {
                let template = model.template.as_ref().ok_or_else(|| Failure::Invalid {
                    field: None,
                    message: format!(
                        "the model {:?} has no chat template: send it a plain prompt instead",
                        model.name
                    ),
                })?;
                model.tokenizer.encode(&template.render(&messages, None, true)?, false)?
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

impl Options {
    /// Checks what can be checked without the prompt.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        galerne_wire::check_sampling(&self.sampling)?;
        if self.stop.len() > STOP_STRINGS_MAX {
            let message = format!("stop must be at most {STOP_STRINGS_MAX} strings, not {}", self.stop.len());
            return Err(Failure::invalid("stop", message));
        }
        if let Some(wrong) = self.stop.iter().find(|s| s.is_empty() || s.len() > STOP_STRING_BYTES_MAX) {
            let bytes = wrong.len();
            let message = format!("a stop string must have 1 to {STOP_STRING_BYTES_MAX} bytes, not {bytes}");
            return Err(Failure::invalid("stop", message));
        }
        let (MaxTokens::Exactly(max) | MaxTokens::UpTo(max)) = self.max_tokens;
        if max == 0 {
            return Err(Failure::invalid("max_tokens", "max_tokens must be at least 1, not 0"));
        }
        if self.min_tokens > max {
            let message =
                format!("min_tokens must be at most max_tokens, which is {max}, not {}", self.min_tokens);
            return Err(Failure::invalid("min_tokens", message));
        }
        Ok(())
    }

    /// Tokens that a request will take of its tenant's quota, as far as that can be known before.
    pub(crate) fn estimate(&self, request: &Request) -> u64 {
        let answer = match self.max_tokens {
            MaxTokens::Exactly(max) => max,
            MaxTokens::UpTo(_) => request.max_tokens.min(ANSWER_TOKENS_EXPECTED),
        };
        request.prompt.len() as u64 + u64::from(answer)
    }

    /// The request to a leader: `context` is the number of tokens of prompt and answer together.
    pub(crate) fn request(
        &self,
        model: &Model,
        prompt: Vec<TokenId>,
        context: u32,
        caller: &Caller,
    ) -> Result<Request, Failure> {
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
        let max_tokens = match self.max_tokens {
            MaxTokens::UpTo(max) => max.min(room),
            MaxTokens::Exactly(max) if max <= room => max,
            MaxTokens::Exactly(max) => {
                let tokens = prompt.len();
                let message = format!(
                    "max_tokens is {max}, but after the prompt's {tokens} tokens this model's context of {context} \
                     has room for {room}: lower it or shorten the prompt"
                );
                return Err(Failure::invalid("max_tokens", message));
            }
        };
        if self.min_tokens > max_tokens {
            let min = self.min_tokens;
            let message = format!("min_tokens must be at most max_tokens, which is {max_tokens}, not {min}");
            return Err(Failure::invalid("min_tokens", message));
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
            trace: None, // each call to a leader has a span of its own
        })
    }
}

/// A seed for a request that names none.
pub(crate) fn random_seed() -> Result<u64, Failure> {
    getrandom::u64().map_err(|error| Failure::Engine(format!("the system gives no random numbers: {error}")))
}

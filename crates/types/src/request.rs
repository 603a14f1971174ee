//! What a router asks of a group, and what comes back: token ids only, no text.

use serde::{Deserialize, Serialize};

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// A request at one leader; unique there for the leader's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// One stream of tokens to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Unique at the leader.
    pub id: RequestId,
    /// Prompt, and behind it whatever was generated before a replay. Not empty.
    pub prompt: Vec<TokenId>,
    /// Index of the first token to generate: 0, or the number of tokens generated before a replay.
    pub first_index: u32,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// The stream ends with [`FinishReason::Length`] when the token with index `max_tokens - 1` was drawn.
    pub max_tokens: u32,
    /// `stop_tokens` cannot be drawn before this index.
    pub min_tokens: u32,
    /// Drawing one of these ends the stream with [`FinishReason::Stop`]; the token itself is reported.
    pub stop_tokens: Vec<TokenId>,
}

/// How a token is drawn from logits. Temperature 0 is greedy; ties go to the lower token id.
///
/// The order is that of most servers: temperature, then top-k, then top-p, then one draw. The random number
/// is a function of (`seed`, index of the token) alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 = greedy. Finite, not negative.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Key of the counter-based generator.
    pub seed: u64,
    /// `Some(n)`: report the drawn token's log probability and those of the n most likely tokens,
    /// from the raw logits (before temperature and filters).
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, logprobs: None }
    }
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: TokenId,
    /// Its natural log probability under the raw logits; 0 when logprobs were not asked for.
    pub logprob: f32,
    /// The most likely tokens, best first, as many as were asked for.
    pub top: Vec<TopToken>,
}

/// An alternative to the token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopToken {
    /// The token.
    pub id: TokenId,
    /// Its natural log probability under the raw logits.
    pub logprob: f32,
}

/// What the scheduler tells about a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was drawn. Indices of one request are consecutive.
    Token {
        /// Which request.
        request: RequestId,
        /// Index of the token among the generated ones.
        index: u32,
        /// The token.
        token: TokenOut,
    },
    /// The stream is complete; nothing follows.
    Finished {
        /// Which request.
        request: RequestId,
        /// Why it ended.
        reason: FinishReason,
    },
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or stop string was met.
    Stop,
    /// `max_tokens` were generated, or the model's context is full.
    Length,
    /// The client left.
    Cancelled,
    /// The group was lost or the engine failed; the client got an explicit error.
    Error,
}

/// Why a request was not accepted. Nothing was computed for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The prompt leaves no room for one token.
    #[error(
        "the prompt has {prompt_tokens} tokens, but this model's context holds {context_tokens_max}: shorten it"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens of prompt and answer together.
        context_tokens_max: usize,
    },
    /// The prompt and its answer would need more KV blocks than the group has.
    #[error(
        "the request can need {needed} KV blocks, but the group has {available}: shorten it or lower max_tokens"
    )]
    NeverFits {
        /// KV blocks that the request can need.
        needed: usize,
        /// KV blocks of the group.
        available: usize,
    },
    /// The waiting queue is full.
    #[error("{waiting} requests are waiting already: retry later")]
    Overloaded {
        /// Requests in the queue.
        waiting: usize,
    },
    /// Something about the request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No group can take it.
    #[error("no group of model {model:?} is ready: retry later")]
    NoGroup {
        /// The model that was asked for.
        model: String,
    },
}

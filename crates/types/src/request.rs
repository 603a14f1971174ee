//! What a router asks of a group, and what comes back: token ids only, no text.

use serde::{Deserialize, Serialize};

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// A request at one leader; unique there for the leader's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// Whose request it is, for fairness between tenants: a number that a router derives from the tenant's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TenantId(pub u64);

/// One stream of tokens to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Unique at the leader.
    pub id: RequestId,
    /// Whose it is.
    pub tenant: TenantId,
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
    /// `Some(n)`: report the log probability of each token of the prompt but the first, and of the n most likely
    /// tokens in its place. Not with a replay.
    pub prompt_logprobs: Option<u32>,
    /// What the answer must be; its state is a function of the grammar and the tokens so far.
    pub grammar: Option<Grammar>,
    /// Requests of one tenant with the same salt share the KV blocks of what their prompts have in common; `None` shares
    /// with no other.
    pub cache_salt: Option<u64>,
    /// Of one tenant's waiting requests those of the lowest number come first, in order of arrival where it is equal.
    pub priority: i32,
    /// The span that its steps belong to, as a W3C `traceparent`; `None` for nearly all requests, which nobody traces.
    pub trace: Option<String>,
}

/// A language that an answer must belong to. The text is the client's and hostile.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// A value that is valid under this JSON schema.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's dialect of Lark, or in GBNF.
    Lark(String),
}

impl Grammar {
    /// Bytes of its texts.
    pub fn bytes(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        }
    }
}

/// How a token is drawn from logits. Temperature 0 is greedy; ties go to the lower token id.
///
/// The order is that of most servers: logit bias, penalties (repetition, frequency, presence), temperature, min-p,
/// top-k, top-p, and then one draw. The random number is a function of (`seed`, index of the token) alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 = greedy. Finite, not negative.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; in (0, 1].
    pub top_p: f32,
    /// Keep the tokens whose probability is at least this share of the largest one; in [0, 1], 0 = all.
    pub min_p: f32,
    /// Logits of tokens that stand in the prompt or the answer so far are divided by this if positive, else
    /// multiplied (Keskar et al. 2019); greater than 0, 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that stand in the answer so far; in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time that it stands in the answer so far; in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, each at most once; in [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the counter-based generator.
    pub seed: u64,
    /// `Some(n)`: report the drawn token's log probability and those of the n most likely tokens,
    /// from the raw logits (before temperature and filters).
    pub logprobs: Option<u32>,
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }

    /// Whether a draw depends on the tokens before it, other than through the logits.
    pub fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: TokenId,
    /// Its natural log probability under the raw logits; 0 when logprobs were not asked for.
    pub logprob: f32,
    /// Its place among all tokens by their raw logits, of equal ones the lower id first: 1 is the most likely; 0 when
    /// logprobs were not asked for.
    pub rank: u32,
    /// The most likely tokens, best first, as many as were asked for.
    pub top: Vec<TopToken>,
}

impl TokenOut {
    /// A token of which nobody asked how likely it was.
    pub fn unreported(id: TokenId) -> Self {
        Self { id, logprob: 0.0, rank: 0, top: Vec::new() }
    }
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
    /// Log probabilities of consecutive tokens of the prompt, before the first token is drawn.
    Scored {
        /// Which request.
        request: RequestId,
        /// Position in the prompt of the first of them; at least 1.
        position: u32,
        /// One a token of the prompt.
        scores: Vec<TokenOut>,
    },
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

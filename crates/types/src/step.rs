//! One forward pass, as the leader plans it and every rank runs it.

use serde::{Deserialize, Serialize};

use crate::request::{RequestId, Sampling, TokenId, TokenOut};

/// A group's incarnation: the revision of the transaction that formed it. Larger is newer; nobody obeys an
/// older one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// A block of [`KV_BLOCK_TOKENS`](crate::limits::KV_BLOCK_TOKENS) positions in every rank's KV memory.
pub type BlockId = u32;

/// Everything a rank needs for one forward pass. A rank refuses another epoch, and a number that does not
/// follow its last one.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The group's incarnation.
    pub epoch: Epoch,
    /// 1, 2, 3 … within the epoch.
    pub number: u64,
    /// Work, one entry a sequence; at most one entry per slot.
    pub slices: Vec<Slice>,
    /// [`Request::trace`](crate::Request::trace) of the traced requests among them, the first few; not part of what
    /// is computed.
    pub traces: Vec<String>,
}

/// Some consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// Where ranks keep this sequence's last drawn token; below the group's limit of running sequences.
    pub slot: u32,
    /// Absolute position of the first token.
    pub start: u32,
    /// The tokens to run.
    pub input: Input,
    /// The first of the sequence's KV blocks that any of the slice's positions sees, counted from position 0: those before
    /// it have left the window, and may hold something else by now.
    pub first_block: u32,
    /// From that one on, the sequence's KV blocks up to position start + tokens - 1, in order; a draft's are tokens, too.
    pub blocks: Vec<BlockId>,
    /// Draw a token from the logits of the slice's last position.
    pub draw: Option<Draw>,
    /// Report the log probabilities of the tokens that follow the slice's positions.
    pub score: Option<Score>,
}

/// Which log probabilities of a slice's positions to report.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The most likely tokens to report beside each.
    pub top: u32,
    /// The token that follows each of the slice's positions, from the first on; at most as many as there are
    /// positions (none follows the last one of a prompt).
    pub targets: Vec<TokenId>,
}

/// The tokens that a slice runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Tokens that the leader knows.
    Tokens(Vec<TokenId>),
    /// One token: the last one that was drawn for this slot, which the leader may not have seen yet.
    Last,
}

impl Input {
    /// Number of tokens.
    #[expect(clippy::len_without_is_empty, reason = "a slice is never empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Last => 1,
        }
    }
}

/// How to draw a slice's token.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Temperature, filters, seed.
    pub sampling: Sampling,
    /// Index of the token among the generated ones: the generator's counter.
    pub index: u32,
    /// Tokens that cannot be drawn now (stop tokens before `min_tokens`).
    pub banned: Vec<TokenId>,
    /// What penalties look back on: told with a request's first draw, if its sampling looks back. Each token that is
    /// drawn for the slot afterwards adds itself.
    pub history: Option<History>,
    /// The request whose grammar masks the vocabulary, if it has one.
    pub grammar: Option<RequestId>,
    /// The tokens that are believed to be drawn, this one first. They are run behind the slice's own, and while they come
    /// true one more token is drawn after each: the very tokens that would be drawn one step at a time. Empty for a draw
    /// that looks back, that has banned tokens or a grammar.
    pub draft: Vec<TokenId>,
}

/// The tokens of a sequence before a draw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// As the client sent it.
    pub prompt: Vec<TokenId>,
    /// The answer so far, which a replay's prompt carries behind it.
    pub answer: Vec<TokenId>,
}

impl Draw {
    /// A draw without bans, penalties, grammar or draft.
    pub fn new(sampling: Sampling, index: u32) -> Self {
        Self { sampling, index, banned: Vec::new(), history: None, grammar: None, draft: Vec::new() }
    }

    /// The draw of the token that stands so many behind this one: of an answer that may have a draft.
    pub fn ahead(&self, by: u32) -> Self {
        Self::new(self.sampling.clone(), self.index.saturating_add(by))
    }
}

/// What a step drew.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampled {
    /// One entry a slice, in the step's order; `None` where nothing was to be drawn.
    pub tokens: Vec<Option<TokenOut>>,
    /// One entry a slice with a draft, in the step's order: what was drawn after its first token, one token for each of the
    /// draft that came true.
    pub further: Vec<Vec<TokenOut>>,
    /// At rank 0, one entry a slice that asked for scores, in the step's order: one score a target.
    pub scores: Vec<Vec<TokenOut>>,
}

impl Slice {
    /// Its tokens, those of a draft included.
    pub fn tokens(&self) -> usize {
        self.input.len() + self.draft().len()
    }

    /// Its draft, if it has one.
    pub fn draft(&self) -> &[TokenId] {
        self.draw.as_ref().map_or(&[], |draw| &draw.draft)
    }
}

impl Step {
    /// Tokens in all slices.
    pub fn tokens(&self) -> usize {
        self.slices.iter().map(Slice::tokens).sum()
    }
}

//! Requests that ask for nothing special.

use galerne_types::{Request, RequestId, Sampling, TenantId, TokenId};

/// One whose answer has all of its tokens, and that shares with no other.
pub(crate) fn plain(id: u64, prompt: Vec<TokenId>, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId(0),
        prompt,
        first_index: 0,
        sampling: Sampling::greedy(),
        max_tokens,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        prompt_logprobs: None,
        grammar: None,
        cache_salt: None,
        priority: 0,
        trace: None,
    }
}

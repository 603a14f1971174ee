//! What full KV blocks are found again by.

use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Request, TenantId, TokenId};
use sha2::{Digest as _, Sha256};

/// Stands for a full block's tokens and all tokens before them: SHA-256 over the key of the block before it, or the chain's
/// root, and its own tokens. Two prompts with one key are not known to exist and nobody can make them, so a key is
/// believed without a look at the tokens.
pub(crate) type Key = [u8; 32];

/// The keys of a sequence's first blocks. A scheduler serves one model, so that is no part of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chain(Vec<Key>);

impl Chain {
    /// The first `blocks` keys of a request's prompt and the `answer` behind it, which fill so many blocks; empty if the
    /// request shares with no other. What was worked out once is kept.
    pub(crate) fn keys(&mut self, request: &Request, answer: &[TokenId], blocks: u32) -> &[Key] {
        let Some(salt) = request.cache_salt else { return &[] };
        let blocks = blocks as usize;
        for block in self.0.len()..blocks {
            let before = self.0.last().copied().unwrap_or_else(|| root(request.tenant, salt));
            let tokens = request.prompt.iter().chain(answer).skip(block * KV_BLOCK_TOKENS);
            self.0.push(key(&before, tokens.take(KV_BLOCK_TOKENS)));
        }
        &self.0[..blocks]
    }
}

/// Where the chains of a tenant's requests with this salt begin: those of others never meet them, so nobody learns from the
/// time that a prompt takes what another has asked.
fn root(tenant: TenantId, salt: u64) -> Key {
    let hash = Sha256::new().chain_update(tenant.0.to_le_bytes()).chain_update(salt.to_le_bytes());
    hash.finalize().into()
}

fn key<'a>(before: &Key, tokens: impl Iterator<Item = &'a TokenId>) -> Key {
    let mut bytes = [0; KV_BLOCK_TOKENS * size_of::<TokenId>()];
    for (bytes, token) in bytes.chunks_exact_mut(size_of::<TokenId>()).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
    Sha256::new().chain_update(before).chain_update(bytes).finalize().into()
}

//! Prompts that begin as others did.

use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Request, TenantId};

use super::{Limits, Scheduler};

impl Scheduler {
    /// Blocks that hold the beginning of a tenant's next prompt, in order: whatever stands in a block is a function of its
    /// tokens and those before them alone, so whoever computed it, the answer is the same. The last token of a prompt is
    /// never among them, because its logits are drawn from.
    pub(super) fn find_prefix(&mut self, tenant: TenantId) -> Vec<BlockId> {
        let Some(arrived) = self.tenants.front(tenant) else { return Vec::new() };
        let full =
            looked_up_tokens(&arrived.request, &self.limits).saturating_sub(1) / KV_BLOCK_TOKENS as u32;
        let keys = arrived.chain.keys(&arrived.request, &[], full);
        keys.iter().map_while(|key| self.pool.find(key)).collect()
    }
}

/// Tokens of a prompt that are looked up among what is kept: all, unless every one of them is to be scored, or its request
/// shares with no other.
pub(super) fn looked_up_tokens(request: &Request, limits: &Limits) -> u32 {
    let looks_up = limits.prefix_cache && request.cache_salt.is_some() && request.prompt_logprobs.is_none();
    if looks_up { request.prompt.len() as u32 } else { 0 }
}

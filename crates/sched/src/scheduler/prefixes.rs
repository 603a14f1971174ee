//! Prompts that begin as others did.

use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{BlockId, Request, TenantId};

use super::{Limits, Scheduler};
use crate::chain::Key;
use crate::tenants::Arrived;

/// The beginning of a prompt that need not be run.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    /// Blocks in front that its next position does not see.
    pub(crate) first_block: u32,
    /// Those that it sees, in order.
    pub(crate) blocks: Vec<BlockId>,
}

impl Prefix {
    pub(super) fn tokens(&self) -> u32 {
        (self.first_block + self.blocks.len() as u32) * KV_BLOCK_TOKENS as u32
    }
}

impl Scheduler {
    /// What is kept of the beginning of a tenant's next prompt: whatever stands in a block is a function of its tokens and
    /// those before them alone, so whoever computed it, the answer is the same. The last token of a prompt is never part
    /// of it, because its logits are drawn from.
    pub(super) fn find_prefix(&mut self, tenant: TenantId) -> Prefix {
        let Some(arrived) = self.tenants.front(tenant) else { return Prefix::default() };
        let keys = keys_looked_up(arrived, &self.limits);
        let (mut run, mut longest) = (Prefix::default(), 0..0);
        for (block, key) in (0..).zip(keys) {
            match self.pool.find(key) {
                Some(found) => run.blocks.push(found),
                None if self.limits.window_tokens.is_none() => break,
                None => run = Prefix { first_block: block + 1, blocks: Vec::new() },
            }
            let first_seen = self.limits.first_seen((block + 1) * KV_BLOCK_TOKENS as u32);
            if run.first_block <= first_seen && !run.blocks.is_empty() {
                longest = first_seen..block + 1;
            }
        }
        let seen = &keys[longest.start as usize..longest.end as usize];
        let blocks = seen.iter().filter_map(|key| self.pool.find(key)).collect();
        Prefix { first_block: longest.start, blocks }
    }

    /// Whether another one that runs is about to compute the block behind what was found for a tenant's next prompt.
    pub(super) fn comes_soon(&mut self, tenant: TenantId, found: &Prefix) -> bool {
        let Some(arrived) = self.tenants.front(tenant) else { return false };
        let next = found.tokens() / KV_BLOCK_TOKENS as u32;
        let wanted = keys_looked_up(arrived, &self.limits).get(next as usize).copied();
        let Some(wanted) = wanted else { return false };
        self.slots.iter_mut().flatten().any(|other| other.will_compute(next, &wanted))
    }

    /// Blocks of a prefix that are needed no more because others hold them already. With a window none counts: what others
    /// give back as they go on, this one may still hold.
    pub(super) fn needed_no_more(&self, found: &Prefix) -> u32 {
        let held = |block: &&BlockId| self.limits.window_tokens.is_none() && self.pool.holders(**block) > 0;
        found.blocks.iter().filter(held).count() as u32
    }
}

/// The keys of the blocks of a prompt that may be found: the full ones, but for one that ends in its last token.
fn keys_looked_up<'a>(arrived: &'a mut Arrived, limits: &Limits) -> &'a [Key] {
    let full = looked_up_tokens(&arrived.request, limits).saturating_sub(1) / KV_BLOCK_TOKENS as u32;
    arrived.chain.keys(&arrived.request, &[], full)
}

/// Tokens of a prompt that are looked up among what is kept: all, unless every one of them is to be scored, or its request
/// shares with no other.
pub(super) fn looked_up_tokens(request: &Request, limits: &Limits) -> u32 {
    let looks_up = limits.prefix_cache && request.cache_salt.is_some() && request.prompt_logprobs.is_none();
    if looks_up { request.prompt.len() as u32 } else { 0 }
}

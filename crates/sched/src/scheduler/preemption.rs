//! Room for whoever comes while others hold all.

use std::collections::BTreeMap;

use galerne_types::{BlockId, TenantId};

use super::{Scheduler, occupied};
use crate::sequence::Sequence;
use crate::tenants::Held;

/// A tenant may be taken from while it holds this many times what the one that comes needs.
const HELD_PER_NEEDED: u32 = 2;

impl Scheduler {
    /// Sends requests of tenants that hold more than an equal share back to the queue, of the greediest the least urgent and youngest first,
    /// until there is room for the next request of `tenant`, which needs so many blocks: all that takes, or none. Returns
    /// whether anything is free at once; most have to wait for the steps that hold them.
    pub(super) fn make_room(&mut self, tenant: TenantId, needed: u32) -> bool {
        if !self.tenants.is_entitled(tenant, needed, self.total()) {
            return false;
        }
        let mut coming = self.free();
        let mut going = BTreeMap::new();
        for sequence in self.slots.iter().flatten().filter(|sequence| sequence.leaves()) {
            coming.add(self.freed(sequence, &mut going));
        }
        let mut chosen: Vec<u32> = Vec::new();
        while coming.slots == 0 || coming.kv_blocks < needed {
            let Some(slot) = self.victim(tenant, needed, coming, &chosen) else { return false };
            let sequence = self.slots[slot as usize].as_ref().expect("a victim runs");
            coming.add(self.freed(sequence, &mut going));
            chosen.push(slot);
        }
        let before = self.free();
        for slot in chosen {
            let sequence = occupied(&mut self.slots, slot);
            let (owner, needed) = (sequence.request.tenant, sequence.needed);
            self.tenants.release(owner, sequence.charge, needed, sequence.prompt_left());
            self.preempted_since.push(sequence.request.id);
            sequence.yields = true;
            self.release_if_done(slot);
        }
        self.free() != before
    }

    /// What becomes free when a sequence goes: its slot, and those of its blocks that nobody else holds but others that
    /// are `going`, which tells how many holders of each block go.
    fn freed(&self, sequence: &Sequence, going: &mut BTreeMap<BlockId, u32>) -> Held {
        if self.limits.window_tokens.is_some() {
            return Held::of_one(sequence.needed);
        }
        let last = |&&block: &&BlockId| {
            let holders = going.entry(block).or_insert(0);
            *holders += 1;
            *holders == self.pool.holders(block)
        };
        Held::of_one(sequence.blocks.iter().filter(last).count() as u32)
    }

    /// The next to go, beside those that are `chosen`.
    fn victim(&mut self, tenant: TenantId, needed: u32, coming: Held, chosen: &[u32]) -> Option<u32> {
        let share = self.tenants.share(self.total());
        // Of what is short, the more of which is held the better it is to take from.
        let slots_short = coming.slots == 0;
        let excess = |owner: TenantId| {
            let mut held = self.tenants.held(owner);
            for &slot in chosen {
                let sequence = self.slots[slot as usize].as_ref().filter(|one| one.request.tenant == owner);
                held.subtract(sequence.map_or(Held::default(), |one| Held::of_one(one.charge)));
            }
            let (held, share, needed) = if slots_short {
                (held.slots, share.slots, 1)
            } else {
                (held.kv_blocks, share.kv_blocks, needed)
            };
            (held > share && held >= HELD_PER_NEEDED * needed).then_some(held)
        };
        let candidates = self.admitted.iter().filter(|slot| !chosen.contains(slot)).filter_map(|&slot| {
            let sequence = self.slots[slot as usize].as_ref().filter(|sequence| sequence.may_yield())?;
            let owner = Some(sequence.request.tenant).filter(|owner| *owner != tenant)?;
            Some((excess(owner)?, sequence.request.priority, slot))
        });
        // Of equal ones the least urgent, and of these the last, which is the youngest.
        candidates.max_by_key(|&(held, priority, _)| (held, priority)).map(|(.., slot)| slot)
    }
}

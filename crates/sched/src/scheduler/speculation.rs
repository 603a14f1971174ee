//! Which answers the next step runs ahead, and how far.

use galerne_types::{Draw, Event, TokenOut};

use super::{Scheduler, occupied};
use crate::draft::ANSWERS_MAX;
use crate::sequence::Sequence;

impl Scheduler {
    /// Tokens of the next step's drafts, one entry an answer under way; empty where there are none.
    pub(super) fn drafts(&mut self) -> Vec<usize> {
        let Self { admitted, slots, worth, limits, .. } = self;
        // A step with prompts is long, and takes longer with every token.
        let prompts = |slots: &mut _| admitted.iter().any(|&slot| occupied(slots, slot).prefills());
        if !limits.speculation || admitted.len() > ANSWERS_MAX || prompts(slots) {
            return Vec::new();
        }
        for &slot in &*admitted {
            let sequence = occupied(slots, slot);
            if sequence.decodes() {
                sequence.propose();
            }
        }
        let running = admitted.iter().filter_map(|&slot| slots[slot as usize].as_ref());
        let offers: Vec<_> = running.filter(|sequence| sequence.decodes()).map(Sequence::offer).collect();
        let room = limits.step_tokens_max as usize - offers.len();
        worth.choose(&offers, room, limits.itl_target)
    }

    /// Takes in the token of a slice's draw, and those `further` ones of its draft that came true.
    pub(super) fn commit_draws(
        &mut self,
        slot: u32,
        draw: &Draw,
        (token, further): (&TokenOut, &[TokenOut]),
        events: &mut Vec<Event>,
    ) {
        let sequence = occupied(&mut self.slots, slot);
        if sequence.ended {
            return;
        }
        let (request, tenant) = (sequence.request.id, sequence.request.tenant);
        sequence.take_back((draw.draft.len() - further.len()) as u32);
        for (index, token) in (draw.index..).zip([token].into_iter().chain(further)) {
            if index > draw.index {
                self.tenants.serve_answer(tenant);
            }
            events.push(Event::Token { request, index, token: token.clone() });
            if let Some(reason) = sequence.commit_draw(index, token.id, &mut self.worth) {
                sequence.ended = true;
                events.push(Event::Finished { request, reason });
                break;
            }
        }
        if self.limits.prefix_cache {
            sequence.name_blocks(&mut self.pool);
        }
    }
}

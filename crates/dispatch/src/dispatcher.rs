//! Least-loaded routing.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use std::time::Duration;

use galerne_types::{Epoch, Fleet, Group, GroupId, Health, ModelCard, Refusal};

use crate::breaker::{Breaker, BreakerState};

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The group.
    pub group: GroupId,
    /// Its incarnation: what to name in [`Dispatcher::lost`] if it does not answer.
    pub epoch: Epoch,
    /// `IP:PORT` of its leader.
    pub leader: String,
    /// To be handed to [`Dispatcher::finished`] when the request has ended, however it ended.
    pub ticket: Ticket,
}

/// A request in flight at a group. It cannot be copied, so it is handed back at most once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a ticket that is not handed back counts as load for ever"]
pub struct Ticket {
    group: GroupId,
    /// What becomes of it decides whether its group gets more.
    probes: bool,
}

/// What a request asks of a group.
#[derive(Clone, Copy, Debug)]
pub struct Want<'a> {
    /// The model's name.
    pub model: &'a str,
    /// The [numerics](ModelCard::numerics) under which its answer was begun, and the tokens of prompt and answer: a group must
    /// go on with the very same tokens, and have room for them.
    pub begun: Option<(&'a str, u32)>,
    /// A group that has refused it just now: any other one is better.
    pub not: Option<&'a GroupId>,
}

impl<'a> Want<'a> {
    /// Any group of a model.
    pub fn any(model: &'a str) -> Self {
        Self { model, begun: None, not: None }
    }

    fn fits(&self, card: &ModelCard) -> bool {
        let goes_on =
            |(begun, tokens): (&str, u32)| tokens <= card.context_tokens_max && card.numerics() == begun;
        card.name == self.model && self.begun.is_none_or(goes_on)
    }
}

/// Sends each request to the least loaded of the groups that serve its model.
///
/// Load is the share of a group's sequences that this router has in flight there, the new request included: a group
/// with twice the room takes twice the requests. A tie goes to the group that was chosen longest ago, so that
/// single requests take turns, and then to the first by name.
///
/// A group is never too loaded to be chosen: other routers may load it too, so only its leader knows when it is
/// full, and refuses.
///
/// A group on which requests fail again and again gets no new ones for a while ([`failed`](Self::failed)); an answer that
/// was begun may go on there if it can nowhere else.
#[derive(Debug, Default)]
pub struct Dispatcher {
    groups: BTreeMap<GroupId, Standing>,
    /// Requests in flight, also at groups that have left the fleet; a group with none has no entry.
    in_flight: BTreeMap<GroupId, u32>,
    choices: u64,
}

/// What is known of a group of the fleet.
#[derive(Debug, Default)]
struct Standing {
    /// The leader's word, while the group takes new requests.
    health: Option<Health>,
    /// The newest incarnation that was reported lost.
    lost: Option<Epoch>,
    /// Number of the last choice that fell on it; 0 = none did.
    chosen: u64,
    breaker: Breaker,
}

impl Dispatcher {
    /// A dispatcher that knows no group yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the fleet as it is seen now. What was reported [`lost`](Self::lost) stays lost, even if this view
    /// has not heard of it.
    pub fn fleet(&mut self, fleet: &Fleet) {
        self.groups.retain(|id, _| fleet.groups.contains_key(id));
        for (id, group) in &fleet.groups {
            self.groups.entry(id.clone()).or_default().update(group);
        }
    }

    /// Chooses a group for a request, and counts the request in flight there.
    ///
    /// # Errors
    /// [`Refusal::NoGroup`] if no group takes it now.
    pub fn dispatch(&mut self, want: Want<'_>, now: Duration) -> Result<Choice, Refusal> {
        let worse =
            |(group, standing, _): Candidate<'_>| (want.not == Some(group), !standing.breaker.admits(now));
        let candidates = self.candidates(want, now);
        let best = candidates.min_by(|a, b| worse(*a).cmp(&worse(*b)).then_with(|| self.by_load(*a, *b)));
        let Some((group, _, health)) = best else {
            return Err(Refusal::NoGroup { model: want.model.into() });
        };
        let group = group.clone();
        let (epoch, leader) = (health.epoch, health.leader.clone());
        self.choices += 1;
        let standing = self.groups.get_mut(&group).expect("a candidate has its standing");
        standing.chosen = self.choices;
        let probes = standing.breaker.passes(now);
        *self.in_flight.entry(group.clone()).or_default() += 1;
        Ok(Choice { ticket: Ticket { group: group.clone(), probes }, group, epoch, leader })
    }

    /// Whether there is a group that takes a request now. Nothing is changed by it.
    pub fn takes(&self, want: Want<'_>, now: Duration) -> bool {
        self.candidates(want, now).next().is_some()
    }

    /// Counts a request as ended.
    #[expect(clippy::needless_pass_by_value, reason = "a ticket is used up")]
    pub fn finished(&mut self, ticket: Ticket) {
        let count = self.in_flight.get_mut(&ticket.group).expect("a ticket is one of the group's count");
        *count -= 1;
        if *count == 0 {
            self.in_flight.remove(&ticket.group);
        }
        if let (true, Some(standing)) = (ticket.probes, self.groups.get_mut(&ticket.group)) {
            standing.breaker.gave_up();
        }
    }

    /// A request got on well at a group: it had a token.
    pub fn succeeded(&mut self, group: &GroupId) {
        if let Some(standing) = self.groups.get_mut(group) {
            standing.breaker.succeeded();
        }
    }

    /// A request failed at a group, by no fault of its client's; for how long the group gets no new requests, if that
    /// begins now. `draw` is any number, which jitters that time.
    pub fn failed(&mut self, group: &GroupId, now: Duration, draw: u64) -> Option<Duration> {
        self.groups.get_mut(group)?.breaker.failed(now, draw)
    }

    /// How a group's breaker stands.
    pub fn breaker(&self, group: &GroupId, now: Duration) -> BreakerState {
        self.groups.get(group).map_or(BreakerState::Closed, |standing| standing.breaker.state(now))
    }

    /// Takes an incarnation of a group out of rotation, until the fleet shows a newer one or it is
    /// [`found`](Self::found) again.
    pub fn lost(&mut self, group: &GroupId, epoch: Epoch) {
        if let Some(standing) = self.groups.get_mut(group) {
            standing.lost = standing.lost.max(Some(epoch));
        }
    }

    /// Puts an incarnation of a group back into rotation that was reported lost, and answers after all.
    pub fn found(&mut self, group: &GroupId, epoch: Epoch) {
        if let Some(standing) = self.groups.get_mut(group) {
            standing.lost = standing.lost.filter(|lost| *lost > epoch);
        }
    }

    /// Requests that this router has in flight at a group.
    pub fn in_flight(&self, group: &GroupId) -> u32 {
        self.in_flight.get(group).copied().unwrap_or(0)
    }

    fn candidates<'a>(&'a self, want: Want<'a>, now: Duration) -> impl Iterator<Item = Candidate<'a>> {
        let serving =
            self.groups.iter().filter_map(|(id, standing)| Some((id, standing, standing.serving()?)));
        serving.filter(move |(_, standing, health)| {
            want.fits(&health.model) && (want.begun.is_some() || standing.breaker.admits(now))
        })
    }

    fn by_load(&self, a: Candidate<'_>, b: Candidate<'_>) -> Ordering {
        let taken = |(id, _, _): Candidate<'_>| u64::from(self.in_flight(id)) + 1;
        let room = |(_, _, health): Candidate<'_>| u64::from(health.sequences_max.max(1));
        // taken(a) / room(a) against taken(b) / room(b), without a division.
        let load = (taken(a) * room(b)).cmp(&(taken(b) * room(a)));
        load.then(a.1.chosen.cmp(&b.1.chosen)).then(a.0.cmp(b.0))
    }
}

type Candidate<'a> = (&'a GroupId, &'a Standing, &'a Health);

impl Standing {
    fn update(&mut self, group: &Group) {
        self.health = group.serving().filter(|health| !health.draining && group.hold.is_none()).cloned();
    }

    fn serving(&self) -> Option<&Health> {
        self.health.as_ref().filter(|health| Some(health.epoch) > self.lost)
    }
}

//! Least-loaded routing.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use galerne_types::{Epoch, Fleet, Group, GroupId, Health, Refusal};

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
}

/// Sends each request to the least loaded of the groups that serve its model.
///
/// Load is the share of a group's sequences that this router has in flight there, the new request included: a group
/// with twice the room takes twice the requests. A tie goes to the group that was chosen longest ago, so that
/// single requests take turns, and then to the first by name.
///
/// A group is never too loaded to be chosen: other routers may load it too, so only its leader knows when it is
/// full, and refuses.
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

    /// Chooses a group for a request to `model`, and counts the request in flight there.
    ///
    /// # Errors
    /// [`Refusal::NoGroup`] if no group of that model takes requests now.
    pub fn dispatch(&mut self, model: &str) -> Result<Choice, Refusal> {
        let candidates = self.serving().filter(|(_, _, health)| health.model.name == model);
        let least = candidates.min_by(|a, b| self.by_load(*a, *b));
        let Some((group, _, health)) = least else {
            return Err(Refusal::NoGroup { model: model.into() });
        };
        let group = group.clone();
        let (epoch, leader) = (health.epoch, health.leader.clone());
        self.choices += 1;
        if let Some(standing) = self.groups.get_mut(&group) {
            standing.chosen = self.choices;
        }
        *self.in_flight.entry(group.clone()).or_default() += 1;
        Ok(Choice { ticket: Ticket { group: group.clone() }, group, epoch, leader })
    }

    /// Counts a request as ended.
    #[expect(clippy::needless_pass_by_value, reason = "a ticket is used up")]
    pub fn finished(&mut self, ticket: Ticket) {
        let count = self.in_flight.get_mut(&ticket.group).expect("a ticket is one of the group's count");
        *count -= 1;
        if *count == 0 {
            self.in_flight.remove(&ticket.group);
        }
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

    fn serving(&self) -> impl Iterator<Item = Candidate<'_>> {
        self.groups.iter().filter_map(|(id, standing)| Some((id, standing, standing.serving()?)))
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
        self.health = group.serving().filter(|health| !health.draining).cloned();
    }

    fn serving(&self) -> Option<&Health> {
        self.health.as_ref().filter(|health| Some(health.epoch) > self.lost)
    }
}

//! What can be said of a group from the fleet's view.

use galerne_types::{EpochRecord, Group, Member, RankRecord, RankState};

/// A group's state, in the words of `galerne.v1.GroupStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Ranks gather, load or warm up.
    Forming,
    /// Takes requests.
    Ready,
    /// Serves, and shall get no requests: it is on trial.
    Held,
    /// Finishes what it has.
    Draining,
    /// A rank is dead or has left it, or the leader cannot be reached.
    Lost,
}

impl Standing {
    /// `usable`: whether this router can reach the leader and knows the weights.
    pub(crate) fn of(group: &Group, usable: bool) -> Self {
        match group.serving() {
            _ if group.epoch.is_none() => Self::Forming,
            _ if !group.stands() => Self::Lost,
            Some(_) if !usable => Self::Lost,
            Some(health) if health.draining => Self::Draining,
            Some(_) if group.hold.is_some() => Self::Held,
            Some(_) => Self::Ready,
            None => Self::Forming,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Forming => "forming",
            Self::Ready => "ready",
            Self::Held => "held",
            Self::Draining => "draining",
            Self::Lost => "lost",
        }
    }
}

/// The member of the last epoch that a live rank is.
pub(crate) fn member<'a>(group: &'a Group, rank: &RankRecord) -> Option<&'a Member> {
    let (epoch, EpochRecord { members, .. }) = group.epoch.as_ref()?;
    members.iter().find(|member| member.id == rank.id && group.absence(*epoch, member).is_none())
}

/// Live ranks in rank order; those that no epoch knows come last.
pub(crate) fn in_rank_order(group: &Group) -> Vec<&RankRecord> {
    let members = group.epoch.as_ref().map_or(&[][..], |(_, EpochRecord { members, .. })| members);
    let place = |rank: &RankRecord| members.iter().position(|m| m.id == rank.id).unwrap_or(members.len());
    let mut ranks: Vec<_> = group.ranks.values().collect();
    ranks.sort_by_key(|rank| place(rank));
    ranks
}

/// What a rank is doing, in the words of `galerne.v1.RankStatus`.
pub(crate) fn rank_state(state: RankState) -> String {
    match state {
        RankState::Waiting => "waiting".to_owned(),
        RankState::Loading { percent } => format!("loading {percent}%"),
        RankState::Joining => "joining".to_owned(),
        RankState::Ready => "ready".to_owned(),
        RankState::Dead => "dead".to_owned(),
    }
}

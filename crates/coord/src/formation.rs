//! Who forms a group, of whom, and when it is over. Pure.

use std::fmt;

use galerne_types::{Absence, Epoch, Group, Member, RankId, RankRecord};

/// The members of the epoch that `me` should write now, in rank order; `None` while the last epoch stands,
/// while compatible ranks are missing, or when another rank is the one to write it.
///
/// Ranks are compatible when they serve the same model with the same build. Where more stand than are needed,
/// members of the last epoch go first, because they hold shards already. Order is by host, then index; the
/// first member is the leader, and the one to write.
pub fn formation(group: &Group, me: &RankId) -> Option<Vec<Member>> {
    let mine = group.ranks.get(me)?;
    if group.stands() {
        return None;
    }
    let was_member = |rank: &RankRecord| {
        let members = group.epoch.iter().flat_map(|(_, record)| &record.members);
        members.into_iter().any(|member| member.is(rank))
    };
    let mut ranks: Vec<&RankRecord> =
        group.ranks.values().filter(|rank| rank.model == mine.model && rank.build == mine.build).collect();
    let shards = mine.model.shards;
    if ranks.len() < shards.world_size() {
        return None;
    }
    ranks.sort_by_key(|rank| (!was_member(rank), &rank.host, rank.index));
    ranks.truncate(shards.world_size());
    ranks.sort_by_key(|rank| (&rank.host, rank.index));
    if ranks[0].id != *me {
        return None;
    }
    let member = |(order, rank): (usize, &&RankRecord)| Member {
        id: rank.id.clone(),
        host: rank.host.clone(),
        address: rank.address.clone(),
        collective: rank.collective.clone(),
        pid: rank.pid,
        shards: shards.of_rank(order),
    };
    Some(ranks.iter().enumerate().map(member).collect())
}

/// Why an epoch is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The group has another one.
    Superseded(Epoch),
    /// etcd does not know it any more.
    Forgotten,
    /// A member's process is gone.
    Gone(RankId),
    /// A member's process has given the epoch up.
    Left(RankId),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superseded(epoch) => write!(f, "superseded by epoch {}", epoch.0),
            Self::Forgotten => f.write_str("etcd has lost it"),
            Self::Gone(rank) => write!(f, "rank {rank} is gone"),
            Self::Left(rank) => write!(f, "rank {rank} has left"),
        }
    }
}

/// Whether `epoch` is over for its member `me`, who knows best whether it lives itself.
pub(crate) fn ended(group: &Group, epoch: Epoch, me: &RankId) -> Option<Ended> {
    match &group.epoch {
        None => Some(Ended::Forgotten),
        Some((last, _)) if *last != epoch => Some(Ended::Superseded(*last)),
        Some((_, record)) => {
            let others = record.members.iter().filter(|member| member.id != *me);
            others.into_iter().find_map(|member| trouble(group, epoch, member))
        }
    }
}

fn trouble(group: &Group, epoch: Epoch, member: &Member) -> Option<Ended> {
    match group.absence(epoch, member)? {
        Absence::Gone => Some(Ended::Gone(member.id.clone())),
        Absence::Left => Some(Ended::Left(member.id.clone())),
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    use galerne_types::{Compute, EpochRecord, GroupId, KvDtype, ModelCard, RankState, Shards};

    use super::*;

    pub(crate) fn group_id() -> GroupId {
        GroupId("g".into())
    }

    /// A rank of a group of 2 with 4 shards.
    pub(crate) fn rank(host: &str, index: u16) -> RankRecord {
        RankRecord {
            id: RankId(format!("{host}/{index}")),
            group: group_id(),
            host: host.into(),
            index,
            address: format!("10.0.0.1:{}", 7000 + index),
            collective: format!("10.0.0.1:{}", 8000 + index),
            pid: 100 + u32::from(index),
            device: "cpu x1".into(),
            build: "0.1.0".into(),
            model: ModelCard {
                name: "m".into(),
                digest: "d".into(),
                context_tokens_max: 64,
                vocab: 512,
                shards: Shards::new(4, 2).unwrap(),
                quantize: None,
                compute: Compute::F32,
                kv: KvDtype::F32,
            },
            state: RankState::Waiting,
            memory_bytes: 0,
            left: Epoch::default(),
        }
    }

    pub(crate) fn group_of(ranks: &[&RankRecord]) -> Group {
        let ranks = ranks.iter().map(|rank| (rank.id.clone(), (*rank).clone())).collect();
        Group { ranks, ..Group::default() }
    }

    pub(crate) fn epoch_of(ranks: &[&RankRecord]) -> EpochRecord {
        let members = formation(&group_of(ranks), &ranks[0].id).unwrap_or_default();
        EpochRecord { group: group_id(), shards: ranks[0].model.shards, members, secret: "00".into() }
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::{Compute, KvDtype, ModelCard, Quantize};

    use super::fixtures::{epoch_of, group_of, rank};
    use super::*;

    fn ids(members: Option<Vec<Member>>) -> Vec<String> {
        members.unwrap_or_default().into_iter().map(|member| member.id.0).collect()
    }

    /// Ranks a/0 and a/1 in epoch 9.
    fn standing() -> (RankRecord, RankRecord, Group) {
        let (first, second) = (rank("a", 0), rank("a", 1));
        let mut group = group_of(&[&first, &second]);
        group.epoch = Some((Epoch(9), epoch_of(&[&first, &second])));
        (first, second, group)
    }

    #[test]
    fn the_would_be_leader_forms_a_group_of_all() {
        let (first, second) = (rank("a", 10), rank("b", 2));
        let group = group_of(&[&second, &first]);
        let members = formation(&group, &first.id).unwrap();
        assert_eq!(members.iter().map(|m| m.shards.clone()).collect::<Vec<_>>(), [0..2, 2..4]);
        assert_eq!(ids(Some(members)), ["a/10", "b/2"]);
        assert_eq!(formation(&group, &second.id), None, "only the first rank writes");
        assert_eq!(formation(&group, &RankId("c/0".into())), None, "a stranger does not");
    }

    #[test]
    fn order_within_a_host_is_by_index_not_by_name() {
        let (first, second) = (rank("a", 9), rank("a", 10));
        assert_eq!(ids(formation(&group_of(&[&second, &first]), &first.id)), ["a/9", "a/10"]);
    }

    #[test]
    fn nobody_forms_with_too_few_or_with_others() {
        let (first, mut second) = (rank("a", 0), rank("a", 1));
        assert_eq!(formation(&group_of(&[&first]), &first.id), None);
        second.build = "0.2.0".into();
        assert_eq!(formation(&group_of(&[&first, &second]), &first.id), None);
        second.build = first.build.clone();
        second.model.digest = "other".into();
        assert_eq!(formation(&group_of(&[&first, &second]), &first.id), None);
        second.model = ModelCard { quantize: Some(Quantize::Q8_0), ..first.model.clone() };
        assert_eq!(formation(&group_of(&[&first, &second]), &first.id), None);
        second.model = ModelCard { compute: Compute::Int8, ..first.model.clone() };
        assert_eq!(formation(&group_of(&[&first, &second]), &first.id), None);
        second.model = ModelCard { kv: KvDtype::Int8, ..first.model.clone() };
        assert_eq!(formation(&group_of(&[&first, &second]), &first.id), None);
    }

    #[test]
    fn an_epoch_that_stands_is_left_alone() {
        let (first, second, mut group) = standing();
        assert!(group.stands());
        assert_eq!(formation(&group, &first.id), None);
        assert_eq!(ended(&group, Epoch(9), &second.id), None);
        let earlier = rank("Z", 0);
        group.ranks.insert(earlier.id.clone(), earlier.clone());
        assert_eq!(formation(&group, &earlier.id), None, "a spare disturbs nobody");
    }

    #[test]
    fn a_restarted_member_ends_the_epoch() {
        let (first, mut second, mut group) = standing();
        group.ranks.remove(&second.id);
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Gone(second.id.clone())));
        assert_eq!(formation(&group, &first.id), None, "one is missing");

        second.pid += 1;
        second.left = Epoch(9);
        group.ranks.insert(second.id.clone(), second.clone());
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Gone(second.id.clone())));
        assert_eq!(ids(formation(&group, &first.id)), ["a/0", "a/1"]);
    }

    #[test]
    fn a_member_that_left_ends_the_epoch_though_all_live() {
        let (first, mut second, mut group) = standing();
        second.left = Epoch(8);
        group.ranks.insert(second.id.clone(), second.clone());
        assert!(group.stands(), "it left an older one");
        second.left = Epoch(9);
        group.ranks.insert(second.id.clone(), second.clone());
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Left(second.id.clone())));
        assert_eq!(ended(&group, Epoch(9), &second.id), None, "it need not be told");
        assert_eq!(ids(formation(&group, &first.id)), ["a/0", "a/1"]);
    }

    #[test]
    fn a_spare_steps_in_for_the_lost_one_only() {
        let (first, second, mut group) = standing();
        let spare = rank("A", 0);
        group.ranks.insert(spare.id.clone(), spare.clone());
        let another = rank("B", 0);
        group.ranks.insert(another.id.clone(), another.clone());
        group.ranks.remove(&first.id);
        assert_eq!(ids(formation(&group, &spare.id)), ["A/0", "a/1"]);
        assert_eq!(formation(&group, &second.id), None);
        assert_eq!(formation(&group, &another.id), None);
    }

    #[test]
    fn another_epoch_or_none_ends_this_one() {
        let (first, _, mut group) = standing();
        assert_eq!(ended(&group, Epoch(8), &first.id), Some(Ended::Superseded(Epoch(9))));
        group.epoch = None;
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Forgotten));
    }
}

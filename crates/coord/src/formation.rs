//! Who forms a group, of whom, and when it is over. Pure.

use std::fmt;
use std::time::Duration;

use galerne_types::{Absence, Epoch, Group, Loss, LossKind, Member, RankId, RankRecord, RankState, Shards};

use crate::limits::{GONE_AFTER, GROW_AFTER, SHRINK_AFTER};

/// What a group needs another epoch for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// There is none that can go on.
    Over,
    /// A member's registration is gone. It may be back at once: leases are lost without their holders.
    Silent,
    /// It has fewer ranks than it should.
    Small,
}

/// The next epoch of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Formation {
    /// S and N.
    pub shards: Shards,
    /// In rank order.
    pub members: Vec<Member>,
    /// Why the one before is over, if there was one.
    pub loss: Option<Loss>,
}

/// What the group needs another epoch for, if it does.
pub fn need(group: &Group) -> Option<Need> {
    let Some((_, record)) = &group.epoch else { return Some(Need::Over) };
    if !group.stands() {
        return Some(Need::Over);
    }
    if !group.is_whole() {
        return Some(Need::Silent);
    }
    let wanted =
        record.members.first().and_then(|member| group.ranks.get(&member.id))?.model.shards.world_size();
    (record.members.len() < wanted).then_some(Need::Small)
}

/// The epoch that `me` should write now, when the group has been in need of it for so long; `None` while it is not,
/// while compatible ranks are missing, or when another rank is the one to write it.
///
/// Ranks are compatible when they serve the same model with the same build, and free when they are in no epoch that goes
/// on. Where there are more than are needed, members of the last epoch go first, because they hold shards; those that are
/// blamed for its end go last. A member keeps its place, others fill the gaps in order of host and index. The first rank
/// leads, and the first free one writes.
///
/// With too few ranks that nobody blames, a group that has survivors forms after [`SHRINK_AFTER`] of waiting: of the most
/// ranks that divide S and have room for their shares. It grows again when more have stood for [`GROW_AFTER`], and for
/// up to 16 times as long if that has not gone well before.
pub fn formation(group: &Group, me: &RankId, waited: Duration) -> Option<Formation> {
    let mine = group.ranks.get(me).filter(|_| is_free(group, me))?;
    let need = need(group)?;
    let waited = match need {
        Need::Over => waited,
        Need::Silent => waited.checked_sub(GONE_AFTER)?,
        Need::Small => waited.checked_sub(grow_after(group))?,
    };
    let mut ranks: Vec<&RankRecord> = group
        .ranks
        .values()
        .filter(|rank| rank.model == mine.model && rank.build == mine.build && rank.state != RankState::Dead)
        .filter(|rank| need == Need::Small || is_free(group, &rank.id))
        .collect();
    ranks.sort_by_key(|rank| (is_blamed(group, rank), !was_member(group, rank), &rank.host, rank.index));
    let shards = size(group, &ranks, mine.model.shards, need, waited)?;
    ranks.truncate(shards.world_size());
    let writer =
        ranks.iter().filter(|rank| is_free(group, &rank.id)).min_by_key(|rank| (&rank.host, rank.index));
    if writer.is_none_or(|writer| writer.id != *me) {
        return None;
    }
    let member = |(place, rank): (usize, &RankRecord)| Member {
        id: rank.id.clone(),
        host: rank.host.clone(),
        address: rank.address.clone(),
        collective: rank.collective.clone(),
        pid: rank.pid,
        shards: shards.of_rank(place),
    };
    let members = seated(group, ranks, shards).into_iter().enumerate().map(member).collect();
    let loss = group.epoch.as_ref().map(|(epoch, _)| loss(group, *epoch, need));
    Some(Formation { shards, members, loss })
}

/// N, if it can be formed now. `ranks` come in the order in which they are taken.
fn size(group: &Group, ranks: &[&RankRecord], asked: Shards, need: Need, waited: Duration) -> Option<Shards> {
    let sound = ranks.iter().take_while(|rank| !is_blamed(group, rank)).count();
    if sound >= asked.world_size() {
        return Some(asked);
    }
    if need != Need::Small && waited < SHRINK_AFTER {
        return None;
    }
    let survivors = ranks[..sound].iter().any(|rank| was_member(group, rank));
    let now = group.epoch.as_ref().map_or(0, |(_, record)| record.members.len());
    let least = if need == Need::Small { now + 1 } else { 1 };
    let fits = |count: &usize| ranks[..*count].iter().all(|rank| usize::from(rank.ranks_min) <= *count);
    let fewer = (least..=sound).rev().filter(|_| survivors).filter(fits);
    let fewer = fewer.filter_map(|count| Shards::new(asked.virtual_shards(), count).ok()).next();
    fewer.or((ranks.len() >= asked.world_size()).then_some(asked))
}

/// How long more ranks must stand before the group grows.
fn grow_after(group: &Group) -> Duration {
    let past = group.epoch.iter().flat_map(|(_, record)| &record.past);
    let bad = past
        .filter(|past| !matches!(past.loss.kind, LossKind::Died | LossKind::Drained | LossKind::Grown))
        .count();
    GROW_AFTER * (1 << bad.min(4))
}

/// Whether the rank is in no epoch that goes on.
fn is_free(group: &Group, id: &RankId) -> bool {
    let Some(rank) = group.ranks.get(id) else { return false };
    let Some((epoch, record)) = &group.epoch else { return true };
    rank.left >= *epoch || !record.members.iter().any(|member| member.is(rank))
}

fn was_member(group: &Group, rank: &RankRecord) -> bool {
    group.epoch.iter().flat_map(|(_, record)| &record.members).any(|member| member.is(rank))
}

/// Whether a survivor of the last epoch says that it ended by the fault of this process. Of two that say it of each other,
/// the earlier one is believed.
fn is_blamed(group: &Group, rank: &RankRecord) -> bool {
    let Some((epoch, _)) = &group.epoch else { return false };
    let blames = |a: &RankRecord, b: &RankRecord| {
        a.left == *epoch && a.loss.as_ref().is_some_and(|loss| loss.rank.as_ref() == Some(&b.id))
    };
    let order = |rank: &RankRecord| (rank.host.clone(), rank.index);
    let believed =
        |other: &&RankRecord| blames(other, rank) && (!blames(rank, other) || order(other) < order(rank));
    let others = group.ranks.values().filter(|other| other.id != rank.id && other.state != RankState::Dead);
    was_member(group, rank) && others.filter(|other| was_member(group, other)).any(|other| believed(&other))
}

/// The ranks in their places: who holds shards already goes where most of them are needed.
fn seated<'a>(group: &Group, mut ranks: Vec<&'a RankRecord>, shards: Shards) -> Vec<&'a RankRecord> {
    let held = |rank: &RankRecord| {
        let members = group.epoch.iter().flat_map(|(_, record)| &record.members);
        members.into_iter().find(|member| member.is(rank)).map(|member| member.shards.start)
    };
    ranks.sort_by_key(|rank| (held(rank).unwrap_or(usize::MAX), &rank.host, rank.index));
    let mut places: Vec<Option<&RankRecord>> = vec![None; ranks.len()];
    let mut others = Vec::new();
    for rank in ranks {
        let wants = held(rank).map(|first| first * shards.world_size() / shards.virtual_shards());
        match wants.and_then(|place| places.get_mut(place)).filter(|place| place.is_none()) {
            Some(place) => *place = Some(rank),
            None => others.push(rank),
        }
    }
    others.sort_by_key(|rank| (&rank.host, rank.index));
    let mut others = others.into_iter();
    places.into_iter().filter_map(|place| place.or_else(|| others.next())).collect()
}

/// Why the last epoch is over: what its members say, or what has become of them.
fn loss(group: &Group, epoch: Epoch, need: Need) -> Loss {
    if need == Need::Small {
        return Loss { kind: LossKind::Grown, rank: None };
    }
    let of_member = |(member, absence): (&Member, Absence)| {
        let rank = Some(member.id.clone());
        match absence {
            Absence::Gone => Some(Loss { kind: LossKind::Vanished, rank }),
            Absence::Dead => Some(Loss { kind: LossKind::Died, rank }),
            Absence::Left => group.ranks.get(&member.id)?.loss.clone(),
        }
    };
    let said = group
        .absences()
        .filter(|(member, _)| group.ranks.get(&member.id).is_none_or(|rank| rank.left <= epoch));
    let told = said.filter_map(of_member).min_by_key(|loss| (loss.kind, loss.rank.is_none()));
    told.unwrap_or(Loss { kind: LossKind::Failed, rank: None })
}

/// The epoch that `me` was to be in, if that was over before it could enter. It has to give it up all the same.
pub(crate) fn missed(group: &Group, me: &RankRecord) -> Option<Epoch> {
    let (epoch, record) = group.epoch.as_ref().filter(|_| !group.stands())?;
    (me.left < *epoch && record.members.iter().any(|member| member.is(me))).then_some(*epoch)
}

/// Why an epoch is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The group has another one.
    Superseded(Epoch),
    /// etcd does not know it any more.
    Forgotten,
    /// A member's process has ended.
    Dead(RankId),
    /// A member's process has given the epoch up.
    Left(RankId),
}

impl Ended {
    /// What this rank says of it.
    pub fn loss(&self) -> Loss {
        match self {
            Self::Superseded(_) | Self::Forgotten | Self::Left(_) => {
                Loss { kind: LossKind::Failed, rank: None }
            }
            Self::Dead(rank) => Loss { kind: LossKind::Died, rank: Some(rank.clone()) },
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superseded(epoch) => write!(f, "superseded by epoch {}", epoch.0),
            Self::Forgotten => f.write_str("etcd has lost it"),
            Self::Dead(rank) => write!(f, "rank {rank} is dead"),
            Self::Left(rank) => write!(f, "rank {rank} has left"),
        }
    }
}

/// Whether `epoch` is over for its member `me`, who knows best whether it lives itself. A member that is not registered
/// ends nothing: whether it lives is seen where the ranks meet.
pub(crate) fn ended(group: &Group, epoch: Epoch, me: &RankId) -> Option<Ended> {
    match &group.epoch {
        None => Some(Ended::Forgotten),
        Some((last, _)) if *last != epoch => Some(Ended::Superseded(*last)),
        Some(_) => {
            group.absences().filter(|(member, _)| member.id != *me).find_map(
                |(member, absence)| match absence {
                    Absence::Gone => None,
                    Absence::Dead => Some(Ended::Dead(member.id.clone())),
                    Absence::Left => Some(Ended::Left(member.id.clone())),
                },
            )
        }
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
            ranks_min: 1,
            left: Epoch::default(),
            loss: None,
        }
    }

    pub(crate) fn group_of(ranks: &[&RankRecord]) -> Group {
        let ranks = ranks.iter().map(|rank| (rank.id.clone(), (*rank).clone())).collect();
        Group { ranks, ..Group::default() }
    }

    pub(crate) fn epoch_of(ranks: &[&RankRecord]) -> EpochRecord {
        let formed = formation(&group_of(ranks), &ranks[0].id, Duration::ZERO);
        let members = formed.map(|formed| formed.members).unwrap_or_default();
        EpochRecord::new(group_id(), ranks[0].model.shards, members, "00".into())
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::{Compute, KvDtype, ModelCard, Past, Quantize};

    use super::fixtures::{epoch_of, group_of, rank};
    use super::*;

    fn formation(group: &Group, me: &RankId) -> Option<Vec<Member>> {
        after(group, me, Duration::ZERO)
    }

    fn after(group: &Group, me: &RankId, waited: Duration) -> Option<Vec<Member>> {
        super::formation(group, me, waited).map(|formation| formation.members)
    }

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

    /// The rank gives epoch 9 up, and says why.
    fn leaves(group: &mut Group, rank: &RankRecord, kind: LossKind, blamed: Option<&RankRecord>) {
        let rank = group.ranks.get_mut(&rank.id).unwrap();
        rank.left = Epoch(9);
        rank.loss = Some(Loss { kind, rank: blamed.map(|rank| rank.id.clone()) });
    }

    fn restarted(rank: &RankRecord) -> RankRecord {
        RankRecord { pid: rank.pid + 50, left: Epoch(9), ..rank.clone() }
    }

    #[test]
    fn a_member_whose_registration_is_gone_ends_nothing_for_a_while() {
        let (first, second, mut group) = standing();
        group.ranks.remove(&second.id);
        assert!(group.stands() && !group.is_whole());
        assert_eq!(ended(&group, Epoch(9), &first.id), None);
        for spare in [rank("b", 0), rank("b", 1)] {
            group.ranks.insert(spare.id.clone(), spare);
        }
        let spare = RankId("b/0".into());
        assert_eq!(formation(&group, &spare), None);
        assert_eq!(ids(after(&group, &spare, GONE_AFTER)), ["b/0", "b/1"]);
        assert_eq!(
            super::formation(&group, &spare, GONE_AFTER).unwrap().loss.unwrap().to_string(),
            "vanished (a/1)"
        );
    }

    #[test]
    fn a_dead_or_restarted_member_ends_the_epoch() {
        let (first, mut second, mut group) = standing();
        second.state = RankState::Dead;
        group.ranks.insert(second.id.clone(), second.clone());
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Dead(second.id.clone())));
        leaves(&mut group, &first, LossKind::Died, Some(&second));
        assert_eq!(formation(&group, &first.id), None, "one is missing");

        let back = restarted(&rank("a", 1));
        group.ranks.insert(back.id.clone(), back);
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Dead(second.id.clone())));
        let formed = super::formation(&group, &first.id, Duration::ZERO).unwrap();
        assert_eq!(
            (ids(Some(formed.members)), formed.loss.unwrap().kind),
            (vec!["a/0".into(), "a/1".into()], LossKind::Died)
        );
    }

    #[test]
    fn a_member_that_left_ends_the_epoch_though_all_live() {
        let (first, second, mut group) = standing();
        group.ranks.get_mut(&second.id).unwrap().left = Epoch(8);
        assert!(group.stands(), "it left an older one");
        leaves(&mut group, &second, LossKind::Failed, None);
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Left(second.id.clone())));
        assert_eq!(ended(&group, Epoch(9), &second.id), None, "it need not be told");
        assert_eq!(formation(&group, &second.id), None, "the other one still works for it");
        leaves(&mut group, &first, LossKind::Failed, None);
        assert_eq!(ids(formation(&group, &first.id)), ["a/0", "a/1"]);
    }

    #[test]
    fn a_spare_takes_the_place_and_the_shards_of_the_lost_one() {
        let (first, second, mut group) = standing();
        for spare in [rank("A", 0), rank("B", 0)] {
            group.ranks.insert(spare.id.clone(), spare);
        }
        group.ranks.get_mut(&first.id).unwrap().state = RankState::Dead;
        leaves(&mut group, &second, LossKind::Died, Some(&first));
        let spare = RankId("A/0".into());
        assert_eq!(ids(formation(&group, &spare)), ["A/0", "a/1"]);
        assert_eq!(formation(&group, &second.id), None, "one writes");
        assert_eq!(formation(&group, &RankId("B/0".into())), None, "one is enough");

        let (first, second, mut group) = standing();
        group.ranks.insert(spare.clone(), rank("A", 0));
        group.ranks.get_mut(&second.id).unwrap().state = RankState::Dead;
        leaves(&mut group, &first, LossKind::Died, Some(&second));
        let members = formation(&group, &spare).unwrap();
        assert_eq!(members[1].shards, second_shards(), "the survivor leads, and keeps what it holds");
        assert_eq!(ids(Some(members)), ["a/0", "A/0"]);
    }

    fn second_shards() -> std::ops::Range<usize> {
        2..4
    }

    #[test]
    fn survivors_go_on_with_fewer_when_nobody_comes_and_memory_permits() {
        let (first, second, mut group) = standing();
        group.ranks.get_mut(&second.id).unwrap().state = RankState::Dead;
        leaves(&mut group, &first, LossKind::Died, Some(&second));
        assert_eq!(after(&group, &first.id, SHRINK_AFTER / 2), None);
        let members = after(&group, &first.id, SHRINK_AFTER).unwrap();
        assert_eq!((members.len(), members[0].shards.clone()), (1, 0..4));
        group.ranks.get_mut(&first.id).unwrap().ranks_min = 2;
        assert_eq!(after(&group, &first.id, SHRINK_AFTER * 9), None, "it has no room for all");

        let mut stranger = restarted(&first);
        stranger.ranks_min = 1;
        group.ranks.insert(stranger.id.clone(), stranger);
        assert_eq!(after(&group, &first.id, SHRINK_AFTER * 9), None, "a group that comes up waits for all");
    }

    #[test]
    fn a_small_group_grows_when_another_rank_has_stood_for_a_while() {
        let (first, second, mut group) = standing();
        let (_, record) = group.epoch.as_mut().unwrap();
        record.members.pop();
        record.members[0].shards = 0..4;
        assert_eq!(need(&group), Some(Need::Small));
        assert_eq!(after(&group, &second.id, GROW_AFTER / 2), None);
        assert_eq!(after(&group, &first.id, GROW_AFTER), None, "who is free writes");
        let formed = super::formation(&group, &second.id, GROW_AFTER).unwrap();
        assert_eq!(
            (ids(Some(formed.members)), formed.loss.unwrap().kind),
            (vec!["a/0".into(), "a/1".into()], LossKind::Grown)
        );

        let loss = Loss { kind: LossKind::Hung, rank: None };
        let past = Past { epoch: Epoch(5), ranks: 2, began_ms: 0, ended_ms: 0, loss };
        group.epoch.as_mut().unwrap().1.past.push(past);
        assert_eq!(after(&group, &second.id, GROW_AFTER), None, "it has failed before");
        assert!(after(&group, &second.id, 2 * GROW_AFTER).is_some());
    }

    #[test]
    fn who_is_blamed_is_left_out() {
        let (first, second, mut group) = standing();
        leaves(&mut group, &first, LossKind::Hung, Some(&second));
        leaves(&mut group, &second, LossKind::Hung, Some(&first));
        assert_eq!(formation(&group, &first.id), None);
        assert_eq!(
            ids(after(&group, &first.id, SHRINK_AFTER)),
            ["a/0"],
            "they cannot meet: the first is believed"
        );
        group.ranks.get_mut(&first.id).unwrap().ranks_min = 2;
        assert_eq!(
            ids(after(&group, &first.id, SHRINK_AFTER)),
            ["a/0", "a/1"],
            "without room they try again"
        );
        let spare = rank("b", 0);
        group.ranks.insert(spare.id.clone(), spare);
        assert_eq!(ids(formation(&group, &first.id)), ["a/0", "b/0"]);
    }

    #[test]
    fn a_member_leaves_an_epoch_that_was_over_before_it_could_enter() {
        let (first, second, mut group) = standing();
        assert_eq!(missed(&group, &first), None, "it stands");
        leaves(&mut group, &second, LossKind::Failed, None);
        assert_eq!(missed(&group, &first), Some(Epoch(9)));
        assert_eq!(missed(&group, &rank("b", 0)), None, "a spare was never in it");
        for left in [Epoch(9), Epoch(10)] {
            assert_eq!(missed(&group, &RankRecord { left, ..first.clone() }), None, "it has left it");
        }
    }

    #[test]
    fn another_epoch_or_none_ends_this_one() {
        let (first, _, mut group) = standing();
        assert_eq!(ended(&group, Epoch(8), &first.id), Some(Ended::Superseded(Epoch(9))));
        group.epoch = None;
        assert_eq!(ended(&group, Epoch(9), &first.id), Some(Ended::Forgotten));
    }
}

//! The dispatcher's promises, by example and over random schedules.

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_dispatch::{BREAKER_FAILURES, BREAKER_MS_MIN, BreakerState, Choice, Dispatcher, Ticket, Want};
use galerne_types::{
    Compute, Epoch, EpochRecord, Fleet, Group, GroupId, Health, Hold, KvDtype, ModelCard, Quantize, RankId,
    RankRecord, RankState, Refusal, Shards,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const MODEL: &str = "bard";

const NOW: Duration = Duration::from_secs(100);

fn card(name: &str) -> ModelCard {
    let shards = Shards::new(1, 1).unwrap();
    ModelCard {
        name: name.into(),
        digest: "d".into(),
        context_tokens_max: 64,
        vocab: 10,
        shards,
        quantize: None,
        compute: Compute::F32,
        kv: KvDtype::F32,
    }
}

fn id(name: &str) -> GroupId {
    GroupId(name.into())
}

/// A group whose newest incarnation is `epoch`, and which serves.
fn serving(name: &str, epoch: u64) -> Group {
    let record = EpochRecord::new(id(name), card(MODEL).shards, Vec::new(), String::new());
    let health = Health {
        group: id(name),
        epoch: Epoch(epoch),
        leader: format!("{name}:{epoch}"),
        model: card(MODEL),
        kv_blocks: 8,
        sequences_max: 4,
        step_tokens_max: 64,
        draining: false,
    };
    Group { epoch: Some((Epoch(epoch), record)), health: Some(health), ..Group::default() }
}

fn with_health(mut group: Group, change: impl FnOnce(&mut Health)) -> Group {
    group.health.as_mut().map(change);
    group
}

/// A group of which one rank is there, and waits for the others.
fn forming(name: &str) -> Group {
    let rank = RankRecord {
        id: RankId("host/0".into()),
        group: id(name),
        host: "host".into(),
        index: 0,
        address: String::new(),
        collective: String::new(),
        pid: 1,
        device: String::new(),
        build: String::new(),
        model: card(MODEL),
        state: RankState::Waiting,
        memory_bytes: 0,
        ranks_min: 1,
        left: Epoch(0),
        loss: None,
    };
    Group { ranks: [(rank.id.clone(), rank)].into(), ..Group::default() }
}

fn fleet<const N: usize>(groups: [(&str, Group); N]) -> Fleet {
    Fleet { groups: groups.into_iter().map(|(name, group)| (id(name), group)).collect() }
}

fn dispatcher(fleet: &Fleet) -> Dispatcher {
    let mut dispatcher = Dispatcher::new();
    dispatcher.fleet(fleet);
    dispatcher
}

fn no_group() -> Result<Choice, Refusal> {
    Err(Refusal::NoGroup { model: MODEL.into() })
}

/// Sends `count` requests that do not end; says where they went.
fn spread(dispatcher: &mut Dispatcher, count: usize) -> Vec<String> {
    (0..count).map(|_| dispatcher.dispatch(Want::any(MODEL), NOW).unwrap().group.0).collect()
}

#[test]
fn single_requests_take_turns() {
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    for expected in ["a:1", "b:2", "a:1", "b:2"] {
        let choice = dispatcher.dispatch(Want::any(MODEL), NOW).unwrap();
        assert_eq!(choice.leader, expected);
        assert_eq!(dispatcher.in_flight(&choice.group), 1);
        dispatcher.finished(choice.ticket);
        assert_eq!(dispatcher.in_flight(&choice.group), 0);
    }
}

#[test]
fn the_least_loaded_is_chosen() {
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    let [first, second] = [(); 2].map(|()| dispatcher.dispatch(Want::any(MODEL), NOW).unwrap());
    assert_eq!((first.group, second.group), (id("a"), id("b")));
    dispatcher.finished(second.ticket);
    assert_eq!(spread(&mut dispatcher, 1), ["b"]);
}

#[test]
fn a_group_with_twice_the_room_takes_twice_the_requests() {
    let big = with_health(serving("big", 2), |health| health.sequences_max = 8);
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("big", big)]));
    spread(&mut dispatcher, 30);
    assert_eq!((dispatcher.in_flight(&id("a")), dispatcher.in_flight(&id("big"))), (10, 20));
}

#[test]
fn a_lost_group_is_out_of_rotation_until_it_forms_again() {
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    let choice = dispatcher.dispatch(Want::any(MODEL), NOW).unwrap();
    dispatcher.lost(&choice.group, choice.epoch);
    assert_eq!(spread(&mut dispatcher, 3), ["b"; 3]);
    dispatcher.fleet(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    assert_eq!(spread(&mut dispatcher, 1), ["b"], "a view from before the loss");

    dispatcher.fleet(&fleet([("a", serving("a", 7)), ("b", serving("b", 2))]));
    dispatcher.lost(&choice.group, choice.epoch);
    assert_eq!(
        dispatcher.dispatch(Want::any(MODEL), NOW).unwrap().leader,
        "a:7",
        "old news do not harm the new incarnation"
    );
}

#[test]
fn a_group_that_answers_again_is_back_in_rotation() {
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 2))]));
    dispatcher.lost(&id("a"), Epoch(2));
    dispatcher.found(&id("a"), Epoch(1));
    assert_eq!(dispatcher.dispatch(Want::any(MODEL), NOW), no_group(), "its predecessor was found, not it");
    dispatcher.found(&id("a"), Epoch(2));
    assert_eq!(spread(&mut dispatcher, 1), ["a"]);
}

#[test]
fn groups_that_do_not_serve_are_not_chosen() {
    let draining = with_health(serving("a", 1), |health| health.draining = true);
    let superseded = with_health(serving("b", 5), |health| health.epoch = Epoch(4));
    let silent = Group { health: None, ..serving("c", 6) };
    let held = Group { hold: Some(Hold { why: "on trial".into() }), ..serving("e", 7) };
    for group in [draining, superseded, silent, forming("d"), held, Group::default()] {
        assert_eq!(dispatcher(&fleet([("a", group)])).dispatch(Want::any(MODEL), NOW), no_group());
    }
}

#[test]
fn a_request_goes_only_to_a_group_of_its_model() {
    let other = with_health(serving("c", 3), |health| health.model = card("alba"));
    let view = fleet([("a", serving("a", 1)), ("b", serving("b", 2)), ("c", other), ("d", forming("d"))]);
    let mut dispatcher = dispatcher(&view);
    assert_eq!(dispatcher.dispatch(Want::any("alba"), NOW).unwrap().group, id("c"));
    dispatcher.lost(&id("c"), Epoch(3));
    assert_eq!(dispatcher.dispatch(Want::any("alba"), NOW), Err(Refusal::NoGroup { model: "alba".into() }));
    assert_eq!(dispatcher.dispatch(Want::any(MODEL), NOW).unwrap().group, id("a"));
}

#[test]
fn what_was_begun_goes_on_only_under_the_same_numerics_and_where_it_has_room() {
    let fewer_ranks = ModelCard { shards: Shards::new(4, 1).unwrap(), ..begun() };
    let others = [
        ModelCard { digest: "other".into(), ..begun() },
        ModelCard { shards: Shards::new(8, 2).unwrap(), ..begun() },
        ModelCard { quantize: Some(Quantize::Q8_0), ..begun() },
        ModelCard { compute: Compute::Int8, ..begun() },
        ModelCard { kv: KvDtype::Bf16, ..begun() },
        ModelCard { context_tokens_max: 63, ..begun() },
    ];
    let (begun, took) = (begun().numerics(), |card: &ModelCard, begun: Option<&str>| {
        let group = with_health(serving("a", 1), |health| health.model = card.clone());
        let want = Want { begun: begun.map(|begun| (begun, 64)), ..Want::any(MODEL) };
        let mut dispatcher = dispatcher(&fleet([("a", group)]));
        let takes = dispatcher.takes(want, NOW);
        takes && dispatcher.dispatch(want, NOW).is_ok()
    });
    assert!(took(&fewer_ranks, Some(&begun)));
    for other in others {
        assert!(!took(&other, Some(&begun)), "{other:?}");
        assert!(took(&other, None), "nothing was begun");
    }
}

fn begun() -> ModelCard {
    ModelCard { shards: Shards::new(4, 2).unwrap(), ..card(MODEL) }
}

#[test]
fn who_has_just_refused_is_the_last_to_be_asked() {
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    let (a, b) = (id("a"), id("b"));
    let not = |not| Want { not: Some(not), ..Want::any(MODEL) };
    for _ in 0..3 {
        assert_eq!(dispatcher.dispatch(not(&a), NOW).unwrap().group, b);
    }
    dispatcher.lost(&b, Epoch(2));
    assert_eq!(dispatcher.dispatch(not(&a), NOW).unwrap().group, a);
}

#[test]
fn a_group_that_fails_again_and_again_gets_one_request_after_a_while_and_what_was_begun_if_nobody_else_can() {
    let (a, numerics) = (id("a"), card(MODEL).numerics());
    let mut dispatcher = dispatcher(&fleet([("a", serving("a", 1)), ("b", serving("b", 2))]));
    let opened: Vec<_> = (0..BREAKER_FAILURES).map(|_| dispatcher.failed(&a, NOW, u64::MAX)).collect();
    assert_eq!(opened.last(), Some(&Some(BREAKER_MS_MIN)));
    assert_eq!(spread(&mut dispatcher, 3), ["b"; 3]);
    dispatcher.lost(&id("b"), Epoch(2));
    assert_eq!(dispatcher.dispatch(Want::any(MODEL), NOW), no_group());
    let begun = Want { begun: Some((&numerics, 2)), ..Want::any(MODEL) };
    assert_eq!(dispatcher.dispatch(begun, NOW).unwrap().group, a);

    let later = NOW + BREAKER_MS_MIN;
    assert_eq!(dispatcher.breaker(&a, later), BreakerState::Probing);
    let probe = dispatcher.dispatch(Want::any(MODEL), later).unwrap();
    assert!(!dispatcher.takes(Want::any(MODEL), later), "one is enough");
    assert_eq!(dispatcher.dispatch(Want::any(MODEL), later), no_group(), "one is enough");
    dispatcher.finished(probe.ticket);
    let probe = dispatcher.dispatch(Want::any(MODEL), later).unwrap();
    dispatcher.succeeded(&a);
    dispatcher.finished(probe.ticket);
    assert_eq!(dispatcher.breaker(&a, later), BreakerState::Closed);
    assert_eq!(spread(&mut dispatcher, 2), ["a"; 2]);
}

#[derive(Clone, Debug)]
enum Op {
    Dispatch,
    Finish(prop::sample::Index),
    /// Report the newest incarnation of a group, or the one before, as lost.
    Lost(usize, bool),
    /// A group forms again.
    Form(usize),
    /// The fleet is seen; bit i of the mask: group i is missing.
    Look(u8),
}

const GROUPS: [&str; 4] = ["a", "b", "c", "d"];

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => Just(Op::Dispatch),
        6 => any::<prop::sample::Index>().prop_map(Op::Finish),
        1 => (0..GROUPS.len(), any::<bool>()).prop_map(|(group, newest)| Op::Lost(group, newest)),
        1 => (0..GROUPS.len()).prop_map(Op::Form),
        2 => prop_oneof![3 => Just(0u8), 1 => 0..16u8].prop_map(Op::Look),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn load_is_level_and_counted_exactly(ops in prop::collection::vec(op(), 1..200)) {
        let mut dispatcher = Dispatcher::new();
        let mut epochs = [1u64; GROUPS.len()];
        let mut seen: BTreeMap<GroupId, u64> = BTreeMap::new();
        let mut lost: BTreeMap<GroupId, u64> = BTreeMap::new();
        let mut tickets: Vec<(GroupId, Ticket)> = Vec::new();
        for op in ops {
            match op {
                Op::Dispatch => {
                    let alive: Vec<&GroupId> =
                        seen.iter().filter(|(group, epoch)| lost.get(group) < Some(epoch)).map(|(group, _)| group).collect();
                    let least = alive.iter().map(|group| dispatcher.in_flight(group)).min();
                    prop_assert_eq!(dispatcher.takes(Want::any(MODEL), NOW), !alive.is_empty());
                    match dispatcher.dispatch(Want::any(MODEL), NOW) {
                        Ok(choice) => {
                            prop_assert!(alive.contains(&&choice.group));
                            prop_assert_eq!(choice.epoch, Epoch(seen[&choice.group]));
                            prop_assert_eq!(Some(dispatcher.in_flight(&choice.group)), least.map(|least| least + 1));
                            tickets.push((choice.group, choice.ticket));
                        }
                        refused => {
                            prop_assert!(alive.is_empty());
                            prop_assert_eq!(refused, no_group());
                        }
                    }
                }
                Op::Finish(_) if tickets.is_empty() => {}
                Op::Finish(which) => {
                    let (_, ticket) = tickets.swap_remove(which.index(tickets.len()));
                    dispatcher.finished(ticket);
                }
                Op::Lost(group, newest) => {
                    let (group, epoch) = (id(GROUPS[group]), epochs[group] - u64::from(!newest));
                    dispatcher.lost(&group, Epoch(epoch));
                    if seen.contains_key(&group) {
                        let known = lost.entry(group).or_default();
                        *known = epoch.max(*known);
                    }
                }
                Op::Form(group) => epochs[group] += 1,
                Op::Look(missing) => {
                    let mut view = Fleet::default();
                    for (i, name) in GROUPS.iter().enumerate().filter(|(i, _)| missing >> i & 1 == 0) {
                        view.groups.insert(id(name), serving(name, epochs[i]));
                    }
                    seen = view.groups.iter().map(|(id, group)| (id.clone(), group.epoch.as_ref().unwrap().0.0)).collect();
                    lost.retain(|group, _| seen.contains_key(group));
                    dispatcher.fleet(&view);
                }
            }
            for name in GROUPS {
                let expected = tickets.iter().filter(|(group, _)| group.0 == name).count();
                prop_assert_eq!(dispatcher.in_flight(&id(name)) as usize, expected);
            }
        }
    }
}

#[test]
fn equal_groups_stay_within_one_of_each_other() {
    let mut dispatcher = dispatcher(&fleet(GROUPS.map(|name| (name, serving(name, 1)))));
    for count in 1..50usize {
        spread(&mut dispatcher, 1);
        let loads = GROUPS.map(|name| dispatcher.in_flight(&id(name)) as usize);
        assert_eq!(loads.iter().sum::<usize>(), count);
        assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1, "{loads:?}");
    }
}

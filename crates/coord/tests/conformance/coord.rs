//! Registrations, formation, fencing, the fleet view.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use etcd_client::{Client, PutOptions};
use galerne_coord::{Clusters, Coord, CoordError, Ended, EtcdAccess, Registration};
use galerne_types::{
    Compute, Epoch, Fleet, Group, GroupId, Health, KvDtype, Loss, LossKind, ModelCard, RankId, RankRecord,
    RankState, RouterRecord, Shards,
};
use tokio::sync::{mpsc, watch};

use crate::server::{Server, free_address};

const NOW: Duration = Duration::ZERO;

const FAILED: Loss = Loss { kind: LossKind::Failed, rank: None };

pub(crate) async fn ranks_come_and_go(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let first = coord.register(rank(0, 2)).await.unwrap();
    let second = coord.register(rank(1, 2)).await.unwrap();
    let both = seen(&mut fleet, |group| group.ranks.len() == 2).await;
    assert_eq!(both.ranks[&rank_id(0)], rank(0, 2));
    assert_eq!(coord.fleet().await.unwrap(), *fleet.borrow());

    first.update(RankState::Loading { percent: 40 }, 1 << 20);
    first.update(RankState::Ready, 2 << 20);
    let ready = seen_rank(&mut fleet, 0, |rank| rank.state == RankState::Ready).await;
    assert_eq!(ready.ranks[&rank_id(0)].memory_bytes, 2 << 20);

    first.close().await.unwrap();
    seen(&mut fleet, |group| group.ranks.len() == 1).await;
    second.close().await.unwrap();
    fleet.wait_for(|fleet| *fleet == Fleet::default()).await.unwrap();

    let stray = RankRecord { group: GroupId("a/b".into()), ..rank(0, 1) };
    assert!(matches!(coord.register(stray).await, Err(CoordError::Name { what: "group", .. })));
}

pub(crate) async fn a_group_is_held_before_it_is_there(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    coord.hold(&group_id(), Some("on trial")).await.unwrap();
    seen(&mut fleet, |group| group.hold.is_some() && group.ranks.is_empty()).await;
    coord.hold(&group_id(), None).await.unwrap();
    fleet.wait_for(|fleet| *fleet == Fleet::default()).await.unwrap();

    coord.hold(&group_id(), Some("on trial")).await.unwrap();
    coord.drain(&group_id(), Duration::ZERO).await.unwrap();
    seen(&mut fleet, |group| group.drain.is_some()).await;
    coord.drained(&group_id()).await.unwrap();
    fleet.wait_for(|fleet| *fleet == Fleet::default()).await.unwrap();
    assert!(matches!(coord.hold(&GroupId("a/b".into()), None).await, Err(CoordError::Name { .. })));
}

pub(crate) async fn one_watch_shows_the_fleets_of_all_clusters(server: Rc<Server>) {
    let hold = async |cluster: &Coord, why| cluster.hold(&group_id(), why).await.unwrap();
    let [first, second] = [server.coord_of("many-1").await, server.coord_of("many-2").await];
    hold(&first, Some("on trial")).await;
    let endpoints = [server.endpoint.clone()];
    let access = EtcdAccess::default();
    let clusters = Clusters::connect_as(&access, &endpoints, Duration::from_secs(5)).await.unwrap();
    let [mut known, mut later] =
        ["many-1", "many-2"].map(|name| clusters.cluster(name).unwrap().watch_fleet());
    seen(&mut known, |group| group.hold.is_some()).await;
    later.changed().await.unwrap(); // the first listing, which shows nothing
    assert_eq!(*later.borrow_and_update(), Fleet::default());
    known.mark_unchanged();
    hold(&second, Some("on trial")).await;
    seen(&mut later, |group| group.hold.is_some()).await;
    assert!(!known.has_changed().unwrap(), "that was another cluster");
    let mut asked_for_late = clusters.cluster("many-3").unwrap().watch_fleet();
    asked_for_late.changed().await.unwrap();
    hold(&second, None).await;
    later.wait_for(|fleet| *fleet == Fleet::default()).await.unwrap();

    let mut routers = clusters.cluster("many-2").unwrap().watch_routers();
    let (counts, records) = watch::channel(RouterRecord { arrivals: 3, ..RouterRecord::default() });
    let telling = tokio::task::spawn_local(async move { second.tell("r-1", records).await });
    routers.wait_for(|told| told.get("r-1").is_some_and(|record| record.arrivals == 3)).await.unwrap();
    assert!(!later.has_changed().unwrap(), "who follows groups is told of none of this");
    drop(counts);
    telling.await.unwrap().unwrap();
    routers.wait_for(|told| told.is_empty()).await.unwrap();
    assert!(clusters.cluster("a/b").is_err());
    drop(clusters);
    while known.changed().await.is_ok() {}
}

pub(crate) async fn routers_tell_what_they_count(server: Rc<Server>) {
    let (coord, mut client) = (server.coord_of("routers").await, wait_for(&server).await);
    let (mut told, mut fleet) = (coord.watch_routers(), coord.watch_fleet());
    fleet.changed().await.unwrap();
    let counted = |arrivals| RouterRecord { arrivals, ..RouterRecord::default() };
    let (counts, records) = watch::channel(counted(3));
    let telling = tokio::task::spawn_local(async move { coord.tell("r-1", records).await });
    told.wait_for(|told| told.get("r-1") == Some(&counted(3))).await.unwrap();
    counts.send_replace(counted(5));
    told.wait_for(|told| told.get("r-1") == Some(&counted(5))).await.unwrap();

    let key = "/galerne/routers/routers/r-1";
    let lease = client.get(key, None).await.unwrap().kvs()[0].lease();
    client.lease_revoke(lease).await.unwrap();
    told.wait_for(|told| told.is_empty()).await.unwrap();
    told.wait_for(|told| told.get("r-1") == Some(&counted(5))).await.unwrap();

    drop(counts);
    telling.await.unwrap().unwrap();
    told.wait_for(|told| told.is_empty()).await.unwrap();
    assert!(!fleet.has_changed().unwrap(), "who follows groups is told of none of this");
    let (_sender, records) = watch::channel(counted(0));
    let stray = server.coord().await.tell("a/b", records).await;
    assert!(matches!(stray, Err(CoordError::Name { what: "router", .. })));
}

pub(crate) async fn what_one_router_bans_all_see_for_a_while(server: Rc<Server>) {
    let [one, other] = [server.coord_of("bans").await, server.coord_of("bans").await];
    let (mut seen, mut fleet) = (other.watch_bans(), other.watch_fleet());
    fleet.changed().await.unwrap();
    let ban = async |digests: &[&str], seconds| {
        let (bans, told) = mpsc::channel(digests.len());
        digests.iter().for_each(|digest| bans.try_send((*digest).to_owned()).unwrap());
        drop(bans);
        one.tell_bans(told, seconds).await;
    };
    ban(&["a/b", "5e"], 1).await;
    seen.wait_for(|banned| banned.contains("5e")).await.unwrap();
    ban(&["5f"], 60).await;
    let only = |digest: &str| BTreeSet::from([digest.to_owned()]);
    seen.wait_for(|banned| *banned == only("5f")).await.unwrap();
    one.watch_bans().wait_for(|banned| *banned == only("5f")).await.unwrap();
    assert!(!fleet.has_changed().unwrap(), "who follows groups is told of none of this");
}

pub(crate) async fn a_rank_that_falls_silent_is_gone(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let silent = coord.register(rank(0, 2)).await.unwrap();
    let _loud = coord.register(rank(1, 2)).await.unwrap();
    seen(&mut fleet, |group| group.ranks.len() == 2).await;
    drop(silent);
    let left = seen(&mut fleet, |group| group.ranks.len() == 1).await;
    assert!(left.ranks.contains_key(&rank_id(1)));
}

pub(crate) async fn a_dead_rank_is_evicted_with_its_groups_health(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let leader = coord.register(rank(0, 2)).await.unwrap();
    let follower = coord.register(rank(1, 2)).await.unwrap();
    let (formed, other) = tokio::join!(leader.form(), follower.form());
    let (formed, other) = (formed.unwrap(), other.unwrap());
    assert_eq!((formed.rank, other.rank), (0, 1));
    assert_eq!((formed.epoch, &formed.record), (other.epoch, &other.record));
    assert_eq!(formed.record.secret.len(), 64);
    leader.declare(health(formed.epoch)).await.unwrap();
    seen(&mut fleet, |group| group.serving().is_some()).await;

    let pid = rank(1, 2).pid;
    assert!(!coord.evict(&group_id(), &rank_id(1), pid + 1).await.unwrap(), "another process");
    drop(follower);
    assert!(coord.evict(&group_id(), &rank_id(1), pid).await.unwrap());
    assert!(!coord.evict(&group_id(), &rank_id(1), pid).await.unwrap(), "it is gone already");
    let group = seen_rank(&mut fleet, 1, |rank| rank.state == RankState::Dead).await;
    assert_eq!(group.health, None);
    assert_eq!(leader.ended(formed.epoch).await, Ended::Dead(rank_id(1)));
}

pub(crate) async fn a_survivor_goes_on_alone_and_the_group_grows_again(server: Rc<Server>) {
    let coord = server.coord().await;
    let first = coord.register(rank(0, 2)).await.unwrap();
    let second = coord.register(rank(1, 2)).await.unwrap();
    let formed = form(&first, &second).await;
    drop(second);
    coord.evict(&group_id(), &rank_id(1), rank(1, 2).pid).await.unwrap();
    first.leave(formed, first.ended(formed).await.loss());
    let alone = first.form().await.unwrap();
    assert_eq!((alone.record.members.len(), alone.record.members[0].shards.clone()), (1, 0..4));

    let second = coord.register(RankRecord { pid: 9_999, ..rank(1, 2) }).await.unwrap();
    let grown = second.form().await.unwrap();
    assert_eq!((grown.rank, grown.record.members.len()), (1, 2));
    assert_eq!(first.ended(alone.epoch).await, Ended::Superseded(grown.epoch));
    let told: Vec<_> =
        grown.record.past.iter().map(|past| (past.epoch, past.ranks, past.loss.to_string())).collect();
    assert_eq!(told, [(formed, 2, "died (host/1)".into()), (alone.epoch, 1, "grown".into())]);
    assert_eq!(grown.record.reformations, [(LossKind::Died, 1), (LossKind::Grown, 1)].into());
}

pub(crate) async fn of_two_proposers_one_wins(server: Rc<Server>) {
    let coord = server.coord().await;
    // Two builds do not mix, so each rank would lead a group of its own.
    let other = RankRecord { build: "other".into(), ..rank(1, 1) };
    let _first = coord.register(rank(0, 1)).await.unwrap();
    let _second = coord.register(other).await.unwrap();
    let (ids, group) = ([rank_id(0), rank_id(1)], group_id());
    let (first, second) =
        tokio::join!(coord.propose(&group, &ids[0], NOW), coord.propose(&group, &ids[1], NOW));
    let won: Vec<_> = first.unwrap().into_iter().chain(second.unwrap()).collect();
    assert_eq!(won.len(), 1);
    assert_eq!(coord.fleet().await.unwrap().groups[&group_id()].epoch.as_ref(), won.first());
    for id in &ids {
        assert_eq!(coord.propose(&group, id, NOW).await.unwrap(), None, "the epoch stands");
    }
}

pub(crate) async fn a_group_forms_again_after_a_restart_and_after_a_leave(server: Rc<Server>) {
    let coord = server.coord().await;
    let first = coord.register(rank(0, 2)).await.unwrap();
    let second = coord.register(rank(1, 2)).await.unwrap();
    let formed = form(&first, &second).await;

    // The second process dies and comes back.
    drop(second);
    let restarted = RankRecord { pid: 9_999, ..rank(1, 2) };
    coord.evict(&group_id(), &rank_id(1), rank(1, 2).pid).await.unwrap();
    let second = coord.register(restarted).await.unwrap();
    assert!(matches!(first.ended(formed).await, Ended::Dead(_)));
    first.leave(formed, Ended::Dead(rank_id(1)).loss());
    let again = form(&first, &second).await;
    assert!(again > formed);

    // It cannot join, and says so.
    second.leave(again, FAILED);
    assert!(matches!(first.ended(again).await, Ended::Left(_)));
    first.leave(again, FAILED);
    assert!(form(&first, &second).await > again);
}

pub(crate) async fn only_the_last_epoch_declares_health(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let leader = coord.register(rank(0, 1)).await.unwrap();
    let old = leader.form().await.unwrap().epoch;
    leader.declare(health(old)).await.unwrap();
    seen(&mut fleet, |group| group.serving().is_some()).await;
    leader.leave(old, FAILED);
    let new = leader.form().await.unwrap().epoch;
    assert!(new > old);
    let refused = leader.declare(health(old)).await;
    assert!(matches!(refused, Err(CoordError::Over { epoch, .. }) if epoch == old), "{refused:?}");
    assert_eq!(coord.fleet().await.unwrap().groups[&group_id()].health, None);
    leader.declare(health(new)).await.unwrap();
    // The view may still be of the old epoch.
    seen(&mut fleet, |group| group.serving().is_some_and(|serving| serving.epoch == new)).await;
    assert_eq!(coord.fleet().await.unwrap().groups[&group_id()].health, Some(health(new)));
    leader.close().await.unwrap();
    seen(&mut fleet, |group| group.health.is_none() && group.ranks.is_empty()).await;
}

pub(crate) async fn a_lost_lease_is_taken_up_again(server: Rc<Server>) {
    let coord = server.coord_of("lost-lease").await;
    let mut fleet = coord.watch_fleet();
    let (_leader, epoch) = leads_alone(&coord, &mut fleet).await;

    let mut client = server.client().await;
    let key = "/galerne/lost-lease/groups/g/ranks/host/0";
    let lease = client.get(key, None).await.unwrap().kvs()[0].lease();
    client.lease_revoke(lease).await.unwrap();
    seen(&mut fleet, |group| group.ranks.is_empty() && group.health.is_none()).await;
    let back = seen(&mut fleet, |group| group.serving().is_some()).await;
    assert_eq!(back.serving().unwrap().epoch, epoch, "the epoch stands, and so does the leader's word");
    assert_eq!(back.ranks.len(), 1);
    assert_ne!(client.get(key, None).await.unwrap().kvs()[0].lease(), lease);
}

/// An etcd that is put back to an earlier state, or that loses its last writes with its power (3.5 before 3.5.5 does when it
/// has one member), holds what is no longer so.
pub(crate) async fn what_etcd_has_lost_is_told_again(server: Rc<Server>) {
    let coord = server.coord_of("lossy").await;
    let mut fleet = coord.watch_fleet();
    let (leader, epoch) = leads_alone(&coord, &mut fleet).await;
    leader.update(RankState::Ready, 7);
    seen_rank(&mut fleet, 0, |rank| rank.memory_bytes == 7).await;

    let mut client = server.client().await;
    client.delete("/galerne/lossy/groups/g/health", None).await.unwrap();
    seen(&mut fleet, |group| group.serving().is_none()).await;
    let back = seen(&mut fleet, |group| group.serving().is_some()).await;
    assert_eq!(back.serving(), Some(&health(epoch)), "it is the same epoch");

    let key = "/galerne/lossy/groups/g/ranks/host/0";
    let lease = client.get(key, None).await.unwrap().kvs()[0].lease();
    let earlier = serde_json::to_vec(&rank(0, 1)).unwrap();
    client.put(key, earlier, Some(PutOptions::new().with_lease(lease))).await.unwrap();
    seen_rank(&mut fleet, 0, |rank| rank.memory_bytes == 0).await;
    seen_rank(&mut fleet, 0, |rank| rank.memory_bytes == 7).await;
    assert_eq!(client.get(key, None).await.unwrap().kvs()[0].lease(), lease, "it stayed registered");
}

pub(crate) async fn who_leads_a_dead_rank_is_not_believed(server: Rc<Server>) {
    let coord = server.coord_of("widow").await;
    let mut fleet = coord.watch_fleet();
    let leader = coord.register(rank(0, 2)).await.unwrap();
    let follower = coord.register(rank(1, 2)).await.unwrap();
    let epoch = form(&leader, &follower).await;
    leader.declare(health(epoch)).await.unwrap();
    drop(follower);
    assert!(coord.evict(&group_id(), &rank_id(1), rank(1, 2).pid).await.unwrap());
    let refused = leader.declare(Health { draining: true, ..health(epoch) }).await;
    assert!(matches!(refused, Err(CoordError::Over { ended: Ended::Dead(_), .. })), "{refused:?}");

    // Nor when it registers anew before it knows.
    drop(leader);
    let leader = coord.register(RankRecord { pid: 9_999, ..rank(0, 2) }).await.unwrap();
    let follower = coord.register(RankRecord { pid: 9_998, ..rank(1, 2) }).await.unwrap();
    let epoch = form(&leader, &follower).await;
    leader.declare(health(epoch)).await.unwrap();
    drop(follower);
    assert!(coord.evict(&group_id(), &rank_id(1), 9_998).await.unwrap());
    let mut client = server.client().await;
    let key = "/galerne/widow/groups/g/ranks/host/0";
    let lease = client.get(key, None).await.unwrap().kvs()[0].lease();
    client.lease_revoke(lease).await.unwrap();
    let there = |group: &Group| group.ranks.contains_key(&rank_id(0));
    seen(&mut fleet, |group| !there(group)).await;
    seen(&mut fleet, there).await;
    leader.update(RankState::Ready, 7);
    seen_rank(&mut fleet, 0, |rank| rank.memory_bytes == 7).await;
    assert_eq!(coord.fleet().await.unwrap().groups[&group_id()].health, None);
}

pub(crate) async fn the_latest_process_holds_the_place(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let early = coord.register(rank(0, 2)).await.unwrap();
    let late = coord.register(RankRecord { pid: 9_999, ..rank(0, 2) }).await.unwrap();
    early.replaced().await;
    assert!(matches!(early.form().await, Err(CoordError::Replaced { .. })));
    early.close().await.unwrap();
    seen_rank(&mut fleet, 0, |rank| rank.pid == 9_999).await;
    late.close().await.unwrap();
}

pub(crate) async fn what_is_not_a_record_is_skipped(server: Rc<Server>) {
    let coord = server.coord_of("garbage").await;
    let mut fleet = coord.watch_fleet();
    let mut client = server.client().await;
    let prefix = "/galerne/garbage/groups/g";
    for key in ["ranks/host/7", "epoch", "health", "else"] {
        client.put(format!("{prefix}/{key}"), "{\"group\":", None).await.unwrap();
    }
    // The garbage of an epoch key does not hinder the next epoch.
    let leader = coord.register(rank(0, 1)).await.unwrap();
    let formed = leader.form().await.unwrap();
    let group = seen(&mut fleet, |group| group.epoch.is_some()).await;
    assert_eq!(group.ranks.keys().collect::<Vec<_>>(), [&rank_id(0)]);
    assert_eq!(group.epoch, Some((formed.epoch, formed.record)));
}

pub(crate) async fn the_fleet_view_survives_compaction(server: Rc<Server>) {
    let coord = server.coord().await;
    let mut fleet = coord.watch_fleet();
    let registration = coord.register(rank(0, 1)).await.unwrap();
    let mut client = server.client().await;
    for percent in 0..50 {
        registration.update(RankState::Loading { percent }, 0);
        let revision = client.put("noise", "", None).await.unwrap().header().unwrap().revision();
        // Another case may have compacted so far already.
        let _ = client.compact(revision, None).await;
        // Each receiver of another handle lists and watches anew.
        assert!(server.coord_of("noise").await.watch_fleet().changed().await.is_ok());
    }
    seen_rank(&mut fleet, 0, |rank| rank.state == RankState::Loading { percent: 49 }).await;
}

pub(crate) async fn a_member_that_is_away_is_passed_over(server: Rc<Server>) {
    let endpoints = [free_address(), server.endpoint.clone()];
    let coord = Coord::connect(&endpoints, "members", Duration::from_secs(4)).await.unwrap();
    let mut fleet = coord.watch_fleet();
    let _leading = leads_alone(&coord, &mut fleet).await;
    for _ in 0..20 {
        assert_eq!(coord.fleet().await.unwrap().groups.len(), 1);
    }
}

pub(crate) async fn the_fleet_view_survives_a_restart(server: Rc<Server>) {
    let coord = server.coord_of("restart").await;
    let mut fleet = coord.watch_fleet();
    let (leader, epoch) = leads_alone(&coord, &mut fleet).await;

    server.restart().await;
    let mut client = wait_for(&server).await;
    let marker = "/galerne/restart/groups/marker/epoch";
    let other = RankRecord { group: GroupId("other".into()), ..rank(0, 1) };
    let key = "/galerne/restart/groups/other/ranks/host/0";
    let lease = client.lease_grant(60, None).await.unwrap().id();
    let value = serde_json::to_vec(&other).unwrap();
    client.put(key, value, Some(PutOptions::new().with_lease(lease))).await.unwrap();
    client.put(marker, "", None).await.unwrap();
    let both = |fleet: &Fleet| {
        fleet.groups.get(&other.group).is_some_and(|group| group.ranks.len() == 1)
            && fleet.groups.get(&group_id()).is_some_and(|group| group.ranks.len() == 1)
    };
    fleet.wait_for(both).await.unwrap();

    // The embedded store has forgotten the epoch, a real etcd has not: both ways the rank serves again.
    let group = coord.fleet().await.unwrap().groups.remove(&group_id()).unwrap_or_default();
    if group.epoch.is_none() {
        assert_eq!(leader.ended(epoch).await, Ended::Forgotten);
        let epoch = leader.form().await.unwrap().epoch;
        leader.declare(health(epoch)).await.unwrap();
    }
    seen(&mut fleet, |group| group.serving().is_some()).await;
}

async fn wait_for(server: &Server) -> Client {
    server.coord().await;
    server.client().await
}

/// A rank that leads a group of its own, which is seen to serve.
async fn leads_alone(coord: &Coord, fleet: &mut watch::Receiver<Fleet>) -> (Registration, Epoch) {
    let leader = coord.register(rank(0, 1)).await.unwrap();
    let epoch = leader.form().await.unwrap().epoch;
    leader.declare(health(epoch)).await.unwrap();
    seen(fleet, |group| group.serving().is_some()).await;
    (leader, epoch)
}

async fn form(first: &Registration, second: &Registration) -> Epoch {
    let (first, second) = tokio::join!(first.form(), second.form());
    let epoch = first.unwrap().epoch;
    assert_eq!(second.unwrap().epoch, epoch);
    epoch
}

/// The case's group once `holds` for it.
pub(crate) async fn seen(fleet: &mut watch::Receiver<Fleet>, holds: impl Fn(&Group) -> bool) -> Group {
    let group = |fleet: &Fleet| fleet.groups.get(&group_id()).cloned().unwrap_or_default();
    group(&fleet.wait_for(|fleet| holds(&group(fleet))).await.unwrap())
}

/// The same for one of its ranks.
async fn seen_rank(
    fleet: &mut watch::Receiver<Fleet>,
    index: u16,
    holds: impl Fn(&RankRecord) -> bool,
) -> Group {
    seen(fleet, |group| group.ranks.get(&rank_id(index)).is_some_and(&holds)).await
}

fn group_id() -> GroupId {
    GroupId("g".into())
}

pub(crate) fn rank_id(index: u16) -> RankId {
    RankId(format!("host/{index}"))
}

pub(crate) fn rank(index: u16, world_size: usize) -> RankRecord {
    RankRecord {
        id: rank_id(index),
        group: group_id(),
        host: "host".into(),
        index,
        address: format!("127.0.0.1:{}", 7000 + index),
        collective: format!("127.0.0.1:{}", 8000 + index),
        pid: 100 + u32::from(index),
        device: "cpu x1".into(),
        build: "test".into(),
        model: card(world_size),
        state: RankState::Waiting,
        memory_bytes: 0,
        ranks_min: 1,
        left: Epoch::default(),
        loss: None,
    }
}

fn card(world_size: usize) -> ModelCard {
    ModelCard {
        name: "model".into(),
        digest: "digest".into(),
        context_tokens_max: 64,
        vocab: 512,
        shards: Shards::new(4, world_size).unwrap(),
        quantize: None,
        compute: Compute::F32,
        kv: KvDtype::F32,
    }
}

fn health(epoch: Epoch) -> Health {
    Health {
        group: group_id(),
        epoch,
        leader: rank(0, 1).address,
        model: card(1),
        kv_blocks: 16,
        sequences_max: 4,
        step_tokens_max: 64,
        draining: false,
    }
}

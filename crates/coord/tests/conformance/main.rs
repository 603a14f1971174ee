//! One suite for the embedded store and for a real etcd: whatever the crate relies on holds for both.
//!
//! The real one is found by `GALERNE_ETCD`, in the workspace's `.cache/bin`, or on the PATH.

#[path = "../../../tls/tests/tls/authority.rs"]
mod authority;
mod coord;
mod etcdctl;
mod kv;
mod lease;
mod secured;
mod server;
mod watch;

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use server::Server;
use tokio::task::LocalSet;
use tokio::time::timeout;

/// Far more than any case takes.
const CASE_DEADLINE: Duration = Duration::from_secs(30);

type Case = (&'static str, fn(Rc<Server>) -> Pin<Box<dyn Future<Output = ()>>>);

macro_rules! cases {
    ($($case:path),* $(,)?) => {
        &[$((stringify!($case), |server| Box::pin($case(server)))),*]
    };
}

/// Cases that count revisions: they have the store for themselves.
const ALONE: &[Case] = cases![
    kv::puts_and_ranges,
    kv::deletes,
    kv::transactions_compare,
    kv::transactions_are_one_revision,
    kv::refusals,
    watch::events_from_now_and_from_the_past,
    watch::what_is_compacted_cannot_be_watched,
    watch::progress_and_cancellation,
    etcdctl::a_curious_person_looks_around,
];

/// Cases that wait, all at once, each with keys of its own.
const TOGETHER: &[Case] = cases![
    lease::grants_and_revocations,
    lease::expiry_is_seen_by_watchers,
    lease::keep_alive_prolongs,
    coord::ranks_come_and_go,
    coord::a_group_is_held_before_it_is_there,
    coord::one_watch_shows_the_fleets_of_all_clusters,
    coord::routers_tell_what_they_count,
    coord::what_one_router_bans_all_see_for_a_while,
    coord::a_rank_that_falls_silent_is_gone,
    coord::a_dead_rank_is_evicted_with_its_groups_health,
    coord::a_survivor_goes_on_alone_and_the_group_grows_again,
    coord::of_two_proposers_one_wins,
    coord::a_group_forms_again_after_a_restart_and_after_a_leave,
    coord::only_the_last_epoch_declares_health,
    coord::a_lost_lease_is_taken_up_again,
    coord::what_etcd_has_lost_is_told_again,
    coord::who_leads_a_dead_rank_is_not_believed,
    coord::the_latest_process_holds_the_place,
    coord::what_is_not_a_record_is_skipped,
    coord::the_fleet_view_survives_compaction,
    coord::a_member_that_is_away_is_passed_over,
];

/// Cases that stop the store.
const RESTARTING: &[Case] = cases![coord::the_fleet_view_survives_a_restart];

#[tokio::test]
async fn the_embedded_store_conforms() {
    conform(Server::embedded().await, Server::embedded().await).await;
}

#[tokio::test]
async fn a_real_etcd_conforms() {
    let (first, second) = tokio::join!(Server::etcd(), Server::etcd());
    conform(first, second).await;
}

async fn conform(steady: Server, restarting: Server) {
    let (steady, restarting) = (Rc::new(steady), Rc::new(restarting));
    let mut failed = Vec::new();
    for case in ALONE {
        failed.extend(run(&[*case], &steady).await);
    }
    let (first, second) = tokio::join!(run(TOGETHER, &steady), run(RESTARTING, &restarting));
    failed.extend(first.into_iter().chain(second));
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// Runs cases at once; the names of those that fail.
async fn run(cases: &[Case], server: &Rc<Server>) -> Vec<&'static str> {
    LocalSet::new()
        .run_until(async {
            let start = |(name, case): &Case| {
                (*name, tokio::task::spawn_local(timeout(CASE_DEADLINE, case(Rc::clone(server)))))
            };
            let mut failed = Vec::new();
            for (name, case) in cases.iter().map(start).collect::<Vec<_>>() {
                if !matches!(case.await, Ok(Ok(()))) {
                    failed.push(name);
                }
            }
            failed
        })
        .await
}

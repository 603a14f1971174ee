//! The operator against the Kubernetes API: of a server in this process, or of the cluster that KUBECONFIG names.
//!
//! Ranks are played: pods need no kubelet that runs containers, only one that says what it would do. `make test-e2e` runs the real
//! processes.

#[path = "../../../tls/tests/tls/authority.rs"]
mod authority;
mod cases;
mod extras;
mod kubelet;
mod link;
mod live;
mod processes;
mod ranks;
mod real;
mod scaled;
mod secured;
mod streams;
mod trouble;
mod world;

use std::time::Duration;

use world::World;

/// So long one case may take.
const CASE_TIMEOUT: Duration = Duration::from_secs(90);

macro_rules! cases {
    ($($of:ident::$case:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let world = World::played(stringify!($case)).await;
            tokio::time::timeout(CASE_TIMEOUT, $of::$case(&world)).await.expect("the case ends in time");
            world.end().await;
        })*
    };
}

cases! {
    cases::a_cluster_comes_up_is_silent_and_goes,
    cases::what_others_change_is_mended,
    cases::an_operator_that_begins_anew_finds_nothing_to_do,
    cases::groups_come_and_go_by_the_scale_subresource,
    cases::a_version_takes_anothers_place_group_by_group,
    cases::a_cordoned_node_is_emptied_without_a_gap,
    cases::a_pod_on_a_lost_node_is_replaced,
    cases::users_errors_are_told_in_a_sentence,
    cases::watches_that_break_are_taken_up_again,
    cases::of_two_operators_one_acts,
    cases::a_cluster_that_sleeps_is_woken_and_tells_its_number,
    cases::routers_are_others_to_scale_until_the_spec_says_another_number,
    cases::where_there_is_no_room_a_version_is_brought_to_nodes_first,
    cases::what_goes_all_at_once_waits_for_what_comes,
    trouble::what_cannot_be_is_refused,
    trouble::what_is_refused_is_told,
    trouble::a_managed_etcd_that_finds_no_room_is_told,
    trouble::without_etcd_nobody_is_ended,
    trouble::what_is_anothers_is_left_alone,
    trouble::a_failed_version_takes_nothing_from_the_one_that_serves,
    extras::a_certificate_is_asked_for_where_there_is_cert_manager,
    extras::groups_are_gangs_where_kubernetes_can_do_that,
}

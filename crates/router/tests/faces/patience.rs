//! How long an answer waits for a group, and how often one is asked.

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_router::RequestLimits;
use galerne_types::Fleet;
use galerne_wire::v1::FinishReason;
use serde_json::json;
use tonic::Status;

use crate::leader::{Act, Leader, gate, losses, token, tokens};
use crate::migration::started;
use crate::stage::{Stage, deserted, group, ids, patiently};

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_request_waits_for_its_group_only_so_long() {
    let leader = Leader::start(vec![losses(u64::MAX)]).await;
    let recovery_s_max = Duration::from_millis(50);
    let stage = Stage::busy(&leader, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
    let reply = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("group_lost")));
}

#[tokio::test]
async fn a_fleet_that_changes_and_brings_no_group_does_not_prolong_the_wait() {
    let leader = Leader::start(vec![Act::Token(token(40)), losses(1)]).await;
    let recovery_s_max = Duration::from_millis(200);
    let stage = Stage::busy(&leader, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
    let ends = patiently(started(&stage, 1).await.rest());
    let changes = async {
        for epoch in 8.. {
            let (id, mut other) = group("g1", epoch, &leader.address);
            other.health.as_mut().unwrap().model.name = "another".to_owned();
            stage.fleet.send_replace(Fleet { groups: BTreeMap::from([(id, other)]) });
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        reply = ends => assert!(reply.body.contains("group_lost"), "{reply:?}"),
        () = changes => unreachable!("it goes on"),
    }
}

#[tokio::test]
async fn the_next_token_is_due_whether_a_group_has_the_request_or_not() {
    let first_token_s_max = Duration::from_millis(700);
    let limits = RequestLimits { first_token_s_max, ..RequestLimits::DEFAULT };
    let slow = Leader::start(vec![Act::Wait(gate())]).await;
    for groups in [BTreeMap::new(), BTreeMap::from([group("g1", 7, &slow.address)])] {
        let leader = Leader::start(vec![Act::Token(token(40)), losses(1)]).await;
        let stage = Stage::busy(&leader, limits.clone()).await;
        let connection = started(&stage, 1).await;
        stage.fleet.send_replace(Fleet { groups });
        let reply = connection.rest().await;
        assert!(reply.body.contains(r#""code":"group_stalled""#), "{reply:?}");
        assert!(reply.body.contains("0.7 s behind token 1 of the answer"), "{reply:?}");
    }
}

#[tokio::test]
async fn a_group_that_is_slow_is_not_silent() {
    let next_token_s_max = Duration::from_secs(2);
    let door = gate();
    let [first, second] = [Act::Token(token(40)), Act::Token(token(41))];
    let waits = Act::Wait(door.clone());
    let script = vec![first, waits.clone(), second, waits, Act::Finish(FinishReason::Stop)];
    let leader = Leader::start(script).await;
    let stage = Stage::busy(&leader, RequestLimits { next_token_s_max, ..RequestLimits::DEFAULT }).await;
    let connection = started(&stage, 1).await;
    for _ in 0..2 {
        tokio::time::sleep(next_token_s_max * 6 / 10).await;
        door.add_permits(1);
    }
    let reply = connection.rest().await;
    assert!(reply.body.contains("[DONE]") && !reply.body.contains("error"), "{reply:?}");
}

/// Its client could have sent it to another router by now. A group that is drained says so at once, and is none of those.
#[tokio::test]
async fn few_leaders_are_tried_that_cannot_be_reached() {
    let good = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let drained = Leader::start(vec![Act::Fail(Status::failed_precondition("drained").into())]).await;
    let nobody = deserted().await;
    for (others, tries, status) in [(&nobody, 2, 200), (&nobody, 3, 503), (&drained.address, 5, 200)] {
        let others = (0..tries).map(|at| group(&format!("g{at}"), 7, others));
        let stage = Stage::set(others.chain([group("h", 7, &good.address)]).collect()).await;
        let reply = stage.post(TEXT, &json!({ "prompt": "x" })).await;
        assert_eq!(reply.status, status, "behind {tries}: {reply:?}");
    }
}

/// Whoever is full gets no storm of questions.
#[tokio::test]
async fn a_replay_that_is_refused_waits_longer_each_time() {
    let leader = Leader::start(vec![Act::Token(token(40)), losses(1)]).await;
    let mut full = Leader::start(vec![Act::Fail(Status::resource_exhausted("1024 wait").into())]).await;
    let stage = Stage::with(&[&leader]).await;
    let connection = started(&stage, 1).await;
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g1", 7, &full.address)]) });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let asked = std::iter::from_fn(|| full.requests.try_recv().ok()).count();
    assert!((1..50).contains(&asked), "{asked} times");
    drop(connection);
}

#[tokio::test]
async fn the_wait_for_a_turn_is_none_for_a_group() {
    let recovery_s_max = Duration::from_millis(600);
    let doors = [gate(), gate()];
    let waits = |at: usize| [Act::Wait(doors[at].clone()), losses(1)];
    let mut first = Leader::start([&[Act::Begin], &waits(0)[..]].concat()).await;
    let mut second = Leader::start(waits(1).to_vec()).await;
    let third = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::busy(&first, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(stage.start(TEXT, &json!({ "prompt": "x" })).await);
        patiently(first.waiting.recv()).await.unwrap();
    }
    let only = |name, leader: &Leader| Fleet { groups: BTreeMap::from([group(name, 7, &leader.address)]) };
    stage.fleet.send_replace(only("g1", &second));
    doors[0].add_permits(1);
    patiently(second.waiting.recv()).await.unwrap(); // one has its turn
    tokio::time::sleep(recovery_s_max).await;
    stage.fleet.send_replace(Fleet { groups: BTreeMap::new() });
    doors[1].add_permits(1);
    tokio::time::sleep(recovery_s_max / 6).await;
    stage.fleet.send_replace(only("g2", &third));
    for connection in open {
        assert_eq!(connection.rest().await.status, 200);
    }
}

/// Group after group is lost on the first that tries it: the others wait for their turn, and for no group for longer than it takes
/// for the next one to come.
#[tokio::test]
async fn a_request_whose_turn_never_comes_waits_anew_after_each_group() {
    const GAP_MS: Duration = Duration::from_millis(400);
    let recovery_s_max = 3 * GAP_MS;
    let door = gate();
    let mut first = Leader::start(vec![Act::Begin, Act::Wait(door.clone()), losses(1)]).await;
    let stage = Stage::busy(&first, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
    let mut open = Vec::new();
    for _ in 0..6 {
        open.push(stage.start(TEXT, &json!({ "prompt": "x" })).await);
    }
    for _ in &open {
        patiently(first.waiting.recv()).await.unwrap();
    }
    let nobody = Fleet { groups: BTreeMap::new() };
    stage.fleet.send_replace(nobody.clone());
    door.add_permits(1);
    for round in 1..=4 {
        tokio::time::sleep(GAP_MS).await;
        let mut next = Leader::start(vec![Act::Wait(gate())]).await;
        let groups = BTreeMap::from([group(&format!("g{round}"), 7, &next.address)]);
        stage.fleet.send_replace(Fleet { groups });
        patiently(next.requests.recv()).await.unwrap();
        stage.fleet.send_replace(nobody.clone());
        next.die();
    }
    let last = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g5", 7, &last.address)]) });
    for connection in open {
        assert_eq!(connection.rest().await.status, 200);
    }
}

/// What no leader has accepted is sent again within a budget: 100 in ten seconds, and one for each ten requests.
#[tokio::test]
async fn retries_are_no_storm() {
    const REQUESTS: usize = 150;
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    leader.lead(8); // so it refuses what is sent in the belief in another epoch
    let mut stage = Stage::busy(&leader, RequestLimits::DEFAULT).await;
    let mut open = Vec::new();
    for _ in 0..REQUESTS {
        open.push(stage.start(TEXT, &json!({ "prompt": "x" })).await);
    }
    patiently(stage.counts.wait_for(|told| told.arrivals == REQUESTS as u64)).await.unwrap();
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &leader.address)]) });
    let mut answered = 0;
    for connection in open {
        answered += usize::from(connection.rest().await.status == 200);
    }
    assert!((100..=115).contains(&answered), "{answered} of {REQUESTS}");
}

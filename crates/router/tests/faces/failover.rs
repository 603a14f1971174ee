//! Groups that are lost, stale, full, incomplete or strangers.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use galerne_router::RequestLimits;
use galerne_types::{Epoch, Fleet, Group, GroupId};
use galerne_wire::v1::{FinishReason, FleetRequest};
use serde_json::json;
use tonic::Status;

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{BARD, Stage, deserted, group, ids, patiently};

const TEXT: &str = "/v1/completions";

/// The state of each group, by the router's own account.
async fn states(stage: &Stage) -> Vec<String> {
    let fleet = stage.client().await.fleet(FleetRequest {}).await.unwrap().into_inner();
    fleet.groups.into_iter().map(|group| group.state).collect()
}

#[tokio::test]
async fn a_leader_that_cannot_be_reached_is_passed_over() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let groups = [group("a-gone", 7, &deserted().await), group("b", 7, &leader.address)];
    let stage = Stage::set(BTreeMap::from(groups)).await;
    for _ in 0..4 {
        let reply = stage.post(TEXT, &json!({ "prompt": [5, 6] })).await;
        assert_eq!(reply.json()["choices"][0]["text"], "Anon");
        assert_eq!(patiently(leader.requests.recv()).await.unwrap().prompt, [5, 6]);
    }
    assert_eq!(states(&stage).await, ["lost", "ready"]);
    let metrics = stage.get("/metrics").await.body;
    assert!(
        metrics.contains(r#"galerne_router_retries_total{model_name="bard",reason="lost"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_leader_that_dies_before_the_first_token_is_replaced() {
    let mut dying = Leader::start(vec![Act::Wait(gate())]).await;
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&dying, &leader]).await;
    let connection = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    patiently(dying.requests.recv()).await.unwrap();
    dying.die();
    assert_eq!(connection.rest().await.json()["choices"][0]["text"], "Anon");
}

#[tokio::test]
async fn a_leader_that_is_drained_is_passed_over_and_blamed_for_nothing() {
    let drained = Status::failed_precondition("this group is drained");
    let mut drains = Leader::start(vec![Act::Fail(drained.into())]).await;
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&drains, &leader]).await;
    for _ in 0..6 {
        assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
    }
    patiently(drains.requests.recv()).await.unwrap();
    assert!(drains.requests.try_recv().is_err(), "it was asked again");
    assert_eq!(states(&stage).await, ["draining", "ready"]);
    let metrics = stage.get("/metrics").await.body;
    for said in [r#"retries_total{model_name="bard",reason="drained"} 1"#, r#"breaker_state{group="g0"} 0"#] {
        assert!(metrics.contains(said), "{metrics}");
    }
    drains.lead(8);
    drains.play(tokens(&ids("Anon"), FinishReason::Stop));
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &drains.address)]) });
    assert_eq!(states(&stage).await, ["ready"]);
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
}

#[tokio::test]
async fn when_all_are_lost_the_client_is_told_to_come_back() {
    let stage = Stage::set(BTreeMap::from([group("g0", 7, &deserted().await)])).await;
    let reply = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((reply.status, &reply.json()["error"]["type"]), (503, &json!("server_error")));
    assert!(reply.head.contains("retry-after: 1"), "{reply:?}");
}

#[tokio::test]
async fn a_request_that_comes_while_the_only_group_forms_anew_is_held_for_it() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::busy(&leader, RequestLimits::DEFAULT).await;
    let (id, whole) = group("g0", 7, &leader.address);
    // Nobody leads: it waits before it is tokenized.
    stage.fleet.send_modify(|fleet| fleet.groups.values_mut().for_each(|group| group.health = None));
    let held = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    let waits = r#"vllm:num_requests_waiting{model_name="bard"}"#;
    patiently(async { while !stage.get("/metrics").await.body.contains(waits) {} }).await;
    let mut counts = stage.counts.clone();
    let held_too = counts.wait_for(|counts| counts.held == 1);
    assert_eq!(patiently(held_too).await.unwrap().arrivals, 0, "it counts when it may go on");
    stage.fleet.send_modify(|fleet| drop(fleet.groups.insert(id.clone(), whole.clone())));
    assert_eq!(held.rest().await.json()["choices"][0]["text"], "Anon");
    assert!(patiently(leader.requests.recv()).await.is_some());

    // Its leader is found dead: it waits for the next one.
    let dead = deserted().await;
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &dead)]) });
    let held = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    patiently(async { while states(&stage).await != ["lost"] {} }).await;
    leader.lead(9);
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 9, &leader.address)]) });
    assert_eq!(held.rest().await.json()["choices"][0]["text"], "Anon");
}

#[tokio::test]
async fn what_comes_is_counted_for_whoever_decides_how_many_groups_there_should_be() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let answer = ids("Anon").len() as u64;
    stage.post(TEXT, &json!({ "prompt": [5, 6, 7], "n": 2 })).await;
    stage.post(TEXT, &json!({ "prompt": [5] })).await;
    stage.post(TEXT, &json!({ "prompt": [5], "temperature": -1 })).await;
    let mut counts = stage.counts.clone();
    let counted = patiently(counts.wait_for(|counts| counts.answers.count == 3)).await.unwrap().clone();
    assert_eq!((counted.arrivals, counted.held), (3, 0), "what could not be is no demand");
    assert_eq!((counted.prompts.count, counted.prompts.sum, counted.prompts.squares), (3, 7, 19));
    assert_eq!((counted.answers.sum, counted.answers.squares), (3 * answer, 3 * answer * answer));
}

#[tokio::test]
async fn a_request_is_held_for_a_group_only_so_long() {
    let leader = Leader::start(Vec::new()).await;
    let hold_s_max = Duration::from_millis(50);
    let stage = Stage::busy(&leader, RequestLimits { hold_s_max, ..RequestLimits::DEFAULT }).await;
    stage.fleet.send_replace(Fleet::default());
    let reply = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("no_group_ready")));
    assert!(reply.head.contains("retry-after: 1"), "{reply:?}");
}

/// A host that was cut off: its lease ends, and when it is back its leader says again what it said before.
#[tokio::test]
async fn a_lost_leader_whose_word_comes_back_is_believed() {
    let address = deserted().await;
    let groups = BTreeMap::from([group("g0", 7, &address)]);
    let stage = Stage::set(groups.clone()).await;
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 503);
    assert_eq!(states(&stage).await, ["lost"]);
    stage.fleet.send_modify(|fleet| fleet.groups.values_mut().for_each(|group| group.health = None));
    assert_eq!(states(&stage).await, ["forming"]);
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    let _leader = Leader::start_at(address.parse().unwrap(), script).await;
    stage.fleet.send_replace(Fleet { groups });
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
}

#[tokio::test]
async fn a_lost_leader_that_answers_again_is_back() {
    let address = deserted().await;
    let stage = Stage::set(BTreeMap::from([group("g0", 7, &address)])).await;
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 503);
    assert_eq!(states(&stage).await, ["lost"]);
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    let _leader = Leader::start_at(address.parse().unwrap(), script).await;
    patiently(async { while states(&stage).await != ["ready"] {} }).await;
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
}

#[tokio::test]
async fn an_answer_whose_group_does_not_come_back_ends_with_one_error() {
    let script = vec![Act::Token(token(ids("Anon")[0])), Act::Wait(gate())];
    let recovery_s_max = Duration::from_millis(100);
    for stream in [true, false] {
        let mut leader = Leader::start(script.clone()).await;
        let stage = Stage::busy(&leader, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
        let connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": stream })).await;
        let token_has_come = r#"vllm:generation_tokens_total{model_name="bard"} 1"#;
        patiently(async { while !stage.get("/metrics").await.body.contains(token_has_come) {} }).await;
        leader.die();
        let reply = connection.rest().await;
        let error = if stream {
            let events = reply.events();
            assert_eq!(events.len(), 2, "a token and an error: {events:?}");
            serde_json::from_str(events[1]).unwrap()
        } else {
            assert_eq!(reply.status, 503);
            reply.json()
        };
        assert_eq!(error["error"]["code"], "group_lost");
        assert!(error["error"]["message"].as_str().unwrap().contains("lost at token 1"), "{error}");
        assert_eq!(states(&stage).await, ["lost"]);
    }
}

#[tokio::test]
async fn a_stale_epoch_is_tried_again_when_the_fleet_has_moved() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    leader.lead(8);
    let stage = Stage::with(&[&leader]).await;
    let connection = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!(patiently(leader.refused.recv()).await, Some(7));
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &leader.address)]) });
    assert_eq!(connection.rest().await.json()["choices"][0]["text"], "Anon");
}

/// A group forms anew and cannot write so, because etcd is away: its leader is there, and leads nothing.
#[tokio::test]
async fn a_leader_that_has_left_its_epoch_gets_no_more_requests_though_it_can_be_reached() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    leader.lead(8);
    let stage = Stage::busy(&leader, RequestLimits::DEFAULT).await;
    let held = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!(patiently(leader.refused.recv()).await, Some(7));
    patiently(async { while states(&stage).await != ["lost"] {} }).await;
    let asked = leader.strangers.load(Relaxed);
    patiently(async {
        while leader.strangers.load(Relaxed) < asked + 4 && states(&stage).await == ["lost"] {}
    })
    .await;
    assert_eq!(states(&stage).await, ["lost"]);
    assert!(leader.refused.try_recv().is_err(), "it was asked again");
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &leader.address)]) });
    assert_eq!(held.rest().await.json()["choices"][0]["text"], "Anon");
}

#[tokio::test]
async fn a_leaders_refusal_keeps_its_meaning() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    for (refusal, status, kind) in [
        (Status::resource_exhausted("1024 requests are waiting already"), 429, "rate_limit_error"),
        (Status::invalid_argument("the request can need 99 KV blocks"), 400, "invalid_request_error"),
        (Status::aborted("too slow"), 408, "invalid_request_error"),
        (Status::internal("a bug"), 500, "server_error"),
    ] {
        leader.play(vec![Act::Fail(refusal.into())]);
        let reply = stage.post(TEXT, &json!({ "prompt": "x", "stream": true })).await;
        assert_eq!((reply.status, &reply.json()["error"]["type"]), (status, &json!(kind)));
        assert_eq!(reply.head.contains("retry-after"), status == 429);
        assert_eq!(states(&stage).await, ["ready"], "a refusal is no loss");
    }
    leader.play(vec![Act::Finish(FinishReason::Error)]);
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 500);
}

#[tokio::test]
async fn only_whole_groups_with_the_right_weights_get_requests() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let (id, whole) = group("g0", 7, &leader.address);
    let stage = Stage::set(BTreeMap::from([(id.clone(), whole.clone())])).await;
    let changed = |change: fn(&mut Group)| {
        let mut group = whole.clone();
        change(&mut group);
        group
    };
    for (group, state, status) in [
        (changed(|g| drop(g.ranks.pop_last())), "ready", 200),
        (changed(|g| g.ranks.first_entry().unwrap().get_mut().pid = 1), "lost", 503),
        (changed(|g| g.ranks.first_entry().unwrap().get_mut().left = Epoch(7)), "lost", 503),
        (changed(|g| g.health.as_mut().unwrap().model.digest = "other".to_owned()), "lost", 503),
        (changed(|g| g.health.as_mut().unwrap().draining = true), "draining", 503),
        (changed(|g| g.health = None), "forming", 503),
        (changed(|g| g.epoch = None), "forming", 503),
        (whole.clone(), "ready", 200),
    ] {
        stage.fleet.send_replace(Fleet { groups: BTreeMap::from([(id.clone(), group)]) });
        assert_eq!(states(&stage).await, [state]);
        assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, status, "{state}");
        let ready = stage.get("/readyz").await;
        assert_eq!(ready.status, status);
        if state == "lost" {
            assert!(
                ready.body.contains("of 2 ranks are up") || ready.body.contains("other weights"),
                "{ready:?}"
            );
        }
    }
}

#[tokio::test]
async fn the_smallest_context_of_the_ready_groups_is_the_models() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let (small, mut record) = group("g1", 7, &leader.address);
    record.health.as_mut().unwrap().model.context_tokens_max = 32;
    let groups: BTreeMap<GroupId, Group> = BTreeMap::from([group("g0", 7, &leader.address), (small, record)]);
    let stage = Stage::set(groups).await;
    assert_eq!(stage.get("/v1/models/bard").await.json()["max_model_len"], 32);
    assert_eq!(stage.post(TEXT, &json!({ "prompt": vec![5; 32] })).await.status, 400);
    assert_eq!(BARD.card.context_tokens_max, 2048);
}

//! Answers that outlive their groups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use galerne_router::RequestLimits;
use galerne_types::{Compute, Epoch, Fleet, Group, GroupId, Shards};
use galerne_wire::v1::{self, FinishReason, GenerateRequest, generate_request::Prompt};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_stream::StreamExt as _;
use tonic::Status;
use vllm_proto::inference_client::InferenceClient;

use crate::leader::{Act, Leader, gate, losses, scored, token, tokens};
use crate::stage::{Connection, Reply, Stage, group, ids, patiently};

const TEXT: &str = "/v1/completions";
const VERSE: &str = "But soft, what light through yonder window breaks?\n";

/// A script whose group is lost so often behind its k-th token.
fn losing(script: &[Act], behind: usize, times: u64) -> Vec<Act> {
    let is_token = |act: &Act| matches!(act, Act::Token(_) | Act::Seeded(_) | Act::Cached(..));
    let mut tokens = 0;
    let at = script.iter().position(|act| {
        tokens += usize::from(is_token(act));
        tokens > behind || !is_token(act) && tokens == behind && matches!(act, Act::Finish(_))
    });
    let mut script = script.to_vec();
    script.insert(at.unwrap(), losses(times));
    script
}

/// Two groups that play the same script, of which each loss makes a new epoch.
struct Pair {
    leaders: [Leader; 2],
    stage: Stage,
    epoch: u64,
}

impl Pair {
    async fn new() -> Self {
        let leaders = [Leader::start(Vec::new()).await, Leader::start(Vec::new()).await];
        let stage = Stage::with(&[&leaders[0], &leaders[1]]).await;
        Self { leaders, stage, epoch: 7 }
    }

    /// Plays a script from now on, in new epochs.
    fn play(&mut self, script: &[Act]) {
        self.epoch += 1;
        for leader in &self.leaders {
            leader.lead(self.epoch);
            leader.play(script.to_vec());
        }
        let groups = ["g0", "g1"].into_iter().zip(&self.leaders);
        let groups = groups.map(|(name, leader)| group(name, self.epoch, &leader.address));
        self.stage.fleet.send_replace(Fleet { groups: groups.collect() });
    }

    /// All requests that came.
    fn requests(&mut self) -> Vec<v1::RunRequest> {
        let requests = self.leaders.iter_mut().map(|leader| &mut leader.requests);
        requests.flat_map(|requests| std::iter::from_fn(|| requests.try_recv().ok())).collect()
    }
}

/// What an answer says that is the same each time: no names and times.
fn said(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    let events = reply.body.split("\n\n").filter_map(|event| event.split_once("data: "));
    let mut said: Vec<Value> = events.filter_map(|(_, data)| serde_json::from_str(data).ok()).collect();
    if said.is_empty() {
        said.push(reply.json());
    }
    said.iter_mut().for_each(forget_names);
    said
}

fn forget_names(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| {
                !["id", "item_id", "created", "created_at", "completed_at"].contains(&&**name)
            });
            fields.values_mut().for_each(forget_names);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_names),
        _ => {}
    }
}

#[tokio::test]
async fn every_face_goes_on_with_the_next_token_wherever_its_group_was_lost() {
    let (verse, mut pair) = (ids(VERSE), Pair::new().await);
    let script = tokens(&verse, FinishReason::Stop);
    let chat = json!({ "messages": [{ "role": "user", "content": "Speak" }], "seed": 3, "logprobs": true, "top_logprobs": 1 });
    let faces = [
        ("/v1/chat/completions", chat.clone()),
        (TEXT, json!({ "prompt": "x", "max_tokens": 64, "seed": 3, "logprobs": 1, "presence_penalty": 0.5 })),
        // Its stop string begins before the loss and ends behind it.
        (TEXT, json!({ "prompt": "x", "seed": 3, "stop": ["what light through"] })),
        ("/v1/responses", json!({ "input": "Speak" })),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "Speak" }], "random_seed": 3 }),
        ),
    ];
    for (path, body) in faces {
        for stream in [true, false] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            pair.play(&script);
            let whole = said(&pair.stage.post(path, &body).await);
            let [sent] = &pair.requests()[..] else { panic!("one request") };
            for behind in [1, 5, verse.len()] {
                pair.play(&losing(&script, behind, 1));
                assert_eq!(said(&pair.stage.post(path, &body).await), whole, "{path} behind {behind}");
                let requests = pair.requests();
                let replayed = requests.iter().find(|request| request.first_index > 0);
                let stopped = body.get("stop").is_some() && behind > 5;
                let Some(replay) = replayed else {
                    assert!(behind == verse.len() || stopped, "{path} behind {behind}");
                    continue;
                };
                let expected = v1::RunRequest {
                    prompt: [&sent.prompt[..], &verse[..behind]].concat(),
                    first_index: behind as u32,
                    sampling: replay.sampling.clone(),
                    id: replay.id,
                    accepted: true,
                    ..sent.clone()
                };
                assert_eq!(*replay, expected);
                let draw = |request: &v1::RunRequest| request.sampling.clone();
                let first = requests.iter().find(|request| request.first_index == 0).unwrap();
                assert_eq!(draw(replay), draw(first), "seed and penalties");
            }
        }
    }
}

#[tokio::test]
async fn grpc_goes_on_with_the_next_token_wherever_its_group_was_lost() {
    let (verse, mut pair) = (ids(VERSE), Pair::new().await);
    let script = tokens(&verse, FinishReason::Length);
    let prompt = v1::TokenIds { ids: vec![5, 6] };
    let ours = GenerateRequest { prompt: Some(Prompt::Tokens(prompt)), ..Default::default() };
    let prompt = vllm_proto::TokenIds { ids: vec![5, 6] };
    let theirs = vllm_proto::GenerateRequest {
        prompt: Some(vllm_proto::generate_request::Prompt::TokenIds(prompt)),
        ..Default::default()
    };
    let mut whole = None;
    for behind in [verse.len() + 1, 1, 5, verse.len()] {
        let script = if behind > verse.len() { script.clone() } else { losing(&script, behind, 1) };
        pair.play(&script);
        let stream = pair.stage.client().await.generate(ours.clone()).await.unwrap().into_inner();
        let deltas: Vec<_> = stream.collect::<Result<_, _>>().await.unwrap();
        pair.play(&script);
        let mut client = InferenceClient::new(pair.stage.channel().await);
        let stream = client.generate_stream(theirs.clone()).await.unwrap().into_inner();
        let chunks: Vec<_> = stream.collect::<Result<_, _>>().await.unwrap();
        assert_eq!(
            *whole.get_or_insert((deltas.clone(), chunks.clone())),
            (deltas, chunks),
            "behind {behind}"
        );
    }
}

#[tokio::test]
async fn each_of_several_choices_goes_on_by_itself() {
    let drawn = [ids("But soft what"), ids("It is the east"), ids("Arise fair sun")];
    let script: Vec<_> =
        (0..3).map(|at| Act::Seeded(drawn.iter().map(|own| token(own[at])).collect())).collect();
    let script = [script, vec![Act::Finish(FinishReason::Stop)]].concat();
    let mut pair = Pair::new().await;
    let body = json!({ "prompt": "x", "n": 3, "seed": 0, "logprobs": 0 });
    pair.play(&script);
    let whole = said(&pair.stage.post(TEXT, &body).await);
    for behind in 0..3 {
        pair.play(&losing(&script, behind, 2));
        assert_eq!(said(&pair.stage.post(TEXT, &body).await), whole, "behind {behind}");
    }
}

#[tokio::test]
async fn a_prompts_scores_are_told_once_and_whole() {
    let mut pair = Pair::new().await;
    let body = json!({ "prompt": [5, 6, 7, 8], "prompt_logprobs": 1, "seed": 1 });
    let script = |lost_while_scoring: u64, lost_behind: u64| {
        vec![
            scored(1, &[6]),
            losses(lost_while_scoring),
            scored(2, &[7, 8]),
            Act::Cached(token(40), 2),
            losses(lost_behind),
            Act::Token(token(41)),
            Act::Finish(FinishReason::Stop),
        ]
    };
    pair.play(&script(0, 0));
    let whole = said(&pair.stage.post(TEXT, &body).await);
    for (scoring, behind) in [(1, 0), (0, 1), (1, 1)] {
        pair.play(&script(scoring, behind));
        assert_eq!(said(&pair.stage.post(TEXT, &body).await), whole);
    }
    let replays: Vec<_> = pair.requests().into_iter().filter(|request| request.first_index > 0).collect();
    assert_eq!(replays.iter().map(|replay| replay.prompt_logprobs).collect::<Vec<_>>(), [None, None]);
}

#[tokio::test]
async fn scores_that_no_prompt_has_are_the_engines_fault() {
    let too_many = [vec![scored(1, &[6]), scored(2, &[7, 8, 9])], vec![scored(2, &[7])]];
    for mut script in too_many {
        script.extend(tokens(&[40], FinishReason::Stop));
        let leader = Leader::start(script).await;
        let stage = Stage::with(&[&leader]).await;
        let reply = stage.post(TEXT, &json!({ "prompt": [5, 6, 7, 8], "prompt_logprobs": 1 })).await;
        assert_eq!(reply.status, 500, "{reply:?}");
        assert!(reply.body.contains("it scored the prompt from token 2 on, out of turn"), "{reply:?}");
    }
}

#[tokio::test]
async fn a_replay_goes_on_in_its_groups_next_epoch() {
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    let leader = Leader::start([&script[..1], &[losses(1)], &script[1..]].concat()).await;
    let stage = Stage::with(&[&leader]).await;
    let connection = started(&stage, 1).await;
    leader.lead(8);
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &leader.address)]) });
    assert_eq!(text(&connection.rest().await), "Anon");
    let metrics = stage.get("/metrics").await.body;
    let moved = r#"galerne_router_stream_migrations_total{model_name="bard",reason="lost"} 1"#;
    assert!(metrics.contains(moved), "{metrics}");
    assert!(
        metrics.contains(r#"galerne_router_stream_stall_seconds_count{model_name="bard"} 1"#),
        "{metrics}"
    );
}

/// A streamed answer of which so many tokens have come.
pub(crate) async fn started(stage: &Stage, tokens: usize) -> Connection {
    let connection = stage.start(TEXT, &json!({ "prompt": [5, 6], "stream": true })).await;
    let come = format!(r#"vllm:generation_tokens_total{{model_name="bard"}} {tokens}"#);
    patiently(async { while !stage.get("/metrics").await.body.contains(&come) {} }).await;
    connection
}

fn text(reply: &Reply) -> String {
    reply.chunks().iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

#[tokio::test]
async fn only_a_group_of_the_same_numerics_goes_on() {
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    let begins = Leader::start(vec![script[0].clone(), losses(1)]).await;
    let goes_on = Leader::start(script).await;
    let stage = Stage::with(&[&begins]).await;
    let connection = started(&stage, 1).await;
    let changes: [fn(&mut Group); 3] = [
        |group| group.health.as_mut().unwrap().model.compute = Compute::Int8,
        |group| group.health.as_mut().unwrap().model.shards = Shards::new(8, 2).unwrap(),
        |group| group.health.as_mut().unwrap().model.shards = Shards::new(4, 1).unwrap(),
    ];
    let leaders = [Leader::start(Vec::new()).await, Leader::start(Vec::new()).await, goes_on];
    let mut groups = BTreeMap::new();
    for ((number, change), leader) in changes.into_iter().enumerate().zip(&leaders) {
        let (id, mut group) = group(&format!("g{}", number + 1), 7, &leader.address);
        change(&mut group);
        groups.insert(id, group);
        stage.fleet.send_replace(Fleet { groups: groups.clone() });
    }
    assert_eq!(text(&connection.rest().await), "Anon");
    let [mut int8, mut other_cut, mut fewer_ranks] = leaders;
    assert!(int8.requests.try_recv().is_err() && other_cut.requests.try_recv().is_err());
    assert_eq!(fewer_ranks.requests.try_recv().unwrap().first_index, 1);
}

#[tokio::test]
async fn a_replay_that_is_refused_is_tried_again() {
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    for refusal in [Status::resource_exhausted("1024 wait"), Status::invalid_argument("no room for 3 tokens")]
    {
        let leader = Leader::start([&script[..1], &[losses(1)]].concat()).await;
        let mut refuses = Leader::start(vec![Act::Fail(refusal.into())]).await;
        let stage = Stage::with(&[&leader]).await;
        let connection = started(&stage, 1).await;
        stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g1", 7, &refuses.address)]) });
        for _ in 0..2 {
            assert_eq!(patiently(refuses.requests.recv()).await.unwrap().first_index, 1);
        }
        refuses.play(script.clone());
        assert_eq!(text(&connection.rest().await), "Anon");
    }
}

/// More of them than may be tried again of what nobody had accepted.
#[tokio::test]
async fn whatever_a_lost_leader_had_accepted_goes_on_at_once() {
    const COUNT: usize = 150;
    let mut dying = Leader::start(vec![Act::Wait(gate())]).await;
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let recovery_s_max = Duration::from_secs(5);
    let stage = Stage::busy(&dying, RequestLimits { recovery_s_max, ..RequestLimits::DEFAULT }).await;
    let mut open = Vec::new();
    for _ in 0..COUNT {
        open.push(stage.start(TEXT, &json!({ "prompt": "x" })).await);
    }
    for _ in 0..COUNT {
        assert!(!patiently(dying.requests.recv()).await.unwrap().accepted);
    }
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g1", 7, &leader.address)]) });
    dying.die();
    for connection in open {
        assert_eq!(connection.rest().await.status, 200);
        assert!(patiently(leader.requests.recv()).await.unwrap().accepted, "it finds a place in any queue");
    }
}

#[tokio::test]
async fn a_client_or_a_router_that_leaves_waits_for_no_group() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), losses(1)]).await;
    let mut stage =
        Stage::with_grace(BTreeMap::from([group("g0", 7, &leader.address)]), Duration::from_millis(1)).await;
    let lost = Fleet { groups: BTreeMap::new() };
    let leaves = started(&stage, 1).await;
    stage.fleet.send_replace(lost.clone());
    drop(leaves);
    let aborted = r#"vllm:request_success_total{model_name="bard",finished_reason="abort"} 1"#;
    patiently(async { while !stage.get("/metrics").await.body.contains(aborted) {} }).await;
    leader.die();

    let again = Leader::start(vec![Act::Token(token(40)), losses(1)]).await;
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &again.address)]) });
    again.lead(8);
    let stays = started(&stage, 2).await;
    stage.fleet.send_replace(lost);
    stage.shut_down();
    let reply = stays.rest().await;
    assert!(reply.events()[1].contains("shutting_down"), "{reply:?}");
}

/// A leader that hangs does not say that it does.
#[tokio::test]
async fn what_runs_in_an_epoch_that_is_over_goes_on_elsewhere() {
    let script = tokens(&ids("Anon"), FinishReason::Stop);
    type Change = fn(&mut BTreeMap<GroupId, Group>, &str);
    let over: [Change; 2] = [
        |groups, _| groups.values_mut().next().unwrap().ranks.last_entry().unwrap().get_mut().left = Epoch(7),
        |groups, other| groups.extend([group("g0", 8, other)]),
    ];
    for change in over {
        let hung = Leader::start(vec![script[0].clone(), Act::Wait(gate())]).await;
        let other = Leader::start(script.clone()).await;
        other.lead(8);
        let mut groups = BTreeMap::from([group("g0", 7, &hung.address)]);
        let stage = Stage::set(groups.clone()).await;
        let connection = started(&stage, 1).await;
        groups.extend([group("g1", 8, &other.address)]);
        // A member whose lease was lost ends nothing.
        groups.values_mut().next().unwrap().ranks.pop_first();
        stage.fleet.send_replace(Fleet { groups: groups.clone() });
        assert_eq!(stage.post(TEXT, &json!({ "prompt": [5], "max_tokens": 1 })).await.status, 200);
        change(&mut groups, &other.address);
        stage.fleet.send_replace(Fleet { groups });
        assert_eq!(text(&connection.rest().await), "Anon");
    }
}

#[tokio::test]
async fn a_leader_whose_lease_was_lost_goes_on_to_take_requests() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let (id, mut whole) = group("g0", 7, &leader.address);
    let stage = Stage::set(BTreeMap::from([(id.clone(), whole.clone())])).await;
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
    whole.health = None;
    whole.ranks.clear();
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([(id, whole)]) });
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
    assert_eq!(stage.get("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_request_on_which_two_groups_were_lost_is_refused_for_a_while() {
    let lost = |begins: bool| {
        let begins = begins.then_some(Act::Begin);
        begins
            .into_iter()
            .chain([losses(1)])
            .chain(tokens(&ids("Anon"), FinishReason::Stop))
            .collect::<Vec<_>>()
    };
    for (begins, status) in [(true, 500), (false, 200)] {
        let leaders = [Leader::start(lost(begins)).await, Leader::start(lost(begins)).await];
        let third = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
        let mut stage = Stage::with(&[&leaders[0], &leaders[1], &third]).await;
        let body = json!({ "prompt": "x" });
        let reply = stage.post(TEXT, &body).await;
        assert_eq!(reply.status, status, "{reply:?}");
        let again = stage.post(TEXT, &body).await;
        assert_eq!(again.status, status, "{again:?}");
        assert_eq!(stage.post(TEXT, &json!({ "prompt": "y" })).await.status, 200, "nobody else's");
        if begins {
            assert_eq!(again.json()["error"]["code"], "request_kills_groups");
            let metrics = stage.get("/metrics").await.body;
            assert!(metrics.contains("galerne_router_banned_requests 1\n"), "{metrics}");
            let other = Stage::with(&[&third]).await; // another router
            assert_eq!(other.post(TEXT, &body).await.status, 200);
            let told = stage.banned.try_recv().unwrap();
            other.bans.send_replace(BTreeSet::from([told, "no digest".to_owned()]));
            let refuses = "galerne_router_banned_requests 1\n";
            patiently(async { while !other.get("/metrics").await.body.contains(refuses) {} }).await;
            assert_eq!(other.post(TEXT, &body).await.json(), again.json());
            assert_eq!(other.post(TEXT, &json!({ "prompt": "y" })).await.status, 200);
        }
        assert!(stage.banned.try_recv().is_err());
    }
}

/// Of several on which a group was lost together each is tried alone; if the next is lost, too, that is because of the one.
#[tokio::test]
async fn requests_that_were_there_when_a_group_was_lost_go_on() {
    let doors = [gate(), gate()];
    let script = |door: &Arc<Semaphore>| vec![Act::Begin, Act::Wait(door.clone()), losses(1)];
    for kills in [false, true] {
        let mut first = Leader::start(script(&doors[0])).await;
        let anon = tokens(&ids("Anon"), FinishReason::Stop);
        let mut second = Leader::start(if kills { script(&doors[1]) } else { anon.clone() }).await;
        let third = Leader::start(anon).await;
        let addresses = [&first, &second, &third].map(|leader| leader.address.clone());
        let fleet = |number: usize| BTreeMap::from([group(&format!("g{number}"), 7, &addresses[number])]);
        let stage = Stage::set(fleet(0)).await;
        let (mut open, count) = (Vec::new(), if kills { 3 } else { 17 });
        for number in 0..count {
            open.push(stage.start(TEXT, &json!({ "prompt": [number] })).await);
        }
        for _ in 0..count {
            patiently(first.waiting.recv()).await.unwrap();
        }
        stage.fleet.send_replace(Fleet { groups: fleet(1) });
        doors[0].add_permits(1);
        if kills {
            patiently(second.waiting.recv()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await; // the others would be there by then
            assert_eq!(std::iter::from_fn(|| second.requests.try_recv().ok()).count(), 1, "alone");
            stage.fleet.send_replace(Fleet { groups: fleet(2) });
            doors[1].add_permits(1);
        }
        let mut statuses = Vec::new();
        for connection in open {
            statuses.push(connection.rest().await.status);
        }
        statuses.sort_unstable();
        assert_eq!(statuses.pop(), Some(if kills { 500 } else { 200 }));
        assert_eq!(statuses, vec![200; count - 1]);
    }
}

#[tokio::test]
async fn a_request_that_gets_on_a_little_outlives_group_after_group() {
    for (lives, begins, each) in [(3, true, 1), (3, true, 16), (8, false, 1)] {
        let gets_on = |from: u32| (from..from + each).map(|id| Act::Token(token(id)));
        let life =
            |from: u32| begins.then_some(Act::Begin).into_iter().chain(gets_on(from)).chain([losses(1)]);
        let script: Vec<_> = (1..=lives).map(|number| 40 * number).flat_map(life).collect();
        let script = [script, tokens(&ids("Anon"), FinishReason::Stop)].concat();
        let mut leaders = Vec::new();
        for _ in 0..=lives {
            leaders.push(Leader::start(script.clone()).await);
        }
        let stage = Stage::with(&leaders.iter().collect::<Vec<_>>()).await;
        let body = json!({ "prompt": "x", "stream": true, "max_tokens": 100 });
        let reply = stage.post(TEXT, &body).await;
        assert!(reply.body.contains("[DONE]") && !reply.body.contains("error"), "{reply:?}");
        let asked = leaders.iter_mut().map(|leader| leader.requests.try_recv()).filter(Result::is_ok).count();
        assert_eq!(asked, 1 + lives as usize);
        assert_eq!(stage.post(TEXT, &body).await.status, 200);
    }
}

/// What it had of those before does not speak for it.
#[tokio::test]
async fn a_request_on_which_groups_are_lost_behind_its_first_tokens_is_refused() {
    let lost_behind = |ids: &[u32]| {
        let told = ids.iter().map(|&id| Act::Token(token(id)));
        [Act::Begin].into_iter().chain(told).chain([losses(1)]).collect::<Vec<_>>()
    };
    let lives = [lost_behind(&[]), lost_behind(&[40, 41, 42]), lost_behind(&[43])].concat();
    let script = [lives, tokens(&ids("Anon"), FinishReason::Stop)].concat();
    let mut leaders = Vec::new();
    for _ in 0..4 {
        leaders.push(Leader::start(script.clone()).await);
    }
    let stage = Stage::with(&leaders.iter().collect::<Vec<_>>()).await;
    let reply = stage.post(TEXT, &json!({ "prompt": "x", "max_tokens": 100 })).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (500, &json!("request_kills_groups")));
}

#[tokio::test]
async fn a_group_that_fails_every_request_gets_no_more_for_a_while() {
    let leader = Leader::start(vec![Act::Fail(Status::internal("a bug").into())]).await;
    let stage = Stage::busy(&leader, RequestLimits::DEFAULT).await;
    let body = json!({ "prompt": "x" });
    for _ in 0..5 {
        assert_eq!(stage.post(TEXT, &body).await.status, 500);
    }
    assert_eq!(stage.post(TEXT, &body).await.status, 503, "it is not held until the group may be tried");
    assert!(stage.get("/metrics").await.body.contains(r#"galerne_router_breaker_state{group="g0"} 1"#));
    leader.play(tokens(&ids("Anon"), FinishReason::Stop));
    patiently(async { while stage.post(TEXT, &body).await.status != 200 {} }).await;
    assert!(stage.get("/metrics").await.body.contains(r#"galerne_router_breaker_state{group="g0"} 0"#));
}

#[tokio::test]
async fn all_that_wait_for_a_group_go_on_when_the_one_that_tries_it_has_succeeded() {
    let mut script = vec![losses(17)];
    script.extend(tokens(&ids("Anon"), FinishReason::Stop));
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let mut open = Vec::new();
    for prompt in ["x", "y", "z"] {
        open.push(stage.start(TEXT, &json!({ "prompt": prompt })).await);
    }
    for connection in open {
        let reply = patiently(connection.rest()).await;
        assert_eq!(reply.status, 200, "{reply:?}");
    }
}

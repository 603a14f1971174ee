//! Requests that are sent again, and answers that are taken up where they broke off.

use std::collections::{BTreeMap, BTreeSet};

use galerne_types::{Compute, Fleet};
use galerne_wire::v1::galerne_client::GalerneClient;
use galerne_wire::v1::{
    self, FinishReason, GenerateRequest, GenerateResponse, TokenIds, generate_request::Prompt,
};
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::leader::{Act, Leader, gate, losses, token, tokens};
use crate::stage::{Connection, Stage, group, ids, patiently};

const TEXT: &str = "/v1/completions";
const VERSE: &str = "But soft, what light through yonder window breaks?\n";

/// A request that its client calls so.
async fn named(stage: &Stage, header: &str, name: &str, body: &Value) -> Connection {
    let body = body.to_string();
    let head = format!("POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}: {name}");
    stage.open(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await
}

#[tokio::test]
async fn a_repeat_takes_the_place_of_the_request_under_way() {
    for stream in [true, false] {
        let waits = vec![Act::Token(token(40)), Act::Wait(gate())];
        let mut leader = Leader::start(waits).await;
        let stage = Stage::with(&[&leader]).await;
        let body = json!({ "prompt": "x", "stream": stream });
        let first = named(&stage, "idempotency-key", "a", &body).await;
        patiently(leader.requests.recv()).await.unwrap();
        let other = named(&stage, "idempotency-key", "b", &body).await;
        patiently(leader.requests.recv()).await.unwrap();
        leader.play(tokens(&ids("Anon"), FinishReason::Stop));
        let repeat = named(&stage, "x-request-id", "a", &body).await;
        patiently(leader.cancelled.recv()).await.unwrap();
        assert_eq!(repeat.rest().await.status, 200);
        let reply = first.rest().await;
        assert!(reply.body.contains(r#""code":"superseded""#), "{reply:?}");
        if !stream {
            assert_eq!(reply.status, 409);
        }
        drop(other);
        patiently(leader.cancelled.recv()).await.unwrap();
    }
}

#[tokio::test]
async fn a_request_that_waits_for_a_group_ends_when_it_is_repeated() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let body = json!({ "prompt": "x", "stream": true });
    let first = named(&stage, "idempotency-key", "a", &body).await;
    patiently(leader.waiting.recv()).await.unwrap();
    stage.fleet.send_replace(Fleet { groups: BTreeMap::new() });
    leader.die();
    let moves = r#"galerne_router_stream_migrations_total{model_name="bard",reason="lost"} 1"#;
    patiently(async { while !stage.get("/metrics").await.body.contains(moves) {} }).await;
    assert_eq!(named(&stage, "idempotency-key", "a", &body).await.rest().await.status, 503);
    let reply = patiently(first.rest()).await;
    assert!(reply.body.contains(r#""code":"superseded""#), "{reply:?}");
}

#[tokio::test]
async fn a_key_stands_for_one_request_and_an_id_for_any() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let body = |prompt| json!({ "prompt": prompt, "stream": true });
    let mut open = Vec::new();
    for (header, prompt) in [("idempotency-key", "x"), ("x-request-id", "y"), ("x-request-id", "z")] {
        open.push(named(&stage, header, "a", &body(prompt)).await);
        patiently(leader.requests.recv()).await.unwrap();
    }
    let refused = named(&stage, "idempotency-key", "a", &body("y")).await.rest().await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (422, &json!("idempotency_key_reused")));
    assert!(leader.cancelled.try_recv().is_err(), "all of them go on");
}

/// So a leader knows a repeat that reaches it by another router, and each of its answers.
#[tokio::test]
async fn a_repeat_is_known_by_the_same_keys_at_every_router() {
    let mut leader = Leader::start(tokens(&[40], FinishReason::Length)).await;
    let mut keys = Vec::new();
    for prompt in ["x", "x", "y"] {
        let stage = Stage::with(&[&leader]).await; // another router each time
        let body = json!({ "prompt": [prompt, prompt], "n": 2 });
        assert_eq!(named(&stage, "idempotency-key", "a", &body).await.rest().await.status, 200);
        let asked = std::iter::from_fn(|| leader.requests.try_recv().ok());
        keys.push(asked.map(|request| request.repeat_key).collect::<BTreeSet<_>>());
    }
    assert!(keys[0] == keys[1] && keys[0].is_disjoint(&keys[2]), "{keys:?}");
    assert!(keys[0].len() == 4 && keys[0].iter().all(|key| key.len() == 32));
    let stage = Stage::with(&[&leader]).await;
    assert_eq!(stage.post(TEXT, &json!({ "prompt": "x" })).await.status, 200);
    assert!(leader.requests.try_recv().unwrap().repeat_key.is_empty());

    leader.play(vec![Act::Fail(Status::cancelled("its client has sent it again").into())]);
    let over = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((over.status, &over.json()["error"]["code"]), (409, &json!("superseded")));
}

/// The one before may be under way there, by another router. A replay may be the one before.
#[tokio::test]
async fn a_named_request_is_told_to_the_other_groups_and_its_replay_is_not() {
    let lost = losses(1);
    let script = || vec![Act::Token(token(40)), lost.clone(), Act::Finish(FinishReason::Stop)];
    let mut leaders = [Leader::start(script()).await, Leader::start(script()).await];
    let stage = Stage::with(&leaders.each_ref()).await;
    let body = json!({ "prompt": "x" });
    assert_eq!(named(&stage, "idempotency-key", "a", &body).await.rest().await.status, 200);
    let asked = leaders
        .each_mut()
        .map(|leader| leader.requests.try_recv().expect("lost by the one, ended by the other"));
    let [first, second] = if asked[0].accepted { [1, 0] } else { [0, 1] };
    assert!(!asked[first].accepted && asked[second].accepted);
    assert_eq!(patiently(leaders[second].superseded.recv()).await.unwrap(), asked[first].repeat_key);
    assert_eq!(stage.post(TEXT, &body).await.status, 200);
    assert!(leaders.iter_mut().all(|leader| leader.superseded.try_recv().is_err()));
}

#[tokio::test]
async fn a_name_gives_the_seed_that_its_client_does_not() {
    let mut leader = Leader::start(tokens(&[40], FinishReason::Length)).await;
    let mut seeds = Vec::new();
    for (name, seed) in [("a", None), ("a", None), ("b", None), ("a", Some(5))] {
        let stage = Stage::with(&[&leader]).await; // another router each time
        let body = json!({ "prompt": "x", "seed": seed });
        assert_eq!(named(&stage, "idempotency-key", name, &body).await.rest().await.status, 200);
        let request = patiently(leader.requests.recv()).await.unwrap();
        seeds.push(request.sampling.unwrap().seed.unwrap());
    }
    assert!(seeds[0] == seeds[1] && seeds[1] != seeds[2] && seeds[3] == 5, "{seeds:?}");
}

#[tokio::test]
async fn a_call_that_is_made_again_ends_the_one_before() {
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let call = |told| {
        let mut call = Request::new(resuming(told));
        call.metadata_mut().insert("idempotency-key", "a".parse().unwrap());
        call
    };
    let mut client = stage.client().await;
    let mut first = client.generate(call(&[])).await.unwrap().into_inner();
    patiently(leader.requests.recv()).await.unwrap();
    leader.play(tokens(&[40, 41], FinishReason::Stop));
    let second = client.generate(call(&[40])).await.unwrap().into_inner();
    assert!(second.collect::<Result<Vec<_>, _>>().await.is_ok());
    patiently(first.next()).await.unwrap().unwrap();
    assert_eq!(patiently(first.next()).await.unwrap().unwrap_err().code(), Code::Aborted);
}

/// Nobody asks for its next token, so nobody there would notice that it is over.
#[tokio::test]
async fn a_call_that_nobody_reads_ends_when_it_is_made_again() {
    let told = [vec![Act::Token(token(40)); 100], vec![Act::Wait(gate())]].concat();
    let mut leader = Leader::start(told).await;
    let stage = Stage::with(&[&leader]).await;
    let call = || {
        let mut call = Request::new(GenerateRequest { max_tokens: Some(200), ..resuming(&[]) });
        call.metadata_mut().insert("idempotency-key", "a".parse().unwrap());
        call
    };
    let narrow =
        Channel::from_shared(format!("http://{}", stage.grpc)).unwrap().initial_stream_window_size(100);
    let mut deaf = GalerneClient::new(narrow.connect().await.unwrap());
    let unread = deaf.generate(call()).await.unwrap();
    patiently(leader.waiting.recv()).await.unwrap();
    leader.play(tokens(&[40, 41], FinishReason::Stop));
    assert!(stage.client().await.generate(call()).await.is_ok());
    patiently(leader.cancelled.recv()).await.unwrap();
    drop(unread);
}

fn resuming(told: &[u32]) -> GenerateRequest {
    let prompt = Prompt::Tokens(TokenIds { ids: vec![5, 6] });
    let resume = (!told.is_empty()).then(|| TokenIds { ids: told.to_vec() });
    let sampling = Some(v1::Sampling { temperature: Some(0.0), ..Default::default() });
    GenerateRequest { prompt: Some(prompt), resume, sampling, ..Default::default() }
}

async fn generate(stage: &Stage, request: GenerateRequest) -> Vec<GenerateResponse> {
    let deltas = stage.client().await.generate(request).await.unwrap().into_inner();
    deltas.collect::<Result<_, _>>().await.unwrap()
}

#[tokio::test]
async fn a_stream_that_broke_off_is_taken_up_at_any_token() {
    let verse = ids(VERSE);
    let mut leader = Leader::start(tokens(&verse, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let asked = |told| GenerateRequest {
        stop: vec!["yonder window".to_owned()],
        max_tokens: Some(verse.len() as u32),
        ..resuming(told)
    };
    let whole = generate(&stage, asked(&[])).await;
    patiently(leader.requests.recv()).await.unwrap();
    let told = whole.iter().flat_map(|delta| &delta.tokens).count();
    for had in 1..told {
        let mut rest = generate(&stage, asked(&verse[..had])).await;
        assert_eq!(std::mem::take(&mut rest[0].numerics), whole[0].numerics);
        assert_eq!(rest, whole[had..], "behind {had}");
        let request = patiently(leader.requests.recv()).await.unwrap();
        assert_eq!((request.first_index as usize, request.prompt.len()), (had, 2 + had));
    }
    let [end] = &generate(&stage, asked(&verse[..told])).await[..] else { panic!("nothing but the end") };
    assert_eq!((end.finish_reason(), end.text.as_str()), (FinishReason::Stop, ""));
    assert_eq!(end.usage.unwrap().completion_tokens as usize, told);
    assert!(leader.requests.try_recv().is_err(), "no leader has anything to do with that");

    let most = GenerateRequest { max_tokens: Some(3), ..resuming(&verse[..3]) };
    assert_eq!(generate(&stage, most.clone()).await.last().unwrap().finish_reason(), FinishReason::Length);
    let ends = |told| GenerateRequest { stop_token_ids: vec![40], ..resuming(told) };
    assert_eq!(generate(&stage, ends(&[41, 40])).await.last().unwrap().finish_reason(), FinishReason::Stop);
    let refused = stage.client().await.generate(ends(&[41, 40, 42])).await.unwrap_err();
    assert!(refused.message().contains("resume has token 40 at 1, which ends an answer"), "{refused}");
    let anon = ids("Anon");
    leader.play(tokens(&anon, FinishReason::Stop));
    let ending = |told, include_stop, stop: &[String]| GenerateRequest {
        stop_token_ids: anon[anon.len() - 1..].to_vec(),
        include_stop,
        stop: stop.to_vec(),
        ..resuming(told)
    };
    let text = |deltas: Vec<GenerateResponse>| deltas.into_iter().map(|delta| delta.text).collect::<String>();
    let without = text(generate(&stage, ending(&[], false, &[])).await);
    let held = ["Anon".strip_prefix(&without).unwrap().to_owned() + "!"];
    for include_stop in [true, false] {
        let whole = generate(&stage, ending(&[], include_stop, &held)).await;
        let rest = generate(&stage, ending(&anon, include_stop, &held)).await;
        assert_eq!(rest.last().unwrap().text, whole.last().unwrap().text, "{include_stop}");
        assert_eq!(text(whole), if include_stop { "Anon" } else { &*without });
    }
    for wrong in [&verse[..4], &[1024]] {
        let request = GenerateRequest { max_tokens: Some(3), ..resuming(wrong) };
        let refused = stage.client().await.generate(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
}

#[tokio::test]
async fn a_stream_is_resumed_only_where_its_tokens_are_the_same() {
    let anon = ids("Anon");
    let mut leader = Leader::start(tokens(&anon, FinishReason::Stop)).await;
    let mut other = Leader::start(tokens(&anon, FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let whole = generate(&stage, resuming(&[])).await;
    patiently(leader.requests.recv()).await.unwrap();
    assert!(whole[1..].iter().all(|delta| delta.numerics.is_empty()), "said once");
    let (id, mut int8) = group("g1", 7, &other.address);
    int8.health.as_mut().unwrap().model.compute = Compute::Int8;
    let fleet = |groups: Vec<_>| Fleet { groups: groups.into_iter().collect() };
    stage.fleet.send_replace(fleet(vec![(id.clone(), int8.clone())]));
    let resume = GenerateRequest { numerics: whole[0].numerics.clone(), ..resuming(&anon[..1]) };
    let nowhere = stage.client().await.generate(resume.clone()).await.unwrap_err();
    assert_eq!(nowhere.code(), Code::Unavailable);
    assert!(nowhere.message().contains("computes as the one did which began this answer"), "{nowhere}");
    stage.fleet.send_replace(fleet(vec![(id, int8), group("g0", 7, &leader.address)]));
    for _ in 0..2 {
        generate(&stage, resume.clone()).await;
        assert_eq!(patiently(leader.requests.recv()).await.unwrap().first_index, 1);
    }
    assert!(other.requests.try_recv().is_err());
    generate(&stage, GenerateRequest { numerics: String::new(), ..resume.clone() }).await;

    let sampled = GenerateRequest { sampling: None, ..resume };
    let refused = stage.client().await.generate(sampled.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("resume needs the seed"), "{refused}");
    let seeded = Some(v1::Sampling { seed: Some(3), ..Default::default() });
    generate(&stage, GenerateRequest { sampling: seeded, ..sampled }).await;
}

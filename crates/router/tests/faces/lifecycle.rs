//! Readers that leave, readers that stall, and routers that stop.

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_wire::v1::{FinishReason, GenerateRequest, TokenIds, generate_request};
use serde_json::json;

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Stage, group, ids, patiently};

const TEXT: &str = "/v1/completions";

fn anon() -> Act {
    Act::Token(token(ids("Anon")[0]))
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let mut leader = Leader::start(vec![anon(), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut streaming = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    streaming.until("data: ").await;
    drop(streaming);
    patiently(leader.cancelled.recv()).await.unwrap();
    patiently(leader.requests.recv()).await.unwrap();

    let whole = stage.start(TEXT, &json!({ "prompt": "x" })).await;
    patiently(leader.requests.recv()).await.unwrap();
    drop(whole);
    patiently(leader.cancelled.recv()).await.unwrap();

    leader.play(vec![Act::Wait(gate())]);
    let waiting = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    patiently(leader.requests.recv()).await.unwrap();
    drop(waiting);
    patiently(leader.cancelled.recv()).await.unwrap();

    leader.play(vec![anon(), Act::Wait(gate())]);
    let prompt = Some(generate_request::Prompt::Tokens(TokenIds { ids: vec![5] }));
    let mut deltas = stage
        .client()
        .await
        .generate(GenerateRequest { prompt, ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    deltas.message().await.unwrap().unwrap();
    drop(deltas);
    patiently(leader.cancelled.recv()).await.unwrap();

    let metrics = stage.get("/metrics").await.body;
    let aborts = r#"vllm:request_success_total{model_name="bard",finished_reason="abort"} 4"#;
    assert!(metrics.contains(aborts), "{metrics}");
    assert!(metrics.contains(r#"vllm:num_requests_running{model_name="bard"} 0"#), "{metrics}");
}

#[tokio::test]
async fn a_reader_that_stalls_is_cut_and_holds_up_no_other() {
    const ENDLESS_TOKENS: usize = 1_000_000;
    let id = ids("Anon")[0];
    let mut leader = Leader::start(vec![anon(); ENDLESS_TOKENS]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut stalled = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    stalled.until("data: ").await;
    leader.play(tokens(&[id; 100], FinishReason::Length));
    let reply = stage.post(TEXT, &json!({ "prompt": "x", "max_tokens": 100 })).await;
    assert_eq!(reply.json()["usage"]["completion_tokens"], 100, "{}", reply.body);
    patiently(leader.cancelled.recv()).await.unwrap();
    let reply = stalled.rest().await;
    assert!(reply.events().last().unwrap().contains("read too slowly"), "{:?}", reply.events().last());
}

#[tokio::test]
async fn running_answers_finish_before_the_router_stops() {
    let wait = gate();
    let script = [vec![anon(), Act::Wait(wait.clone())], tokens(&ids("ymous"), FinishReason::Stop)].concat();
    let leader = Leader::start(script).await;
    let mut stage = Stage::with(&[&leader]).await;
    let mut connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    connection.until("data: ").await;
    stage.shut_down();
    // The listener is closed once a connection is refused; the answer goes on.
    patiently(async { while tokio::net::TcpStream::connect(&stage.http).await.is_ok() {} }).await;
    wait.add_permits(1);
    let reply = connection.rest().await;
    assert_eq!(reply.chunks().last().unwrap()["choices"][0]["finish_reason"], "stop");
    stage.ended().await.unwrap();
}

#[tokio::test]
async fn answers_that_outlast_the_grace_end_with_an_error() {
    let leader = Leader::start(vec![anon(), Act::Wait(gate())]).await;
    let groups = BTreeMap::from([group("g0", 7, &leader.address)]);
    let mut stage = Stage::with_grace(groups, Duration::from_millis(20)).await;
    let mut connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    connection.until("data: ").await;
    stage.shut_down();
    let reply = connection.rest().await;
    assert!(reply.events().last().unwrap().contains("shutting down"), "{reply:?}");
    stage.ended().await.unwrap();
}

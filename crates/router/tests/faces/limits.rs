//! What a connection may take, and what it is told beyond that.

use std::time::Duration;

use galerne_router::ServerLimits;
use galerne_wire::v1::{FinishReason, FleetRequest, GenerateRequest, TokenIds, generate_request};
use serde_json::json;
use tokio::net::TcpStream;
use tonic::Code;

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Stage, ids, patiently};

const TEXT: &str = "/v1/completions";
const SOON: Duration = Duration::from_millis(50);
const GET: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

async fn stage(limits: ServerLimits) -> (Leader, Stage) {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::limited(&leader, limits).await;
    (leader, stage)
}

#[tokio::test]
async fn a_head_that_is_too_long_too_large_or_none_at_all_is_refused_in_words() {
    let limits = ServerLimits { target_bytes_max: 1000, ..ServerLimits::DEFAULT };
    let (_leader, stage) = stage(limits).await;
    let long = "x".repeat(40 << 10);
    let many = "a: b\r\n".repeat(200);
    for (head, status, says) in [
        (
            format!("GET /healthz HTTP/1.1\r\nhost: x\r\ncookie: {long}\r\n\r\n"),
            431,
            "at most 16384 bytes in at most 100",
        ),
        (
            format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n"),
            431,
            "at most 16384 bytes in at most 100",
        ),
        (
            format!("GET /{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", &long[..1000]),
            414,
            "at most 1000 bytes",
        ),
        ("\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), 400, "not HTTP/1.1"),
        ("GET /healthz HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), 400, "not HTTP/1.1"),
    ] {
        let reply = stage.open(&head).await.rest().await;
        assert_eq!(reply.status, status, "{reply:?}");
        let error = &reply.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}

#[tokio::test]
async fn who_is_slow_with_a_request_is_told_so_and_who_sends_none_is_left() {
    let limits = ServerLimits {
        header_s_max: SOON,
        idle_s_max: SOON,
        body_s_max: SOON,
        body_idle_s_max: SOON,
        ..ServerLimits::DEFAULT
    };
    let (_leader, stage) = stage(limits).await;
    let reply = stage.open("GET /healthz HTTP/1.1\r\nhost:").await.rest().await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (408, &json!("header_too_slow")));
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("within 0.05 s"), "{reply:?}");

    assert!(stage.open("").await.all().await.is_empty(), "a connection without a request");
    let twice = format!("{GET}GET /hea");
    let all = String::from_utf8(stage.open(&twice).await.all().await).unwrap();
    assert!(all.starts_with("HTTP/1.1 200"), "{all}");
    let once = String::from_utf8(stage.open(GET).await.all().await).unwrap();
    assert!(
        once.starts_with("HTTP/1.1 200") && once.ends_with("ok\n"),
        "an idle connection is closed: {once}"
    );

    let head = format!("POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{");
    let reply = stage.open(&head).await.rest().await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (408, &json!("body_too_slow")), "{reply:?}");
}

#[tokio::test]
async fn a_connection_that_answers_requests_is_not_idle() {
    let limits = ServerLimits { header_s_max: SOON, idle_s_max: SOON, ..ServerLimits::DEFAULT };
    let wait = gate();
    let script =
        [vec![Act::Token(token(ids("Anon")[0])), Act::Wait(wait.clone())], tokens(&[], FinishReason::Stop)];
    let leader = Leader::start(script.concat()).await;
    let stage = Stage::limited(&leader, limits).await;
    let mut connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    connection.until("data: ").await;
    let prompt = Some(generate_request::Prompt::Tokens(TokenIds { ids: vec![5] }));
    let request = GenerateRequest { prompt, ..Default::default() };
    let mut deltas = stage.client().await.generate(request).await.unwrap().into_inner();
    deltas.message().await.unwrap().unwrap();
    // Another connection's whole idle time passes.
    assert!(stage.open("").await.all().await.is_empty());
    wait.add_permits(2);
    assert_eq!(connection.rest().await.chunks().last().unwrap()["choices"][0]["finish_reason"], "stop");
    while deltas.message().await.unwrap().is_some() {}
}

#[tokio::test]
async fn connections_have_places() {
    let limits = ServerLimits { connections_max: 3, connections_per_peer_max: 2, ..ServerLimits::DEFAULT };
    let (_leader, stage) = stage(limits).await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut connection = stage.open(GET).await;
        connection.until("ok\n").await;
        kept.push(connection);
    }
    let refused = stage.open(GET).await.rest().await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("too_many_connections")));
    assert!(
        refused.head.contains("retry-after: 1") && refused.body.contains("all 2 connections"),
        "{refused:?}"
    );
    // Another address of this machine.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let _third: TcpStream = socket.connect(stage.http.parse().unwrap()).await.unwrap();
    patiently(async {
        while stage.open(GET).await.rest().await.json()["error"]["message"]
            != "all 3 connections are in use: retry later"
        {} // until the third is counted
    })
    .await;
    kept.clear();
    patiently(async { while stage.get("/healthz").await.status != 200 {} }).await;

    let _channels = [stage.channel().await, stage.channel().await];
    let status = stage.client().await.fleet(FleetRequest {}).await.unwrap_err();
    assert!(status.code() != Code::Ok, "{status:?}");
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_cut_and_its_request_cancelled() {
    let limits =
        ServerLimits { write_stall_s_max: SOON, send_buffer_bytes: 4 << 10, ..ServerLimits::DEFAULT };
    let mut leader = Leader::start(vec![Act::Token(token(ids("Anon")[0])); 1_000_000]).await;
    let stage = Stage::limited(&leader, limits).await;
    let mut stalled = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    stalled.until("data: ").await;
    patiently(leader.cancelled.recv()).await.unwrap();
    let read = String::from_utf8(stalled.all().await).unwrap();
    assert!(!read.contains("[DONE]"));

    let prompt = Some(generate_request::Prompt::Tokens(TokenIds { ids: vec![5] }));
    let request = GenerateRequest { prompt, ..Default::default() };
    let mut client = stage.client().await;
    let mut deltas = client.generate(request).await.unwrap().into_inner();
    deltas.message().await.unwrap().unwrap();
    patiently(leader.cancelled.recv()).await.unwrap();
    assert_eq!(
        client.fleet(FleetRequest {}).await.unwrap().into_inner().groups.len(),
        1,
        "only the stream is cut"
    );
}

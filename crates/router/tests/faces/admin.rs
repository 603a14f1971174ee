//! The operator's port.

use galerne_router::RequestLimits;
use galerne_wire::v1::FinishReason;
use serde_json::json;

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Stage, ids, patiently};

const TEXT: &str = "/v1/completions";

fn anon() -> Act {
    Act::Token(token(ids("Anon")[0]))
}

#[tokio::test]
async fn the_operators_port_tells_what_clients_must_not_see() {
    let wait = gate();
    let script = [vec![anon(), Act::Wait(wait.clone())], tokens(&[], FinishReason::Stop)].concat();
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    for path in ["/fleet", "/drain", "/log", "/debug/state", "/debug/memory", "/debug/profile"] {
        assert_eq!(stage.get(path).await.status, 404, "{path} is not public");
        assert_eq!(stage.operate("DELETE", path, "").await.status, 405, "{path} is here");
    }
    let mut connection = stage.start(TEXT, &json!({ "prompt": "planted words", "stream": true })).await;
    connection.until("data: ").await;

    let fleet = stage.operate("GET", "/fleet", "").await.json();
    let seen = &fleet["groups"][0];
    assert_eq!(
        (&seen["name"], &seen["state"], &seen["requests"]),
        (&json!("g0"), &json!("ready"), &json!(1))
    );
    assert_eq!((&seen["ranks"][1]["pid"], &seen["ranks"][1]["shards"]), (&json!(101), &json!([2, 4])));

    let reply = stage.operate("GET", "/debug/state", "").await;
    let state = reply.json();
    let running = &state["requests"]["oldest"][0];
    assert_eq!(state["requests"]["running"], 1);
    assert!(state["connections"]["http"].as_u64().unwrap() >= 1);
    assert_eq!((&running["group"], &running["tokens"]), (&json!("g0"), &json!(1)), "{running}");
    assert_eq!(running["state"], "answering");
    assert!(!reply.body.contains("planted"), "no prompts");

    let memory = stage.operate("GET", "/debug/memory", "").await.json();
    for field in ["rss_bytes", "rss_bytes_peak", "threads", "files"] {
        assert!(memory[field].as_u64().unwrap() > 0, "{field}");
    }
    let profile = stage.operate("GET", "/debug/profile?seconds=1", "").await.json();
    assert!(!profile["threads"].as_array().unwrap().is_empty());
    for wrong in ["61", "0", "soon"] {
        let reply = stage.operate("GET", &format!("/debug/profile?seconds={wrong}"), "").await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("seconds")), "{reply:?}");
    }
    assert_eq!(stage.operate("GET", "/log", "").await.status, 404, "a test has no log");

    wait.add_permits(1);
    connection.rest().await;
    patiently(async {
        while stage.operate("GET", "/debug/state", "").await.json()["requests"]["running"] != 0 {}
    })
    .await;
}

#[tokio::test]
async fn a_web_page_cannot_operate_a_router() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    for header in ["origin: http://evil.example", "sec-fetch-site: cross-site"] {
        let reply = stage.operate("POST", &format!("/drain HTTP/1.1\r\n{header}\r\nx-rest:"), "").await;
        assert_eq!(reply.status, 403, "{reply:?}");
    }
    assert_eq!(stage.get("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_drained_router_finishes_what_it_has_and_ends() {
    let wait = gate();
    let script = [vec![anon(), Act::Wait(wait.clone())], tokens(&[], FinishReason::Stop)].concat();
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let mut connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    connection.until("data: ").await;
    let drain = stage.operate("POST", "/drain", "").await;
    assert_eq!(drain.json(), json!({ "draining": true, "requests": 1 }));
    let refused = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!(refused.status, 503);
    assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
    assert_eq!(stage.get("/readyz").await.json()["missing"], json!(["this router is draining"]));
    assert_eq!(stage.operate("GET", "/readyz", "").await.status, 503);

    assert_eq!(stage.operate("POST", "/undrain", "").await.json()["draining"], false);
    assert_eq!(stage.get("/readyz").await.status, 200);
    stage.operate("POST", "/drain", "").await;
    wait.add_permits(1);
    assert_eq!(connection.rest().await.chunks().last().unwrap()["choices"][0]["finish_reason"], "stop");
    stage.ended().await.unwrap();
}

#[tokio::test]
async fn a_router_works_on_so_many_requests_and_no_more() {
    let leader = Leader::start(vec![anon(), Act::Wait(gate())]).await;
    let stage = Stage::busy(&leader, RequestLimits { requests_max: 1, ..RequestLimits::DEFAULT }).await;
    let mut first = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    first.until("data: ").await;
    let second = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((second.status, &second.json()["error"]["code"]), (429, &json!("overloaded")));
    assert!(
        second.head.contains("retry-after: 1") && second.body.contains("works on 1 requests"),
        "{second:?}"
    );
    drop(first);
    leader.play(tokens(&ids("Anon"), FinishReason::Stop));
    patiently(async { while stage.post(TEXT, &json!({ "prompt": "x" })).await.status != 200 {} }).await;
}

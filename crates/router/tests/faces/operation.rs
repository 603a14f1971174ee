//! What an operator asks: is it up, is it ready, what does it do.

use std::collections::BTreeMap;
use std::future::pending;
use std::time::Duration;

use galerne_router::{
    Gate, GateOptions, Listeners, ModelSource, RequestLimits, RouterError, RouterOptions, RouterTls,
    ServerLimits,
};
use galerne_types::Fleet;
use galerne_wire::v1::FinishReason;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::leader::{Act, Leader, tokens};
use crate::stage::{Stage, group, ids};

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::set(BTreeMap::new()).await;
    assert_eq!(stage.get("/healthz").await.status, 200);
    let reply = stage.get("/readyz").await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.json(), json!({ "ready": false, "missing": ["no rank has registered yet"] }));
    assert_eq!(stage.get("/v1/models").await.json()["data"], json!([]));

    let (id, mut forming) = group("g0", 7, &leader.address);
    forming.health = None;
    forming.ranks.pop_last();
    forming.ranks.first_entry().unwrap().get_mut().state = galerne_types::RankState::Loading { percent: 40 };
    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([(id, forming)]) });
    let missing = stage.get("/readyz").await.json()["missing"][0].as_str().unwrap().to_owned();
    assert_eq!(missing, "group g0 is forming; 1 of 2 ranks are up: host/g0/0 loading 40%");

    stage.fleet.send_replace(Fleet { groups: BTreeMap::from([group("g0", 8, &leader.address)]) });
    assert_eq!(stage.get("/readyz").await.json(), json!({ "ready": true }));
    let models = stage.get("/v1/models").await.json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("bard")));
    assert_eq!(stage.get("/v1/models/bard").await.json(), models["data"][0]);
}

#[tokio::test]
async fn metrics_have_the_names_that_dashboards_expect() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    stage.post("/v1/completions", &json!({ "prompt": [5, 6, 7] })).await;
    let reply = stage.get("/metrics").await;
    assert!(reply.head.contains("content-type: text/plain; version=0.0.4"));
    let tokens = ids("Anon").len();
    for line in [
        r#"vllm:prompt_tokens_total{model_name="bard"} 3"#.to_owned(),
        format!(r#"vllm:generation_tokens_total{{model_name="bard"}} {tokens}"#),
        r#"vllm:request_success_total{model_name="bard",finished_reason="length"} 1"#.to_owned(),
        r#"vllm:time_to_first_token_seconds_count{model_name="bard"} 1"#.to_owned(),
        format!(r#"vllm:inter_token_latency_seconds_count{{model_name="bard"}} {}"#, tokens - 1),
        r#"vllm:e2e_request_latency_seconds_count{model_name="bard"} 1"#.to_owned(),
        r#"vllm:num_requests_running{model_name="bard"} 0"#.to_owned(),
        r#"galerne_groups{state="ready"} 1"#.to_owned(),
    ] {
        assert!(reply.body.lines().any(|have| have == line), "{line} is not in\n{}", reply.body);
    }
}

#[tokio::test]
async fn requests_are_counted_as_vllm_counts_them() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let body = json!({ "prompt": [5, 6, 7], "n": 3, "max_tokens": 9 });
    assert_eq!(stage.post("/v1/completions", &body).await.status, 200);
    leader.play(vec![Act::Fail(tonic::Status::invalid_argument("no").into())]);
    assert_eq!(stage.post("/v1/completions", &body).await.status, 400, "refused by the leader");
    let wrong = json!({ "prompt": [5, 6, 7], "min_tokens": 4000 });
    assert_eq!(stage.post("/v1/completions", &wrong).await.status, 400, "refused by the router");
    let page = stage.get("/metrics").await.body;
    let longest = ids("Anon").len();
    for line in [
        // Every answer counts, and with it its prompt; a request that never ran does not.
        r#"vllm:request_success_total{model_name="bard",finished_reason="length"} 3"#.to_owned(),
        r#"vllm:request_success_total{model_name="bard",finished_reason="error"} 0"#.to_owned(),
        r#"vllm:request_prompt_tokens_sum{model_name="bard"} 9"#.to_owned(),
        r#"vllm:e2e_request_latency_seconds_count{model_name="bard"} 3"#.to_owned(),
        r#"vllm:request_params_max_tokens_sum{model_name="bard"} 27"#.to_owned(),
        r#"vllm:request_params_n_sum{model_name="bard"} 3"#.to_owned(),
        r#"vllm:request_params_n_count{model_name="bard"} 1"#.to_owned(),
        format!(r#"vllm:request_max_num_generation_tokens_sum{{model_name="bard"}} {longest}"#),
    ] {
        assert!(page.lines().any(|have| have == line), "{line} is not in\n{page}");
    }
}

#[tokio::test]
async fn a_router_that_cannot_serve_says_why() {
    let start = async |models| {
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = RouterOptions {
            models,
            shutdown_grace: Duration::ZERO,
            limits: ServerLimits::default(),
            tls: RouterTls::default(),
            gate: Gate::open(GateOptions::default(), &[]).unwrap(),
            requests: RequestLimits::default(),
            log: None,
            tell: |_| {},
            counts: None,
            bans: None,
        };
        let listeners = Listeners { http, grpc, inside: None, admin: None };
        let (_fleet, view) = watch::channel(Fleet::default());
        galerne_router::serve(options, view, listeners, pending()).await.unwrap_err()
    };
    assert!(matches!(start(Vec::new()).await, RouterError::NoModels));
    let nowhere = ModelSource { path: "/nowhere/at-all".into(), name: None, chat_format: None };
    let error = start(vec![nowhere]).await.to_string();
    assert!(error.contains("/nowhere/at-all"), "{error}");
}

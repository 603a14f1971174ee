//! Who is let in, and how much they may use.

use std::path::PathBuf;
use std::sync::Arc;

use galerne_router::{ApiKey, Gate, GateError, GateOptions, key_entry};
use galerne_wire::v1::{FinishReason, FleetRequest, GenerateRequest, TokenIds, generate_request::Prompt};
use serde_json::{Value, json};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::leader::{Act, Leader, gate as closed, token, tokens};
use crate::stage::{Reply, Stage, open, patiently};

/// A key file that a test can change.
pub(crate) struct KeyFile {
    dir: tempfile::TempDir,
}

impl KeyFile {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keys.toml")
    }

    pub(crate) fn write(&self, keys: &[(&str, &ApiKey)], limits: &str) {
        let entry = |(tenant, key): &(&str, &ApiKey)| key_entry(tenant, &key.sha256(), None, false).unwrap();
        let text: String = keys.iter().map(entry).collect();
        std::fs::write(self.path(), text + limits).unwrap();
    }

    pub(crate) fn gate(&self) -> Arc<Gate> {
        let anywhere = [("--http", "0.0.0.0:8000".parse().unwrap())];
        Gate::open(GateOptions { keys: Some(self.path()), no_auth: false }, &anywhere).unwrap()
    }
}

fn request(method: &str, path: &str, key: &str, body: &str) -> String {
    let authorization =
        if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
    let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{authorization}");
    format!("{head}content-length: {}\r\n\r\n{body}", body.len())
}

async fn send(stage: &Stage, method: &str, path: &str, key: &str, body: &str) -> Reply {
    stage.open(&request(method, path, key, body)).await.rest().await
}

async fn complete(stage: &Stage, key: &ApiKey, extra: &Value) -> Reply {
    let mut body = json!({ "model": "bard", "prompt": [1, 2, 3] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    send(stage, "POST", "/v1/completions", key.reveal(), &body.to_string()).await
}

fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

#[tokio::test]
async fn without_a_key_only_health_is_told_over_http() {
    let (file, key) = (KeyFile::new(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "");
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    for (path, status) in
        [("/healthz", 200), ("/readyz", 200), ("/health", 200), ("/v1/models", 401), ("/v2", 401)]
    {
        assert_eq!(stage.get(path).await.status, status, "{path}");
    }
    let asked = json!({ "model": "bard", "prompt": "x" }).to_string();
    let none = send(&stage, "POST", "/v1/completions", "", &asked).await;
    assert_eq!(none.status, 401, "{none:?}");
    assert!(none.head.contains("www-authenticate: bearer realm=\"galerne\"\r\n"), "{none:?}");
    let says = "an API key is needed: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`";
    let error =
        json!({ "message": says, "type": "invalid_request_error", "param": null, "code": "invalid_api_key" });
    assert_eq!(none.json()["error"], error);

    let wrong = send(&stage, "POST", "/v1/completions", ApiKey::random().unwrap().reveal(), &asked).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (401, &json!("invalid_api_key")));
    assert!(wrong.head.contains("error=\"invalid_token\""), "{wrong:?}");
    assert_eq!(send(&stage, "POST", "/v1/completions", key.reveal(), &asked).await.status, 200);
}

#[tokio::test]
async fn without_a_key_only_health_is_told_over_grpc() {
    let (file, key) = (KeyFile::new(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "");
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let (channel, mut client) = (stage.channel().await, stage.client().await);
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();
    let reflection = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::empty()).await;
    assert_eq!(reflection.unwrap_err().code(), Code::Unauthenticated);
    let none = client.fleet(FleetRequest {}).await.unwrap_err();
    assert_eq!(none.code(), Code::Unauthenticated);
    assert_eq!(
        none.message(),
        "an API key is needed: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
    );
    let wrong = client.fleet(with_key(FleetRequest {}, "galerne-0")).await.unwrap_err();
    assert_eq!((wrong.code(), wrong.message()), (Code::Unauthenticated, "this API key is not valid here"));
    client.fleet(with_key(FleetRequest {}, key.reveal())).await.unwrap();
}

#[tokio::test]
async fn a_key_may_stand_in_a_header_of_its_own() {
    let (file, key, other) = (KeyFile::new(), ApiKey::random().unwrap(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "");
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let (right, wrong) = (key.reveal(), other.reveal());
    for (headers, status) in [
        (format!("x-api-key: {right}\r\n"), 200),
        (format!("X-Api-Key: {wrong}\r\n"), 401),
        (format!("authorization: Basic dTpw\r\nx-api-key: {right}\r\n"), 200),
        (format!("authorization: Bearer {wrong}\r\nx-api-key: {right}\r\n"), 401),
        ("x-api-key: \r\n".to_owned(), 401),
    ] {
        let head = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        assert_eq!(stage.open(&head).await.rest().await.status, status, "{headers}");
    }
    for (key, fits) in [(right, true), (wrong, false)] {
        let mut request = Request::new(FleetRequest {});
        request.metadata_mut().insert("x-api-key", key.parse().unwrap());
        assert_eq!(stage.client().await.fleet(request).await.is_ok(), fits);
    }
}

#[tokio::test]
async fn the_engine_learns_whose_request_it_is_and_nothing_more() {
    let (file, keys) = (KeyFile::new(), [(); 3].map(|()| ApiKey::random().unwrap()));
    file.write(&[("acme", &keys[0]), ("acme", &keys[1]), ("other", &keys[2])], "");
    let mut leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let mut tenants = Vec::new();
    for key in &keys {
        assert_eq!(complete(&stage, key, &json!({})).await.status, 200);
        tenants.push(patiently(leader.requests.recv()).await.unwrap().tenant);
    }
    let prompt = Some(Prompt::Tokens(TokenIds { ids: vec![1] }));
    let request = GenerateRequest { prompt, ..Default::default() };
    stage.client().await.generate(with_key(request, keys[0].reveal())).await.unwrap();
    tenants.push(patiently(leader.requests.recv()).await.unwrap().tenant);
    assert_eq!([tenants[1], tenants[3]], [tenants[0], tenants[0]], "both keys and faces are one tenant's");
    assert!(tenants[2] != tenants[0] && !tenants.contains(&0), "{tenants:?}");
}

#[tokio::test]
async fn keys_come_and_go_without_a_restart() {
    let (file, old, new) = (KeyFile::new(), ApiKey::random().unwrap(), ApiKey::random().unwrap());
    file.write(&[("acme", &old)], "");
    let gate = file.gate();
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::behind(&gate, &leader).await;
    let statuses =
        async || [complete(&stage, &old, &json!({})).await, complete(&stage, &new, &json!({})).await];
    assert_eq!(statuses().await.map(|reply| reply.status), [200, 401]);
    file.write(&[("acme", &new)], "");
    assert!(gate.reload().unwrap());
    assert_eq!(statuses().await.map(|reply| reply.status), [401, 200]);
    assert!(!gate.reload().unwrap(), "nothing has changed");
    std::fs::write(file.path(), "[[key]]\ntenant = 7").unwrap();
    let error = gate.reload().unwrap_err().to_string();
    assert!(error.contains("keys.toml are wrong: line 2: invalid type: integer `7`"), "{error}");
    std::fs::remove_file(file.path()).unwrap();
    assert!(gate.reload().unwrap_err().to_string().contains("No such file"));
    assert_eq!(statuses().await.map(|reply| reply.status), [401, 200], "the last good file holds");
}

#[tokio::test]
async fn an_admin_port_that_others_reach_wants_an_operators_key() {
    let (file, client, operator) = (KeyFile::new(), ApiKey::random().unwrap(), ApiKey::random().unwrap());
    file.write(&[("acme", &client)], &key_entry("ops", &operator.sha256(), None, true).unwrap());
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let asked = async |method, path, key| {
        let reply = open(&stage.admin, &request(method, path, key, "")).await.rest().await;
        (reply.status, reply.body)
    };
    for (method, path) in
        [("GET", "/metrics"), ("GET", "/fleet"), ("GET", "/debug/state"), ("POST", "/drain")]
    {
        assert_eq!(asked(method, path, "").await.0, 401, "{path}");
        assert_eq!(asked(method, path, "galerne-wrong").await.0, 401, "{path}");
        let (status, says) = asked(method, path, client.reveal()).await;
        assert!(status == 403 && says.contains("galerne key new --operator"), "{path}: {says}");
    }
    assert_eq!(asked("GET", "/readyz", "").await.0, 200, "whoever balances loads has no key");
    assert_eq!(asked("GET", "/metrics", operator.reveal()).await.0, 200);
    assert_eq!(
        send(&stage, "GET", "/v1/models", operator.reveal(), "").await.status,
        200,
        "it is a tenant's, too"
    );
    assert_eq!(asked("POST", "/drain", operator.reveal()).await.0, 200);
}

#[tokio::test]
async fn requests_beyond_the_limit_are_told_when_to_come_back() {
    let (file, key, free) = (KeyFile::new(), ApiKey::random().unwrap(), ApiKey::random().unwrap());
    let limits = "[tenant.acme]\nrequests_per_minute = 2\ntokens_per_minute = 1000\n";
    file.write(&[("acme", &key), ("free", &free)], limits);
    let leader = Leader::start(tokens(&[5, 6], FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let first = complete(&stage, &key, &json!({ "max_tokens": 500 })).await;
    assert_eq!(first.status, 200, "{first:?}");
    for header in ["limit-requests: 2", "remaining-requests: 1", "limit-tokens: 1000"] {
        assert!(first.head.contains(&format!("x-ratelimit-{header}\r\n")), "{first:?}");
    }
    // 503 tokens were charged ahead, and five are what it took: two such requests fit.
    assert_eq!(complete(&stage, &key, &json!({ "max_tokens": 900 })).await.status, 200);
    let refused = complete(&stage, &key, &json!({})).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    let error = refused.json()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    let says = error["message"].as_str().unwrap();
    assert!(says.starts_with("your limit of 2 requests a minute is used up"), "{says}");
    let after = refused.head.split("retry-after: ").nth(1).unwrap().split("\r\n").next().unwrap();
    assert!((1..=30).contains(&after.parse::<u32>().unwrap()), "{refused:?}");
    assert!(refused.head.contains("x-ratelimit-remaining-requests: 0\r\n"), "{refused:?}");
    let other = complete(&stage, &free, &json!({})).await;
    assert_eq!(other.status, 200, "another tenant is not touched");
    assert!(!other.head.contains("x-ratelimit"), "{other:?}");
    assert_eq!(
        send(&stage, "GET", "/v1/models", key.reveal(), "").await.status,
        200,
        "looking costs nothing"
    );
}

#[tokio::test]
async fn tokens_are_charged_before_and_settled_after() {
    let (file, key) = (KeyFile::new(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "[tenant.acme]\ntokens_per_minute = 600\n");
    let go_on = closed();
    let mut leader =
        Leader::start(vec![Act::Token(token(5)), Act::Wait(go_on.clone()), Act::Finish(FinishReason::Stop)])
            .await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let mut client = stage.client().await;
    let ask = || {
        let prompt = Some(Prompt::Tokens(TokenIds { ids: vec![1, 2, 3] }));
        with_key(GenerateRequest { prompt, max_tokens: Some(400), ..Default::default() }, key.reveal())
    };
    let mut running = client.generate(ask()).await.unwrap().into_inner();
    patiently(leader.requests.recv()).await.unwrap();
    let refused: Status = client.generate(ask()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("600 tokens a minute has no room"), "{refused}");
    go_on.add_permits(2);
    while running.message().await.unwrap().is_some() {}
    drop(running);
    client.generate(ask()).await.unwrap(); // four tokens were used: there is room for 403 again
}

#[tokio::test]
async fn a_prompt_is_charged_once_for_all_its_choices() {
    let (file, key) = (KeyFile::new(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "[tenant.acme]\ntokens_per_minute = 700\n");
    let leader = Leader::start(tokens(&[5], FinishReason::Length)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let mut statuses = Vec::new();
    for choices in [2, 1, 1] {
        let asked = json!({ "prompt": vec![7; 300], "max_tokens": 1, "n": choices, "seed": 3 });
        statuses.push(complete(&stage, &key, &asked).await.status);
    }
    assert_eq!(statuses, [200, 200, 429], "603 of 700 tokens were used");
}

#[tokio::test]
async fn requests_at_once_end_with_their_answers() {
    let (file, key) = (KeyFile::new(), ApiKey::random().unwrap());
    file.write(&[("acme", &key)], "[tenant.acme]\nrequests_at_once = 1\n");
    let script = vec![Act::Token(token(5)), Act::Wait(closed())];
    let mut leader = Leader::start(script).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    let body = json!({ "model": "bard", "prompt": [1], "stream": true }).to_string();
    let head = format!("authorization: Bearer {}\r\ncontent-length: {}", key.reveal(), body.len());
    let stream =
        stage.open(&format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}")).await;
    patiently(leader.requests.recv()).await.unwrap();
    let refused = complete(&stage, &key, &json!({})).await;
    assert_eq!(refused.status, 429);
    assert!(
        refused.json()["error"]["message"].as_str().unwrap().contains("1 requests at once"),
        "{refused:?}"
    );
    drop(stream);
    patiently(leader.cancelled.recv()).await.unwrap();
    leader.play(tokens(&[5], FinishReason::Stop));
    // The leader hears of the end just before the tenant's place is free.
    let again = async {
        while complete(&stage, &key, &json!({})).await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    patiently(again).await;
}

#[test]
fn a_face_that_others_reach_needs_keys_or_a_word() {
    let open = |address: &str, no_auth| {
        Gate::open(GateOptions { keys: None, no_auth }, &[("--grpc", address.parse().unwrap())])
    };
    for loopback in ["127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        assert!(open(loopback, false).is_ok(), "{loopback}");
    }
    for public in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "[::ffff:10.0.0.1]:1"] {
        let error = open(public, false).unwrap_err();
        assert!(
            matches!(error, GateError::Open { .. }) && error.to_string().contains("--api-keys"),
            "{error}"
        );
        assert!(open(public, true).is_ok(), "{public}");
    }
    let missing = GateOptions { keys: Some("/nowhere/keys.toml".into()), no_auth: false };
    assert!(Gate::open(missing, &[]).unwrap_err().to_string().contains("/nowhere/keys.toml"));
}

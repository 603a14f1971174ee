//! A load against a server that says what a test wants.

mod server;

use std::time::Duration;

use galerne_load::{Api, Endpoint, Limits, LoadError, Mode, Options, Progress, TargetOptions};
use galerne_workload::{Arrivals, Law, Length, Pace, Report, Rules, Source, TokenIds, Workload};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use server::{Act, Server, events, plain, stream};

fn options(url: &str, api: Api, mode: Mode, requests_max: usize) -> Options {
    let pace = Some(Pace { arrivals: Arrivals::Constant, rate_per_s: 1000.0 });
    let law = Law { pace, prompt: Length::Fixed(7), output: Length::Fixed(3), prefixes: None };
    Options {
        target: TargetOptions {
            endpoint: Endpoint::parse(url, api).unwrap(),
            model: Some("m".to_owned()),
            api_key: Some("secret".to_owned()),
            tls: None,
            temperature: 0.7,
            ignore_eos: true,
            token_ids: TokenIds { first: 100, last: 199 },
        },
        workload: Workload::new(1, Source::Law(law)),
        mode,
        requests_max,
        duration: Duration::MAX,
        rules: Rules { warm_up: Duration::ZERO, slo: None, slo_share: 1.0, lag_max: None },
        limits: Limits {
            connect_s_max: Duration::from_secs(10),
            request_s_max: Duration::from_secs(60),
            grpc_connections: 1,
        },
    }
}

async fn run(options: Options) -> Result<Report, LoadError> {
    galerne_load::run(options, CancellationToken::new(), watch::channel(Progress::default()).0).await
}

const ONE: Mode = Mode::Closed { concurrency: 1 };

#[tokio::test]
async fn answers_are_counted_and_connections_kept() {
    let server = Server::start(vec![Act::Say(stream())]).await;
    let report = run(options(&server.url, Api::Chat, Mode::Closed { concurrency: 2 }, 10)).await.unwrap();
    assert!(report.valid, "{:?}", report.problems);
    assert_eq!((report.requests.answered, report.requests.failed), (10, 0));
    assert_eq!((report.prompt_tokens, report.output_tokens), (70, 30));
    assert_eq!((report.ttft_ms.count, report.tpot_ms.count, report.e2e_ms.count), (10, 10, 10));
    assert_eq!((report.send_lag_ms, report.generator.in_flight_peak), (None, 2));
    let seen = server.seen.lock().unwrap();
    assert!(seen.connections <= 2, "{} connections", seen.connections);
    let (head, body) = &seen.requests[0];
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("authorization: Bearer secret\r\n"), "{head}");
    assert_eq!(body["messages"][0]["content"].as_str().unwrap().split(' ').count(), 7);
    let expected = serde_json::json!({
        "max_tokens": 3, "temperature": 0.7, "stream": true, "stream_options": {"include_usage": true}, "model": "m",
        "ignore_eos": true,
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&body[name], value, "{name}");
    }
    let mut prompts: Vec<_> = seen.requests.iter().map(|(_, body)| body["messages"].to_string()).collect();
    prompts.sort_unstable();
    prompts.dedup();
    assert_eq!(prompts.len(), 10, "each asks something else");
}

#[tokio::test]
async fn an_open_loop_sends_all_that_is_due() {
    let server = Server::start(vec![Act::Say(stream())]).await;
    let mut options = options(&server.url, Api::Completions, Mode::Open { in_flight_max: 100 }, 50);
    options.rules.lag_max = Some(Duration::from_secs(60));
    options.rules.warm_up = Duration::from_micros(10_500); // a request each millisecond
    let report = run(options).await.unwrap();
    assert!(report.valid, "{:?}", report.problems);
    assert_eq!((report.requests.warm_up, report.requests.answered), (10, 40));
    assert_eq!(report.send_lag_ms.unwrap().count, 40);
    let seen = server.seen.lock().unwrap();
    let ids = seen.requests[0].1["prompt"].as_array().unwrap();
    assert!(ids.len() == 7 && ids.iter().all(|id| (100..200).contains(&id.as_u64().unwrap())), "{ids:?}");
}

#[tokio::test]
async fn failures_are_told_apart() {
    let token = "{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}";
    let lost = "{\"error\":{\"message\":\"the group was lost\"}}";
    let refused = "{\"error\":{\"message\":\"slow down\"}}";
    let server = Server::start(vec![
        Act::Say(plain("429 Too Many Requests", "application/json", refused)),
        Act::Say(plain("503 Service Unavailable", "text/plain", "nobody is here")),
        Act::Say(plain("200 OK", "application/json", "{}")),
        Act::Cut(events(&[token])),
        Act::Say(events(&[token, lost]) + "0\r\n\r\n"),
        Act::Say(events(&[token, "not JSON"]) + "0\r\n\r\n"),
        Act::Cut(events(&[token]) + "0\r\n\r\n"),
        Act::Say(stream()),
    ]);
    let server = server.await;
    let report = run(options(&server.url, Api::Chat, ONE, 8)).await.unwrap();
    assert_eq!((report.requests.answered, report.requests.failed), (1, 7));
    let errors: Vec<_> = report.errors.iter().map(|(kind, errors)| (&**kind, errors.count)).collect();
    assert_eq!(errors, [("429", 1), ("broken", 2), ("http 503", 1), ("protocol", 2), ("stream", 1)]);
    assert_eq!(report.errors["429"].example, "slow down");
    assert_eq!(report.errors["http 503"].example, "nobody is here");
    assert_eq!(report.errors["stream"].example, "the group was lost");
    assert!(report.errors["protocol"].example.contains("no stream of events"), "{:?}", report.errors);
}

#[tokio::test]
async fn a_server_that_closes_after_each_answer_is_asked_on_new_connections() {
    let closing = stream().replacen("\r\n", "\r\nconnection: close\r\n", 1);
    let server = Server::start(vec![Act::Cut(closing)]).await;
    let report = run(options(&server.url, Api::Chat, ONE, 5)).await.unwrap();
    assert_eq!((report.requests.answered, report.requests.failed), (5, 0), "{:?}", report.errors);
    assert_eq!(server.seen.lock().unwrap().connections, 5);
}

#[tokio::test]
async fn a_request_has_a_deadline_and_a_run_an_end() {
    let server = Server::start(vec![Act::Hang]).await;
    let mut hanging = options(&server.url, Api::Chat, ONE, 1);
    hanging.limits.request_s_max = Duration::from_millis(50);
    let report = run(hanging).await.unwrap();
    assert_eq!(report.errors["late"].count, 1);
    assert!(!report.valid && report.problems[0].contains("no request that counts was answered"));

    let stop = CancellationToken::new();
    let (progress, mut seen) = watch::channel(Progress::default());
    let stops = stop.clone();
    tokio::spawn(async move {
        seen.wait_for(|progress| progress.open == 1).await.unwrap();
        stops.cancel();
    });
    let report = galerne_load::run(options(&server.url, Api::Chat, ONE, 9), stop, progress).await.unwrap();
    assert_eq!((report.requests.unfinished, report.requests.counted), (1, 0));
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_told_before_the_run() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for scheme in ["http", "grpc"] {
        let error =
            run(options(&format!("{scheme}://{free}"), Api::Chat, ONE, 1)).await.unwrap_err().to_string();
        assert!(error.contains(&format!("nobody answers at {free}")) && error.contains("refused"), "{error}");
    }
    let error = run(options(&format!("https://{free}"), Api::Chat, ONE, 1)).await.unwrap_err().to_string();
    assert!(error.contains("--tls-ca"), "{error}");
}

//! Spans of real processes at a real OTLP receiver, and what must not be in them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use crate::process::{self, Process};
use crate::setup::{self, Cluster};

/// The client's own span.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// Something that must not be found anywhere.
const SECRET: &str = "PlantedSecret0815";

/// The receiver, and the spans that it has received.
pub(crate) struct Receiver(Process);

impl Receiver {
    fn start() -> (Self, String) {
        Self::start_with(&mut setup::python("otlp_receiver.py"))
    }

    pub(crate) fn start_with(command: &mut Command) -> (Self, String) {
        let process = Process::start(command);
        let line = process.line_with("receives on ");
        (Self(process), line.rsplit(' ').next().expect("an address").to_owned())
    }

    pub(crate) fn spans(&self) -> Vec<Value> {
        self.0.output().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for the span of that name in the client's trace: its children were exported before, or come soon.
    fn named(&self, name: &str) -> Value {
        let found = || self.spans().into_iter().find(|span| span["name"] == name && span["trace"] == TRACE);
        process::eventually(name, found)
    }
}

/// Posts `body` with more lines of header; the whole answer.
pub(crate) fn post(http: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    exchange(
        http,
        &format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{headers}\r\n{body}"
        ),
    )
}

/// Gets `path`; the whole answer, whose body is in one piece.
pub(crate) fn get(http: &str, path: &str) -> String {
    exchange(http, &format!("GET {path} HTTP/1.0\r\nhost: x\r\n\r\n"))
}

fn exchange(http: &str, request: &str) -> String {
    let address = http.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("a server that answers");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn traceparent(sampled: bool) -> String {
    format!("traceparent: 00-{TRACE}-{CLIENT}-0{}\r\n", u8::from(sampled))
}

#[test]
fn one_trace_joins_client_router_leader_and_every_ranks_steps() {
    const TOKENS: u64 = 5;
    let (receiver, endpoint) = Receiver::start();
    let flags = ["--tp", "2", "--threads", "1", "--trace-ratio", "0", "--otlp-endpoint", &endpoint];
    let cluster = Cluster::up(&setup::bard(), &flags);
    let body = json!({ "model": "bard-1m", "prompt": [1, 40, 50], "max_tokens": TOKENS, "ignore_eos": true });
    let ask = |headers: &str| post(&cluster.http, "/v1/completions", headers, &body.to_string());
    for (headers, why) in
        [(String::new(), "nobody asked"), (traceparent(false), "its client does not want it")]
    {
        assert!(ask(&headers).starts_with("HTTP/1.1 200"), "{why}");
    }
    assert!(ask(&traceparent(true)).starts_with("HTTP/1.1 200"));

    let parent_of = |span: &Value| span["parent"].clone();
    let server = receiver.named("POST /v1/completions");
    assert_eq!((parent_of(&server), &server["kind"]), (json!(CLIENT), &json!(2)), "{server}");
    assert_eq!(server["attributes"]["http.response.status_code"], 200);
    assert_eq!(server["resource"]["service.name"], "galerne-router");
    assert_eq!(parent_of(&receiver.named("tokenize")), server["id"]);
    let generate = receiver.named("generate bard-1m");
    assert_eq!(parent_of(&generate), server["id"]);
    let attributes = &generate["attributes"];
    assert_eq!(attributes["gen_ai.request.model"], "bard-1m");
    assert_eq!(attributes["gen_ai.usage.input_tokens"].as_u64(), Some(3), "{generate}");
    assert_eq!(attributes["gen_ai.usage.output_tokens"].as_u64(), Some(TOKENS));
    assert_eq!(attributes["gen_ai.response.finish_reasons"], "length");
    let sent = receiver.named("run");
    assert_eq!((parent_of(&sent), &sent["kind"]), (generate["id"].clone(), &json!(3)), "{sent}");

    let run = receiver.named("engine.run");
    assert_eq!(
        (parent_of(&run), &run["resource"]["service.name"]),
        (sent["id"].clone(), &json!("galerne-worker"))
    );
    let phases = ["queue", "prefill", "decode"].map(|name| receiver.named(name));
    for (one, next) in phases.iter().zip(&phases[1..]) {
        assert_eq!((parent_of(one), parent_of(next)), (run["id"].clone(), run["id"].clone()));
        assert!(one["end_ns"].as_u64() >= next["start_ns"].as_u64(), "{one} goes over into {next}");
    }
    let numbers = |rank: u64| {
        let spans = receiver.spans().into_iter().filter(|span| span["name"] == "step");
        let steps = spans.filter(|step| step["attributes"]["galerne.rank"] == rank);
        steps
            .map(|step| {
                assert_eq!((parent_of(&step), &step["trace"]), (run["id"].clone(), &json!(TRACE)));
                assert!(
                    step["resource"]["service.instance.id"]
                        .as_str()
                        .expect("a name")
                        .ends_with(&rank.to_string())
                );
                step["attributes"]["galerne.step"].as_u64().expect("a number")
            })
            .collect::<Vec<_>>()
    };
    let steps = process::eventually("steps of both ranks", || {
        let (first, second) = (numbers(0), numbers(1));
        (first.len() as u64 >= TOKENS && first.len() == second.len()).then_some((first, second))
    });
    assert_eq!(steps.0, steps.1, "both ranks ran the same steps");
    let strange = |span: &Value| span["trace"] != TRACE && span["name"] != "group.form";
    let strangers: Vec<_> = receiver.spans().into_iter().filter(strange).collect();
    assert!(strangers.is_empty(), "only the request that asked for it is traced: {strangers:?}");
}

#[test]
fn a_group_that_forms_is_a_span_that_says_why() {
    let (receiver, endpoint) = Receiver::start();
    let flags = ["--tp", "2", "--threads", "1", "--trace-ratio", "0", "--otlp-endpoint", &endpoint];
    let cluster = Cluster::up(&setup::bard(), &flags);
    let formed = |count: usize| {
        let spans = || receiver.spans().into_iter().filter(|span| span["name"] == "group.form");
        let last = process::eventually("spans of a group", || spans().nth(count - 1));
        assert_eq!(last["status"], 1, "it serves: {last}");
        last["attributes"].clone()
    };
    let first = formed(1);
    assert_eq!((&first["galerne.ranks"], &first["galerne.reformation.reason"]), (&json!(2), &Value::Null));
    process::send(cluster.rank_pids()[1], libc::SIGKILL);
    let second = formed(2);
    assert_eq!(second["galerne.reformation.reason"], "died", "{second}");
    assert!(second["galerne.epoch"].as_u64() > first["galerne.epoch"].as_u64(), "{first} {second}");
}

#[test]
fn a_collector_that_is_away_holds_up_nobody() {
    let endpoint = format!("http://127.0.0.1:{}", setup::free_port());
    let mut cluster =
        Cluster::up(&setup::bard(), &["--threads", "1", "--trace-ratio", "1", "--otlp-endpoint", &endpoint]);
    assert_eq!(cluster.greedy(&[1, 40, 50], 20).expect("an answer").len(), 20);
    cluster.process.line_with("the collector takes no spans");
    cluster.process.signal(libc::SIGTERM);
    let status = cluster.process.exit_within(process::PATIENCE);
    assert!(status.success(), "{}", cluster.process.output());
}

#[test]
fn no_prompt_and_no_key_reaches_logs_spans_or_errors() {
    let (receiver, endpoint) = Receiver::start();
    let flags = [
        "--tp",
        "2",
        "--threads",
        "1",
        "--log",
        "trace",
        "--log-format",
        "json",
        "--otlp-endpoint",
        &endpoint,
    ];
    let cluster = Cluster::up(&setup::bard(), &flags);
    let headers = format!("authorization: Bearer {SECRET}\r\nx-api-key: {SECRET}\r\n{}", traceparent(true));
    let chat = json!([{ "role": "user", "content": SECRET }]);
    let wrong_type = json!({ "prompt": SECRET, "max_tokens": 3, "temperature": SECRET });
    let bodies = [
        ("/v1/completions", json!({ "prompt": SECRET, "max_tokens": 3, "stop": [SECRET], "user": SECRET })),
        (
            "/v1/completions",
            json!({ "prompt": SECRET, "max_tokens": 3, "stream": true, "metadata": { "x": SECRET } }),
        ),
        ("/v1/chat/completions", json!({ "messages": chat, "max_tokens": 3 })),
        ("/v1/completions", json!({ "prompt": SECRET, "max_tokens": 0 })),
        ("/v1/completions", wrong_type),
    ];
    for (path, body) in &bodies {
        let answer = post(&cluster.http, path, &headers, &body.to_string());
        let refused = !answer.starts_with("HTTP/1.1 200");
        assert!(!refused || !answer.contains(SECRET), "an error repeats what was sent: {answer}");
    }
    let cut = format!("{{\"prompt\": \"{SECRET}");
    let answer = post(&cluster.http, "/v1/completions", &headers, &cut);
    assert!(!answer.contains(SECRET), "{answer}");
    let mut request = tonic::Request::new(setup::request(&[1, 40, 50], 3));
    request.metadata_mut().insert("authorization", format!("Bearer {SECRET}").parse().expect("a value"));
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{CLIENT}-01").parse().expect("a value"));
    setup::block_on(async {
        let mut stream =
            setup::client(&cluster.grpc).await.generate(request).await.expect("taken").into_inner();
        while stream.message().await.expect("no error").is_some() {}
    });
    receiver.named("galerne.v1.Galerne/Generate");
    receiver.named("POST /v1/chat/completions");
    for (what, text) in [("logs", cluster.process.output()), ("spans", receiver.0.output())] {
        let lines: Vec<_> = text.lines().filter(|line| line.contains(SECRET)).collect();
        assert!(lines.is_empty(), "{what}: {}", lines[..lines.len().min(5)].join("\n"));
    }
    let log = cluster.process.output();
    let json = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    assert!(
        json.filter(|line| line["level"] == "TRACE").count() > 0,
        "the log is JSON, at trace level:\n{log}"
    );
}

//! Ten thousand malformed requests from a seed, beside a stream that must not notice.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use galerne_router::ServerLimits;
use galerne_wire::v1::FinishReason;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Stage, ids, patiently};

const REQUESTS: u64 = 10_000;
const GRPC_REQUESTS: u64 = 500;
const AT_ONCE: usize = 128;
const STREAM_TOKENS: usize = 100;

/// Memory that may stay with the allocator after all of them.
const GROWTH_BYTES_MAX: u64 = 96 << 20;

/// SplitMix64.
struct Seed(u64);

impl Seed {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

const PATHS: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/%ff%00",
    "/healthz",
    "/readyz",
    "/../../etc/passwd",
    "/v1/nothing?a=%",
];

const FIELDS: [&str; 24] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "stop_token_ids",
    "min_tokens",
    "best_of",
    "echo",
    "presence_penalty",
    "\u{fffd}",
];

/// A value that is not what its field wants, most of the time; not always JSON.
fn value(seed: &mut Seed) -> Vec<u8> {
    let deep = |open: &str, count: usize| open.repeat(count).into_bytes();
    match seed.below(16) {
        0 => b"null".to_vec(),
        1 => b"-1e999".to_vec(),
        2 => vec![b'9'; 1 + seed.below(400)],
        3 => deep("[", 1 + seed.below(50_000)),
        4 => [deep("[", 2_000), deep("]", 2_000)].concat(),
        5 => deep("{\"a\":", 1 + seed.below(10_000)),
        6 => [b"\"".to_vec(), seed.bytes(40), b"\"".to_vec()].concat(),
        7 => b"\"\\ud800\"".to_vec(),
        8 => format!("\"{}\"", "x".repeat(seed.below(20_000))).into_bytes(),
        9 => b"[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]".to_vec(),
        10 => b"{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":7}}}".to_vec(),
        11 => b"true".to_vec(),
        12 => b"-0.0000000000000000000000000000000001".to_vec(),
        13 => b"18446744073709551616".to_vec(),
        14 => b"NaN".to_vec(),
        _ => b"[1, \"a\", null, {}]".to_vec(),
    }
}

fn body(seed: &mut Seed) -> Vec<u8> {
    let size = seed.below(200);
    match seed.below(8) {
        0 => seed.bytes(size),
        1 => value(seed),
        _ => {
            let mut out = b"{\"prompt\":\"x\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]".to_vec();
            for _ in 0..1 + seed.below(3) {
                out.extend(format!(",\"{}\":", seed.of(&FIELDS)).bytes());
                out.extend(value(seed));
            }
            out.push(b'}');
            if seed.below(6) == 0 {
                let end = seed.below(out.len());
                out.truncate(end);
            }
            out
        }
    }
}

/// The bytes of a request, and whether the client ends its side after them.
fn request(seed: &mut Seed) -> (Vec<u8>, bool) {
    let method =
        seed.of(&["POST", "POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "P\u{e9}T", ""]);
    let path = seed.of(&PATHS);
    let version = seed.of(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "junk"]);
    let head = format!("{method} {path} {version}\r\nhost: x\r\nconnection: close\r\n");
    let body = body(seed);
    let whole = |head: &str, headers: &str, body: &[u8]| {
        [head.as_bytes(), headers.as_bytes(), b"\r\n", body].concat()
    };
    let length = format!("content-length: {}\r\n", body.len());
    let junk = seed.below(400);
    let out = match seed.below(24) {
        0 => seed.bytes(junk),
        1 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        2 => [b"\x16\x03\x01\x02\x00".to_vec(), seed.bytes(junk)].concat(), // TLS
        3 => whole(&head, &format!("content-length: {}\r\n", body.len() + 10), &body), // slow, or cut
        4 => whole(&head, "content-length: 99999999999999999999999\r\n", &body),
        5 => whole(&head, &format!("{length}content-length: 3\r\n"), &body),
        6 => whole(&head, "transfer-encoding: chunked\r\n", b"5\r\nhello\r\nzz\r\n"),
        7 => whole(&head, "transfer-encoding: chunked\r\n", b"fffffffffffffffff\r\nx"),
        8 => whole(&head, &format!("transfer-encoding: chunked\r\n{length}"), &body),
        9 => whole(&head, &format!("cookie: {}\r\n", "y".repeat(seed.below(40_000))), &body),
        10 => whole(&head, &"a: b\r\n".repeat(seed.below(300)), &body),
        11 => whole(&head, "no colon\r\n", &body),
        12 => head.into_bytes()[..seed.below(20)].to_vec(), // slow
        13 => whole(&head, "content-length: 1\r\n", &body), // the rest is pipelined junk
        14 => whole(&head, &format!("expect: 100-continue\r\n{length}"), &body),
        _ => whole(&head, &length, &body),
    };
    (out, seed.below(12) == 0)
}

/// Sends it, and reads what comes to the end.
async fn send(address: &str, bytes: &[u8], cut: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    let (mut read, mut write) = stream.split();
    let sent = async {
        let _ = write.write_all(bytes).await; // a refusal may come before the end
        if cut {
            let _ = write.shutdown().await;
        }
    };
    let _ = patiently(async { tokio::join!(sent, read.read_to_end(&mut answer)) }).await;
    answer
}

async fn counts(stage: &Stage) -> (u64, u64, u64) {
    let state = stage.operate("GET", "/debug/state", "").await.json();
    let of = |face: &str| state["connections"][face].as_u64().unwrap();
    (of("http"), of("grpc"), state["requests"]["running"].as_u64().unwrap())
}

async fn memory(stage: &Stage, field: &str) -> u64 {
    stage.operate("GET", "/debug/memory", "").await.json()[field].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_malformed_requests_harm_nobody() {
    const SLOW: Duration = Duration::from_millis(150);
    let limits = ServerLimits {
        header_s_max: SLOW,
        body_s_max: SLOW,
        body_idle_s_max: SLOW,
        idle_s_max: Duration::from_secs(5),
        ..ServerLimits::DEFAULT
    };
    let wait = gate();
    let text = ids("Anon")[0];
    let mut script = vec![Act::Token(token(text))];
    script.extend((1..STREAM_TOKENS).flat_map(|_| [Act::Wait(wait.clone()), Act::Token(token(text))]));
    script.push(Act::Finish(FinishReason::Length));
    let leader = Leader::start(script).await;
    let stage = Stage::limited(&leader, limits).await;
    let beside =
        json!({ "prompt": "x", "max_tokens": STREAM_TOKENS, "stream": true, "return_token_ids": true });
    let mut beside = stage.start("/v1/completions", &beside).await;
    beside.until("data: ").await;
    leader.play(tokens(&ids("Anon"), FinishReason::Stop));
    let files = memory(&stage, "files").await;
    let rss = memory(&stage, "rss_bytes").await;

    let statuses = stream::iter(0..REQUESTS).map(|number| {
        let (stage, wait) = (&stage, &wait);
        async move {
            if number % (REQUESTS / STREAM_TOKENS as u64) == 0 {
                wait.add_permits(1);
            }
            let (bytes, cut) = request(&mut Seed(number));
            let answer = send(&stage.http, &bytes, cut).await;
            let says = String::from_utf8_lossy(&answer[..answer.len().min(200)]).into_owned();
            assert!(answer.is_empty() || says.starts_with("HTTP/1."), "seed {number}: {says}");
            assert!(!says[says.len().min(8)..].starts_with(" 5"), "seed {number}: {says}");
            answer.is_empty()
        }
    });
    let silent =
        statuses.buffer_unordered(AT_ONCE).filter(|silent| std::future::ready(*silent)).count().await;
    assert!(silent < REQUESTS as usize / 4, "{silent} requests got no word");

    let grpc: SocketAddr = stage.grpc.parse().unwrap();
    let garbage = stream::iter(0..GRPC_REQUESTS).map(|number| async move {
        let mut seed = Seed(!number);
        let size = seed.below(2_000);
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let junk = seed.bytes(size);
        let bytes = if number % 2 == 0 { junk } else { [&preface[..], &junk].concat() };
        send(&grpc.to_string(), &bytes, true).await;
    });
    garbage.buffer_unordered(AT_ONCE).count().await;

    assert_eq!(stage.get("/readyz").await.status, 200);
    wait.add_permits(STREAM_TOKENS);
    let chunks = beside.rest().await.chunks();
    let told: Vec<_> =
        chunks.iter().flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap().clone()).collect();
    assert_eq!(told, vec![json!(text); STREAM_TOKENS], "the stream beside them has all of its tokens");
    patiently(async { while counts(&stage).await != (0, 0, 0) {} }).await;
    patiently(async { while memory(&stage, "files").await > files {} }).await;
    let grown = memory(&stage, "rss_bytes").await.saturating_sub(rss);
    assert!(grown <= GROWTH_BYTES_MAX, "memory grew by {grown} bytes");
}

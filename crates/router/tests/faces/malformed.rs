//! Ten thousand malformed requests from a seed, beside a stream that must not notice.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use galerne_router::ServerLimits;
use galerne_wire::v1::FinishReason;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::calls;
use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Stage, ids, patiently};

const REQUESTS: u64 = 10_000;
const CALLS: u64 = 3_000;
const CALLERS: u64 = 16;
const GARBAGE: u64 = 500;
const AT_ONCE: usize = 128;
const STREAM_TOKENS: usize = 100;

/// Time that a request may take.
const SLOW: Duration = Duration::from_millis(150);

/// Pieces in which a slow one is sent: their time exceeds that.
const DRIPS: usize = 4;

/// Memory that may stay with the allocator after all of them.
const GROWTH_BYTES_MAX: u64 = 96 << 20;

/// SplitMix64.
pub(crate) struct Seed(u64);

impl Seed {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// What POST routes want, and other paths.
const PATHS: [(&str, &str); 14] = [
    ("/v1/chat/completions", "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"),
    ("/v1/chat/completions", "\"messages\":[{\"role\":\"assistant\",\"content\":\"x\",\"prefix\":true}]"),
    ("/v1/completions", "\"prompt\":\"x\""),
    ("/v1/completions", "\"prompt\":[[5],[6]]"),
    ("/v1/responses", "\"input\":\"x\""),
    ("/v1/responses", "\"input\":[{\"role\":\"user\",\"content\":\"x\"}]"),
    ("/v1/fim/completions", "\"prompt\":\"x\""),
    ("/v1/agents/completions", "\"messages\":[]"),
    ("/tokenize", "\"prompt\":\"x\""),
    ("/detokenize", "\"tokens\":[5]"),
    ("/v1/models/%ff%00", ""),
    ("/healthz", ""),
    ("/../../etc/passwd", ""),
    ("/v1/nothing?a=%", ""),
];

const FIELDS: [&str; 48] = [
    "model",
    "messages",
    "prompt",
    "input",
    "tokens",
    "suffix",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "random_seed",
    "safe_prompt",
    "stop",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "text",
    "include",
    "metadata",
    "instructions",
    "reasoning",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "chat_template_kwargs",
    "truncate_prompt_tokens",
    "return_token_strs",
    "stop_token_ids",
    "min_tokens",
    "best_of",
    "echo",
    "presence_penalty",
    "continue_final_message",
    "\u{fffd}",
];

/// A value that is not what its field wants, most of the time; not always JSON.
pub(crate) fn value(seed: &mut Seed) -> Vec<u8> {
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

/// A body of which `good` is what its route wants.
fn body(seed: &mut Seed, good: &str) -> Vec<u8> {
    let size = seed.below(200);
    match seed.below(8) {
        0 => seed.bytes(size),
        1 => value(seed),
        _ => {
            let mut out = format!("{{\"return_token_ids\":false,{good}").into_bytes();
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

/// How a client sends.
#[derive(Clone, Copy)]
enum Pace {
    /// All at once, and then it waits.
    Plain,
    /// All at once, and then it ends its side.
    Cut,
    /// A piece now and then.
    Drip,
}

/// The bytes of a request, and how they are sent.
fn request(seed: &mut Seed) -> (Vec<u8>, Pace) {
    let method =
        seed.of(&["POST", "POST", "POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "P\u{e9}T", ""]);
    let (path, good) = seed.of(&PATHS);
    let version = seed.of(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "junk"]);
    let head = format!("{method} {path} {version}\r\nhost: x\r\nconnection: close\r\n");
    let body = body(seed, good);
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
    let pace = match seed.below(24) {
        0 | 1 => Pace::Cut,
        2 => Pace::Drip,
        _ => Pace::Plain,
    };
    (out, pace)
}

/// Sends it, and reads what comes to the end.
async fn send(address: &str, bytes: &[u8], pace: Pace) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    let (mut read, mut write) = stream.split();
    // A refusal may come before the end.
    let sent = async {
        match pace {
            Pace::Plain => write.write_all(bytes).await,
            Pace::Cut => {
                write.write_all(bytes).await?;
                write.shutdown().await
            }
            Pace::Drip => {
                for piece in bytes.chunks(bytes.len().div_ceil(DRIPS).max(1)) {
                    write.write_all(piece).await?;
                    tokio::time::sleep(SLOW / 2).await;
                }
                Ok(())
            }
        }
    };
    let _ = patiently(async { tokio::join!(sent, read.read_to_end(&mut answer)) }).await;
    answer
}

/// What is in use: connections of both faces, requests, bytes of bodies, prompts at work, requests at the group.
async fn in_use(stage: &Stage) -> [u64; 6] {
    let state = stage.operate("GET", "/debug/state", "").await.json();
    let fleet = stage.operate("GET", "/fleet", "").await.json();
    [
        &state["connections"]["http"],
        &state["connections"]["grpc"],
        &state["requests"]["running"],
        &state["bodies"]["bytes"],
        &state["tokenizing"],
        &fleet["groups"][0]["requests"],
    ]
    .map(|count| count.as_u64().unwrap())
}

async fn memory(stage: &Stage, field: &str) -> u64 {
    stage.operate("GET", "/debug/memory", "").await.json()[field].as_u64().unwrap()
}

/// Lets the stream beside them go on, half of it over so many requests.
fn go_on(wait: &Semaphore, number: u64, of: u64) {
    if number.is_multiple_of(of / (STREAM_TOKENS as u64 / 2)) {
        wait.add_permits(1);
    }
}

/// Bytes that are no HTTP/2 at the gRPC face.
async fn garbage(stage: &Stage) {
    let sent = stream::iter(0..GARBAGE).map(|number| async move {
        let mut seed = Seed(!number);
        let size = seed.below(2_000);
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let junk = seed.bytes(size);
        let bytes = if number % 2 == 0 { junk } else { [&preface[..], &junk].concat() };
        send(&stage.grpc, &bytes, Pace::Cut).await;
    });
    sent.buffer_unordered(AT_ONCE).count().await;
}

/// Calls with wrong messages there.
async fn broken_calls(stage: &Stage, wait: &Semaphore) {
    let connections = stream::iter(0..CALLERS).map(|caller| async move {
        let sender = calls::connect(stage).await;
        let numbers = stream::iter((caller..CALLS).step_by(CALLERS as usize));
        let made = numbers.map(|number| {
            let mut sender = sender.clone();
            async move {
                go_on(wait, number, CALLS);
                calls::make_broken(&mut sender, number).await;
            }
        });
        made.buffer_unordered(AT_ONCE / CALLERS as usize).count().await;
    });
    connections.buffer_unordered(CALLERS as usize).count().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_malformed_requests_harm_nobody() {
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
            go_on(wait, number, REQUESTS);
            let (bytes, pace) = request(&mut Seed(number));
            let answer = send(&stage.http, &bytes, pace).await;
            let says = String::from_utf8_lossy(&answer[..answer.len().min(200)]).into_owned();
            assert!(answer.is_empty() || says.starts_with("HTTP/1."), "seed {number}: {says}");
            assert!(!says[says.len().min(8)..].starts_with(" 5"), "seed {number}: {says}");
            answer.is_empty()
        }
    });
    let silent =
        statuses.buffer_unordered(AT_ONCE).filter(|silent| std::future::ready(*silent)).count().await;
    assert!(silent < REQUESTS as usize / 4, "{silent} requests got no word");

    garbage(&stage).await;
    broken_calls(&stage, &wait).await;

    assert_eq!(stage.get("/readyz").await.status, 200);
    let chunks = beside.rest().await.chunks();
    let told: Vec<_> =
        chunks.iter().flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap().clone()).collect();
    assert_eq!(told, vec![json!(text); STREAM_TOKENS], "the stream beside them has all of its tokens");
    patiently(async { while in_use(&stage).await != [0; 6] {} }).await;
    patiently(async { while memory(&stage, "files").await > files {} }).await;
    let grown = memory(&stage, "rss_bytes").await.saturating_sub(rss);
    assert!(grown <= GROWTH_BYTES_MAX, "memory grew by {grown} bytes");
}

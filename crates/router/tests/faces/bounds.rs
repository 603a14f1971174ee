//! What requests may take of a router: beyond each limit, on each face, the answer says the limit.

use std::time::Duration;

use galerne_router::{RequestLimits, ServerLimits};
use galerne_wire::v1::{
    Chat, ChatMessage, FinishReason, GenerateRequest, Grammar, TokenIds, generate_request::Prompt, grammar,
};
use galerne_wire::vllm::grpc::engine as smg;
use galerne_wire::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;
use vllm_proto::inference_client::InferenceClient;

use crate::calls::{self, Call, Manner};
use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{Connection, Reply, Stage, ids, patiently};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const FIM: &str = "/v1/fim/completions";
const SOON: Duration = Duration::from_millis(50);

fn small() -> RequestLimits {
    RequestLimits {
        prompts_max: 2,
        choices_max: 3,
        prompt_tokens_max: 64,
        answer_tokens_max: 10,
        stop_strings_max: 1,
        stop_string_bytes_max: 3,
        grammar_bytes_max: 20,
        messages_max: 2,
        tools_max: 1,
        ..RequestLimits::DEFAULT
    }
}

fn turns(count: usize) -> Value {
    vec![json!({ "role": "user", "content": "x" }); count].into()
}

fn asked() -> GenerateRequest {
    GenerateRequest { prompt: Some(Prompt::Tokens(TokenIds { ids: vec![5] })), ..Default::default() }
}

#[tokio::test]
async fn requests_beyond_a_limit_are_told_which_over_http() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::busy(&leader, small()).await;
    let tool = json!({ "type": "function", "function": { "name": "f" } });
    let flat = json!({ "type": "function", "name": "f" });
    let long = "a".repeat(21);
    let schema = json!({ "type": "json_schema", "json_schema": { "schema": { "title": long } } });
    let chat = || json!({ "messages": turns(1) });
    let text = || json!({ "prompt": "x" });
    let input = || json!({ "input": "x" });
    for (path, mut body, field, value, says) in [
        (TEXT, text(), "prompt", json!(["a", "b", "c"]), "prompts must be at most 2, not 3"),
        (TEXT, json!({ "n": 2 }), "prompt", json!(["a", "b"]), "must be at most 3, not 4"),
        (TEXT, text(), "n", json!(4), "n must be from 1 to 3, not 4"),
        (TEXT, text(), "best_of", json!(4), "best_of must be from 1 to 3, not 4"),
        (TEXT, text(), "prompt", json!(vec![5; 65]), "prompt must have at most 64 tokens"),
        (TEXT, text(), "max_tokens", json!(11), "max_tokens must be at most 10"),
        (TEXT, text(), "stop", json!(["a", "b"]), "stop must be at most 1 strings, not 2"),
        (TEXT, text(), "stop", json!("abcd"), "must have 1 to 3 bytes, not 4"),
        (TEXT, text(), "guided_regex", json!(long), "guided_regex must have at most 20 bytes, not 21"),
        (TEXT, text(), "guided_choice", json!([long]), "guided_choice must have at most 20 bytes, not 21"),
        (CHAT, chat(), "response_format", schema, "response_format must have at most 20 bytes"),
        (CHAT, chat(), "n", json!(4), "n must be from 1 to 3, not 4"),
        (CHAT, chat(), "max_completion_tokens", json!(11), "max_completion_tokens must be at most 10"),
        (CHAT, chat(), "messages", turns(3), "messages must be at most 2, not 3"),
        (CHAT, chat(), "tools", json!([tool, tool]), "tools must be at most 1, not 2"),
        (RESPONSES, input(), "input", turns(3), "input must be at most 2, not 3"),
        (RESPONSES, input(), "tools", json!([flat, flat]), "tools must be at most 1, not 2"),
        (RESPONSES, input(), "max_output_tokens", json!(11), "max_output_tokens must be at most 10"),
        (FIM, text(), "n", json!(4), "n must be from 1 to 3, not 4"),
        (FIM, text(), "max_tokens", json!(0), "max_tokens must be at least 1"),
        ("/tokenize", json!({}), "messages", turns(3), "messages must be at most 2, not 3"),
    ] {
        body[field] = value;
        let reply = stage.post(path, &body).await;
        let wanted = if path == FIM { 422 } else { 400 }; // Mistral's word for a field that is wrong
        assert_eq!(reply.status, wanted, "{body}: {reply:?}");
        assert!(reply.body.contains(says), "{body}: {reply:?}");
    }
    assert!(leader.requests.try_recv().is_err(), "no leader was troubled");
    let all = json!({ "prompt": ["a", "b"], "max_tokens": 10, "stop": "abc", "guided_regex": "a*" });
    assert_eq!(stage.post(TEXT, &all).await.status, 200, "what is within all limits passes");
    assert_eq!(stage.post(CHAT, &json!({ "messages": turns(2), "n": 3 })).await.status, 200);
}

#[tokio::test]
async fn requests_beyond_a_limit_are_told_which_over_grpc() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::busy(&leader, small()).await;
    let turn = ChatMessage { role: "user".to_owned(), content: "x".to_owned(), ..Default::default() };
    let chat = Chat { messages: vec![turn.clone(); 3], ..Default::default() };
    let tools = Chat {
        messages: vec![turn],
        tools: vec!["{\"type\":\"function\"}".to_owned(); 2],
        ..Default::default()
    };
    let long = Grammar { grammar: Some(grammar::Grammar::Regex("a".repeat(21))) };
    let ids = Prompt::Tokens(TokenIds { ids: vec![5; 65] });
    for (request, says) in [
        (GenerateRequest { prompt: Some(ids), ..asked() }, "at most 64 tokens"),
        (GenerateRequest { max_tokens: Some(11), ..asked() }, "max_tokens must be at most 10"),
        (GenerateRequest { stop: vec!["a".to_owned(); 2], ..asked() }, "at most 1 strings, not 2"),
        (GenerateRequest { stop: vec!["abcd".to_owned()], ..asked() }, "1 to 3 bytes, not 4"),
        (GenerateRequest { grammar: Some(long), ..asked() }, "at most 20 bytes, not 21"),
        (
            GenerateRequest { prompt: Some(Prompt::Chat(chat)), ..asked() },
            "messages must be at most 2, not 3",
        ),
        (GenerateRequest { prompt: Some(Prompt::Chat(tools)), ..asked() }, "tools must be at most 1, not 2"),
    ] {
        let status = stage.client().await.generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(says), "{status}");
    }
    let sampling = vllm_proto::RandomSampling { num_sequences: u32::MAX, ..Default::default() };
    let request = vllm_proto::GenerateRequest { sampling: Some(sampling), ..inference() };
    let status = InferenceClient::new(stage.channel().await).generate_stream(request).await.unwrap_err();
    assert!(status.message().contains("must be at most 3, not 4294967295"), "{status}");
    let params = smg::SamplingParams { n: u32::MAX, ..Default::default() };
    let request = smg::GenerateRequest { sampling_params: Some(params), ..engine() };
    let status = VllmEngineClient::new(stage.channel().await).generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("must be at most 3, not 4294967295"), "{status}");
    assert!(leader.requests.try_recv().is_err(), "no leader was troubled");
}

fn inference() -> vllm_proto::GenerateRequest {
    let ids = vllm_proto::TokenIds { ids: vec![5] };
    let prompt = Some(vllm_proto::generate_request::Prompt::TokenIds(ids));
    vllm_proto::GenerateRequest { prompt, ..Default::default() }
}

fn engine() -> smg::GenerateRequest {
    let input = Some(smg::generate_request::Input::Text("x".to_owned()));
    smg::GenerateRequest { input, ..Default::default() }
}

#[tokio::test]
async fn json_that_is_too_deep_is_told_so() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    for (path, body) in [
        (TEXT, format!("{{\"prompt\": {}}}", deep(200))),
        (CHAT, format!("{{\"messages\": [{{\"role\": \"user\", \"content\": {}}}]}}", deep(100_000))),
        (CHAT, format!("{{\"messages\": [{}], \"tools\": [{}]}}", turns(1)[0], deep(200))),
        (CHAT, format!("{{\"messages\": [{}], \"response_format\": {}}}", turns(1)[0], deep(200))),
        (RESPONSES, format!("{{\"input\": [{}]}}", deep(200))),
        (FIM, format!("{{\"prompt\": \"x\", \"stop\": {}}}", deep(200))),
        ("/tokenize", format!("{{\"prompt\": {}}}", deep(200))),
        ("/detokenize", format!("{{\"tokens\": {}}}", deep(200))),
    ] {
        let reply = stage.post_raw(path, &body).await.rest().await;
        assert!(matches!(reply.status, 400 | 422), "{path}: {reply:?}");
        assert!(
            reply.body.contains("must have at most 127 levels of arrays and objects in each other"),
            "{path}: {reply:?}"
        );
    }
    let turn = ChatMessage { role: "user".to_owned(), ..Default::default() };
    let chat = Chat { messages: vec![turn], tools: vec![deep(200)], ..Default::default() };
    let request = GenerateRequest { prompt: Some(Prompt::Chat(chat)), ..asked() };
    let status = stage.client().await.generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
}

/// Every way to ask for an answer, as text: all are refused with the same status.
async fn refused_everywhere(stage: &Stage, code: &str, reason: &str, says: &str) {
    for (path, mut body) in [
        (CHAT, json!({ "messages": turns(1) })),
        (TEXT, json!({ "prompt": "x" })),
        (TEXT, json!({ "prompt": ["x", "y"], "n": 2 })),
        (RESPONSES, json!({ "input": "x" })),
        (CHAT, json!({ "messages": turns(1), "random_seed": 7 })), // Mistral's
    ] {
        for stream in [false, true] {
            body["stream"] = stream.into();
            let reply = stage.post(path, &body).await;
            assert_eq!(reply.status, 429, "{path}: {reply:?}");
            assert_eq!(reply.json()["error"]["code"], code);
            told(&reply, says);
        }
    }
    let body = json!({ "messages": turns(1) }).to_string();
    let head = format!("user-agent: mistral-client-python/1\r\ncontent-length: {}", body.len());
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n\r\n{body}");
    let reply = stage.open(&request).await.rest().await;
    assert_eq!(
        (reply.status, &reply.json()["object"], &reply.json()["code"]),
        (429, &json!("error"), &json!(code))
    );
    told(&reply, says);

    let channel = stage.channel().await;
    for status in [
        stage.client().await.generate(asked()).await.unwrap_err(),
        InferenceClient::new(channel.clone()).generate(inference()).await.unwrap_err(),
        InferenceClient::new(channel.clone()).generate_stream(inference()).await.unwrap_err(),
        VllmEngineClient::new(channel).generate(engine()).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains(says), "{status}");
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, reason);
        assert!(details.retry_info().unwrap().retry_delay.is_some());
    }
}

fn told(reply: &Reply, says: &str) {
    assert!(reply.head.contains("retry-after: 1") && reply.body.contains(says), "{reply:?}");
}

#[tokio::test]
async fn a_full_queue_is_the_same_on_every_face() {
    let full = "1024 requests are waiting already: retry later";
    let leader = Leader::start(vec![Act::Fail(Status::resource_exhausted(full).into())]).await;
    let stage = Stage::with(&[&leader]).await;
    refused_everywhere(&stage, "overloaded", "OVERLOADED", full).await;
}

#[tokio::test]
async fn a_router_that_is_busy_says_so_on_every_face() {
    let leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::busy(&leader, RequestLimits { requests_max: 1, ..RequestLimits::DEFAULT }).await;
    let mut first = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    first.until("data: ").await;
    refused_everywhere(&stage, "overloaded", "OVERLOADED", "works on 1 requests").await;
}

#[tokio::test]
async fn a_request_that_waits_too_long_for_its_first_token_may_come_again() {
    let mut leader = Leader::start(vec![Act::Wait(gate())]).await;
    let stage =
        Stage::busy(&leader, RequestLimits { first_token_s_max: SOON, ..RequestLimits::DEFAULT }).await;
    refused_everywhere(&stage, "queue_timeout", "QUEUE_TIMEOUT", "has not begun within 0.05 s").await;
    patiently(leader.cancelled.recv()).await.unwrap();
}

#[tokio::test]
async fn a_group_that_falls_silent_ends_its_answers_with_an_error_of_their_own() {
    let leader = Leader::start(vec![Act::Token(token(ids("Anon")[0])), Act::Wait(gate())]).await;
    let stage =
        Stage::busy(&leader, RequestLimits { next_token_s_max: SOON, ..RequestLimits::DEFAULT }).await;
    let says = "has sent nothing for 0.05 s behind token 1 of the answer";
    let reply = stage.post(TEXT, &json!({ "prompt": "x" })).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (503, &json!("group_stalled")));
    told(&reply, says);
    let reply = stage.post(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    let last: Value =
        serde_json::from_str(reply.events().iter().rfind(|event| **event != "[DONE]").unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "group_stalled", "{reply:?}");
    let mut stream = stage.client().await.generate(asked()).await.unwrap().into_inner();
    patiently(stream.message()).await.unwrap().unwrap();
    let status = patiently(stream.message()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "GROUP_STALLED");
    assert!(status.message().contains(says), "{status}");
}

async fn bytes_held(stage: &Stage) -> u64 {
    stage.operate("GET", "/debug/state", "").await.json()["bodies"]["bytes"].as_u64().unwrap()
}

/// A request with so much in it that changes nothing.
fn padded(bytes: usize) -> Value {
    json!({ "prompt": "x", "user": "y".repeat(bytes) })
}

/// Begins a request whose last ten bytes are kept back.
async fn begun(stage: &Stage) -> (Connection, String) {
    let body = padded(80_000).to_string();
    let (sent, rest) = body.split_at(body.len() - 10);
    let head =
        format!("POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}", body.len());
    let connection = stage.open(&format!("{head}\r\n\r\n{sent}")).await;
    patiently(async { while bytes_held(stage).await < 80_000 {} }).await;
    (connection, rest.to_owned())
}

#[tokio::test]
async fn all_bodies_together_have_a_limit_and_give_their_room_back() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let limits = RequestLimits { bodies_bytes_max: 100_000, ..RequestLimits::DEFAULT };
    let stage = Stage::busy(&leader, limits).await;
    let (mut slow, rest) = begun(&stage).await;
    let held = bytes_held(&stage).await;
    let says = "at most 100000 bytes of bodies that come in at once";
    let reply = stage.post(TEXT, &padded(30_000)).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (429, &json!("overloaded")), "{reply:?}");
    told(&reply, says);
    let request = |length: usize| GenerateRequest { stop: vec!["x".repeat(length)], ..asked() };
    let status = stage.client().await.generate(request(30_000)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains(says), "{status}");
    assert_eq!(status.get_error_details().error_info().unwrap().reason, "OVERLOADED");
    assert_eq!(bytes_held(&stage).await, held, "what was refused holds nothing");
    slow.send(&rest).await;
    assert_eq!(slow.rest().await.status, 200);
    patiently(async { while bytes_held(&stage).await != 0 {} }).await;
    assert_eq!(stage.post(TEXT, &padded(30_000)).await.status, 200);

    let (gone, _) = begun(&stage).await;
    drop(gone);
    patiently(async { while bytes_held(&stage).await != 0 {} }).await;
    let many = json!({ "prompt": vec![5; 2000] }); // few bytes, many values
    for never in [stage.post(TEXT, &padded(100_000)).await, stage.post(TEXT, &many).await] {
        assert_eq!(never.status, 400, "{never:?}");
        assert!(never.body.contains("all bodies together may take 100000: send less at once"), "{never:?}");
    }
    let status = stage.client().await.generate(request(100_000)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    // An answer that runs holds no body, unless it repeats it.
    leader.play(vec![Act::Token(token(40)), Act::Wait(gate())]);
    let mut running = stage.start(TEXT, &json!({ "prompt": "x".repeat(300), "stream": true })).await;
    running.until("data: ").await;
    let mut stream = stage.client().await.generate(request(300)).await.unwrap().into_inner();
    patiently(stream.message()).await.unwrap().unwrap();
    assert_eq!(bytes_held(&stage).await, 0);
    let repeats = json!({ "input": "x", "instructions": "x".repeat(300), "stream": true });
    let mut repeated = stage.start(RESPONSES, &repeats).await;
    repeated.until("data: ").await;
    assert!(bytes_held(&stage).await > 300);
    drop(repeated);
    patiently(async { while bytes_held(&stage).await != 0 {} }).await;
}

#[tokio::test]
async fn a_request_larger_than_a_tenants_minute_is_never_let_in_and_told_so() {
    let key = galerne_router::ApiKey::random().unwrap();
    let file = crate::access::KeyFile::new();
    file.write(&[("acme", &key)], "[tenant.acme]\ntokens_per_minute = 100\n");
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::behind(&file.gate(), &leader).await;
    for body in
        [json!({ "prompt": [5, 6], "max_tokens": 99 }), json!({ "prompt": [[5], [6]], "max_tokens": 60 })]
    {
        let body = body.to_string();
        let head = format!("authorization: Bearer {}\r\ncontent-length: {}", key.reveal(), body.len());
        let request = format!("POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n\r\n{body}");
        let reply = stage.open(&request).await.rest().await;
        assert_eq!(reply.status, 400, "{reply:?}");
        assert!(reply.body.contains("more than your limit of 100 a minute"), "{reply:?}");
        assert!(reply.head.contains("x-ratelimit-remaining-tokens: 100"), "nothing is charged: {reply:?}");
    }
    let mut request = tonic::Request::new(GenerateRequest { max_tokens: Some(100), ..asked() });
    let bearer = format!("Bearer {}", key.reveal()).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let status = stage.client().await.generate(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(leader.requests.try_recv().is_err());
}

#[tokio::test]
async fn messages_and_heads_of_calls_are_limited_in_words() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let limits = ServerLimits { body_bytes_max: 1000, ..ServerLimits::DEFAULT };
    let stage = Stage::limited(&leader, limits).await;
    let prompt = Some(Prompt::Text("x".repeat(1001)));
    let status = stage.client().await.generate(GenerateRequest { prompt, ..asked() }).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("1000 bytes"), "{status}");
    let mut sender = calls::connect(&stage).await;
    let one = GenerateRequest { prompt: Some(Prompt::Text("x".repeat(400))), ..asked() }.encode_to_vec();
    let body = [calls::framed(&one), calls::framed(&one), calls::framed(&one)].concat();
    let path = "/galerne.v1.Galerne/Generate";
    let call = Call { path, headers: Vec::new(), body, manner: Manner::Whole };
    let status = calls::make(&mut sender, call).await.unwrap().1.unwrap();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("must have at most 1000 bytes together"), "{status}");
    let many = (0..150).map(|at| (format!("x-{at}"), "y".to_owned())).collect();
    let large = vec![("x-large".to_owned(), "y".repeat(17_000))];
    for headers in [many, large] {
        let mut request = tonic::Request::new(asked());
        for (name, value) in headers {
            let name: tonic::metadata::MetadataKey<_> = name.parse().unwrap();
            request.metadata_mut().insert(name, value.parse().unwrap());
        }
        let status = stage.client().await.generate(request).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("at most 16384 bytes in at most 100 headers"), "{status}");
    }
}

#[tokio::test]
async fn messages_that_are_slow_cut_or_no_messages_are_their_senders_fault() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let patient = Duration::from_secs(20);
    for (whole, idle, says) in [
        (SOON, patient, "the message did not arrive within 0.05 s"),
        (patient, SOON, "nothing of the message arrived for 0.05 s"),
    ] {
        let limits = ServerLimits { body_s_max: whole, body_idle_s_max: idle, ..ServerLimits::DEFAULT };
        let stage = Stage::limited(&leader, limits).await;
        let mut sender = calls::connect(&stage).await;
        let message = calls::framed(&asked().encode_to_vec());
        let half = message[..message.len() - 1].to_vec();
        // The second one is there, but the call's end is not.
        for body in [half, message] {
            let status = called(&mut sender, body, Manner::Open).await;
            assert_eq!(status.code(), Code::Aborted, "{status}");
            assert_eq!(status.message(), says);
            assert_eq!(status.get_error_details().error_info().unwrap().reason, "MESSAGE_TOO_SLOW");
        }
        assert_eq!(bytes_held(&stage).await, 0);
    }
    let stage = Stage::with(&[&leader]).await;
    let mut sender = calls::connect(&stage).await;
    let message = calls::framed(&asked().encode_to_vec());
    for (body, says) in [
        (message[..message.len() - 1].to_vec(), "Unexpected EOF"),
        (calls::framed(&[0xff; 10]), "failed to decode"),
        (Vec::new(), "Missing request message"),
    ] {
        let status = called(&mut sender, body, Manner::Whole).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let message = status.message();
        assert!(message.starts_with("the message cannot be read: ") && message.contains(says), "{message}");
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "BAD_MESSAGE");
    }
}

#[tokio::test]
async fn calls_without_a_message_take_room_too() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let limits = RequestLimits { bodies_bytes_max: 100_000, ..RequestLimits::DEFAULT };
    let stage = Stage::busy(&leader, limits).await;
    let sender = calls::connect(&stage).await;
    let silent: Vec<_> = (0..12)
        .map(|_| {
            let mut sender = sender.clone();
            tokio::spawn(async move { called(&mut sender, Vec::new(), Manner::Open).await })
        })
        .collect();
    patiently(async { while bytes_held(&stage).await < 12 * 8192 {} }).await;
    let status = stage.client().await.generate(asked()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    silent.iter().for_each(tokio::task::JoinHandle::abort);
    drop(sender);
    patiently(async { while bytes_held(&stage).await != 0 {} }).await;
    stage.client().await.generate(asked()).await.unwrap();
}

async fn called(sender: &mut calls::Sender, body: Vec<u8>, manner: Manner) -> Status {
    let call = Call { path: "/galerne.v1.Galerne/Generate", headers: Vec::new(), body, manner };
    let (http, status) = calls::make(sender, call).await.unwrap();
    assert_eq!(http.as_u16(), 200);
    status.unwrap()
}

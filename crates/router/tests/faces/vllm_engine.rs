//! `vllm.grpc.engine.VllmEngine`, asked by a client that is generated from the public description: the Python stubs
//! of the package `smg-grpc-proto`.

use std::path::Path;
use std::process::Stdio;

use galerne_wire::v1::{FinishReason, grammar::Grammar};
use galerne_wire::vllm::grpc::engine::generate_request::Input;
use galerne_wire::vllm::grpc::engine::generate_response::Response;
use galerne_wire::vllm::grpc::engine::vllm_engine_client::VllmEngineClient;
use galerne_wire::vllm::grpc::engine::{AbortRequest, GenerateRequest, TokenizedInput};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::leader::{Act, Leader, gate, scored, token, tokens};
use crate::stage::{Stage, ids, patiently};

/// The client, a process that lives as long as this.
struct Client {
    _process: Child,
    calls: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Client {
    fn of(stage: &Stage) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut process = Command::new("python3")
            .arg(root.join("tests/faces/vllm_engine_client.py"))
            .arg(&stage.grpc)
            .env("PYTHONPATH", root.join("../../.cache/python"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let calls = process.stdin.take().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { _process: process, calls, answers }
    }

    /// Begins a call.
    async fn begin(&mut self, id: &str, rpc: &str, request: Value) {
        let line = json!({ "id": id, "rpc": rpc, "request": request }).to_string() + "\n";
        self.calls.write_all(line.as_bytes()).await.unwrap();
    }

    /// Waits for a call to end, whichever.
    async fn ended(&mut self) -> Value {
        let line = patiently(self.answers.next_line()).await.unwrap();
        serde_json::from_str(&line.expect("the client lives; if not: make setup")).unwrap()
    }

    async fn call(&mut self, rpc: &str, request: Value) -> Value {
        self.begin("only", rpc, request).await;
        self.ended().await
    }

    async fn responses(&mut self, rpc: &str, request: Value) -> Vec<Value> {
        let said = self.call(rpc, request).await;
        said["responses"].as_array().unwrap_or_else(|| panic!("{said}")).clone()
    }
}

fn asked(params: &Value) -> Value {
    json!({ "request_id": "r", "tokenized": { "input_ids": [5, 6, 7] }, "sampling_params": params })
}

fn streamed(params: &Value) -> Value {
    let mut request = asked(params);
    request["stream"] = true.into();
    request
}

#[tokio::test]
async fn tokens_come_in_chunks_and_the_end_repeats_the_last() {
    let leader = Leader::start(tokens(&[40, 41, 42], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let responses = client.responses("Generate", streamed(&json!({ "max_tokens": 3 }))).await;
    let chunk = |id: u32| json!({ "chunk": { "token_ids": [id], "prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 0, "index": 0 } });
    assert_eq!(responses[..3], [chunk(40), chunk(41), chunk(42)]);
    let end = json!({ "complete": {
        "output_ids": [42], "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 0,
        "index": 0, "spec_accepted_tokens": 0, "spec_draft_tokens": 0,
    } });
    assert_eq!(responses[3..], [end]);

    let whole = client.responses("Generate", asked(&json!({ "max_tokens": 3 }))).await;
    assert_eq!(whole.len(), 1);
    let complete = &whole[0]["complete"];
    assert_eq!(complete["output_ids"], json!([40, 41, 42]));
    assert_eq!((&complete["finish_reason"], &complete["completion_tokens"]), (&json!("length"), &json!(3)));
}

#[tokio::test]
async fn sampling_arrives_as_it_was_sent_and_unset_is_what_vllm_takes_it_for() {
    let mut leader = Leader::start(tokens(&[40], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let params = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125, "frequency_penalty": 0.5,
        "presence_penalty": 1.5, "repetition_penalty": 1.25, "max_tokens": 9, "min_tokens": 2, "stop_token_ids": [77],
        "ignore_eos": true, "seed": -1, "logit_bias": { "9": 2.0, "3": -2.0 }, "choice": { "choices": ["a", "b"] },
        "truncate_prompt_tokens": 2, "prompt_logprobs": 1, "logprobs": 2,
    });
    client.responses("Generate", asked(&params)).await;
    let request = patiently(leader.requests.recv()).await.unwrap();
    let sampling = request.sampling.unwrap();
    assert_eq!(request.prompt, [6, 7], "the prompt's end is kept");
    assert_eq!((request.max_tokens, request.min_tokens, request.stop_tokens), (9, 2, vec![77]));
    assert_eq!((request.prompt_logprobs, sampling.logprobs), (Some(1), Some(2)));
    assert!(
        matches!(request.grammar.unwrap().grammar, Some(Grammar::Choice(texts)) if texts.texts == ["a", "b"])
    );
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.5), Some(0.25), 4));
    assert_eq!((sampling.min_p, sampling.frequency_penalty, sampling.presence_penalty), (0.125, 0.5, 1.5));
    assert_eq!((sampling.repetition_penalty, sampling.seed), (Some(1.25), Some(u64::MAX)));
    let bias: Vec<_> = sampling.logit_bias.iter().map(|bias| (bias.id, bias.bias)).collect();
    assert_eq!(bias, [(3, -2.0), (9, 2.0)]);

    client.responses("Generate", json!({ "text": "ROMEO" })).await;
    let request = patiently(leader.requests.recv()).await.unwrap();
    let sampling = request.sampling.unwrap();
    assert_eq!(request.prompt, [vec![1], ids("ROMEO")].concat());
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.repetition_penalty),
        (Some(1.0), Some(1.0), Some(1.0))
    );
    assert_eq!(request.max_tokens as usize, 2048 - request.prompt.len());
    assert!(request.grammar.is_none() && sampling.logprobs.is_none());
}

#[tokio::test]
async fn what_stopped_an_answer_is_told() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let verse = ids("What's in a name?");
    for (script, params, matched) in [
        (tokens(&[40, 2], FinishReason::Stop), json!({}), Value::Null),
        (
            tokens(&[40, 77], FinishReason::Stop),
            json!({ "stop_token_ids": [77] }),
            json!({ "matched_token_id": 77 }),
        ),
        (
            tokens(&verse, FinishReason::Length),
            json!({ "stop": ["xx", "in a"] }),
            json!({ "matched_stop_str": "in a" }),
        ),
    ] {
        leader.play(script);
        let complete = client.responses("Generate", asked(&params)).await.pop().unwrap()["complete"].clone();
        assert_eq!(complete["finish_reason"], "stop", "{complete}");
        for name in ["matched_token_id", "matched_stop_str"] {
            assert_eq!(complete.get(name), matched.get(name), "{complete}");
        }
    }
}

#[tokio::test]
async fn log_probabilities_have_the_token_itself_first() {
    let mut script = vec![scored(1, &[6, 7])];
    script.extend(tokens(&[40, 41], FinishReason::Length));
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let params = json!({ "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 2 });
    let responses = client.responses("Generate", streamed(&params)).await;
    let first = &responses[0]["chunk"];
    let output = json!({
        "token_ids": [40], "token_logprobs": [-0.4],
        "top_logprobs": [{ "token_ids": [40, 301], "values": [-0.4, "-Infinity"] }],
    });
    assert_eq!(first["output_logprobs"], output);
    let input = json!({
        "token_ids": [5, 6, 7], "token_logprobs": [{}, { "value": -0.06 }, { "value": -0.07 }],
        "top_logprobs": [
            { "token_ids": [], "values": [] }, { "token_ids": [6], "values": [-0.06] },
            { "token_ids": [7], "values": [-0.07] },
        ],
    });
    assert_eq!(first["input_logprobs"], input);
    assert!(responses[1]["chunk"].get("input_logprobs").is_none(), "only once");
    let whole = client.responses("Generate", asked(&json!({ "logprobs": 0, "prompt_logprobs": 0 }))).await;
    let complete = &whole[0]["complete"];
    assert_eq!(complete["output_logprobs"]["token_logprobs"], json!([-0.4, -0.41]));
    assert_eq!(complete["input_logprobs"]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn several_answers_are_told_apart_by_their_index() {
    let mut leader = Leader::start(tokens(&[40, 41], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let responses =
        client.responses("Generate", streamed(&json!({ "n": 3, "seed": 5, "max_tokens": 2 }))).await;
    for index in 0..3 {
        let of = |kind: &str| responses.iter().filter(|r| r[kind]["index"] == index).count();
        assert_eq!((of("chunk"), of("complete")), (2, 1), "answer {index}");
    }
    let mut seeds = Vec::new();
    for _ in 0..3 {
        seeds.push(patiently(leader.requests.recv()).await.unwrap().sampling.unwrap().seed.unwrap());
    }
    seeds.sort_unstable();
    assert_eq!(seeds, [5, 6, 7]);
}

#[tokio::test]
async fn an_abort_ends_the_request_at_its_leader() {
    let wait = gate();
    let mut leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(wait)]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    client.begin("generate", "Generate", asked(&json!({}))).await;
    patiently(leader.requests.recv()).await.unwrap();
    client.begin("abort", "Abort", json!({ "request_ids": ["unknown", "r"] })).await;
    let mut said = [client.ended().await, client.ended().await];
    said.sort_by_key(|said| said["id"].to_string());
    patiently(leader.cancelled.recv()).await.unwrap();
    assert_eq!(said[0]["responses"], json!([{}]));
    assert_eq!(said[1]["responses"][0]["complete"]["finish_reason"], "abort", "{said:?}");
}

#[tokio::test]
async fn an_aborted_answer_still_tells_how_long_its_prompt_was() {
    let leader = Leader::start(vec![Act::Token(token(40)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = VllmEngineClient::new(stage.channel().await);
    let prompt = TokenizedInput { input_ids: vec![5, 6, 7], ..Default::default() };
    let (input, request_id) = (Some(Input::Tokenized(prompt)), "r".to_owned());
    let request = GenerateRequest { request_id, input, stream: true, ..Default::default() };
    let mut pieces = client.generate(request).await.unwrap().into_inner();
    patiently(pieces.message()).await.unwrap().expect("the first chunk");
    client.abort(AbortRequest { request_ids: vec!["r".to_owned()] }).await.unwrap();
    let last = patiently(pieces.message()).await.unwrap().expect("the end").response;
    let Some(Response::Complete(end)) = last else { panic!("{last:?}") };
    assert_eq!((end.finish_reason.as_str(), end.prompt_tokens), ("abort", 3));
}

#[tokio::test]
async fn the_server_tells_of_itself_and_refuses_what_it_does_not_do() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = Client::of(&stage);
    let health = client.responses("HealthCheck", json!({})).await;
    assert_eq!(health, [json!({ "healthy": true, "message": "requests are taken" })]);
    let model = client.responses("GetModelInfo", json!({})).await.pop().unwrap();
    assert_eq!((&model["served_model_name"], &model["max_context_length"]), (&json!("bard"), &json!(2048)));
    assert_eq!((&model["eos_token_ids"], &model["bos_token_id"]), (&json!([2]), &json!(1)));
    let server = client.responses("GetServerInfo", json!({})).await.pop().unwrap();
    assert_eq!((&server["server_type"], &server["max_num_seqs"]), (&json!("vllm-grpc"), &json!(8)));
    let loads = client.responses("GetLoads", json!({})).await.pop().unwrap();
    assert_eq!(
        (&loads["dp_rank_count"], &loads["loads"][0]["max_total_num_tokens"]),
        (&json!(1), &json!(64 * 32))
    );
    for (rpc, request, code, says) in [
        ("Embed", json!({}), "UNIMPLEMENTED", "do not embed"),
        ("FlushCache", json!({}), "UNIMPLEMENTED", ""),
        ("Generate", json!({}), "INVALID_ARGUMENT", "input is missing"),
        ("Generate", asked(&json!({ "structural_tag": "x" })), "INVALID_ARGUMENT", "structural_tag"),
        ("Generate", asked(&json!({ "logprobs": -1 })), "INVALID_ARGUMENT", "from 0 to 20"),
        (
            "Generate",
            json!({ "text": "x", "mm_inputs": {} }),
            "INVALID_ARGUMENT",
            "mm_inputs is not supported",
        ),
        (
            "Generate",
            json!({ "text": "x", "data_parallel_rank": 1 }),
            "INVALID_ARGUMENT",
            "data_parallel_rank",
        ),
    ] {
        let said = client.call(rpc, request).await;
        assert_eq!(said["code"], code, "{said}");
        assert!(said["says"].as_str().unwrap().contains(says), "{said}");
    }
}

//! What each face tells of prompts that a group had kept, and how clients keep theirs to themselves.

use galerne_wire::v1::{FinishReason, GenerateRequest, TokenIds, generate_request};
use serde_json::{Value, json};
use tokio_stream::StreamExt;
use vllm_proto::inference_client::InferenceClient;
use vllm_proto::{KvCacheParameters, generate_request::Prompt};

use crate::leader::{Act, Leader, token, tokens};
use crate::stage::{Stage, patiently};

const PROMPT: [u32; 5] = [5, 6, 7, 8, 9];

fn chat(extra: &Value) -> Value {
    let mut body = json!({ "model": "bard", "messages": [{ "role": "user", "content": "Speak" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn asked(cache_salt: &str) -> GenerateRequest {
    let prompt = generate_request::Prompt::Tokens(TokenIds { ids: PROMPT.to_vec() });
    GenerateRequest { prompt: Some(prompt), cache_salt: cache_salt.to_owned(), ..Default::default() }
}

fn inference(kv: Option<KvCacheParameters>) -> vllm_proto::GenerateRequest {
    let prompt = Prompt::TokenIds(vllm_proto::TokenIds { ids: PROMPT.to_vec() });
    vllm_proto::GenerateRequest { prompt: Some(prompt), kv, ..Default::default() }
}

#[tokio::test]
async fn every_face_tells_how_much_of_a_prompt_was_not_computed_again() {
    let script = vec![Act::Cached(token(40), 4), Act::Token(token(41)), Act::Finish(FinishReason::Length)];
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].clone();
    let body = stage.post("/v1/chat/completions", &chat(&json!({ "n": 2 }))).await.json();
    assert_eq!(cached(&body["usage"]), 4, "{body}: once, as the prompt is");
    let wanted = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let chunks = stage.post("/v1/chat/completions", &chat(&wanted)).await.chunks();
    assert_eq!(cached(&chunks.last().unwrap()["usage"]), 4);
    let prompts = json!({ "model": "bard", "prompt": [PROMPT, PROMPT] });
    let body = stage.post("/v1/completions", &prompts).await.json();
    assert_eq!(cached(&body["usage"]), 8, "{body}");
    let body = stage.post("/v1/responses", &json!({ "model": "bard", "input": "Speak" })).await.json();
    assert_eq!(body["usage"]["input_tokens_details"]["cached_tokens"], 4, "{body}");

    let deltas = stage.client().await.generate(asked("")).await.unwrap().into_inner();
    let deltas: Vec<_> = deltas.collect::<Result<_, _>>().await.unwrap();
    assert_eq!(deltas.last().unwrap().usage.unwrap().cached_tokens, 4);
    let mut engine = InferenceClient::new(stage.channel().await);
    let whole = engine.generate(inference(None)).await.unwrap().into_inner();
    assert_eq!(whole.outputs.unwrap().finish_info.unwrap().num_cached_tokens, Some(4));

    leader.play(vec![Act::Cached(token(40), 4000), Act::Finish(FinishReason::Length)]);
    let body = stage.post("/v1/completions", &json!({ "model": "bard", "prompt": PROMPT })).await.json();
    assert_eq!(cached(&body["usage"]), PROMPT.len(), "no more than there is");
}

#[tokio::test]
async fn prompts_are_shared_by_those_who_say_the_same_salt() {
    let mut leader = Leader::start(tokens(&[40], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let mut salts = Vec::new();
    for salt in
        [json!({}), json!({ "cache_salt": "" }), json!({ "cache_salt": "s" }), json!({ "cache_salt": "t" })]
    {
        assert_eq!(stage.post("/v1/chat/completions", &chat(&salt)).await.status, 200);
        salts.push(patiently(leader.requests.recv()).await.unwrap().cache_salt);
    }
    let [nobodys, empty, s, t] = salts[..] else { panic!("{salts:?}") };
    assert!(nobodys.is_some() && empty == nobodys && s.is_some() && s != nobodys && t != s);

    for (salt, expected) in [("", nobodys), ("s", s)] {
        stage.client().await.generate(asked(salt)).await.unwrap();
        assert_eq!(patiently(leader.requests.recv()).await.unwrap().cache_salt, expected);
    }
    let mut engine = InferenceClient::new(stage.channel().await);
    let kv = |bypass_prefix_cache, cache_salt: &str| {
        Some(KvCacheParameters {
            bypass_prefix_cache,
            cache_salt: cache_salt.to_owned(),
            ..Default::default()
        })
    };
    for (kv, expected) in [(None, nobodys), (kv(false, "s"), s), (kv(true, "s"), None)] {
        engine.generate(inference(kv)).await.unwrap();
        assert_eq!(patiently(leader.requests.recv()).await.unwrap().cache_salt, expected);
    }
}

//! What Mistral's clients see, and what their requests become.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Leader, tokens};
use crate::stage::{BARD, Reply, Stage, ids, patiently};

const CHAT: &str = "/v1/chat/completions";
const VERSE: &str = "But soft, what light through yonder window breaks?\n";

fn chat(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Speak" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Asks as Mistral's own clients do.
async fn ask(stage: &Stage, path: &str, body: &Value) -> Reply {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nuser-agent: mistral-client-python/3.7.0"
    );
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stage.open(&request).await.rest().await
}

#[tokio::test]
async fn seeds_and_safety_reach_the_leader() {
    let mut leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted =
        json!({ "random_seed": 5, "seed": 5, "safe_prompt": true, "guardrails": [], "prompt_mode": null });
    let reply = stage.post(CHAT, &chat(&wanted)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let request = patiently(leader.requests.recv()).await.unwrap();
    let safe = "system:\nAlways assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid \
                harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and positivity.";
    assert_eq!(request.prompt, ids(&format!("{safe}\n\nuser:\nSpeak\n\nassistant:\n")));
    assert_eq!(request.sampling.unwrap().seed, Some(5));
    for (wanted, field) in [
        (json!({ "random_seed": 5, "seed": 6 }), "random_seed"),
        (json!({ "random_seed": "5" }), "random_seed"),
        (json!({ "safe_prompt": 1 }), "safe_prompt"),
        (json!({ "prompt_mode": "reasoning" }), "prompt_mode"),
        (json!({ "guardrails": [{ "block_on_error": true }] }), "guardrails"),
        (json!({ "top_prompt_logprobs": 2 }), "top_prompt_logprobs"),
    ] {
        let reply = stage.post(CHAT, &chat(&wanted)).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{wanted}");
    }
}

#[tokio::test]
async fn an_answer_goes_on_with_its_prefix() {
    let mut leader = Leader::start(tokens(&ids("soft"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let user = json!({ "role": "user", "content": "Speak" });
    let begun = json!({ "role": "assistant", "content": "But ", "prefix": true });
    let asked = json!({ "messages": [user, begun] });
    let body = stage.post(CHAT, &asked).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "But soft");
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("user:\nSpeak\n\nassistant:\nBut "));
    let mut streamed = asked;
    streamed["stream"] = json!(true);
    let chunks = stage.post(CHAT, &streamed).await.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "But " }));

    for messages in [json!([begun, user]), json!([{ "role": "user", "content": "But ", "prefix": true }])] {
        let reply = stage.post(CHAT, &json!({ "messages": messages })).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("messages")));
    }
}

#[tokio::test]
async fn the_contexts_end_is_told_from_the_clients_limit() {
    let prompt: Vec<u32> = vec![5; 2048 - 3];
    let leader = Leader::start(tokens(&ids(VERSE)[..3], FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    // A conversation whose prompt leaves room for three tokens.
    let mut text = BARD.tokenizer.decode(&prompt, true);
    while ids(&format!("user:\n{text}\n\nassistant:\n")).len() > prompt.len() {
        text.pop();
    }
    let full = chat(&json!({ "messages": [{ "role": "user", "content": text }] }));
    let room = 2048 - ids(&format!("user:\n{text}\n\nassistant:\n")).len();
    leader.play(tokens(&vec![7; room], FinishReason::Length));
    let reason = |reply: Reply| reply.json()["choices"][0]["finish_reason"].clone();
    assert_eq!(reason(ask(&stage, CHAT, &full).await), "model_length");
    assert_eq!(reason(stage.post(CHAT, &full).await), "length", "OpenAI's clients know one word");
    assert_eq!(reason(ask(&stage, CHAT, &chat(&json!({ "max_tokens": room }))).await), "length");
}

#[tokio::test]
async fn a_stream_tells_its_usage_unasked_and_calls_whole() {
    let leader = Leader::start(tokens(&ids("{\"a\": 1}"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let chunks = ask(&stage, CHAT, &chat(&json!({ "stream": true, "n": 2 }))).await.chunks();
    let told: Vec<_> = chunks.iter().filter(|chunk| chunk.get("usage").is_some()).collect();
    assert_eq!((told.len(), told[0]), (1, chunks.last().unwrap()));
    assert_eq!(told[0]["usage"]["completion_tokens"], 2 * ids("{\"a\": 1}").len());
    let ends = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop");
    assert_eq!(ends.count(), 2);

    let tool =
        json!({ "type": "function", "function": { "name": "add", "parameters": { "type": "object" } } });
    let wanted =
        json!({ "stream": true, "tools": [tool], "tool_choice": "any", "parallel_tool_calls": false });
    let chunks = ask(&stage, CHAT, &chat(&wanted)).await.chunks();
    let deltas: Vec<_> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
    assert_eq!(deltas.len(), 1);
    assert_eq!(deltas[0]["function"], json!({ "name": "add", "arguments": "{\"a\": 1}" }));
    assert_eq!(deltas[0]["id"].as_str().unwrap().len(), 9);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn errors_have_the_shape_that_the_client_knows() {
    let leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let wrong = chat(&json!({ "temperature": -1 }));
    let reply = ask(&stage, CHAT, &wrong).await;
    let body = reply.json();
    assert_eq!((reply.status, &body["object"]), (422, &json!("error")));
    assert_eq!((&body["type"], &body["param"]), (&json!("invalid_request_error"), &json!("temperature")));
    assert_eq!(body["detail"][0]["loc"], json!(["body", "temperature"]));
    assert_eq!((&body["detail"][0]["msg"], body.get("error")), (&body["message"], None));
    let reply = stage.post(CHAT, &wrong).await;
    assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("temperature")));

    let reply = ask(&stage, CHAT, &chat(&json!({ "model": "nobody" }))).await;
    assert_eq!((reply.status, &reply.json()["code"]), (404, &json!("model_not_found")));
    let reply = ask(&stage, "/v1/agents/completions", &json!({ "agent_id": "a" })).await;
    assert_eq!(reply.status, 404);
    assert!(reply.json()["message"].as_str().unwrap().contains("/v1/chat/completions"));
    // bard-1m has no tokens for gaps.
    let reply = stage.post("/v1/fim/completions", &json!({ "prompt": "a", "suffix": "b" })).await;
    assert_eq!((reply.status, &reply.json()["param"]), (422, &json!("suffix")));
    let reply = stage.post("/v1/fim/completions", &json!({ "suffix": "b" })).await;
    assert_eq!((reply.status, &reply.json()["param"]), (422, &json!("prompt")));
}

#[tokio::test]
async fn models_say_what_they_can() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let model = &stage.get("/v1/models").await.json()["data"][0];
    assert_eq!((&model["id"], &model["type"]), (&json!("bard"), &json!("base")));
    assert_eq!(model["max_context_length"], 2048);
    let can = &model["capabilities"];
    assert_eq!((&can["completion_chat"], &can["completion_fim"]), (&json!(true), &json!(false)));
}

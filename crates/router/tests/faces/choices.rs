//! Several answers to one request, and prompts that are shown.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{BARD, Stage, ids, patiently};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Speak" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn text(id: u32) -> String {
    String::from_utf8_lossy(BARD.tokenizer.token_bytes(id)).into_owned()
}

/// Answers a request of seed s with the words' s-th token.
fn by_seed(words: &str) -> (Vec<Act>, Vec<u32>) {
    let ids = ids(words);
    (vec![Act::Seeded(ids.iter().map(|&id| token(id)).collect()), Act::Finish(FinishReason::Stop)], ids)
}

#[tokio::test]
async fn choices_are_requests_with_seeds_of_their_own() {
    let (script, drawn) = by_seed("But soft what light");
    let mut leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let body = stage.post(CHAT, &chat(&json!({ "n": 3, "seed": 1 }))).await.json();
    let choices = body["choices"].as_array().unwrap();
    let shown: Vec<_> =
        choices.iter().map(|c| (c["index"].as_u64().unwrap(), c["message"]["content"].clone())).collect();
    let expected: Vec<_> = (0..3).map(|at| (at, json!(text(drawn[at as usize + 1])))).collect();
    assert_eq!(shown, expected);
    let prompt = ids("user:\nSpeak\n\nassistant:\n").len();
    assert_eq!(
        (&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]),
        (&json!(prompt), &json!(3))
    );
    let mut seeds = Vec::new();
    for _ in 0..3 {
        seeds.push(patiently(leader.requests.recv()).await.unwrap().sampling.unwrap().seed.unwrap());
    }
    seeds.sort_unstable();
    assert_eq!(seeds, [1, 2, 3]);
}

#[tokio::test]
async fn streamed_choices_are_told_apart() {
    let (script, drawn) = by_seed("But soft what light");
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted = json!({ "n": 3, "seed": 0, "stream": true, "stream_options": { "include_usage": true } });
    let chunks = stage.post(CHAT, &chat(&wanted)).await.chunks();
    for (at, &token) in drawn.iter().enumerate().take(3) {
        let own: Vec<_> = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == at).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        let said: String = own.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!((said, &own.last().unwrap()["finish_reason"]), (text(token), &json!("stop")));
    }
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn prompts_and_choices_multiply() {
    let (script, drawn) = by_seed("But soft what light");
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    for (prompts, asked) in [(json!(["a", "b"]), 4), (json!([[5, 6], [7]]), 3)] {
        for stream in [false, true] {
            let wanted = json!({ "prompt": prompts, "n": 2, "seed": 0, "stream": stream });
            let reply = stage.post(TEXT, &wanted).await;
            let mut texts = vec![String::new(); 4];
            let mut add = |choice: &Value| {
                texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
            };
            if stream {
                reply.chunks().iter().for_each(|chunk| add(&chunk["choices"][0]));
            } else {
                let body = reply.json();
                assert_eq!(body["usage"]["prompt_tokens"], asked);
                body["choices"].as_array().unwrap().iter().for_each(add);
            }
            assert_eq!(texts, [0, 1, 0, 1].map(|seed| text(drawn[seed])));
        }
    }
}

#[tokio::test]
async fn choices_end_together() {
    let mut leader = Leader::start(vec![Act::Token(token(5)), Act::Wait(gate())]).await;
    let stage = Stage::with(&[&leader]).await;
    let mut streaming = stage.start(TEXT, &json!({ "prompt": "x", "n": 3, "stream": true })).await;
    streaming.until("data: ").await;
    for _ in 0..3 {
        patiently(leader.requests.recv()).await.unwrap();
    }
    drop(streaming);
    for _ in 0..3 {
        patiently(leader.cancelled.recv()).await.unwrap();
    }
    leader
        .play(vec![Act::Fail(tonic::Status::resource_exhausted("1024 requests are waiting already").into())]);
    let reply = stage.post(TEXT, &json!({ "prompt": "x", "n": 3, "stream": true })).await;
    assert_eq!(reply.status, 429, "{reply:?}");
}

#[tokio::test]
async fn the_best_choices_are_those_that_are_most_likely() {
    let (_, drawn) = by_seed("But soft what light");
    let (script, mut sorted) = (by_seed("But soft what light").0, drawn[..4].to_vec());
    sorted.sort_unstable(); // a token's log probability falls with its id
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let body = stage.post(TEXT, &json!({ "prompt": "x", "n": 2, "best_of": 4, "seed": 0 })).await.json();
    let choices = body["choices"].as_array().unwrap();
    let shown: Vec<_> = choices.iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(shown, [text(sorted[0]), text(sorted[1])]);
    assert_eq!(body["usage"]["completion_tokens"], 4, "what was thrown away was computed too");
    assert!(choices.iter().all(|choice| choice["logprobs"].is_null()), "unasked, unshown");
    for (wanted, says) in [
        (json!({ "n": 3, "best_of": 2 }), "at least n"),
        (json!({ "best_of": 2, "stream": true }), "cannot be streamed"),
    ] {
        let mut body = json!({ "prompt": "x" });
        body.as_object_mut().unwrap().extend(wanted.as_object().unwrap().clone());
        let reply = stage.post(TEXT, &body).await;
        assert!(reply.status == 400 && reply.body.contains(says), "{reply:?}");
    }
}

/// Scores the prompt [5, 6, 7] and draws one token.
fn scored(drawn: u32) -> Vec<Act> {
    vec![
        Act::Score(1, vec![token(6)]),
        Act::Score(1, vec![token(6)]), // a leader that began again
        Act::Score(2, vec![token(7)]),
        Act::Token(token(drawn)),
        Act::Finish(FinishReason::Length),
    ]
}

#[tokio::test]
async fn an_echoed_prompt_has_log_probabilities_too() {
    let drawn = ids("soft")[0];
    let mut leader = Leader::start(scored(drawn)).await;
    let stage = Stage::with(&[&leader]).await;
    let all = [text(5), text(6), text(7), text(drawn)];
    for max_tokens in [0, 1] {
        for stream in [false, true] {
            let shown = &all[..3 + max_tokens];
            let wanted = json!({ "prompt": [5, 6, 7], "echo": true, "logprobs": 1, "max_tokens": max_tokens, "stream": stream });
            let reply = stage.post(TEXT, &wanted).await;
            let choices: Vec<Value> = match stream {
                true => reply.chunks().iter().map(|chunk| chunk["choices"][0].clone()).collect(),
                false => vec![reply.json()["choices"][0].clone()],
            };
            let said: String = choices.iter().filter_map(|c| c["text"].as_str()).collect();
            assert_eq!(said, shown.concat());
            let list = |name: &str| -> Vec<Value> {
                choices.iter().filter_map(|c| c["logprobs"][name].as_array()).flatten().cloned().collect()
            };
            assert_eq!(list("tokens"), shown.iter().map(|t| json!(t)).collect::<Vec<_>>());
            let logprobs = list("token_logprobs");
            assert!(
                logprobs[0].is_null() && (logprobs[2].as_f64().unwrap() + 0.07).abs() < 1e-6,
                "{logprobs:?}"
            );
            assert!(list("top_logprobs")[0].is_null() && list("top_logprobs")[1].is_object());
            assert_eq!(list("text_offset")[2], text(5).chars().count() + text(6).chars().count());
            assert_eq!(choices.last().unwrap()["finish_reason"], "length");
            let request = patiently(leader.requests.recv()).await.unwrap();
            assert_eq!((request.prompt_logprobs, request.max_tokens), (Some(1), 1));
        }
    }
    leader.play(tokens(&[drawn], FinishReason::Length));
    let reply = stage.post(TEXT, &json!({ "prompt": "x", "echo": true, "max_tokens": 1 })).await.json();
    assert_eq!(reply["choices"][0]["text"], format!("x{}", text(drawn)));
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_have_vllms_shape() {
    let leader = Leader::start(scored(301)).await;
    let stage = Stage::with(&[&leader]).await;
    let body = stage.post(TEXT, &json!({ "prompt": [5, 6, 7], "prompt_logprobs": 2 })).await.json();
    let list = body["choices"][0]["prompt_logprobs"].as_array().unwrap().clone();
    assert_eq!((list.len(), &list[0]), (3, &Value::Null));
    assert_eq!((&list[1]["6"]["rank"], &list[1]["6"]["decoded_token"]), (&json!(6), &json!(text(6))));
    assert_eq!((&list[2]["301"]["rank"], &list[2]["301"]["logprob"]), (&json!(2), &json!(-9999.0)));

    let stream =
        stage.post(TEXT, &json!({ "prompt": [5, 6, 7], "prompt_logprobs": 2, "stream": true })).await;
    assert!(stream.status == 400 && stream.body.contains("cannot be streamed"), "{stream:?}");
    leader.play(vec![Act::Score(2, vec![token(7)]), Act::Token(token(301))]);
    let skipped = stage.post(TEXT, &json!({ "prompt": [5, 6, 7], "prompt_logprobs": 2 })).await;
    assert_eq!((skipped.status, &skipped.json()["error"]["code"]), (500, &json!("engine_failed")));
}

#[tokio::test]
async fn tokens_that_are_ready_at_once_are_written_at_once() {
    let verse = ids("But soft, what light through yonder window breaks?\n");
    let ready = gate();
    let mut script = vec![Act::Wait(ready.clone())];
    script.extend(tokens(&verse, FinishReason::Stop));
    let leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    let connection = stage.start(TEXT, &json!({ "prompt": "x", "stream": true })).await;
    ready.add_permits(1);
    let reply = connection.rest().await;
    let events = reply.events().len();
    assert!(events > verse.len() / 2, "each token has an event of its own, not {events}");
}

#[tokio::test]
async fn many_choices_of_one_prompt_are_limited() {
    let leader = Leader::start(tokens(&[5], FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let body = json!({ "prompt": ["a", "b", "c"], "n": 64 });
    let error = stage.post(TEXT, &body).await.json()["error"].clone();
    assert_eq!(error["param"], "n");
    assert!(error["message"].as_str().unwrap().contains("at most 128, not 192"), "{error}");
    let most = stage.post(TEXT, &json!({ "prompt": "a", "n": 128 })).await.json();
    assert_eq!(most["choices"].as_array().unwrap().len(), 128);
}

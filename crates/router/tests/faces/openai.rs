//! What OpenAI's clients see, and what their requests become.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Act, Leader, gate, token, tokens};
use crate::stage::{BARD, Stage, ids, patiently};

const VERSE: &str = "But soft, what light through yonder window breaks?\n";

fn chat(extra: &Value) -> Value {
    let mut body = json!({ "model": "bard", "messages": [{ "role": "user", "content": "Speak" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let mut leader = Leader::start(tokens(&ids(VERSE), FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let reply = stage.post("/v1/chat/completions", &chat(&json!({}))).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let body = reply.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(reply.head.contains(&format!("x-request-id: {}", body["id"].as_str().unwrap())));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "bard");
    assert_eq!(body["system_fingerprint"], format!("fp_{}_s4_f32_kvf32", &BARD.card.digest[..12]));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    let message = json!({ "role": "assistant", "content": VERSE, "refusal": null });
    let choice = json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": "length", "stop_reason": null });
    assert_eq!(body["choices"], json!([choice]));

    let prompt = ids("user:\nSpeak\n\nassistant:\n");
    let (asked, generated) = (prompt.len(), ids(VERSE).len());
    let usage = json!({
        "prompt_tokens": asked, "completion_tokens": generated, "total_tokens": asked + generated,
        "prompt_tokens_details": { "cached_tokens": 0 }, "completion_tokens_details": { "reasoning_tokens": 0 },
    });
    assert_eq!(body["usage"], usage);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!((request.first_index, request.prompt), (0, prompt));
    assert_eq!((request.max_tokens as usize, request.min_tokens), (2048 - asked, 0));
    assert_eq!(request.stop_tokens, [2]);
    let sampling = request.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(1.0), Some(1.0), 0));
    assert_eq!(sampling.logprobs, None);
}

#[tokio::test]
async fn a_chat_is_streamed() {
    let leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let reply = stage.post("/v1/chat/completions", &chat(&wanted)).await;
    let chunks = reply.chunks();
    let choice = |at: usize| &chunks[at]["choices"][0];
    assert_eq!(choice(0)["delta"], json!({ "role": "assistant", "content": "" }));
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, VERSE);
    let last = chunks.len() - 2;
    assert_eq!(
        choice(last),
        &json!({ "index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop", "stop_reason": null })
    );
    assert!(chunks[..=last].iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    assert_eq!(chunks[last + 1]["choices"], json!([]));
    assert_eq!(chunks[last + 1]["usage"]["completion_tokens"], ids(VERSE).len());

    let reply = stage.post("/v1/chat/completions", &chat(&json!({ "stream": true }))).await;
    assert!(reply.chunks().iter().all(|chunk| chunk.get("usage").is_none()), "unasked, no usage");
}

#[tokio::test]
async fn usage_can_be_told_all_along() {
    let leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let reply = stage
        .post("/v1/chat/completions", &chat(&json!({ "stream": true, "stream_options": options })))
        .await;
    let chunks = reply.chunks();
    let counts: Vec<_> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!((counts[0], counts[1]), (1, 1), "who speaks is told with the first token");
    assert!(counts.is_sorted());
}

#[tokio::test]
async fn a_completion_takes_text_and_tokens() {
    let mut leader = Leader::start(tokens(&ids(VERSE), FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let with_bos = [vec![1], ids("ROMEO")].concat();
    for (prompt, expected) in [
        (json!("ROMEO"), with_bos.clone()),
        (json!(["ROMEO"]), with_bos),
        (json!([5, 6, 7]), vec![5, 6, 7]),
        (json!([[5, 6, 7]]), vec![5, 6, 7]),
    ] {
        let body = stage.post("/v1/completions", &json!({ "model": "bard", "prompt": prompt })).await.json();
        assert!(body["id"].as_str().unwrap().starts_with("cmpl-"), "{body}");
        assert_eq!(body["object"], "text_completion");
        let choice = json!({ "index": 0, "text": VERSE, "logprobs": null, "finish_reason": "length", "stop_reason": null });
        assert_eq!(body["choices"], json!([choice]));
        let request = patiently(leader.requests.recv()).await.unwrap();
        assert_eq!((request.prompt, request.max_tokens), (expected, 16));
    }
    let reply = stage.post("/v1/completions", &json!({ "prompt": "x", "stream": true })).await;
    let chunks = reply.chunks();
    let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, VERSE);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn options_reach_the_leader() {
    let mut leader = Leader::start(tokens(&ids(VERSE), FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let options = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 40, "seed": -1, "max_tokens": 9, "max_completion_tokens": 8,
        "min_tokens": 3, "stop_token_ids": [9, 4], "ignore_eos": true, "logprobs": true, "top_logprobs": 2,
        "user": "someone", "n": 1, "presence_penalty": 0.0,
    });
    assert_eq!(stage.post("/v1/chat/completions", &chat(&options)).await.status, 200);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!((request.max_tokens, request.min_tokens), (8, 3));
    assert_eq!(request.stop_tokens, [4, 9]);
    let sampling = request.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.5), Some(0.25), 40));
    assert_eq!((sampling.seed, sampling.logprobs), (Some(u64::MAX), Some(2)));

    let parts = json!([{ "type": "text", "text": "To be" }, { "type": "text", "text": "or not" }]);
    let messages =
        json!([{ "role": "developer", "content": "Brief." }, { "role": "user", "content": parts }]);
    stage.post("/v1/chat/completions", &chat(&json!({ "messages": messages, "top_k": -1, "seed": 5 }))).await;
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("system:\nBrief.\n\nuser:\nTo be\nor not\n\nassistant:\n"));
    assert_eq!((request.sampling.as_ref().unwrap().top_k, request.sampling.unwrap().seed), (0, Some(5)));

    let mut seeds = Vec::new();
    for _ in 0..2 {
        stage.post("/v1/chat/completions", &chat(&json!({}))).await;
        seeds.push(patiently(leader.requests.recv()).await.unwrap().sampling.unwrap().seed.unwrap());
    }
    assert_ne!(seeds[0], seeds[1], "a request without a seed gets one of its own");
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_and_cancels_the_rest() {
    let verse = ids(VERSE);
    let mut script: Vec<_> = verse.iter().map(|&id| Act::Token(token(id))).collect();
    script.push(Act::Wait(gate()));
    let mut leader = Leader::start(script).await;
    let stage = Stage::with(&[&leader]).await;
    // Ends in the middle of the words' tokens, wherever the tokenizer cuts them.
    for stop in [json!("onder wind"), json!(["nothing", "onder wind"])] {
        for stream in [false, true] {
            let body = chat(&json!({ "stop": stop, "stream": stream }));
            let reply = stage.post("/v1/chat/completions", &body).await;
            let (text, last) = if stream {
                let chunks = reply.chunks();
                let text =
                    chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
                let told = chunks.iter().filter(|c| c["choices"][0].get("stop_reason").is_some());
                assert_eq!(told.count(), 1, "in the last chunk only");
                (text, chunks.last().unwrap()["choices"][0].clone())
            } else {
                let choice = reply.json()["choices"][0].clone();
                (choice["message"]["content"].as_str().unwrap().to_owned(), choice)
            };
            assert_eq!(text, "But soft, what light through y");
            assert_eq!(
                (&last["finish_reason"], &last["stop_reason"]),
                (&json!("stop"), &json!("onder wind"))
            );
            patiently(leader.cancelled.recv()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn the_token_that_stops_is_counted_but_not_text() {
    let all = [ids("Anon"), vec![2]].concat();
    let leader = Leader::start(tokens(&all, FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let mark = ids("!")[0];
    for (stop, options, reason) in [
        (2, json!({}), Value::Null),
        (2, json!({ "stop_token_ids": [2] }), Value::Null),
        (2, json!({ "stop_token_ids": [2], "ignore_eos": true }), json!(2)),
        (mark, json!({ "stop_token_ids": [mark], "ignore_eos": true }), json!(mark)),
    ] {
        let all = [ids("Anon"), vec![stop]].concat();
        leader.play(tokens(&all, FinishReason::Stop));
        let mut wanted = options;
        wanted["return_token_ids"] = json!(true);
        let body = stage.post("/v1/chat/completions", &chat(&wanted)).await.json();
        assert_eq!(body["choices"][0]["message"]["content"], "Anon");
        assert_eq!(body["choices"][0]["token_ids"], json!(all));
        assert_eq!(body["choices"][0]["stop_reason"], reason);
        assert_eq!(body["usage"]["completion_tokens"], all.len());
        let mut asked = json!({ "prompt": "x", "stream": true });
        asked.as_object_mut().unwrap().extend(wanted.as_object().unwrap().clone());
        let chunks = stage.post("/v1/completions", &asked).await.chunks();
        let last = &chunks.last().unwrap()["choices"][0];
        assert_eq!((&last["finish_reason"], &last["stop_reason"]), (&json!("stop"), &reason));
    }
}

#[tokio::test]
async fn token_ids_are_shown_as_vllm_shows_them() {
    let verse = ids(VERSE);
    let leader = Leader::start(tokens(&verse, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let prompt = ids("user:\nSpeak\n\nassistant:\n");
    let wanted = json!({ "return_token_ids": true });
    let body = stage.post("/v1/chat/completions", &chat(&wanted)).await.json();
    assert_eq!(
        (&body["prompt_token_ids"], &body["choices"][0]["token_ids"]),
        (&json!(prompt), &json!(verse))
    );

    let asked = json!({ "prompt": [5, 6], "return_token_ids": true });
    let body = stage.post("/v1/completions", &asked).await.json();
    let choice = &body["choices"][0];
    assert_eq!((&choice["prompt_token_ids"], &choice["token_ids"]), (&json!([5, 6]), &json!(verse)));

    for (path, body) in [
        ("/v1/chat/completions", chat(&json!({ "return_token_ids": true, "stream": true }))),
        ("/v1/completions", json!({ "prompt": [5, 6], "return_token_ids": true, "stream": true })),
    ] {
        let chunks = stage.post(path, &body).await.chunks();
        let choices: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        let shown = choices.iter().filter_map(|c| c["token_ids"].as_array()).flatten();
        assert_eq!(shown.cloned().collect::<Value>(), json!(verse));
        let prompts = chunks.iter().filter(|c| !c["prompt_token_ids"].is_null()).count()
            + choices.iter().filter(|c| !c["prompt_token_ids"].is_null()).count();
        assert_eq!(prompts, 1, "{path}: the prompt is shown once");
    }
}

#[tokio::test]
async fn log_probabilities_have_the_shape_of_their_api() {
    let two = &ids("light through")[..2];
    let [first, second] = [two[0], two[1]];
    let leader = Leader::start(tokens(two, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    let text = |id: u32| String::from_utf8_lossy(BARD.tokenizer.token_bytes(id)).into_owned();
    let bytes = |id: u32| BARD.tokenizer.token_bytes(id).to_vec();
    let logprob = |id: u32| f64::from(-(id as f32) / 100.0);
    let close = |value: &Value, expected: f64| (value.as_f64().unwrap() - expected).abs() < 1e-5;

    let wanted = json!({ "logprobs": true, "top_logprobs": 2 });
    let body = stage.post("/v1/chat/completions", &chat(&wanted)).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2);
    for (entry, id) in content.iter().zip(two) {
        assert_eq!((&entry["token"], &entry["bytes"]), (&json!(text(*id)), &json!(bytes(*id))));
        assert!(close(&entry["logprob"], logprob(*id)), "{entry}");
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(
            (top.len(), &top[0]["token"], &top[1]["logprob"]),
            (2, &json!(text(*id)), &json!(-9999.0))
        );
    }

    let asked = json!({ "prompt": "x", "logprobs": 2 });
    let body = stage.post("/v1/completions", &asked).await.json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!([text(first), text(second)]));
    assert_eq!(logprobs["text_offset"], json!([0, text(first).chars().count()]));
    assert!(close(&logprobs["token_logprobs"][1], logprob(second)));
    assert!(close(&logprobs["top_logprobs"][0][text(first)], logprob(first)));
    assert_eq!(logprobs["top_logprobs"][0][text(301)], json!(-9999.0));
    assert_eq!(logprobs["top_logprobs"][0][text(first)], logprobs["token_logprobs"][0], "to the last digit");

    let asked = json!({ "prompt": "x", "logprobs": 2, "stream": true });
    let chunks = stage.post("/v1/completions", &asked).await.chunks();
    let offsets = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["text_offset"][0].as_u64());
    assert_eq!(offsets.collect::<Vec<_>>(), [0, text(first).chars().count() as u64]);
}

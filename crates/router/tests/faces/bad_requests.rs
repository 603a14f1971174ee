//! Requests that are refused: with the right status, OpenAI's error body, and a sentence that helps.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Leader, tokens};
use crate::stage::{Stage, ids};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Each value is refused in its field's name, and with a sentence that says so; no leader hears of it.
async fn refused(path: &str, wrong: &[(&str, Value, &str)]) {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    for (field, value, says) in wrong {
        let mut body = match path {
            CHAT => json!({ "messages": [{ "role": "user", "content": "hi" }] }),
            _ => json!({ "prompt": "hi" }),
        };
        body[*field] = value.clone();
        let reply = stage.post(path, &body).await;
        assert_eq!(reply.status, 400, "{field}: {reply:?}");
        let error = &reply.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(*says), "{field}: {message}");
        assert_eq!(
            (&error["param"], &error["type"]),
            (&json!(field), &json!("invalid_request_error")),
            "{message}"
        );
        assert!(error.get("code").is_some());
    }
    assert!(leader.requests.try_recv().is_err(), "no leader was troubled");
}

#[tokio::test]
async fn wrong_options_are_named() {
    let stops: Vec<_> = (0..17).map(|at| format!("s{at}")).collect();
    refused(
        CHAT,
        &[
            ("temperature", json!(-1), "temperature must be a finite number of at least 0, not -1"),
            ("temperature", json!("hot"), "temperature must be a number"),
            ("temperature", json!(1e300), "temperature must be a finite number"),
            ("top_p", json!(0), "top_p must be greater than 0"),
            ("top_k", json!(-2), "top_k must be -1, 0 or a count"),
            ("seed", json!(1.5), "seed must be an integer"),
            ("seed", json!(u128::from(u64::MAX) as f64), "seed must be an integer"),
            ("max_tokens", json!(0), "max_tokens must be at least 1"),
            ("max_tokens", json!(-1), "max_tokens must be an integer of at least 0"),
            ("max_tokens", json!(2048), "has room for"),
            ("min_tokens", json!(4096), "min_tokens must be at most max_tokens"),
            ("n", json!(0), "n must be from 1 to 128, not 0"),
            ("n", json!(129), "n must be from 1 to 128, not 129"),
            ("best_of", json!(2), "best_of is not supported with this value: leave it out or set it to 1"),
            ("logit_bias", json!({ "x": 1 }), "logit_bias must be an object of token ids and numbers"),
            ("logit_bias", json!({ "5": 101 }), "logit_bias must be from -100 to 100, not 101"),
            ("logit_bias", json!({ "1024": 1 }), "this model's vocabulary ends at 1023"),
            ("min_p", json!(1.5), "min_p must be from 0 to 1, not 1.5"),
            ("presence_penalty", json!(3), "presence_penalty must be from -2 to 2, not 3"),
            ("repetition_penalty", json!(0), "repetition_penalty must be a finite number above 0"),
            ("prompt_logprobs", json!(21), "prompt_logprobs must be from 0 to 20, not 21"),
            ("truncate_prompt_tokens", json!(0), "must be -1 or a count of tokens, not 0"),
            ("truncation_side", json!("top"), "truncation_side must be left or right"),
            ("prompt_logprobs", json!(-1), "from 0 to 20, not -1, which is all of the vocabulary"),
            ("allowed_token_ids", json!([5]), "guided_choice"),
            ("temprature", json!(0.1), "\"temprature\" is not a field"),
            ("top_logprobs", json!(3), "top_logprobs needs logprobs"),
            ("stop", json!(stops), "stop must be at most 16 strings, not 17"),
            ("stop", json!(""), "a stop string must have 1 to"),
            ("stop", json!(7), "stop must be a string or a list of strings"),
            ("stop_token_ids", json!([1024]), "this model's vocabulary ends at 1023"),
            ("stop_token_ids", json!((3..70).collect::<Vec<_>>()), "at most 64"),
            ("stream", json!("yes"), "stream must be true or false"),
            ("stream_options", json!({ "include_usage": true }), "needs stream to be true"),
        ],
    )
    .await;
}

#[tokio::test]
async fn wrong_conversations_are_named() {
    refused(
        CHAT,
        &[
            ("messages", json!([]), "at least one"),
            ("messages", json!("hi"), "must be a list of objects"),
            ("messages", json!([{ "role": "wizard", "content": "hi" }]), "messages[0].role must be"),
            ("messages", json!([{ "role": "user" }]), "messages[0].content is missing"),
            (
                "messages",
                json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
                "text parts only",
            ),
            (
                "tools",
                json!([{ "type": "function" }]),
                "tools[0] must have the type \"function\" and a function",
            ),
            (
                "tools",
                json!([{ "type": "function", "function": { "name": "f" } }]),
                "not taught to call tools",
            ),
            ("tool_choice", json!("required"), "there are no tools"),
            ("functions", json!([{ "name": "f" }]), "use tools"),
            ("function_call", json!({ "name": "f" }), "use tool_choice"),
            ("response_format", json!({ "type": "yaml" }), "response_format.type must be text, json_object"),
            ("chat_template", json!("{{ x }}"), "--chat-format"),
            ("messages", json!([{ "role": "tool", "content": "4" }]), "tool_call_id is missing"),
            (
                "messages",
                json!([{ "role": "user", "content": "4", "tool_calls": [{ "function": { "name": "f" } }] }]),
                "belong to the assistant",
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn wrong_completions_are_named() {
    refused(
        TEXT,
        &[
            ("prompt", Value::Null, "prompt is missing"),
            ("prompt", json!([]), "prompt must have at least one token"),
            ("prompt", json!([[]]), "prompt must have at least one token"),
            ("prompt", json!(vec!["a"; 129]), "prompts must be at most 128, not 129"),
            ("best_of", json!(0), "best_of must be from 1 to 128"),
            ("suffix", json!("and so on"), "this model cannot fill in the middle"),
            ("max_tokens", json!(0), "max_tokens must be at least 1"),
            ("guided_regex", json!(["a"]), "guided_regex must be a string"),
            ("prompt", json!([1024]), "prompt has the token id 1024"),
            ("prompt", json!(vec![1; 2048]), "shorten it"),
            (
                "prompt",
                json!({ "text": 1 }),
                "prompt must be a string, a list of token ids, or a list of either",
            ),
            ("logprobs", json!(21), "logprobs must be from 0 to 20, not 21"),
            ("echo", json!("yes"), "echo must be true or false"),
            ("use_beam_search", json!(true), "best_of"),
        ],
    )
    .await;
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    for (body, says) in [
        ("", "not valid JSON"),
        ("{\"model\": ", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("\"messages\"", "must be a JSON object"),
    ] {
        let reply = stage.post_raw(CHAT, body).await.rest().await;
        assert_eq!(reply.status, 400, "{reply:?}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(says), "{reply:?}");
    }
}

#[tokio::test]
async fn what_is_not_there_and_what_is_too_much() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let unknown = stage.post(TEXT, &json!({ "model": "hamlet", "prompt": "x" })).await;
    let error = &unknown.json()["error"];
    assert_eq!(
        (unknown.status, &error["code"], &error["param"]),
        (404, &json!("model_not_found"), &json!("model"))
    );
    assert!(error["message"].as_str().unwrap().contains("\"bard\""), "it says what there is");

    assert_eq!(stage.get("/v1/models/hamlet").await.status, 404);
    let no_text = stage.get("/v1/models/%ff").await;
    assert_eq!((no_text.status, &no_text.json()["error"]["param"]), (400, &json!("model")), "{no_text:?}");
    assert_eq!(stage.get("/v2").await.json()["error"]["code"], "unknown_url");
    let wrong = stage.get(CHAT).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (405, &json!("method_not_allowed")));

    let head = format!("POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n");
    let announced = stage.open(&head).await.rest().await;
    assert_eq!((announced.status, &announced.json()["error"]["code"]), (413, &json!("body_too_large")));

    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(galerne_types::limits::HTTP_BODY_BYTES_MAX));
    let reply = stage.post_raw(TEXT, &long).await.rest().await;
    assert_eq!(reply.status, 413);
    assert!(
        reply.json()["error"]["message"].as_str().unwrap().contains("at most 4194304 bytes"),
        "{reply:?}"
    );
}

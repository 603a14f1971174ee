//! Requests that are refused: with the right status, OpenAI's error body, and a sentence that helps.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Leader, tokens};
use crate::stage::{Stage, ids};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn each_wrong_field_is_named() {
    let mut leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let stops: Vec<_> = (0..17).map(|at| format!("s{at}")).collect();
    for (path, field, value, says) in [
        (CHAT, "messages", json!([]), "at least one"),
        (CHAT, "messages", json!("hi"), "must be a list of objects"),
        (CHAT, "messages", json!([{ "role": "wizard", "content": "hi" }]), "messages[0].role must be"),
        (CHAT, "messages", json!([{ "role": "user" }]), "messages[0].content is missing"),
        (
            CHAT,
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            "text parts only",
        ),
        (CHAT, "temperature", json!(-1), "temperature must be a finite number of at least 0, not -1"),
        (CHAT, "temperature", json!("hot"), "temperature must be a number"),
        (CHAT, "temperature", json!(1e300), "temperature must be a finite number"),
        (CHAT, "top_p", json!(0), "top_p must be greater than 0"),
        (CHAT, "top_k", json!(-2), "top_k must be -1, 0 or a count"),
        (CHAT, "seed", json!(1.5), "seed must be an integer"),
        (CHAT, "seed", json!(u128::from(u64::MAX) as f64), "seed must be an integer"),
        (CHAT, "max_tokens", json!(0), "max_tokens must be at least 1"),
        (CHAT, "max_tokens", json!(-1), "max_tokens must be an integer of at least 0"),
        (CHAT, "max_tokens", json!(2048), "has room for"),
        (CHAT, "min_tokens", json!(4096), "min_tokens must be at most max_tokens"),
        (CHAT, "n", json!(2), "n is not supported with this value: leave it out or set it to 1"),
        (CHAT, "tools", json!([{ "type": "function" }]), "tools is not supported"),
        (CHAT, "response_format", json!({ "type": "json_object" }), "response_format is not supported"),
        (CHAT, "temprature", json!(0.1), "\"temprature\" is not a field"),
        (CHAT, "top_logprobs", json!(3), "top_logprobs needs logprobs"),
        (CHAT, "stop", json!(stops), "stop must be at most 16 strings, not 17"),
        (CHAT, "stop", json!(""), "a stop string must have 1 to"),
        (CHAT, "stop", json!(7), "stop must be a string or a list of strings"),
        (CHAT, "stop_token_ids", json!([1024]), "this model's vocabulary ends at 1023"),
        (CHAT, "stop_token_ids", json!((3..70).collect::<Vec<_>>()), "at most 64"),
        (CHAT, "stream", json!("yes"), "stream must be true or false"),
        (CHAT, "stream_options", json!({ "include_usage": true }), "needs stream to be true"),
        (TEXT, "prompt", Value::Null, "prompt is missing"),
        (TEXT, "prompt", json!([]), "prompt must have at least one token"),
        (TEXT, "prompt", json!(["a", "b"]), "prompt must be one prompt"),
        (TEXT, "prompt", json!([1024]), "prompt has the token id 1024"),
        (TEXT, "prompt", json!(vec![1; 2048]), "shorten it"),
        (TEXT, "prompt", json!({ "text": 1 }), "prompt must be a string or a list of token ids"),
        (TEXT, "logprobs", json!(21), "logprobs must be at most 20, not 21"),
        (TEXT, "echo", json!(true), "echo is not supported"),
    ] {
        let mut body = match path {
            CHAT => json!({ "messages": [{ "role": "user", "content": "hi" }] }),
            _ => json!({ "prompt": "hi" }),
        };
        body[field] = value;
        let reply = stage.post(path, &body).await;
        assert_eq!(reply.status, 400, "{field}: {reply:?}");
        let error = &reply.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says), "{field}: {message}");
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
    assert_eq!(stage.get("/v2").await.json()["error"]["code"], "unknown_url");
    let wrong = stage.get(CHAT).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (405, &json!("method_not_allowed")));

    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(galerne_types::limits::HTTP_BODY_BYTES_MAX));
    let reply = stage.post_raw(TEXT, &long).await.rest().await;
    assert_eq!(reply.status, 413);
    assert!(
        reply.json()["error"]["message"].as_str().unwrap().contains("at most 4194304 bytes"),
        "{reply:?}"
    );
}

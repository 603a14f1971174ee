//! Every field that vLLM 0.33 reads in the bodies of its chats, completions and tokenizers, and those that it read
//! before: each does what it does there, or changes nothing, or is refused by its name.

use galerne_wire::v1::FinishReason;
use serde_json::{Value, json};

use crate::leader::{Leader, tokens};
use crate::stage::{Stage, ids};

/// What comes of a field with a value that is not its default.
enum Fate {
    /// It is understood: it works, or changes nothing here.
    Taken(Value),
    /// It would change the answer, and is refused by name.
    Refused(Value),
}

use Fate::{Refused, Taken};

/// Fields that chats and completions share.
fn shared() -> Vec<(&'static str, Fate)> {
    vec![
        ("allowed_token_ids", Refused(json!([5]))),
        ("allowed_token_ids", Taken(json!([]))),
        ("bad_words", Refused(json!(["x"]))),
        ("bad_words", Taken(json!([]))),
        ("cache_salt", Taken(json!("s"))),
        ("ec_transfer_params", Refused(json!({ "a": 1 }))),
        ("frequency_penalty", Taken(json!(0.5))),
        ("ignore_eos", Taken(json!(true))),
        ("include_stop_str_in_output", Taken(json!(true))),
        ("kv_transfer_params", Refused(json!({ "do_remote_decode": true }))),
        ("length_penalty", Taken(json!(2.0))),
        ("logit_bias", Taken(json!({ "5": 1 }))),
        ("logprob_token_ids", Refused(json!([5]))),
        ("max_tokens", Taken(json!(8))),
        ("min_p", Taken(json!(0.1))),
        ("min_tokens", Taken(json!(2))),
        ("mm_payload", Taken(json!("none"))),
        ("model", Taken(json!("bard"))),
        ("n", Taken(json!(2))),
        ("presence_penalty", Taken(json!(0.5))),
        ("priority", Taken(json!(-3))),
        ("priority", Refused(json!("high"))),
        ("prompt_logprobs", Taken(json!(1))),
        ("prompt_logprobs", Refused(json!(-1))),
        ("repetition_detection", Refused(json!({ "max_pattern_size": 3 }))),
        ("repetition_penalty", Taken(json!(1.1))),
        ("request_id", Taken(json!("r"))),
        ("response_format", Taken(json!({ "type": "json_object" }))),
        ("response_format", Refused(json!({ "type": "structural_tag", "format": {} }))),
        ("return_mm_kwargs", Taken(json!(false))),
        ("return_token_ids", Taken(json!(true))),
        ("return_token_offsets", Taken(json!(true))),
        ("return_tokens_as_token_ids", Taken(json!(true))),
        ("return_weight_versions", Refused(json!(true))),
        ("routed_experts_prompt_start", Taken(json!(3))),
        ("seed", Taken(json!(-5))),
        ("session_id", Taken(json!("s"))),
        ("skip_special_tokens", Taken(json!(false))),
        ("spaces_between_special_tokens", Taken(json!(false))),
        ("stop", Taken(json!(["x", "y"]))),
        ("stop_token_ids", Taken(json!([5]))),
        ("stream", Taken(json!(true))),
        ("stream_interval", Taken(json!(4))),
        ("stream_options", Refused(json!({ "include_usage": true }))), // without stream
        ("structured_outputs", Taken(json!({ "regex": "a", "disable_any_whitespace": true }))),
        ("structured_outputs", Refused(json!({ "structural_tag": "{}" }))),
        ("temperature", Taken(json!(0.5))),
        ("thinking_token_budget", Refused(json!(5))),
        ("thinking_token_budget", Taken(json!(-1))),
        ("top_k", Taken(json!(5))),
        ("top_p", Taken(json!(0.5))),
        ("truncate_prompt_tokens", Taken(json!(3))),
        ("truncate_prompt_tokens", Taken(json!(-1))),
        ("truncation_side", Taken(json!("right"))),
        ("use_beam_search", Refused(json!(true))),
        ("use_beam_search", Taken(json!(false))),
        ("user", Taken(json!("u"))),
        ("vllm_xargs", Refused(json!({ "a": 1 }))),
        ("watermarking", Refused(json!(true))),
        ("watermarking", Taken(json!(false))),
    ]
}

/// Fields of older versions, in both.
fn older() -> Vec<(&'static str, Fate)> {
    vec![
        ("early_stopping", Refused(json!(true))),
        ("guided_choice", Taken(json!(["a"]))),
        ("guided_decoding_backend", Taken(json!("xgrammar"))),
        ("guided_grammar", Taken(json!("root ::= \"a\""))),
        ("guided_json", Taken(json!({ "type": "object" }))),
        ("guided_regex", Taken(json!("a"))),
        ("guided_whitespace_pattern", Taken(json!(" "))),
        ("logits_processors", Refused(json!(["a.b"]))),
    ]
}

fn of_chats() -> Vec<(&'static str, Fate)> {
    let tool = json!([{ "type": "function", "function": { "name": "add" } }]);
    vec![
        ("add_generation_prompt", Taken(json!(false))),
        ("add_special_tokens", Refused(json!(true))),
        ("chat_template", Refused(json!("{{ messages }}"))),
        ("chat_template_kwargs", Taken(json!({ "preface": "x" }))),
        ("continue_final_message", Taken(json!(false))),
        ("documents", Refused(json!([{ "text": "x" }]))),
        ("echo", Refused(json!(true))),
        ("include_reasoning", Taken(json!(false))),
        ("logprobs", Taken(json!(true))),
        ("max_completion_tokens", Taken(json!(8))),
        ("media_io_kwargs", Refused(json!({ "image": {} }))),
        ("mm_processor_kwargs", Refused(json!({ "a": 1 }))),
        ("parallel_tool_calls", Taken(json!(false))),
        ("reasoning_effort", Taken(json!("low"))),
        ("return_prompt_text", Refused(json!(true))),
        ("tool_choice", Taken(json!("none"))),
        ("tools", Refused(tool)),            // this model's template knows none
        ("top_logprobs", Refused(json!(2))), // without logprobs
    ]
}

fn of_completions() -> Vec<(&'static str, Fate)> {
    vec![
        ("add_special_tokens", Taken(json!(false))),
        ("best_of", Taken(json!(2))),
        ("echo", Taken(json!(true))),
        ("logprobs", Taken(json!(2))),
        ("logprobs", Refused(json!(-1))),
        ("prompt_embeds", Refused(json!("AAAA"))),
        ("suffix", Refused(json!("x"))), // this vocabulary has no tokens for it
    ]
}

fn of_tokenizing_chats() -> Vec<(&'static str, Fate)> {
    let tool = json!([{ "type": "function", "function": { "name": "add" } }]);
    vec![
        ("add_generation_prompt", Taken(json!(false))),
        ("add_special_tokens", Taken(json!(true))),
        ("chat_template", Refused(json!("{{ messages }}"))),
        ("chat_template_kwargs", Taken(json!({ "preface": "x" }))),
        ("continue_final_message", Taken(json!(false))),
        ("media_io_kwargs", Refused(json!({ "image": {} }))),
        ("mm_processor_kwargs", Refused(json!({ "a": 1 }))),
        ("model", Taken(json!("bard"))),
        ("return_token_strs", Taken(json!(true))),
        ("tools", Taken(tool)),
    ]
}

#[tokio::test]
async fn an_answer_is_named_after_its_request() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let body = json!({ "prompt": "Speak", "request_id": "mine" });
    let reply = stage.post("/v1/completions", &body).await;
    assert_eq!(reply.json()["id"], "cmpl-mine");
    assert!(reply.head.contains("x-request-id: cmpl-mine"), "{reply:?}");
    let chat = json!({ "messages": [{ "role": "user", "content": "Speak" }], "request_id": "mine" });
    let raw = |name: &str, body: &str| {
        let length = body.len();
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: {name}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    for (header, id) in [("a-1", "chatcmpl-a-1"), ("no name", "chatcmpl-mine")] {
        let reply = stage.open(&raw(header, &chat.to_string())).await.rest().await;
        assert_eq!(reply.json()["id"], id);
    }
    let body = json!({ "prompt": "Speak", "request_id": "no\nname" });
    assert_eq!(stage.post("/v1/completions", &body).await.json()["error"]["param"], "request_id");
    assert!(stage.get("/version").await.json()["version"].is_string());
    assert_eq!(stage.get("/ping").await.status, 200);
}

#[tokio::test]
async fn every_field_has_its_fate() {
    let leader = Leader::start(tokens(&ids("Anon"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let messages = json!({ "messages": [{ "role": "user", "content": "Speak" }] });
    let prompt = json!({ "prompt": "Speak" });
    let cases = [
        ("/v1/chat/completions", &messages, shared()),
        ("/v1/chat/completions", &messages, older()),
        ("/v1/chat/completions", &messages, of_chats()),
        ("/v1/completions", &prompt, shared()),
        ("/v1/completions", &prompt, older()),
        ("/v1/completions", &prompt, of_completions()),
        ("/tokenize", &messages, of_tokenizing_chats()),
    ];
    for (path, body, fields) in cases {
        for (field, fate) in fields {
            let (Taken(value) | Refused(value)) = &fate;
            let mut asked = body.clone();
            asked[field] = value.clone();
            let reply = stage.post(path, &asked).await;
            match fate {
                Taken(_) => assert_eq!(reply.status, 200, "{path} {field}: {reply:?}"),
                Refused(_) => {
                    assert_eq!(reply.status, 400, "{path} {field}: {reply:?}");
                    assert_eq!(reply.json()["error"]["param"], field, "{reply:?}");
                }
            }
            asked[field] = Value::Null;
            if field != "stream" {
                assert_eq!(stage.post(path, &asked).await.status, 200, "{path}: null {field} is none");
            }
        }
    }
}

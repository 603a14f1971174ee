//! Answers that must have a shape: tools, schemas, grammars; and conversations that hold calls.

use galerne_wire::v1::grammar::Grammar;
use galerne_wire::v1::{Failed, FinishReason};
use serde_json::{Value, json};

use crate::leader::{Act, Leader, tokens};
use crate::stage::{Stage, ids, patiently};

const CHAT: &str = "/v1/chat/completions";

fn chat(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "Speak" }] });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
    json!([tool("add"), tool("sub")])
}

fn script(text: &str) -> Vec<Act> {
    tokens(&ids(text), FinishReason::Stop)
}

#[tokio::test]
async fn a_named_tool_is_called() {
    let mut leader = Leader::start(script("{\"a\": 1}")).await;
    let stage = Stage::with(&[&leader]).await;
    let choice = json!({ "type": "function", "function": { "name": "sub" } });
    let wanted = json!({ "tools": tools(), "tool_choice": choice });
    let body = stage.post(CHAT, &chat(&wanted)).await.json();
    let (choice, message) = (&body["choices"][0], &body["choices"][0]["message"]);
    assert_eq!((&choice["finish_reason"], &message["content"]), (&json!("tool_calls"), &Value::Null));
    let call = &message["tool_calls"][0];
    assert_eq!(call["type"], "function");
    assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
    assert_eq!(call["function"], json!({ "name": "sub", "arguments": "{\"a\": 1}" }));
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(
        request.grammar.unwrap().grammar,
        Some(Grammar::JsonSchema("{\"type\":\"object\"}".to_owned()))
    );

    let mut wanted = wanted;
    wanted["stream"] = json!(true);
    let chunks = stage.post(CHAT, &chat(&wanted)).await.chunks();
    let deltas: Vec<_> =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten().collect();
    assert_eq!((&deltas[0]["function"]["name"], &deltas[0]["index"]), (&json!("sub"), &json!(0)));
    assert!(deltas[0]["id"].is_string() && deltas[1..].iter().all(|delta| delta.get("id").is_none()));
    let arguments: String =
        deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"a\": 1}");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    assert!(chunks.iter().all(|c| c["choices"][0]["delta"]["content"].as_str().is_none_or(str::is_empty)));
}

#[tokio::test]
async fn some_tool_is_called() {
    let list = r#"[{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": {}}]"#;
    let mut leader = Leader::start(script(list)).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted = json!({ "tools": tools(), "tool_choice": "required" });
    let body = stage.post(CHAT, &chat(&wanted)).await.json();
    let calls = body["choices"][0]["message"]["tool_calls"].as_array().unwrap();
    let named: Vec<_> = calls.iter().map(|call| &call["function"]).collect();
    assert_eq!(named[0], &json!({ "name": "add", "arguments": "{\"a\": 1}" }));
    assert_eq!(named[1], &json!({ "name": "sub", "arguments": "{}" }));
    assert_ne!(calls[0]["id"], calls[1]["id"]);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert!(matches!(request.grammar.unwrap().grammar, Some(Grammar::Lark(_))));

    let mut wanted = wanted;
    wanted["stream"] = json!(true);
    let chunks = stage.post(CHAT, &chat(&wanted)).await.chunks();
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(
        (&last["choices"][0]["delta"], &last["choices"][0]["finish_reason"]),
        (&json!({}), &json!("tool_calls"))
    );
    let mut arguments = [String::new(), String::new()];
    let mut told = 0;
    for delta in before.iter().filter_map(|c| c["choices"][0]["delta"]["tool_calls"].as_array()).flatten() {
        told += 1;
        arguments[delta["index"].as_u64().unwrap() as usize] +=
            delta["function"]["arguments"].as_str().unwrap();
    }
    assert!(told > 4, "as the model writes it, not at the end: {told}");
    assert_eq!(arguments, ["{\"a\": 1}", "{}"]);
}

#[tokio::test]
async fn tools_that_may_not_be_called_change_nothing() {
    let mut leader = Leader::start(script("Anon")).await;
    let stage = Stage::with(&[&leader]).await;
    for wanted in
        [json!({ "tools": tools(), "tool_choice": "none" }), json!({ "tools": [], "tool_choice": "auto" })]
    {
        let body = stage.post(CHAT, &chat(&wanted)).await.json();
        assert_eq!(
            body["choices"][0]["message"],
            json!({ "role": "assistant", "content": "Anon", "refusal": null })
        );
        let request = patiently(leader.requests.recv()).await.unwrap();
        assert_eq!((request.grammar, request.prompt), (None, ids("user:\nSpeak\n\nassistant:\n")));
    }
    let both =
        json!({ "tools": tools(), "tool_choice": "required", "response_format": { "type": "json_object" } });
    assert_eq!(stage.post(CHAT, &chat(&both)).await.status, 200, "a forced call leaves nothing to be shaped");
}

#[tokio::test]
async fn what_an_answer_must_be_reaches_the_leader() {
    let mut leader = Leader::start(script("Anon")).await;
    let stage = Stage::with(&[&leader]).await;
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "strict": true, "schema": schema } });
    for (wanted, expected) in [
        (json!({ "response_format": format }), Grammar::JsonSchema(schema.to_string())),
        (json!({ "response_format": { "type": "json_object" } }), Grammar::JsonObject(true)),
        (json!({ "guided_regex": "[a-z]+" }), Grammar::Regex("[a-z]+".to_owned())),
        (
            json!({ "structured_outputs": { "grammar": "start: \"a\"" } }),
            Grammar::Lark("start: \"a\"".to_owned()),
        ),
    ] {
        assert_eq!(stage.post(CHAT, &chat(&wanted)).await.status, 200);
        let request = patiently(leader.requests.recv()).await.unwrap();
        assert_eq!(request.grammar.unwrap().grammar, Some(expected));
    }
    let wrong = tonic::Status::invalid_argument("the schema is wrong at /properties/a");
    leader.play(vec![Act::Fail(Failed::from(wrong).about("grammar"))]);
    let reply = stage.post(CHAT, &chat(&json!({ "guided_json": schema }))).await;
    let error = &reply.json()["error"];
    assert_eq!((reply.status, &error["param"]), (400, &json!("guided_json")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("/properties/a"));
    let large = tonic::Status::invalid_argument("the request can need 9 KV blocks, but the group has 8");
    leader.play(vec![Act::Fail(Failed::from(large).about("max_tokens"))]);
    let reply = stage.post(CHAT, &chat(&json!({ "guided_json": schema }))).await;
    assert_eq!(reply.json()["error"]["param"], "max_tokens", "not the grammar is too large");
    let long = "x".repeat((256 << 10) + 1);
    let reply = stage.post(CHAT, &chat(&json!({ "guided_regex": long }))).await;
    assert!(
        reply.status == 400 && reply.body.contains("guided_regex must have at most 262144 bytes"),
        "{reply:?}"
    );
}

#[tokio::test]
async fn a_conversation_may_hold_calls_and_be_continued() {
    let mut leader = Leader::start(script("Anon")).await;
    let stage = Stage::with(&[&leader]).await;
    let call = json!({ "id": "a1b2c3d4e", "type": "function", "function": { "name": "add", "arguments": "{\"a\": 1}" } });
    let messages = json!([
        { "role": "user", "content": "Add" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "a1b2c3d4e", "content": [{ "type": "text", "text": "2" }] },
    ]);
    let reply = stage.post(CHAT, &json!({ "messages": messages, "reasoning_effort": "low" })).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("user:\nAdd\n\nassistant:\n\n\ntool:\n2\n\nassistant:\n"));

    let begun = json!([{ "role": "user", "content": "Add" }, { "role": "assistant", "content": "Two and " }]);
    let body = json!({ "messages": begun, "continue_final_message": true, "chat_template_kwargs": { "preface": "Hm: " } });
    assert_eq!(stage.post(CHAT, &body).await.status, 200);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("Hm: user:\nAdd\n\nassistant:\nTwo and "));
    for wrong in
        [json!({ "continue_final_message": true }), json!({ "chat_template_kwargs": { "messages": [] } })]
    {
        let reply = stage.post(CHAT, &chat(&wrong)).await;
        assert_eq!(reply.status, 400, "{reply:?}");
    }

    let wrong = json!({ "continue_final_message": true, "add_generation_prompt": true });
    let error = stage.post(CHAT, &chat(&wrong)).await.json()["error"].clone();
    assert_eq!(error["param"], "continue_final_message");
}

#[tokio::test]
async fn special_tokens_and_what_stops_are_shown_on_demand() {
    let all = [ids("Anon"), vec![1], ids("!")].concat();
    let last = &all[all.len() - 1..];
    let mut leader = Leader::start(tokens(&all, FinishReason::Length)).await;
    let stage = Stage::with(&[&leader]).await;
    for (wanted, shown) in [
        (json!({}), "Anon!"),
        (json!({ "skip_special_tokens": false }), "Anon<s>!"),
        (json!({ "stop": "no" }), "A"),
        (json!({ "stop": "no", "include_stop_str_in_output": true }), "Ano"),
        (json!({ "stop_token_ids": last }), "Anon"),
        (json!({ "stop_token_ids": last, "include_stop_str_in_output": true }), "Anon!"),
    ] {
        let body = stage.post(CHAT, &chat(&wanted)).await.json();
        assert_eq!(body["choices"][0]["message"]["content"], shown, "{wanted}");
        patiently(leader.requests.recv()).await.unwrap();
    }
    let wanted = json!({ "prompt": "To be", "add_special_tokens": false, "truncate_prompt_tokens": 1,
        "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 0.5,
        "logit_bias": { "7": -100, "5": 1.5 }, "logprobs": 0, "return_tokens_as_token_ids": true });
    let body = stage.post("/v1/completions", &wanted).await.json();
    assert_eq!(body["choices"][0]["logprobs"]["tokens"][0], format!("token_id:{}", all[0]));
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("To be")[ids("To be").len() - 1..]);
    let long: Vec<u32> = (0..3000).map(|at| at % 1000).collect();
    for (truncate, answer, side, kept) in [
        (json!(3), 16, "left", &long[2997..]),
        (json!(3), 16, "right", &long[..3]),
        (json!(-1), 48, "left", &long[1000..]), // the context of 2048 less the answer
    ] {
        let asked = json!({ "prompt": long, "truncate_prompt_tokens": truncate, "max_tokens": answer, "truncation_side": side });
        assert_eq!(stage.post("/v1/completions", &asked).await.status, 200);
        assert_eq!(patiently(leader.requests.recv()).await.unwrap().prompt, kept);
    }
    let sampling = request.sampling.unwrap();
    assert_eq!((sampling.min_p, sampling.repetition_penalty), (0.25, Some(1.5)));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (-1.0, 0.5));
    let bias: Vec<_> = sampling.logit_bias.iter().map(|entry| (entry.id, entry.bias)).collect();
    assert_eq!(bias, [(5, 1.5), (7, -100.0)]);
}

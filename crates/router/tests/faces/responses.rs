//! The Responses API: what comes in, and the events that go out.

use galerne_wire::v1::FinishReason;
use galerne_wire::v1::grammar::Grammar;
use serde_json::{Value, json};

use crate::leader::{Act, Leader, token, tokens};
use crate::stage::{Reply, Stage, ids, patiently};

const PATH: &str = "/v1/responses";
const VERSE: &str = "But soft, what light through yonder window breaks?\n";

fn ask(extra: &Value) -> Value {
    let mut body = json!({ "model": "bard", "input": "Speak" });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The events of a stream, each with its name told twice and its number.
fn events(reply: &Reply) -> Vec<Value> {
    let events = reply.body.split_terminator("\n\n").enumerate().map(|(number, event)| {
        let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(number)));
        data
    });
    events.collect()
}

fn names(events: &[Value]) -> Vec<&str> {
    let mut names: Vec<_> =
        events.iter().map(|event| event["type"].as_str().unwrap().trim_start_matches("response.")).collect();
    names.dedup();
    names
}

#[tokio::test]
async fn a_response_is_given_whole_and_nothing_is_stored() {
    let mut leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted =
        json!({ "instructions": "Brief.", "temperature": 0.5, "store": true, "metadata": { "a": "b" } });
    let reply = stage.post(PATH, &ask(&wanted)).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let body = reply.json();
    assert!(body["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!((&body["object"], &body["status"]), (&json!("response"), &json!("completed")));
    assert_eq!((&body["store"], &body["temperature"]), (&json!(false), &json!(0.5)));
    assert_eq!((&body["metadata"], &body["tools"]), (&json!({ "a": "b" }), &json!([])));
    let part = json!({ "type": "output_text", "text": VERSE, "annotations": [], "logprobs": [] });
    let message = &body["output"][0];
    assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &json!([part])));
    let prompt = ids("system:\nBrief.\n\nuser:\nSpeak\n\nassistant:\n");
    assert_eq!(body["usage"]["input_tokens"], prompt.len());
    assert_eq!(body["usage"]["output_tokens"], ids(VERSE).len());
    assert_eq!(patiently(leader.requests.recv()).await.unwrap().prompt, prompt);

    leader.play(tokens(&ids(VERSE), FinishReason::Length));
    let body = stage.post(PATH, &ask(&json!({ "max_output_tokens": 5 }))).await.json();
    assert_eq!((&body["status"], &body["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
    assert_eq!(body["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(patiently(leader.requests.recv()).await.unwrap().max_tokens, 5);
}

#[tokio::test]
async fn a_response_is_streamed_in_typed_events() {
    let leader = Leader::start(tokens(&ids(VERSE), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let wanted = json!({ "stream": true, "include": ["message.output_text.logprobs"], "top_logprobs": 1 });
    let events = events(&stage.post(PATH, &ask(&wanted)).await);
    assert_eq!(
        names(&events),
        [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed"
        ]
    );
    let text: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(text, VERSE);
    let shown = events.iter().filter(|event| event["delta"].is_string());
    let shown: usize = shown.map(|event| event["logprobs"].as_array().unwrap().len()).sum();
    assert_eq!(shown, ids(VERSE).len());
    let response = &events.last().unwrap()["response"];
    assert_eq!(response["output"][0]["content"][0]["text"], VERSE);
    assert_eq!(response["output"][0]["content"][0]["logprobs"].as_array().unwrap().len(), ids(VERSE).len());
    assert_eq!(response["usage"]["output_tokens"], ids(VERSE).len());
    assert_eq!(
        (&events[0]["response"]["status"], &response["status"]),
        (&json!("in_progress"), &json!("completed"))
    );

    leader.play(tokens(&[2], FinishReason::Stop));
    let empty = self::events(&stage.post(PATH, &ask(&json!({ "stream": true }))).await);
    assert_eq!(empty.last().unwrap()["response"]["output"][0]["content"][0]["text"], "");
}

#[tokio::test]
async fn a_function_is_called_and_its_output_sent_back() {
    let mut leader = Leader::start(tokens(&ids("{\"a\": 1}"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let tool =
        json!({ "type": "function", "name": "add", "parameters": { "type": "object" }, "strict": true });
    let wanted = json!({ "tools": [tool], "tool_choice": { "type": "function", "name": "add" } });
    let body = stage.post(PATH, &ask(&wanted)).await.json();
    let call = &body["output"][0];
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("add")));
    assert_eq!((&call["arguments"], body["output"].as_array().unwrap().len()), (&json!("{\"a\": 1}"), 1));
    assert_eq!((&body["tools"][0], &body["tool_choice"]["name"]), (&tool, &json!("add")));
    assert!(patiently(leader.requests.recv()).await.unwrap().grammar.is_some());

    let mut streamed = wanted;
    streamed["stream"] = json!(true);
    let events = events(&stage.post(PATH, &ask(&streamed)).await);
    assert_eq!(
        names(&events),
        [
            "created",
            "in_progress",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed"
        ]
    );
    assert_eq!(events.last().unwrap()["response"]["output"][0]["arguments"], "{\"a\": 1}");

    patiently(leader.requests.recv()).await.unwrap();
    let output = json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "2" });
    let input = json!([{ "role": "user", "content": "Add" }, call, output]);
    assert_eq!(stage.post(PATH, &json!({ "input": input })).await.status, 200);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(request.prompt, ids("user:\nAdd\n\nassistant:\n\n\ntool:\n2\n\nassistant:\n"));
}

#[tokio::test]
async fn a_format_is_a_grammar_and_what_is_not_served_is_refused() {
    let mut leader = Leader::start(tokens(&ids("{}"), FinishReason::Stop)).await;
    let stage = Stage::with(&[&leader]).await;
    let format =
        json!({ "type": "json_schema", "name": "x", "schema": { "type": "object" }, "strict": true });
    assert_eq!(stage.post(PATH, &ask(&json!({ "text": { "format": format } }))).await.status, 200);
    let request = patiently(leader.requests.recv()).await.unwrap();
    assert_eq!(
        request.grammar.unwrap().grammar,
        Some(Grammar::JsonSchema("{\"type\":\"object\"}".to_owned()))
    );
    for (wanted, field) in [
        (json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
        (json!({ "background": true }), "background"),
        (json!({ "conversation": "conv_1" }), "conversation"),
        (json!({ "truncation": "auto" }), "truncation"),
        (json!({ "tools": [{ "type": "web_search" }] }), "tools"),
        (json!({ "tool_choice": { "type": "mcp" } }), "tool_choice"),
        (json!({ "text": { "format": { "type": "xml" } } }), "text"),
        (json!({ "text": { "verbosity": "low" } }), "text"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [{ "type": "item_reference", "id": "a" }] }), "input"),
        (json!({ "inptu": 1 }), "inptu"),
    ] {
        let reply = stage.post(PATH, &ask(&wanted)).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{wanted}");
    }
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_an_event() {
    let lost = Act::Fail(tonic::Status::internal("gone").into());
    let leader = Leader::start(vec![Act::Token(token(ids("But")[0])), lost]).await;
    let stage = Stage::with(&[&leader]).await;
    let events = events(&stage.post(PATH, &ask(&json!({ "stream": true }))).await);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"]["code"], "server_error");
    assert!(last["response"]["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
}

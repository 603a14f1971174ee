//! JSON bodies of every HTTP face.

use std::time::Duration;

use serde_json::{Value, json};

use crate::engine::{Target, alone, fuzz, mutate};

/// Stands in every request and in no refusal.
const SECRET: &str = "zebrafink";

/// Fields that some request has, and values that some field wants.
const WORDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "include_usage",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "json_schema",
    "guided_regex",
    "guided_choice",
    "structured_outputs",
    "stop_token_ids",
    "min_tokens",
    "echo",
    "suffix",
    "user",
    "metadata",
    "parallel_tool_calls",
    "role",
    "content",
    "assistant",
    "tool_calls",
    "arguments",
    "required",
    "auto",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "format",
    "input_text",
    "function_call_output",
    "prefix",
    "random_seed",
    "safe_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
    "tokens",
    "ignore_eos",
    "bard",
    "type",
    "any",
];

fn seeds() -> Vec<(&'static str, Value)> {
    let user = json!([{"role": "system", "content": "x"}, {"role": "user", "content": SECRET}]);
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let tool = json!([{"type": "function", "function": {"name": "f", "description": SECRET, "parameters": parameters}}]);
    let called = json!([{"role": "user", "content": [{"type": "text", "text": SECRET}]},
        {"role": "assistant", "tool_calls": [{"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "123456789", "content": "1"}]);
    let schema =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": parameters, "strict": true}});
    let output =
        json!([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": SECRET}]}]);
    vec![
        (
            "/v1/chat/completions",
            json!({"model": "bard", "messages": user, "max_tokens": 4, "temperature": 0.5, "n": 2, "logprobs": true,
            "top_logprobs": 2, "stop": ["x"], "seed": 1, "user": "u", "metadata": {}}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": called, "tools": tool, "tool_choice": "auto", "stream": true,
            "stream_options": {"include_usage": true}}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "response_format": schema, "max_completion_tokens": 9, "logit_bias": {"5": -1}}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": "bard", "messages": user, "random_seed": 1, "safe_prompt": true, "tool_choice": "any", "tools": tool}),
        ),
        (
            "/v1/completions",
            json!({"model": "bard", "prompt": [SECRET, "b"], "echo": true, "logprobs": 1, "best_of": 2, "max_tokens": 2}),
        ),
        (
            "/v1/completions",
            json!({"prompt": [1, 2, 3], "stream": true, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [2]}),
        ),
        (
            "/v1/completions",
            json!({"prompt": SECRET, "guided_regex": "a+", "prompt_logprobs": 1, "truncate_prompt_tokens": 5}),
        ),
        (
            "/v1/responses",
            json!({"model": "bard", "input": output, "instructions": "x", "max_output_tokens": 9, "tools": [], "stream": true}),
        ),
        (
            "/v1/responses",
            json!({"input": SECRET, "text": {"format": {"type": "text"}}, "store": false, "temperature": 1}),
        ),
        ("/v1/fim/completions", json!({"model": "bard", "prompt": SECRET, "suffix": "b", "max_tokens": 3})),
        ("/v1/agents/completions", json!({"agent_id": "x", "messages": user})),
        (
            "/tokenize",
            json!({"model": "bard", "prompt": SECRET, "add_special_tokens": true, "return_token_strs": true}),
        ),
        ("/tokenize", json!({"messages": user, "tools": tool, "add_generation_prompt": true})),
        ("/detokenize", json!({"model": "bard", "tokens": [1, 2, 3]})),
    ]
}

/// The face's own sentence in an error.
fn sentence(body: &Value) -> Option<&str> {
    [
        &body["error"]["message"],
        &body["message"],
        &body["detail"][0]["msg"],
        &body["message"]["detail"][0]["msg"],
    ]
    .into_iter()
    .find_map(Value::as_str)
}

#[test]
fn bodies() {
    let alone = alone();
    let (runtime, _leader, stage) = crate::stage();
    let target = Target {
        name: "bodies",
        seeds: seeds().iter().map(|(path, body)| format!("{path} {body}").into_bytes()).collect(),
        words: WORDS,
        change: |seed, input, other, words| {
            let parts = |input: &[u8]| {
                let end = input.iter().position(|byte| *byte == b' ').unwrap_or(input.len());
                (input[..end].to_vec(), input[end..].to_vec())
            };
            let ((path, body), (_, other)) = (parts(input), parts(other));
            let body = mutate::json(seed, body.trim_ascii_start(), &other, words);
            [&path[..], b" ", &body].concat()
        },
        runs: 2_000,
        memory_bytes: (8 << 20, 600),
        cpu: (Duration::from_secs(4), Duration::from_micros(50)),
        secret: Some(SECRET),
    };
    fuzz(&alone, &target, |input| {
        let text = String::from_utf8_lossy(input);
        let (path, body) = text.split_once(' ').unwrap_or((&text, ""));
        if !seeds().iter().any(|(known, _)| *known == path) {
            return Ok(());
        }
        let reply = runtime.block_on(async { stage.post_raw(path, body).await.rest().await });
        match reply.status {
            200 => Ok(()),
            400..500 => {
                let error = reply.json();
                Err(sentence(&error).unwrap_or_else(|| panic!("no sentence: {error}")).to_owned())
            }
            _ => panic!("it answers {}: {}", reply.status, reply.body.chars().take(200).collect::<String>()),
        }
    });
}

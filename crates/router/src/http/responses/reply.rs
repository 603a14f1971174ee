//! A response as JSON, and the items in it.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use galerne_types::TokenOut;
use serde_json::{Map, Value, json};

use crate::ask::random_seed;
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::error::ApiError;
use crate::http::gather::{Call, Gathered};
use crate::http::openai::logprobs::{Logprobs, Spelling};
use crate::http::openai::reply::View;
use crate::http::shape::Finish;
use crate::http::stream;

/// What all forms of one response have in common.
pub(super) struct Reply {
    /// `resp_…`
    pub(super) id: String,
    pub(super) view: View,
    /// What it repeats of its request.
    terms: Map<String, Value>,
    /// Its items are named by this and their number.
    mark: String,
}

/// How far a response, or an item of it, has come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
        }
    }

    pub(super) fn of(finish: Option<Finish>) -> Self {
        match finish {
            Some(Finish::Stop | Finish::ToolCalls) => Self::Completed,
            Some(Finish::Length) => Self::Incomplete,
            Some(Finish::Error) | None => Self::Failed,
        }
    }
}

impl Reply {
    pub(super) fn new(mut terms: Map<String, Value>, view: View, choices: &Choices) -> Result<Self, Failure> {
        let mark = format!("{:016x}{:016x}", random_seed(), random_seed());
        let id = format!("resp_{mark}");
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        terms.insert("id".to_owned(), id.as_str().into());
        terms.insert("created_at".to_owned(), created.into());
        terms.insert("model".to_owned(), choices.model().name.as_str().into());
        Ok(Self { id, view, terms, mark })
    }

    /// The one body of a response that is not streamed.
    pub(super) fn whole(&self, choices: &Choices, all: &[Gathered]) -> Result<Bytes, Failure> {
        let mut output = Vec::new();
        let status = Status::of(all.first().and_then(|one| one.finish));
        for one in all {
            if !one.text.is_empty() || one.calls.is_empty() {
                let item = Self::message(
                    &self.item_id("msg", 0),
                    status,
                    &self.part(choices, &one.text, &one.tokens),
                );
                output.push(item);
            }
            for call in &one.calls {
                output.push(Self::call(&self.item_id("fc", output.len()), status, call));
            }
        }
        let mut out = BytesMut::new();
        stream::json(&mut out, &self.object(status, &output, Some(choices), None))?;
        Ok(out.freeze())
    }

    /// The response so far; `choices` tell the usage of one that has ended.
    pub(super) fn object(
        &self,
        status: Status,
        output: &[Value],
        choices: Option<&Choices>,
        error: Option<&ApiError>,
    ) -> Value {
        let mut object = self.terms.clone();
        let mut set = |name: &str, value: Value| object.insert(name.to_owned(), value);
        set("status", status.name().into());
        set("output", output.into());
        set("usage", choices.map_or(Value::Null, usage));
        let details = (status == Status::Incomplete).then(|| json!({ "reason": "max_output_tokens" }));
        set("incomplete_details", details.into());
        let error = error.map(|error| json!({ "code": "server_error", "message": error.message() }));
        set("error", error.into());
        object.into()
    }

    pub(super) fn item_id(&self, prefix: &str, number: usize) -> String {
        format!("{prefix}_{}_{number}", self.mark)
    }

    /// A text as a part of a message.
    pub(super) fn part(&self, choices: &Choices, text: &str, tokens: &[TokenOut]) -> Value {
        json!({
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self.logprobs(choices, tokens),
        })
    }

    /// Log probabilities as this API lists them; empty if nobody asked for them.
    pub(super) fn logprobs(&self, choices: &Choices, tokens: &[TokenOut]) -> Value {
        let spelling = Spelling { tokenizer: &choices.model().tokenizer, as_ids: self.view.tokens_as_ids };
        let shown = if self.view.logprobs { tokens } else { &[] };
        match serde_json::to_value(Logprobs::chat(spelling, shown)) {
            Ok(mut logprobs) => logprobs["content"].take(),
            Err(_) => json!([]),
        }
    }

    pub(super) fn message(id: &str, status: Status, part: &Value) -> Value {
        let content = if status == Status::InProgress { json!([]) } else { json!([part]) };
        json!({ "id": id, "type": "message", "status": status.name(), "role": "assistant", "content": content })
    }

    pub(super) fn call(id: &str, status: Status, call: &Call) -> Value {
        let Call { id: call_id, name, arguments } = call;
        json!({
            "id": id,
            "type": "function_call",
            "status": status.name(),
            "call_id": call_id,
            "name": name,
            "arguments": arguments,
        })
    }
}

fn usage(choices: &Choices) -> Value {
    let (input, output) = (choices.prompt_tokens(), choices.generated());
    json!({
        "input_tokens": input,
        "input_tokens_details": { "cached_tokens": choices.cached_tokens(), "cache_write_tokens": 0 },
        "output_tokens": output,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": input + output,
    })
}

//! A response as typed events.

use bytes::{BufMut, BytesMut};
use galerne_text::Part;
use galerne_types::TokenOut;
use serde::Serialize;
use serde_json::{Value, json};

use super::reply::{Reply, Status};
use crate::answer::Delta;
use crate::choices::Choices;
use crate::failure::Failure;
use crate::http::error::ApiError;
use crate::http::gather::Call;
use crate::http::shape::{Calls, Finish, Ids, Shaped, Shaper};
use crate::http::stream::{Dialect, json};

/// A response in events.
pub(super) struct ResponseStream {
    reply: Reply,
    shaper: Shaper,
    /// Items that are complete.
    items: Vec<Value>,
    /// The item that is being written.
    open: Option<Open>,
    /// Number of the next event.
    sequence: u64,
    finish: Option<Finish>,
}

/// An item that is being written, and its name.
struct Open {
    id: String,
    what: What,
}

enum What {
    Message {
        text: String,
        tokens: Vec<TokenOut>,
        /// Tokens whose log probabilities have been shown.
        shown: usize,
    },
    Call(Call),
}

/// One event.
#[derive(Serialize)]
struct Event<'a, T> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: &'a T,
}

/// More of a text or of arguments: most events are this.
#[derive(Serialize)]
struct More<'a> {
    output_index: usize,
    item_id: &'a str,
    delta: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Value>,
}

impl ResponseStream {
    pub(super) fn new(reply: Reply, calls: &Calls) -> Result<Self, Failure> {
        let shaper = Shaper::new(calls, Ids::of(calls))?;
        Ok(Self { reply, shaper, items: Vec::new(), open: None, sequence: 0, finish: None })
    }

    fn tell(&mut self, out: &mut BytesMut, name: &'static str, body: &impl Serialize) -> Result<(), Failure> {
        out.put_slice(b"event: ");
        out.put_slice(name.as_bytes());
        out.put_slice(b"\ndata: ");
        json(out, &Event { r#type: name, sequence_number: self.sequence, body })?;
        out.put_slice(b"\n\n");
        self.sequence += 1;
        Ok(())
    }

    /// Tells that there is a response, once.
    fn begin(&mut self, out: &mut BytesMut) -> Result<(), Failure> {
        if self.sequence > 0 {
            return Ok(());
        }
        let response = json!({ "response": self.reply.object(Status::InProgress, &[], None, None) });
        self.tell(out, "response.created", &response)?;
        self.tell(out, "response.in_progress", &response)
    }

    /// Opens a message, if none is open.
    fn open_message(&mut self, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        if let Some(Open { what: What::Message { .. }, .. }) = &self.open {
            return Ok(());
        }
        self.close(Status::Completed, choices, out)?;
        let (index, id) = (self.items.len(), self.reply.item_id("msg", self.items.len()));
        let item = Reply::message(&id, Status::InProgress, &Value::Null);
        self.tell(out, "response.output_item.added", &json!({ "output_index": index, "item": item }))?;
        let part = self.reply.part(choices, "", &[]);
        let body = json!({ "output_index": index, "item_id": id, "content_index": 0, "part": part });
        self.tell(out, "response.content_part.added", &body)?;
        let what = What::Message { text: String::new(), tokens: Vec::new(), shown: 0 };
        self.open = Some(Open { id, what });
        Ok(())
    }

    fn say(&mut self, delta: &str, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        self.open_message(choices, out)?;
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if let What::Message { text, tokens, shown } = &mut open.what {
            text.push_str(delta);
            let logprobs = Some(self.reply.logprobs(choices, &tokens[*shown..]));
            *shown = tokens.len();
            let (output_index, item_id) = (self.items.len(), open.id.as_str());
            let more = More { output_index, item_id, delta, content_index: Some(0), logprobs };
            self.tell(out, "response.output_text.delta", &more)?;
        }
        self.open = Some(open);
        Ok(())
    }

    fn call(&mut self, part: Part, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        match part {
            Part::Content(_) => Ok(()), // words are told apart from calls before
            Part::Call { index: _, id: call_id, name } => {
                self.close(Status::Completed, choices, out)?;
                let (index, id) = (self.items.len(), self.reply.item_id("fc", self.items.len()));
                let call = Call { id: call_id, name, arguments: String::new() };
                let item = Reply::call(&id, Status::InProgress, &call);
                self.open = Some(Open { id, what: What::Call(call) });
                self.tell(out, "response.output_item.added", &json!({ "output_index": index, "item": item }))
            }
            Part::Arguments { index: _, text } => {
                let Some(mut open) = self.open.take() else { return Ok(()) };
                if let What::Call(call) = &mut open.what {
                    call.arguments.push_str(&text);
                    let (output_index, item_id) = (self.items.len(), open.id.as_str());
                    let more =
                        More { output_index, item_id, delta: &text, content_index: None, logprobs: None };
                    self.tell(out, "response.function_call_arguments.delta", &more)?;
                }
                self.open = Some(open);
                Ok(())
            }
        }
    }

    /// Ends the item that is being written, if one is.
    fn close(&mut self, status: Status, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        let Some(Open { id, what }) = self.open.take() else { return Ok(()) };
        let index = self.items.len();
        let item = match what {
            What::Message { text, tokens, shown: _ } => {
                let part = self.reply.part(choices, &text, &tokens);
                let at = json!({ "output_index": index, "item_id": id, "content_index": 0 });
                let with = |more: Value| merged(&at, more);
                let done = with(json!({ "text": text, "logprobs": part["logprobs"] }));
                self.tell(out, "response.output_text.done", &done)?;
                self.tell(out, "response.content_part.done", &with(json!({ "part": part })))?;
                Reply::message(&id, status, &part)
            }
            What::Call(call) => {
                let Call { id: _, name, arguments } = &call;
                let done =
                    json!({ "output_index": index, "item_id": id, "name": name, "arguments": arguments });
                self.tell(out, "response.function_call_arguments.done", &done)?;
                Reply::call(&id, status, &call)
            }
        };
        self.tell(out, "response.output_item.done", &json!({ "output_index": index, "item": item }))?;
        self.items.push(item);
        Ok(())
    }
}

impl Dialect for ResponseStream {
    fn delta(
        &mut self,
        _: usize,
        delta: Delta,
        choices: &Choices,
        out: &mut BytesMut,
    ) -> Result<(), Failure> {
        self.begin(out)?;
        let Shaped { text, calls, token, finish, stopped: _ } = self.shaper.push(delta)?;
        self.finish = finish.or(self.finish);
        if let Some(token) = token.filter(|_| self.reply.view.logprobs && calls.is_empty()) {
            self.open_message(choices, out)?;
            if let Some(Open { what: What::Message { tokens, .. }, .. }) = &mut self.open {
                tokens.push(token);
            }
        }
        if !text.is_empty() {
            self.say(&text, choices, out)?;
        }
        calls.into_iter().try_for_each(|part| self.call(part, choices, out))
    }

    fn end(&mut self, choices: &Choices, out: &mut BytesMut) -> Result<(), Failure> {
        let status = Status::of(self.finish);
        if self.items.is_empty() && self.open.is_none() {
            self.open_message(choices, out)?; // as in an answer that is not streamed
        }
        self.close(status, choices, out)?;
        let response = json!({ "response": self.reply.object(status, &self.items, Some(choices), None) });
        let name = match status {
            Status::Incomplete => "response.incomplete",
            Status::Failed => "response.failed",
            Status::Completed | Status::InProgress => "response.completed",
        };
        self.tell(out, name, &response)
    }

    fn fail(&mut self, error: &ApiError, out: &mut BytesMut) {
        let response = self.reply.object(Status::Failed, &self.items, None, Some(error));
        let told = self.begin(out);
        let told = told.and_then(|()| self.tell(out, "response.failed", &json!({ "response": response })));
        if let Err(failure) = told {
            tracing::debug!(%failure, "a response's failure could not be told");
        }
    }
}

/// The fields of one object and of another.
fn merged(one: &Value, other: Value) -> Value {
    let mut both = one.as_object().cloned().unwrap_or_default();
    if let Value::Object(other) = other {
        both.extend(other);
    }
    both.into()
}

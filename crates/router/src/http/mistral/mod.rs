//! Mistral's API, where it differs from OpenAI's: fill-in-the-middle at a path of its own; and at the path that both
//! share, the shape of answers and errors for clients that speak Mistral's.

mod errors;
mod fim;
mod reply;

use std::convert::Infallible;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use self::reply::ChatStream;
use super::body::read;
use super::error::ApiError;
use super::fields::Fields;
use super::gather::gather;
use super::openai::reply::Form;
use super::shape::Ids;
use super::{openai, stream};
use crate::ask::{Caller, Several};
use crate::choices::Choices;
use crate::serve::Router;

pub(super) use self::errors::{expects_errors, in_its_shape};

/// How Mistral's own clients introduce themselves, in any language.
const USER_AGENT: &str = "mistral-client-";

/// Fields of a chat that only Mistral's API has.
const MARKS: [&str; 5] = ["guardrails", "prompt_mode", "random_seed", "safe_prompt", "top_prompt_logprobs"];

/// What Mistral documents that `safe_prompt` puts before a conversation.
const SAFE_PROMPT: &str = "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid \
                           harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and \
                           positivity.";

/// What Mistral's formats put between two system messages, and between two parts of one.
const SEPARATOR: &str = "\n\n";

/// Whose API a client speaks, as far as its head tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    Mistral,
    Other,
}

impl Client {
    fn of(headers: &HeaderMap) -> Self {
        let name = headers.get(header::USER_AGENT);
        match name.is_some_and(|name| name.as_bytes().starts_with(USER_AGENT.as_bytes())) {
            true => Self::Mistral,
            false => Self::Other,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Client {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.headers))
    }
}

/// Whether a body has fields that only Mistral's API has.
pub(super) fn speaks(fields: &Fields<'_>) -> bool {
    MARKS.iter().any(|name| fields.has(name))
}

/// The text that an answer goes on with, if the last of these turns says that it does.
pub(super) fn lead(turns: &[Value]) -> Option<String> {
    let last = turns.last().filter(|turn| turn["prefix"] == true)?;
    match &last["content"] {
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part["text"].as_str());
            Some(texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join(SEPARATOR))
        }
        content => content.as_str().map(str::to_owned),
    }
}

/// Puts the safety prompt before a conversation; one system message stays one, because templates may want that.
pub(super) fn make_safe(turns: &mut Vec<Value>) {
    let first = turns.first_mut().filter(|turn| turn["role"] == "system");
    match first.map(|turn| &mut turn["content"]) {
        Some(Value::String(own)) => own.insert_str(0, &format!("{SAFE_PROMPT}{SEPARATOR}")),
        Some(Value::Array(parts)) => parts.insert(0, json!({ "type": "text", "text": SAFE_PROMPT })),
        _ => turns.insert(0, json!({ "role": "system", "content": SAFE_PROMPT })),
    }
}

/// `POST /v1/fim/completions`
pub(super) async fn fim(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Response, ApiError> {
    let wanted = fim::parse(&router.requests, &read(body, &caller, &router.limits).await?)?;
    answer(&router, caller, wanted).await
}

/// `POST /v1/agents/completions`
pub(super) async fn agents() -> ApiError {
    let message = "no agents are kept here: send what the agent has, its instructions as a system message and its \
                   tools, to /v1/chat/completions";
    ApiError::new(StatusCode::NOT_FOUND, Some("unknown_url"), message)
}

/// Answers as Mistral does.
pub(super) async fn answer(
    router: &Arc<Router>,
    caller: Caller,
    wanted: openai::Wanted,
) -> Result<Response, ApiError> {
    let openai::Wanted { asked, view, calls, lead, name, mistral: _ } = wanted;
    let mut choices = Choices::start(router, Several { caller, ..asked }).await?;
    let form = Form::new("cmpl", name, view, &choices)?;
    let id = form.id.clone();
    if view.stream {
        let chunks = ChatStream::new(form, &calls, lead, &choices)?;
        return Ok(openai::events(id, stream::body(chunks, choices)));
    }
    let all = gather(&mut choices, &calls, Ids::Mistral).await?;
    Ok(openai::whole(id, reply::whole(&form, &choices, &all, &lead)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_safety_prompt_comes_first_and_once() {
        let user = json!({ "role": "user", "content": "Speak" });
        let mut turns = vec![user.clone()];
        make_safe(&mut turns);
        assert_eq!(turns, [json!({ "role": "system", "content": SAFE_PROMPT }), user.clone()]);
        let mut turns = vec![json!({ "role": "system", "content": "Brief." }), user.clone()];
        make_safe(&mut turns);
        let joined = format!("{SAFE_PROMPT}\n\nBrief.");
        assert_eq!(turns, [json!({ "role": "system", "content": joined }), user]);
        let part = |text: &str| json!({ "type": "text", "text": text });
        let mut turns = vec![json!({ "role": "system", "content": [part("Brief.")] })];
        make_safe(&mut turns);
        assert_eq!(turns[0]["content"], json!([part(SAFE_PROMPT), part("Brief.")]));
    }

    #[test]
    fn a_prefix_in_parts_is_one_text() {
        let turn = |content: Value| [json!({ "role": "assistant", "content": content, "prefix": true })];
        let parts = json!([{ "type": "text", "text": "But" }, { "type": "text", "text": "soft" }]);
        assert_eq!(lead(&turn(parts)).as_deref(), Some("But\n\nsoft"));
        assert_eq!(lead(&turn(json!("But"))).as_deref(), Some("But"));
        assert_eq!(lead(&[json!({ "role": "assistant", "content": "But" })]), None);
    }
}

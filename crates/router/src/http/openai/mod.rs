//! OpenAI's API: chat completions, completions, models; with vLLM's additions.

mod chat;
pub(super) mod chat_reply;
mod completion;
pub(super) mod format;
mod known;
pub(super) mod logprobs;
mod messages;
mod models;
pub(super) mod options;
pub(super) mod reply;
mod text_reply;
pub(super) mod tools;

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;

use self::chat_reply::ChatStream;
use self::reply::Form;
use self::text_reply::TextStream;
use super::body::read;
use super::error::ApiError;
use super::gather::gather;
use super::mistral::Client;
use super::name::RequestName;
use super::shape::{Calls, Ids};
use super::{mistral, stream};
use crate::ask::{Caller, Several};
use crate::choices::Choices;
use crate::serve::Router;

pub(super) use self::chat::{Wanted, conversation};
pub(super) use self::known::KNOWN;
pub(super) use self::models::{model, models};

/// The header that names an answer, also when its body does not.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The header that keeps a reverse proxy from holding events back.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// `POST /v1/chat/completions`
pub(super) async fn chat(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    client: Client,
    named: RequestName,
    body: Body,
) -> Result<Response, ApiError> {
    let wanted = chat::parse(&router, &read(body, &caller, &router.limits).await?)?;
    if wanted.mistral || client == Client::Mistral {
        return mistral::answer(&router, caller, wanted).await;
    }
    let chat::Wanted { asked, view, calls, name, .. } = wanted;
    let mut choices = Choices::start(&router, Several { caller, ..asked }).await?;
    let form = Form::new("chatcmpl", named.or(name), view, &choices)?;
    let id = form.id.clone();
    if view.stream {
        let chunks = ChatStream::new(form, &calls, &choices)?;
        return Ok(events(id, stream::body(chunks, choices)));
    }
    let all = gather(&mut choices, &calls, Ids::of(&calls)).await?;
    Ok(whole(id, chat_reply::whole(&form, &choices, &all)?))
}

/// `POST /v1/completions`
pub(super) async fn completion(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    named: RequestName,
    body: Body,
) -> Result<Response, ApiError> {
    let completion::Wanted { asked, view, echo, name, keep } =
        completion::parse(&router.requests, &read(body, &caller, &router.limits).await?)?;
    let mut choices = Choices::start(&router, Several { caller, ..asked }).await?;
    let form = Form::new("cmpl", named.or(name), view, &choices)?;
    let id = form.id.clone();
    if view.stream {
        let chunks = TextStream::new(form, echo, &choices)?;
        return Ok(events(id, stream::body(chunks, choices)));
    }
    let all = gather(&mut choices, &Calls::Never, Ids::OpenAi).await?;
    Ok(whole(id, text_reply::whole(&form, &choices, &all, keep, &echo)?))
}

/// A response of server-sent events.
pub(super) fn events(id: String, body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream".to_owned()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        (ACCEL_BUFFERING, "no".to_owned()),
        (REQUEST_ID, id),
    ];
    (headers, body).into_response()
}

/// A response of one JSON body.
pub(super) fn whole(id: String, body: Bytes) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (REQUEST_ID, id)];
    (headers, body).into_response()
}

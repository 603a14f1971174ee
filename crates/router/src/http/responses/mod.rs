//! OpenAI's Responses API without stored state: every request brings its whole conversation, and nothing is kept of
//! its answer.

mod events;
mod input;
mod known;
mod reply;
mod request;

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;

use self::events::ResponseStream;
use self::reply::Reply;
use super::body::read;
use super::error::ApiError;
use super::gather::gather;
use super::shape::Ids;
use super::{openai, stream};
use crate::ask::{Caller, Several};
use crate::choices::Choices;
use crate::serve::Router;

/// `POST /v1/responses`
pub(super) async fn responses(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Response, ApiError> {
    let request::Wanted { asked, view, calls, terms } =
        request::parse(&router, &read(body, &caller, &router.limits).await?)?;
    let body_bytes = caller.held();
    let mut choices = Choices::start(&router, Several { caller: caller.clone(), ..asked }).await?;
    caller.keep(body_bytes)?; // the answer repeats its terms
    let reply = Reply::new(terms, view, &choices)?;
    let id = reply.id.clone();
    if view.stream {
        let events = ResponseStream::new(reply, &calls)?;
        return Ok(openai::events(id, stream::body(events, choices)));
    }
    let all = gather(&mut choices, &calls, Ids::of(&calls)).await?;
    Ok(openai::whole(id, reply.whole(&choices, &all)?))
}

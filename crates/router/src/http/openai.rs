//! OpenAI's API: chat completions, completions, models.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use galerne_types::ModelCard;
use serde_json::{Value, json};

use super::error::ApiError;
use super::request::{self, Wanted};
use super::response::{Form, Gathered, Kind};
use super::{body, events};
use crate::answer::Answer;
use crate::ask::{Ask, Caller, random_seed};
use crate::failure::Failure;
use crate::serve::Router;

/// The header that names an answer, also when its body does not.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The header that keeps a reverse proxy from holding events back.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// `POST /v1/chat/completions`
pub(super) async fn chat(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Response, ApiError> {
    let wanted = request::chat(&body::read(body, &router.limits).await?)?;
    complete(&router, Kind::Chat, wanted, caller).await
}

/// `POST /v1/completions`
pub(super) async fn completion(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Response, ApiError> {
    let wanted = request::completion(&body::read(body, &router.limits).await?)?;
    complete(&router, Kind::Text, wanted, caller).await
}

/// `GET /v1/models`
pub(super) async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let cards = router.models.keys().filter_map(|name| router.groups.card(name));
    Json(json!({ "object": "list", "data": cards.map(|card| model_object(&card)).collect::<Vec<_>>() }))
}

/// `GET /v1/models/{id}`
pub(super) async fn model(
    State(router): State<Arc<Router>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = router.model(&name)?;
    let card = router.groups.card(&model.name).ok_or(Failure::NoGroup { model: name })?;
    Ok(Json(model_object(&card)))
}

fn model_object(card: &ModelCard) -> Value {
    json!({
        "id": card.name,
        "object": "model",
        "created": 0, // when its weights were made is not known
        "owned_by": "galerne",
        "root": card.name,
        "max_model_len": card.context_tokens_max,
    })
}

async fn complete(
    router: &Arc<Router>,
    kind: Kind,
    wanted: Wanted,
    caller: Caller,
) -> Result<Response, ApiError> {
    let Wanted { ask, view } = wanted;
    let mut answer = Answer::start(router, Ask { caller, ..ask }).await?;
    let id = format!("{}-{:016x}{:016x}", kind.id_prefix(), random_seed()?, random_seed()?);
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let form = Form::new(kind, view, id, created, &answer);
    let request_id = (REQUEST_ID, form.id.clone());
    if view.stream {
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream".to_owned()),
            (header::CACHE_CONTROL, "no-cache".to_owned()),
            (ACCEL_BUFFERING, "no".to_owned()),
            request_id,
        ];
        return Ok((headers, events::body(form, answer)).into_response());
    }
    let mut all = Gathered::default();
    while let Some(delta) = answer.next().await {
        all.add(delta?);
    }
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), request_id];
    Ok((headers, form.whole(&all, &answer)?).into_response())
}

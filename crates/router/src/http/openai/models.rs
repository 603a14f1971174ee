//! The models that are served.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use galerne_types::ModelCard;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::http::error::ApiError;
use crate::model::Model;
use crate::serve::Router;

/// `GET /v1/models`
pub(in crate::http) async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let served = router.models.values().filter_map(|model| Some((model, router.groups.card(&model.name)?)));
    let objects = served.map(|(model, card)| model_object(model, &card));
    Json(json!({ "object": "list", "data": objects.collect::<Vec<_>>() }))
}

/// `GET /v1/models/{id}`
pub(in crate::http) async fn model(
    State(router): State<Arc<Router>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|_| ApiError::invalid(Some("model"), "a model's name is UTF-8 text"))?;
    let model = router.model(&name)?;
    let card = router.groups.card(&model.name).ok_or(Failure::NoGroup { model: name, begun: false })?;
    Ok(Json(model_object(&model, &card)))
}

/// A model as OpenAI, vLLM and Mistral describe it: each one's clients ignore what the others add.
fn model_object(model: &Model, card: &ModelCard) -> Value {
    let permission = json!({
        "id": format!("modelperm-{}", card.name),
        "object": "model_permission",
        "created": 0,
        "allow_create_engine": false,
        "allow_sampling": true,
        "allow_logprobs": true,
        "allow_search_indices": false,
        "allow_view": true,
        "allow_fine_tuning": false,
        "organization": "*",
        "group": null,
        "is_blocking": false,
    });
    json!({
        "id": card.name,
        "object": "model",
        "created": 0, // when its weights were made is not known
        "owned_by": "galerne",
        "root": card.name,
        "parent": null,
        "max_model_len": card.context_tokens_max,
        "permission": [permission],
        "type": "base", // the rest is Mistral's
        "name": card.name,
        "description": null,
        "aliases": [],
        "max_context_length": card.context_tokens_max,
        "default_model_temperature": 1.0,
        "deprecation": null,
        "capabilities": {
            "completion_chat": model.chat.is_some(),
            "completion_fim": model.tokenizer.encode_fim("", "").is_ok(),
            "function_calling": model.chat.as_ref().is_some_and(|chat| chat.tool_format().is_some()),
            "fine_tuning": false,
            "vision": false,
        },
    })
}

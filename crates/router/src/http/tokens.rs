//! vLLM's `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::{Extension, Json};
use galerne_types::TokenId;
use serde_json::{Value, json};

use super::body::read;
use super::error::ApiError;
use super::fields::Fields;
use super::openai;
use crate::ask::{Caller, Prompt};
use crate::serve::Router;
use crate::tokens;

/// `POST /tokenize`: a text or a conversation, with what a model wants around it, or without.
pub(super) async fn tokenize(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read(body, &caller, &router.limits).await?;
    let mut fields = Fields::parse(&body)?;
    let model: String = fields.take("model", "a string")?.unwrap_or_default();
    let text: Option<String> = fields.take("prompt", "a string")?;
    let special = fields.take::<bool>("add_special_tokens", "true or false")?;
    let strings = fields.take_bool("return_token_strs")?;
    if text.is_some() && fields.has("messages") {
        return Err(ApiError::invalid(Some("messages"), "messages and prompt exclude each other"));
    }
    let (prompt, again) = match text {
        Some(text) if special == Some(false) => (Prompt::Bare(text), false),
        Some(text) => (Prompt::Text(text), false),
        None if fields.has("messages") => {
            (Prompt::Chat(openai::conversation(&mut fields, &router.requests)?), special == Some(true))
        }
        None => {
            return Err(ApiError::invalid(Some("prompt"), "prompt is missing: give a string, or messages"));
        }
    };
    fields.finish(&openai::KNOWN)?;
    let tokenized = tokens::tokenize(&router, &caller, &model, prompt, again).await?;
    let strings = strings.then(|| tokenized.pieces().map(String::from_utf8_lossy).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokenized.ids.len(),
        "max_model_len": tokenized.context_tokens_max,
        "tokens": tokenized.ids,
        "token_strs": strings,
    })))
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    State(router): State<Arc<Router>>,
    Extension(caller): Extension<Caller>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let body = read(body, &caller, &router.limits).await?;
    let mut fields = Fields::parse(&body)?;
    let model: String = fields.take("model", "a string")?.unwrap_or_default();
    let ids: Option<Vec<TokenId>> = fields.take("tokens", "a list of token ids")?;
    let ids =
        ids.ok_or_else(|| ApiError::invalid(Some("tokens"), "tokens is missing: give a list of ids"))?;
    fields.finish(&openai::KNOWN)?;
    Ok(Json(json!({ "prompt": tokens::detokenize(&router, &caller, &model, ids, false).await? })))
}

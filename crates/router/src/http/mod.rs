//! The HTTP face: OpenAI's API and Mistral's, and whether this router takes requests.

mod access;
mod body;
mod content;
mod error;
mod fields;
mod gather;
mod mistral;
mod name;
mod openai;
mod responses;
mod shape;
mod stream;
mod tokens;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(crate) use self::access::refuse;
pub(crate) use self::error::ApiError;
use crate::limits::{ECHO_CHARS_MAX, RETRY_AFTER_S};
use crate::serve::Router;
use crate::server::{self, Protocol};

/// Serves until `stop`, and then until the running answers have ended.
pub(crate) async fn serve(router: Arc<Router>, listener: TcpListener, stop: CancellationToken) {
    let (places, limits) = (router.http_places.clone(), router.limits.clone());
    let tls = router.tls.http.clone();
    server::serve(listener, Protocol::Http1, places, limits, routes(router), tls, stop).await;
}

fn routes(router: Arc<Router>) -> axum::Router {
    axum::Router::new()
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::completion))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/fim/completions", post(mistral::fim))
        .route("/v1/agents/completions", post(mistral::agents))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model)) // names may hold slashes
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(router.clone(), access::check))
        .merge(probes()) // behind the layer: no key is asked for
        .with_state(router)
}

/// What a load balancer asks; on the admin port, too. `/health` and `/ping` are how vLLM names readiness.
pub(crate) fn probes() -> axum::Router<Arc<Router>> {
    axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/health", get(ready))
        .route("/ping", get(ready))
        .route("/version", get(|| async { Json(json!({ "version": env!("CARGO_PKG_VERSION") })) }))
}

/// Ready when at least one model takes requests; says what is missing otherwise.
async fn ready(State(router): State<Arc<Router>>) -> Response {
    match router.ready() {
        Ok(()) => Json(json!({ "ready": true })).into_response(),
        Err(missing) => {
            let retry = [(header::RETRY_AFTER, RETRY_AFTER_S.to_string())];
            let body = Json(json!({ "ready": false, "missing": missing }));
            (StatusCode::SERVICE_UNAVAILABLE, retry, body).into_response()
        }
    }
}

pub(crate) async fn no_route(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(ECHO_CHARS_MAX).collect();
    ApiError::new(StatusCode::NOT_FOUND, Some("unknown_url"), format!("there is nothing at {path}"))
}

pub(crate) async fn no_method(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(ECHO_CHARS_MAX).collect();
    let message = format!("{path} does not answer {method}");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
}

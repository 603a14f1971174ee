//! OpenAI's error bodies.

use std::sync::Arc;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::failure::Failure;
use crate::limits::RETRY_AFTER_S;

/// An error as the client sees it: a status and `{"error": {message, type, param, code}}`.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    /// The field that is wrong.
    pub(super) param: Option<String>,
    code: Option<&'static str>,
    /// When to try again, if that makes sense.
    retry_after_s: u64,
}

/// The body; in a stream, one event of its own.
#[derive(Serialize)]
pub(super) struct Body<'a> {
    error: Inner<'a>,
}

/// What is wrong, of which kind, and where.
#[derive(Serialize)]
pub(super) struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code, retry_after_s: RETRY_AFTER_S.into() }
    }

    pub(crate) fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        Self { param: param.map(str::to_owned), ..Self::new(StatusCode::BAD_REQUEST, None, message) }
    }

    pub(super) fn unknown_field(param: String, message: String) -> Self {
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, Some("unknown_parameter"), message) }
    }

    pub(super) fn unsupported(param: String, message: String) -> Self {
        Self {
            param: Some(param),
            ..Self::new(StatusCode::BAD_REQUEST, Some("unsupported_parameter"), message)
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn body(&self) -> Body<'_> {
        Body { error: self.inner() }
    }

    pub(super) fn inner(&self) -> Inner<'_> {
        let r#type = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let Self { status: _, message, param, code, retry_after_s: _ } = self;
        Inner { message, r#type, param: param.as_deref(), code: *code }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        let retry_after_s = match &failure {
            Failure::Quota(exceeded) => exceeded.retry_after_s(),
            _ => RETRY_AFTER_S.into(),
        };
        let (status, code, param) = match failure {
            Failure::Invalid { field, .. } => (StatusCode::BAD_REQUEST, None, field),
            Failure::NoModel { .. } => (StatusCode::NOT_FOUND, Some("model_not_found"), Some("model")),
            Failure::Overloaded(_) => (StatusCode::TOO_MANY_REQUESTS, Some("overloaded"), None),
            Failure::Quota(_) => (StatusCode::TOO_MANY_REQUESTS, Some("rate_limit_exceeded"), None),
            Failure::NoGroup { .. } => (StatusCode::SERVICE_UNAVAILABLE, Some("no_group_ready"), None),
            Failure::Lost { .. } => (StatusCode::SERVICE_UNAVAILABLE, Some("group_lost"), None),
            Failure::KillsGroups => (StatusCode::INTERNAL_SERVER_ERROR, Some("request_kills_groups"), None),
            Failure::Queued { .. } => (StatusCode::TOO_MANY_REQUESTS, Some("queue_timeout"), None),
            Failure::Stalled { .. } => (StatusCode::SERVICE_UNAVAILABLE, Some("group_stalled"), None),
            Failure::Closing => (StatusCode::SERVICE_UNAVAILABLE, Some("shutting_down"), None),
            Failure::TooSlow { .. } => (StatusCode::REQUEST_TIMEOUT, Some("reader_too_slow"), None),
            Failure::Superseded => (StatusCode::CONFLICT, Some("superseded"), None),
            Failure::KeyReused => (StatusCode::UNPROCESSABLE_ENTITY, Some("idempotency_key_reused"), None),
            Failure::Engine(_) => (StatusCode::INTERNAL_SERVER_ERROR, Some("engine_failed"), None),
        };
        Self { status, message, param: param.map(str::to_owned), code, retry_after_s }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let retry = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&self.status);
        if retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s));
        }
        response.extensions_mut().insert(Arc::new(self)); // for a client that wants it in another shape
        response
    }
}

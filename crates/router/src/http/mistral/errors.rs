//! Errors in the shape that Mistral's clients expect.

use std::sync::Arc;

use axum::Json;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::Client;
use crate::http::error::{ApiError, Inner};

/// Everything below this path is Mistral's.
const OWN_PATH: &str = "/v1/fim/";

/// The body: flat, and for a field that is wrong with a `detail`, from which Mistral's clients make a validation error.
#[derive(Serialize)]
struct Body<'a> {
    object: &'static str,
    #[serde(flatten)]
    inner: Inner<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<[Detail<'a>; 1]>,
}

#[derive(Serialize)]
struct Detail<'a> {
    r#type: &'static str,
    loc: [&'a str; 2],
    msg: &'a str,
}

/// Whether a request's errors are to be in Mistral's shape.
pub(in crate::http) fn expects_errors<B>(request: &Request<B>) -> bool {
    Client::of(request.headers()) == Client::Mistral || request.uri().path().starts_with(OWN_PATH)
}

/// Gives an error Mistral's shape: a field that is wrong is 422, where OpenAI says 400.
pub(in crate::http) fn in_its_shape(mut response: Response) -> Response {
    if let Some(error) = response.extensions_mut().remove::<Arc<ApiError>>() {
        let (mut head, _) = response.into_parts();
        let (status, body) = shape(&error);
        head.status = status;
        return Response::from_parts(head, body.into_response().into_body());
    }
    response
}

fn shape(error: &ApiError) -> (StatusCode, Json<Body<'_>>) {
    let field = error.param.as_deref().filter(|_| error.status() == StatusCode::BAD_REQUEST);
    let detail =
        field.map(|field| [Detail { r#type: "value_error", loc: ["body", field], msg: error.message() }]);
    let status = if field.is_some() { StatusCode::UNPROCESSABLE_ENTITY } else { error.status() };
    (status, Json(Body { object: "error", inner: error.inner(), detail }))
}

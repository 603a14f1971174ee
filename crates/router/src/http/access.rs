//! Who is let in over HTTP, and what callers are told of their quotas.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::mistral;
use crate::gate::Stranger;
use crate::serve::Router;

/// Lets a request pass if its caller may, with the caller among its extensions.
pub(super) async fn check(State(router): State<Arc<Router>>, request: Request, next: Next) -> Response {
    let mistral = mistral::expects_errors(&request);
    let response = admit(&router, request, next).await;
    if mistral { mistral::in_its_shape(response) } else { response }
}

async fn admit(router: &Router, mut request: Request, next: Next) -> Response {
    let caller = match router.gate.admit(request.headers()) {
        Ok(caller) => caller,
        Err(stranger) => return refuse(stranger),
    };
    let tenant = caller.tenant;
    let caller = caller.naming(request.headers()).holding(router.bodies.begin());
    request.extensions_mut().insert(caller);
    let mut response = next.run(request).await;
    router.gate.tell(tenant, response.headers_mut());
    response
}

/// What a caller gets who may not pass.
pub(crate) fn refuse(stranger: Stranger) -> Response {
    let (status, challenge) = match stranger {
        Stranger::NoKey => (StatusCode::UNAUTHORIZED, "Bearer realm=\"galerne\""),
        Stranger::WrongKey => (StatusCode::UNAUTHORIZED, "Bearer realm=\"galerne\", error=\"invalid_token\""),
        Stranger::NoOperator => {
            (StatusCode::FORBIDDEN, "Bearer realm=\"galerne\", error=\"insufficient_scope\"")
        }
    };
    let error = ApiError::new(status, Some("invalid_api_key"), stranger.to_string());
    let mut response = error.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    response
}

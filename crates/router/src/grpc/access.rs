//! Who is let in over gRPC, and what callers are told of their quotas.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use tonic::Status;

use super::body::limited;
use super::errors::{blame, unauthenticated};
use crate::gate::Caller;
use crate::serve::Router;

/// Whether a router is well is told to whoever asks: load balancers have no keys. What it offers (reflection) is not.
const OPEN: &str = "/grpc.health.v1.Health/";

/// Bytes that a call takes here before its message has come, beside its headers: a connection carries thousands of them.
const CALL_BYTES: usize = 8 << 10;

/// Asks for a key in front of all services but health, and puts limits around what is sent; the caller is then among
/// a request's extensions.
pub(super) fn guarded(services: axum::Router, router: &Arc<Router>) -> axum::Router {
    services.layer(from_fn_with_state(router.clone(), check))
}

async fn check(State(router): State<Arc<Router>>, request: Request, next: Next) -> Response {
    let open = request.uri().path().starts_with(OPEN);
    let admitted = if open { Ok(Caller::default()) } else { router.gate.admit(request.headers()) };
    let caller = match admitted {
        Ok(caller) => caller.naming(request.headers()).holding(router.bodies.begin()),
        Err(stranger) => return unauthenticated(stranger.to_string()).into_http(),
    };
    let head: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if let Err(full) = caller.keep(CALL_BYTES + head) {
        return Status::from(full).into_http();
    }
    let tenant = caller.tenant;
    let mut request = request.map(|body| limited(body, caller.clone(), &router.limits));
    request.extensions_mut().insert(caller);
    let mut response = blame(next.run(request).await);
    router.gate.tell(tenant, response.headers_mut());
    response
}

/// Who sent a request that has passed the check.
pub(super) fn caller<T>(request: &tonic::Request<T>) -> Caller {
    request.extensions().get().cloned().unwrap_or_default()
}

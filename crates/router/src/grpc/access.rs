//! Who is let in over gRPC, and what callers are told of their quotas.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;

use super::errors::unauthenticated;
use crate::gate::{Caller, Gate};

/// Whether a router is well is told to whoever asks: load balancers have no keys. What it offers (reflection) is not.
const OPEN: &str = "/grpc.health.v1.Health/";

/// Asks for a key in front of all services but health; the caller is then among a request's extensions.
pub(super) fn guarded(services: Router, gate: &Arc<Gate>) -> Router {
    services.layer(from_fn_with_state(gate.clone(), check))
}

async fn check(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    if request.uri().path().starts_with(OPEN) {
        return next.run(request).await;
    }
    let caller = match gate.admit(request.headers()) {
        Ok(caller) => caller,
        Err(stranger) => return unauthenticated(stranger.to_string()).into_http(),
    };
    let tenant = caller.tenant;
    request.extensions_mut().insert(caller);
    let mut response = next.run(request).await;
    gate.tell(tenant, response.headers_mut());
    response
}

/// Who sent a request that has passed the check.
pub(super) fn caller<T>(request: &tonic::Request<T>) -> Caller {
    request.extensions().get().cloned().unwrap_or_default()
}

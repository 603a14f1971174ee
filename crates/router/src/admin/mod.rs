//! The operator's port: metrics, the fleet, draining, what goes on inside. Never open it to clients.
//!
//! On loopback it asks nobody for a key; where other machines reach it, it wants an operator's.

mod debug;
mod operate;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::gate::is_public;
use crate::http::{self, ApiError};
use crate::serve::Router;
use crate::server::{self, Places, Protocol, ServerLimits};

/// Connections of operators and their scrapers.
const CONNECTIONS_MAX: usize = 256;

/// Bytes of a body: of a log filter.
const BODY_BYTES_MAX: usize = 4 << 10;

/// Serves until `stop`.
pub(crate) async fn serve(router: Arc<Router>, listener: TcpListener, stop: CancellationToken) {
    let limits = ServerLimits {
        connections_max: CONNECTIONS_MAX,
        connections_per_peer_max: CONNECTIONS_MAX,
        body_bytes_max: BODY_BYTES_MAX,
        ..ServerLimits::DEFAULT
    };
    let places = Places::new(&limits);
    let routes = routes(router, listener.local_addr().is_ok_and(is_public));
    server::serve(listener, Protocol::Http1, places, limits, routes, None, stop).await;
}

fn routes(router: Arc<Router>, public: bool) -> axum::Router {
    let routes = axum::Router::new()
        .route("/metrics", get(operate::metrics))
        .route("/fleet", get(operate::fleet))
        .route("/drain", post(operate::drain))
        .route("/undrain", post(operate::undrain))
        .route("/log", get(operate::log).put(operate::set_log))
        .route("/debug/state", get(debug::state))
        .route("/debug/memory", get(debug::memory))
        .route("/debug/profile", get(debug::profile));
    let routes = if public { routes.layer(from_fn_with_state(router.clone(), operators)) } else { routes };
    routes
        .merge(http::probes())
        .fallback(http::no_route)
        .method_not_allowed_fallback(http::no_method)
        .layer(from_fn(no_browsers))
        .with_state(router)
}

/// Lets operators pass: others could end this router.
async fn operators(State(router): State<Arc<Router>>, request: Request, next: Next) -> Response {
    match router.gate.admit_operator(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(stranger) => http::refuse(stranger),
    }
}

/// Browsers let any page send requests to this machine: those that a page sent are refused.
async fn no_browsers(request: Request, next: Next) -> Response {
    const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
    let headers = request.headers();
    let from_page = headers.get(FETCH_SITE).is_some_and(|site| site != "none");
    if from_page || headers.contains_key(header::ORIGIN) {
        let message = "the admin port does not answer web pages: use a command line, or a scraper";
        return ApiError::new(StatusCode::FORBIDDEN, Some("web_page"), message).into_response();
    }
    next.run(request).await
}

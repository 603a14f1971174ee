//! The operator's port: metrics, the fleet, draining, what goes on inside. Never open it to clients.

mod debug;
mod operate;

use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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
    server::serve(listener, Protocol::Http1, places, limits, routes(router), None, stop).await;
}

fn routes(router: Arc<Router>) -> axum::Router {
    axum::Router::new()
        .route("/metrics", get(operate::metrics))
        .route("/fleet", get(operate::fleet))
        .route("/drain", post(operate::drain))
        .route("/undrain", post(operate::undrain))
        .route("/log", get(operate::log).put(operate::set_log))
        .route("/debug/state", get(debug::state))
        .route("/debug/memory", get(debug::memory))
        .route("/debug/profile", get(debug::profile))
        .merge(http::probes())
        .fallback(http::no_route)
        .method_not_allowed_fallback(http::no_method)
        .layer(middleware::from_fn(no_browsers))
        .with_state(router)
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

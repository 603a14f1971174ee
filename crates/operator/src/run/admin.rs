//! Metrics and health, for Prometheus and kubelet. Nothing can be changed here, and nothing is secret.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;

/// Serves until `stop`.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>, stop: CancellationToken) {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    let page = move || async move { ([(header::CONTENT_TYPE, TEXT)], metrics.page()) };
    // An operator that waits for the lease is as ready as the one that acts.
    let routes = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }));
    if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::warn!(%error, "metrics are not served any more");
    }
}

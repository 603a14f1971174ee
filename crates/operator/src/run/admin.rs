//! Metrics and health, for Prometheus and kubelet, and numbers of groups for other autoscalers. Nothing can be changed here, and
//! nothing is secret.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use kube::{Api, Client};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;
use crate::api::GalerneCluster;

/// Serves until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    client: Client,
    stop: CancellationToken,
) {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    let page = move || async move { ([(header::CONTENT_TYPE, TEXT)], metrics.page()) };
    // An operator that waits for the lease is as ready as the one that acts.
    let routes = Router::new()
        .route("/metrics", get(page))
        .route("/autoscale/{namespace}/{cluster}", get(autoscale))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }))
        .with_state(client);
    if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::warn!(%error, "metrics are not served any more");
    }
}

/// `GET /autoscale/NAMESPACE/CLUSTER`: what `spec.sla` calls for, as the status tells it. Every operator answers, whether it acts
/// or waits.
async fn autoscale(
    State(client): State<Client>,
    Path((namespace, name)): Path<(String, String)>,
) -> Response {
    let refuse = |status, says: String| (status, Json(json!({ "error": says }))).into_response();
    let cluster = match Api::<GalerneCluster>::namespaced(client, &namespace).get_opt(&name).await {
        Ok(Some(cluster)) => cluster,
        Ok(None) => return refuse(StatusCode::NOT_FOUND, format!("there is no cluster {namespace}/{name}")),
        Err(error) => {
            return refuse(StatusCode::BAD_GATEWAY, format!("the Kubernetes API did not tell: {error}"));
        }
    };
    match cluster.status.and_then(|status| status.autoscale) {
        Some(autoscale) => Json(autoscale).into_response(),
        None => refuse(
            StatusCode::NOT_FOUND,
            format!(
                "nothing was decided yet for {namespace}/{name}: a number needs spec.sla, and a router that tells etcd of its requests"
            ),
        ),
    }
}

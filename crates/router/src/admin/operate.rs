//! Metrics, the fleet, draining, the log.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use galerne_types::RankRecord;
use serde_json::{Value, json};

use super::BODY_BYTES_MAX;
use crate::groups::Listed;
use crate::http::ApiError;
use crate::metrics;
use crate::serve::Router;
use crate::standing;

/// `GET /metrics`
pub(super) async fn metrics(State(router): State<Arc<Router>>) -> Response {
    let text = router.metrics.encode(&router.groups, &router.again);
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// `GET /fleet`
pub(super) async fn fleet(State(router): State<Arc<Router>>) -> Json<Value> {
    Json(json!({ "groups": router.groups.list().iter().map(group).collect::<Vec<_>>() }))
}

/// `POST /drain`: no more requests are taken, those under way end, then the process does.
pub(super) async fn drain(State(router): State<Arc<Router>>) -> Json<Value> {
    router.traffic.drain(true);
    draining(&router)
}

/// `POST /undrain`: for as long as the process has not ended.
pub(super) async fn undrain(State(router): State<Arc<Router>>) -> Json<Value> {
    router.traffic.drain(false);
    draining(&router)
}

fn draining(router: &Router) -> Json<Value> {
    Json(json!({ "draining": router.traffic.draining(), "requests": router.traffic.list().len() }))
}

/// `GET /log`: the filter.
pub(super) async fn log(State(router): State<Arc<Router>>) -> Result<String, ApiError> {
    Ok(handle(&router)?.filter() + "\n")
}

/// `PUT /log`: takes a filter, such as `info,galerne_router=debug`.
pub(super) async fn set_log(State(router): State<Arc<Router>>, body: Body) -> Result<String, ApiError> {
    let body = axum::body::to_bytes(body, BODY_BYTES_MAX).await;
    let invalid = || {
        ApiError::invalid(
            None,
            format!("the body must be a log filter in UTF-8 of at most {BODY_BYTES_MAX} bytes"),
        )
    };
    let body = body.map_err(|_| invalid())?;
    let filter = std::str::from_utf8(&body).map_err(|_| invalid())?.trim();
    handle(&router)?.set(filter).map_err(|error| ApiError::invalid(None, error.to_string()))?;
    Ok(filter.to_owned() + "\n")
}

fn handle(router: &Router) -> Result<&galerne_telemetry::LogHandle, ApiError> {
    let none = || ApiError::new(StatusCode::NOT_FOUND, None, "this process's log cannot be changed");
    router.log.as_ref().ok_or_else(none)
}

fn group(listed: &Listed) -> Value {
    let Listed { id, group, standing, same_weights, in_flight, breaker: _ } = listed;
    let served = group.health.as_ref().map(|health| &health.model);
    let model = served.or_else(|| group.ranks.values().next().map(|rank| &rank.model));
    let rank = |rank: &RankRecord| {
        let shards = standing::member(group, rank).map_or(0..0, |member| member.shards.clone());
        json!({
            "id": rank.id.0,
            "state": standing::rank_state(rank.state),
            "host": rank.host,
            "address": rank.address,
            "pid": rank.pid,
            "device": rank.device,
            "build": rank.build,
            "shards": [shards.start, shards.end],
            "memory_bytes": rank.memory_bytes,
        })
    };
    json!({
        "name": id.0,
        "state": standing.name(),
        "epoch": group.epoch.as_ref().map(|(epoch, _)| epoch.0),
        "leader": group.health.as_ref().map(|health| &health.leader),
        "model": model.map(|card| &card.name),
        "digest": model.map(|card| &card.digest),
        "same_weights": same_weights,
        "virtual_shards": model.map(|card| card.shards.virtual_shards()),
        "quantize": model.map(|card| card.quantize),
        "compute": model.map(|card| card.compute),
        "kv_dtype": model.map(|card| card.kv),
        "world_size": model.map(|card| card.shards.world_size()),
        "requests": in_flight,
        "ranks": standing::in_rank_order(group).into_iter().map(rank).collect::<Vec<_>>(),
        "past": group.epoch.as_ref().map_or(&[][..], |(_, record)| &record.past),
    })
}

//! Bodies of requests: read whole, but not too much and not for too long.

use axum::body::Body;
use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use crate::server::ServerLimits;

/// A body that is too large is read up to this many times its limit all the same, so that its client is not cut off
/// in the middle of sending and gets to read why.
const DRAIN_FACTOR: usize = 4;

/// Reads a request's body within the limits of its face.
pub(super) async fn read(body: Body, limits: &ServerLimits) -> Result<Bytes, ApiError> {
    let &ServerLimits { body_bytes_max, body_s_max, body_idle_s_max, .. } = limits;
    let end = Instant::now() + body_s_max;
    let (mut data, mut bytes, mut total) = (body.into_data_stream(), BytesMut::new(), 0_usize);
    loop {
        let due = end.min(Instant::now() + body_idle_s_max);
        let chunk = timeout_at(due, data.next()).await.map_err(|_| {
            too_slow(if due == end {
                format!("the body did not arrive within {} s", body_s_max.as_secs_f64())
            } else {
                format!("nothing of the body arrived for {} s", body_idle_s_max.as_secs_f64())
            })
        })?;
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|_| ApiError::invalid(None, "the body could not be read to its end"))?;
        total = total.saturating_add(chunk.len());
        if total <= body_bytes_max {
            bytes.extend_from_slice(&chunk);
        } else if total > body_bytes_max.saturating_mul(DRAIN_FACTOR) {
            break;
        }
    }
    if total > body_bytes_max {
        let message = format!("the body must have at most {body_bytes_max} bytes");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message));
    }
    Ok(bytes.freeze())
}

fn too_slow(message: String) -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("body_too_slow"), message)
}

//! Bodies of requests: read whole, but not too much and not for too long.

use axum::body::Body;
use axum::http::StatusCode;
use bytes::BytesMut;
use futures_util::StreamExt;
use http_body::Body as _;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use crate::ask::Caller;
use crate::server::ServerLimits;

/// A body that is too large is read up to this many times its limit all the same, so that its client is not cut off
/// in the middle of sending and gets to read why.
const DRAIN_FACTOR: usize = 4;

/// Reads a request's body within the limits of its face and of all bodies together.
pub(super) async fn read(body: Body, caller: &Caller, limits: &ServerLimits) -> Result<BytesMut, ApiError> {
    let &ServerLimits { body_bytes_max, body_s_max, body_idle_s_max, .. } = limits;
    let drained_max = body_bytes_max.saturating_mul(DRAIN_FACTOR);
    if body.size_hint().lower() > drained_max as u64 {
        return Err(too_large(body_bytes_max)); // its head says so: not a byte of it is waited for
    }
    let end = Instant::now() + body_s_max;
    let (mut data, mut total) = (body.into_data_stream(), 0_usize);
    let mut whole = Ok(BytesMut::new());
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
        if let Ok(bytes) = &mut whole {
            let room = match total > body_bytes_max {
                true => Err(too_large(body_bytes_max)),
                false => caller.hold(&chunk).map_err(ApiError::from),
            };
            match room {
                Ok(()) => bytes.extend_from_slice(&chunk),
                Err(refused) => {
                    caller.release();
                    whole = Err(refused); // what was read is gone at once; the rest is thrown away as it comes
                }
            }
        }
        if total > drained_max {
            break;
        }
    }
    whole
}

fn too_large(bytes_max: usize) -> ApiError {
    let message = format!("the body must have at most {bytes_max} bytes");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large"), message)
}

fn too_slow(message: String) -> ApiError {
    ApiError::new(StatusCode::REQUEST_TIMEOUT, Some("body_too_slow"), message)
}

//! One connection of a face, from its first byte to its last.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use super::streams::{Pace, Streams};
use super::watched::{Pulse, Turn, Watched};
use super::{Face, Protocol, ServerLimits, refusal};
use crate::grpc::head_refused;
use crate::http::ApiError;

/// Bytes that a connection may gather of one answer before its reader has taken them.
const WRITE_BYTES_MAX: usize = 16 << 10;

/// Bytes that a client may send ahead on one HTTP/2 stream, and on all streams of a connection together.
const STREAM_WINDOW_BYTES: u32 = 128 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

/// h2 refuses headers without a word: it takes so many times the limit, and those that are beyond the limit itself are
/// told why.
const HEADER_FACTOR: usize = 4;

/// Serves a connection until it ends; when the face stops, until the requests on it have ended.
///
/// `io` is anything that carries bytes: what TLS makes of a socket, too.
pub(super) async fn serve<IO>(io: IO, peer: SocketAddr, face: &Face)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let pulse = Pulse::new();
    let io = TokioIo::new(Watched::new(io, face.protocol, &face.limits, pulse.clone()));
    let service = Requests {
        routes: TowerToHyperService::new(face.routes.clone()),
        protocol: face.protocol,
        limits: face.limits.clone(),
        pulse: pulse.clone(),
    };
    let ended = match face.protocol {
        Protocol::Http1 => {
            let mut connection = pin!(http1(&face.limits).serve_connection(io, service));
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = face.stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }
        Protocol::Http2 => {
            let mut connection = pin!(http2(&face.limits).serve_connection(io, service));
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = face.stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
                () = pulse.idle.notified() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection ended early");
    }
}

fn http1(limits: &ServerLimits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None) // `Watched` looks after that, and says so
        .max_header_size(limits.header_bytes_max)
        .max_buf_size(WRITE_BYTES_MAX.max(limits.header_bytes_max));
    if limits.headers_max != ServerLimits::DEFAULT.headers_max {
        builder.max_headers(limits.headers_max); // hyper's own 100 are the cheaper ones
    }
    builder
}

fn http2(limits: &ServerLimits) -> http2::Builder<Streams> {
    let mut builder = http2::Builder::new(Streams { write_stall_s_max: limits.write_stall_s_max });
    builder
        .timer(TokioTimer::new())
        .max_header_list_size(
            u32::try_from(limits.header_bytes_max.saturating_mul(HEADER_FACTOR)).unwrap_or(u32::MAX),
        )
        .max_concurrent_streams(limits.streams_per_connection_max)
        .keep_alive_interval(limits.ping_s)
        .keep_alive_timeout(limits.ping_s)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(WRITE_BYTES_MAX);
    builder
}

/// The requests of one connection.
struct Requests {
    routes: TowerToHyperService<axum::Router>,
    protocol: Protocol,
    limits: ServerLimits,
    pulse: Arc<Pulse>,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<Tracked>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let turn = self.pulse.begin();
        if let Some(refused) = self.refuse(&request) {
            return Box::pin(async { Ok(refused.map(|body| Tracked::new(body, turn))) });
        }
        let answer = self.routes.call(request);
        Box::pin(async { Ok(answer.await?.map(|body| Tracked::new(body, turn))) })
    }
}

impl Requests {
    /// What is said to a request whose head is too large, in the words of its protocol. Over HTTP/1.1 only its target
    /// can be: hyper has refused the rest.
    fn refuse<B>(&self, request: &Request<B>) -> Option<Response<Body>> {
        let limits = &self.limits;
        let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
        let target = target > limits.target_bytes_max;
        match self.protocol {
            Protocol::Http1 if target => {
                let message = refusal::target_too_long(limits);
                let refused = ApiError::new(StatusCode::URI_TOO_LONG, Some("target_too_long"), message);
                Some(refused.into_response())
            }
            Protocol::Http2 if target => Some(head_refused(refusal::target_too_long(limits)).into_http()),
            Protocol::Http2 if heavy(request.headers(), limits) => {
                Some(head_refused(refusal::head_too_large(limits)).into_http())
            }
            _ => None,
        }
    }
}

/// Whether headers are more, or larger, than a request may have.
fn heavy(headers: &HeaderMap, limits: &ServerLimits) -> bool {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    headers.len() > limits.headers_max || bytes > limits.header_bytes_max
}

/// A response's body, with which its request ends.
struct Tracked {
    body: Body,
    pace: Option<Arc<Pace>>,
    _turn: Turn,
}

impl Tracked {
    fn new(body: Body, turn: Turn) -> Self {
        Self { body, pace: Pace::current(), _turn: turn }
    }
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Some(pace) = &self.pace {
            pace.asked(&frame);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

//! One connection of a face, from its first byte to its last.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
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
use super::{Face, Peer, Protocol, ServerLimits, refusal};
use crate::http::ApiError;

/// Bytes that a connection may gather of one answer before its reader has taken them.
const WRITE_BYTES_MAX: usize = 16 << 10;

/// Bytes that a client may send ahead on one HTTP/2 stream, and on all streams of a connection together.
const STREAM_WINDOW_BYTES: u32 = 128 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

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
        peer: Peer(peer),
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
        .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
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
    peer: Peer,
    limits: ServerLimits,
    pulse: Arc<Pulse>,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<Tracked>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let turn = self.pulse.begin();
        let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
        if target > self.limits.target_bytes_max {
            let message = refusal::target_too_long(&self.limits);
            let refused = ApiError::new(StatusCode::URI_TOO_LONG, Some("target_too_long"), message);
            return Box::pin(async { Ok(refused.into_response().map(|body| Tracked::new(body, turn))) });
        }
        request.extensions_mut().insert(self.peer);
        let answer = self.routes.call(request);
        Box::pin(async { Ok(answer.await?.map(|body| Tracked::new(body, turn))) })
    }
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

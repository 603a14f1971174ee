//! The connections of a face: how many, how long, and how much each may hold.
//!
//! Both faces share it: HTTP/1.1 for OpenAI's API, HTTP/2 for gRPC. A connection is a task of its own with a place
//! among the others; what it may do to us is bounded by [`ServerLimits`].

mod bodies;
mod connection;
mod limits;
mod places;
mod refusal;
mod streams;
mod watched;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn;
use galerne_telemetry::exports;
use galerne_tls::Server as TlsServer;
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub(crate) use self::bodies::{Bodies, Held};
pub use self::limits::ServerLimits;
use self::places::Place;
pub(crate) use self::places::Places;
use self::refusal::refuse;
use crate::inside::Inside;
use crate::trace;

/// Time before the next try to accept a connection when the system had no room for it.
const ACCEPT_RETRY_MS: Duration = Duration::from_millis(50);

/// Connections that are told at once why they are refused; further ones are only closed.
const REFUSALS_MAX: usize = 256;

/// Where the process's own connections come from.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a face speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2 with prior knowledge, as gRPC has it.
    Http2,
}

/// What all connections of a face share.
struct Face {
    protocol: Protocol,
    limits: ServerLimits,
    routes: axum::Router,
    tls: Option<Arc<TlsServer>>,
    stop: CancellationToken,
}

/// Serves connections until `stop`, and then until those that have requests under way have ended them. Dropping the
/// future ends all of them at once.
pub(crate) async fn serve(
    listener: TcpListener,
    protocol: Protocol,
    places: Arc<Places>,
    limits: ServerLimits,
    routes: axum::Router,
    tls: Option<Arc<TlsServer>>,
    stop: CancellationToken,
) {
    let routes = traced(routes);
    let face = Arc::new(Face { protocol, limits, routes, tls, stop });
    let mut connections = JoinSet::new();
    let mut refusals = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            Some(_) = refusals.join_next() => continue,
            () = face.stop.cancelled() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                accept_failed(&error, &face.stop).await;
                continue;
            }
        };
        match places.take(peer.ip()) {
            Ok(place) => {
                connections.spawn(admitted(stream, peer, place, face.clone()));
            }
            Err(full) => {
                tracing::debug!(%peer, ?full, "a connection is refused");
                if refusals.len() < REFUSALS_MAX {
                    refusals.spawn(refuse(stream, protocol, full));
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Puts requests into spans, if somebody gets to see them.
fn traced(routes: axum::Router) -> axum::Router {
    if exports() { routes.layer(from_fn(trace::serve)) } else { routes }
}

/// Serves the process's own connections over HTTP/2, as [`serve`] does those of others.
pub(crate) async fn serve_inside(
    Inside(mut streams): Inside,
    limits: ServerLimits,
    routes: axum::Router,
    stop: CancellationToken,
) {
    let routes = traced(routes);
    let face = Arc::new(Face { protocol: Protocol::Http2, limits, routes, tls: None, stop });
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            Some(stream) = streams.recv() => stream,
            Some(_) = connections.join_next() => continue,
            () = face.stop.cancelled() => break,
        };
        let face = face.clone();
        connections.spawn(async move { connection::serve(stream, NOWHERE, &face).await });
    }
    drop(streams);
    while connections.join_next().await.is_some() {}
}

/// A connection that went away before it was accepted is nothing; a system without room gets time to find some.
async fn accept_failed(error: &io::Error, stop: &CancellationToken) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        return;
    }
    tracing::error!(%error, "no connection can be accepted: raise the limit of open files (ulimit -n)");
    tokio::select! {
        () = tokio::time::sleep(ACCEPT_RETRY_MS) => {}
        () = stop.cancelled() => {}
    }
}

async fn admitted(stream: TcpStream, peer: SocketAddr, place: Place, face: Arc<Face>) {
    if let Err(error) = prepare(&stream, &face.limits) {
        tracing::debug!(%peer, %error, "a connection's socket takes no options");
    }
    match &face.tls {
        None => connection::serve(stream, peer, &face).await,
        Some(tls) => {
            let shaken = tokio::select! {
                shaken = timeout(face.limits.header_s_max, tls.accept(stream)) => shaken,
                () = face.stop.cancelled() => return,
            };
            match shaken {
                Ok(Ok(stream)) => connection::serve(stream, peer, &face).await,
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
            }
        }
    }
    drop(place);
}

fn prepare(stream: &TcpStream, limits: &ServerLimits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    set_socket_send_buffer_size(stream, limits.send_buffer_bytes)?;
    Ok(())
}

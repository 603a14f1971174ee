//! The connections that come to a listener within the cluster, once they have begun to speak HTTP/2.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::either::Either;
use tonic::transport::server::Connected;

use crate::Server;

/// What a client of HTTP/2 says first (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Time for a TLS handshake, if there is one, and the preface.
const OPENING_S_MAX: Duration = Duration::from_secs(10);

/// Connections of a listener that have not got so far yet. One more, and the oldest is dropped: whoever means it is
/// through within milliseconds.
const OPENINGS_MAX: usize = 256;

/// Open connections of a listener, beyond those; further ones are dropped.
const CONNECTIONS_MAX: usize = 1024;

/// Time before the next try to accept a connection when the system had no room for it.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A connection whose client has said the preface of HTTP/2, which is read from it once more.
#[derive(Debug)]
pub struct Opened {
    connection: Either<TcpStream, TlsStream<TcpStream>>,
    /// Bytes of the preface that were read again.
    repeated: usize,
    _place: OwnedSemaphorePermit,
}

/// The connections of a listener, by TLS if `tls` says how, for a server that takes a stream of them. Who does not
/// begin to speak HTTP/2 holds up nobody and is dropped, after some seconds at the latest: by itself such a server
/// pings only those who did. Ends when it is dropped.
pub fn incoming(
    listener: TcpListener,
    tls: Option<Arc<Server>>,
) -> impl Stream<Item = io::Result<Opened>> + use<> {
    let (done, ready) = mpsc::channel(1);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut openings = Openings::default();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = done.closed() => break,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let (tls, places, done) = (tls.clone(), Arc::clone(&places), done.clone());
            openings.begin(async move {
                let opened = timeout(OPENING_S_MAX, open(stream, tls, places)).await;
                match opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    // Nobody takes it when the server has ended.
                    Ok(opened) => drop(done.send(Ok(opened)).await),
                    Err(error) => tracing::info!(%peer, %error, "a connection did not open"),
                }
            });
        }
    });
    ReceiverStream::new(ready)
}

/// Those that are being opened, the oldest first; all end with it.
#[derive(Default)]
struct Openings(VecDeque<AbortHandle>);

impl Openings {
    fn begin(&mut self, opening: impl Future<Output = ()> + Send + 'static) {
        if self.0.len() >= OPENINGS_MAX {
            self.0.retain(|opening| !opening.is_finished());
        }
        if self.0.len() >= OPENINGS_MAX
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(tokio::spawn(opening).abort_handle());
    }
}

impl Drop for Openings {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

async fn open(stream: TcpStream, tls: Option<Arc<Server>>, places: Arc<Semaphore>) -> io::Result<Opened> {
    stream.set_nodelay(true)?;
    let mut connection = match tls {
        Some(tls) => Either::Right(tls.accept(stream).await?),
        None => Either::Left(stream),
    };
    let mut said = [0; PREFACE.len()];
    let mut heard = 0;
    while heard < said.len() {
        match connection.read(&mut said[heard..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => heard += bytes,
        }
        if !PREFACE.starts_with(&said[..heard]) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak HTTP/2"));
        }
    }
    let full = |_| io::Error::other(format!("{CONNECTIONS_MAX} connections are open"));
    Ok(Opened { connection, repeated: 0, _place: places.try_acquire_owned().map_err(full)? })
}

impl Connected for Opened {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let again = &PREFACE[self.repeated..];
        if again.is_empty() {
            return Pin::new(&mut self.connection).poll_read(cx, buffer);
        }
        let bytes = again.len().min(buffer.remaining());
        buffer.put_slice(&again[..bytes]);
        self.repeated += bytes;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

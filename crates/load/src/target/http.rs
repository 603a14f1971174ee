//! OpenAI's API over HTTP/1.1, on connections that are kept.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use galerne_tls::Client;
use galerne_workload::{Answer, ErrorKind, Failure};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::rt::{Read, Write};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::events::{Event, Events, message};
use super::failure;
use crate::error::{LoadError, root_cause};
use crate::options::Endpoint;
use crate::stopwatch::Stopwatch;

/// Bytes of an answer that is an error.
const ERROR_BYTES_MAX: usize = 64 << 10;

type Sender = SendRequest<Full<Bytes>>;

/// One endpoint. Each open request has a connection; as many wait for the next ones.
pub(crate) struct Http {
    endpoint: Endpoint,
    headers: HeaderMap,
    tls: Option<Arc<Client>>,
    connect_s_max: Duration,
    idle: Mutex<Vec<Sender>>,
}

impl Http {
    /// Makes the first connection.
    pub(super) async fn open(
        endpoint: &Endpoint,
        tls: Option<Arc<Client>>,
        key: Option<&str>,
        connect_s_max: Duration,
    ) -> Result<Self, LoadError> {
        let mut headers = HeaderMap::new();
        let host = HeaderValue::try_from(endpoint.address());
        headers.insert(HOST, host.map_err(|_| LoadError::Url(endpoint.to_string()))?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("galerne-load/", env!("CARGO_PKG_VERSION"))),
        );
        if let Some(key) = key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| LoadError::ApiKey)?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = Self { endpoint: endpoint.clone(), headers, tls, connect_s_max, idle: Mutex::default() };
        let first = http.connect().await.map_err(|error| LoadError::connect(&endpoint.address(), error))?;
        http.keep(first);
        Ok(http)
    }

    pub(super) async fn ask(&self, body: Bytes, mut watch: Stopwatch) -> Result<Answer, Failure> {
        let (response, mut sender) = self.send(body).await?;
        if response.status() != StatusCode::OK {
            return Err(refusal(response).await);
        }
        let kind = response.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        if !kind.starts_with(b"text/event-stream") {
            let kind = String::from_utf8_lossy(kind);
            return Err(failure(
                ErrorKind::Protocol,
                format!("the answer is no stream of events, but {kind:?}"),
            ));
        }
        let (mut body, mut events) = (response.into_body(), Events::default());
        let (mut usage, mut done) = (None, false);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| failure(ErrorKind::Broken, root_cause(&error)))?;
            let Some(data) = frame.data_ref() else { continue };
            // What comes in one piece was sent in one: it is one message, however many events are in it.
            let mut said = 0;
            events.feed(data, |event| {
                match event {
                    Event::Chunk { said: something, usage: cost } => {
                        said += u32::from(something);
                        usage = cost.or(usage);
                    }
                    Event::Done => done = true,
                }
                Ok(())
            })?;
            if said > 0 {
                watch.tokens(said);
            }
        }
        if !done {
            return Err(failure(ErrorKind::Broken, "the stream ended before [DONE]"));
        }
        if sender.ready().await.is_ok() {
            self.keep(sender);
        }
        Ok(watch.answer(usage.map(|usage| usage.prompt_tokens), usage.map(|usage| usage.completion_tokens)))
    }

    /// Sends a request over a connection that waits, or else over a new one.
    async fn send(&self, body: Bytes) -> Result<(Response<Incoming>, Sender), Failure> {
        let mut request = Request::post(&*self.endpoint.path).body(Full::new(body)).expect("a path of a URL");
        request.headers_mut().clone_from(&self.headers);
        while let Some(mut sender) = self.waiting() {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, sender)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent, // the server has closed the connection meanwhile
                    None => return Err(failure(ErrorKind::Broken, root_cause(error.error()))),
                },
            }
        }
        let mut sender =
            self.connect().await.map_err(|error| failure(ErrorKind::Connect, error.to_string()))?;
        let sent = sender.send_request(request).await;
        Ok((sent.map_err(|error| failure(ErrorKind::Broken, root_cause(&error)))?, sender))
    }

    fn waiting(&self) -> Option<Sender> {
        self.idle.lock().expect("no panic while locked").pop()
    }

    fn keep(&self, sender: Sender) {
        self.idle.lock().expect("no panic while locked").push(sender);
    }

    async fn connect(&self) -> std::io::Result<Sender> {
        let late =
            |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "no connection in time (--connect-s-max)");
        let Endpoint { host, port, .. } = &self.endpoint;
        let host = host.trim_start_matches('[').trim_end_matches(']'); // of IPv6
        let connected = async {
            match &self.tls {
                Some(tls) => shake(TokioIo::new(tls.connect(host, *port).await?)).await,
                None => {
                    let stream = TcpStream::connect((host, *port)).await?;
                    stream.set_nodelay(true)?;
                    shake(TokioIo::new(stream)).await
                }
            }
        };
        timeout(self.connect_s_max, connected).await.map_err(late)?
    }
}

async fn shake(stream: impl Read + Write + Unpin + Send + 'static) -> std::io::Result<Sender> {
    let (sender, connection) = handshake(stream).await.map_err(std::io::Error::other)?;
    // What breaks a connection is told to the request on it.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

async fn refusal(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = Limited::new(response.into_body(), ERROR_BYTES_MAX).collect().await;
    let told = body.map(|body| message(&body.to_bytes())).unwrap_or_default();
    let kind = match status {
        StatusCode::TOO_MANY_REQUESTS => ErrorKind::Refused,
        _ => ErrorKind::Http(status.as_u16()),
    };
    failure(kind, told)
}

//! `etcd-client` with what it lacks: every call ends, what a dead connection broke is repeated, and failures
//! are sentences.

use std::error::Error as _;
use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use etcd_client::{
    Client, ConnectOptions, GetOptions, KeyValue, Txn, TxnResponse, WatchOptions, WatchStream,
};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Code;

use crate::access::{Contents, EtcdAccess};
use crate::backoff::Backoff;
use crate::error::{CoordError, root_cause};
use crate::limits::{ANSWER_BYTES_MAX, CALL_DEADLINE, DIAL_DEADLINE, PING_DEADLINE, PING_INTERVAL};

/// A connection to etcd's members.
#[derive(Clone)]
pub(crate) struct Etcd {
    made: Arc<RwLock<Made>>,
    access: Arc<EtcdAccess>,
    endpoints: Arc<str>,
}

/// A client, and what stood in the files that it was made with.
struct Made {
    client: Client,
    with: Arc<Contents>,
}

/// All keys below a prefix at one moment.
pub(crate) struct Listing {
    pub(crate) kvs: Vec<KeyValue>,
    pub(crate) revision: i64,
}

impl Etcd {
    /// Connects, and makes sure within `timeout` that etcd answers and has a quorum.
    pub(crate) async fn connect(
        endpoints: &[String],
        access: &EtcdAccess,
        timeout: Duration,
    ) -> Result<Self, CoordError> {
        let scheme = access.scheme();
        if endpoints.is_empty() {
            return Err(CoordError::Endpoint { endpoint: String::new(), scheme });
        }
        endpoints.iter().try_for_each(|endpoint| check_endpoint(endpoint, scheme))?;
        let (access, with) = (Arc::new(access.clone()), access.read().await?);
        let client = make(endpoints, &access, &with, timeout).await?;
        let made = Arc::new(RwLock::new(Made { client, with }));
        let etcd = Self { made, access, endpoints: endpoints.join(",").into() };
        etcd.call_within("connect", timeout, |mut client| async move { client.get("/galerne", None).await })
            .await?;
        Ok(etcd)
    }

    fn client(&self) -> Client {
        self.made.read().unwrap_or_else(PoisonError::into_inner).client.clone()
    }

    /// Makes the client anew if the files that it was made with have changed: certificates and passwords end. What is
    /// wrong with them is told, and the old client kept.
    async fn renew(&self) {
        let with = match self.access.read().await {
            Ok(with) => with,
            Err(error) => return tracing::warn!("{error}"),
        };
        if *with == *self.made.read().unwrap_or_else(PoisonError::into_inner).with {
            return;
        }
        let endpoints: Vec<String> = self.endpoints.split(',').map(str::to_owned).collect();
        match make(&endpoints, &self.access, &with, DIAL_DEADLINE).await {
            Ok(client) => {
                *self.made.write().unwrap_or_else(PoisonError::into_inner) = Made { client, with };
                tracing::info!("etcd is spoken to with new files");
            }
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Runs `attempt` until etcd has answered, within [`CALL_DEADLINE`]. An attempt whose connection broke is
    /// repeated, so it must be harmless twice: a read, or a transaction that compares.
    pub(crate) async fn call<T, F>(
        &self,
        what: &'static str,
        attempt: impl Fn(Client) -> F,
    ) -> Result<T, CoordError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        self.call_within(what, CALL_DEADLINE, attempt).await
    }

    async fn call_within<T, F>(
        &self,
        what: &'static str,
        timeout: Duration,
        attempt: impl Fn(Client) -> F,
    ) -> Result<T, CoordError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + timeout;
        let mut reason = format!("no answer within {timeout:?}");
        let mut backoff = Backoff::new();
        loop {
            match timeout_at(deadline, attempt(self.client())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if !passes(&error) => {
                    let endpoints = self.endpoints.to_string();
                    return Err(CoordError::Refused { endpoints, what, reason: root_cause(&error) });
                }
                Ok(Err(error)) => reason = root_cause(&error),
                Err(_) => break,
            }
            let pause = backoff.pause();
            if Instant::now() + pause >= deadline {
                break;
            }
            sleep(pause).await;
            self.renew().await;
        }
        Err(CoordError::Unreachable { endpoints: self.endpoints.to_string(), what, reason })
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Listing, CoordError> {
        let mut answer = self
            .call("list the fleet", |client| async move {
                let mut kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
                kv.get(prefix, Some(GetOptions::new().with_prefix())).await
            })
            .await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(Listing { kvs: answer.take_kvs(), revision })
    }

    /// Events of keys below `prefix` from `revision` on.
    pub(crate) async fn watch(&self, prefix: &str, revision: i64) -> Result<WatchStream, CoordError> {
        self.call("watch the fleet", |client| async move {
            let mut watch = client.watch_client().max_decoding_message_size(ANSWER_BYTES_MAX);
            let options = WatchOptions::new().with_prefix().with_start_revision(revision);
            watch.watch(prefix, Some(options)).await
        })
        .await
    }

    pub(crate) async fn txn(&self, what: &'static str, txn: &Txn) -> Result<TxnResponse, CoordError> {
        self.call(what, |mut client| async move { client.txn(txn.clone()).await }).await
    }
}

/// Whether the failure is one of the way to etcd, or of an etcd without a leader, rather than its answer.
fn passes(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::GRpcStatus(status) => {
            status.code() == Code::Unavailable || status.source().is_some()
        }
        _ => matches!(error, etcd_client::Error::TransportError(_) | etcd_client::Error::IoError(_)),
    }
}

/// A client of etcd's members. One with a name asks for its token here, so that this may fail.
async fn make(
    endpoints: &[String],
    access: &EtcdAccess,
    with: &Contents,
    timeout: Duration,
) -> Result<Client, CoordError> {
    let options = ConnectOptions::new()
        .with_connect_timeout(DIAL_DEADLINE.min(timeout))
        .with_keep_alive(PING_INTERVAL, PING_DEADLINE)
        // etcd takes pings on a connection without streams for an attack.
        .with_keep_alive_while_idle(false)
        .with_require_leader(true);
    let made = Client::connect(endpoints, Some(access.apply(with, options)));
    let (endpoints, what) = (endpoints.join(","), "connect");
    match tokio::time::timeout(timeout, made).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) if passes(&error) => {
            Err(CoordError::Unreachable { endpoints, what, reason: root_cause(&error) })
        }
        Ok(Err(error)) => Err(CoordError::Refused { endpoints, what, reason: root_cause(&error) }),
        Err(_) => {
            Err(CoordError::Unreachable { endpoints, what, reason: format!("no answer within {timeout:?}") })
        }
    }
}

fn check_endpoint(endpoint: &str, scheme: &'static str) -> Result<(), CoordError> {
    let address = endpoint.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://")).unwrap_or(endpoint);
    let address = address.strip_suffix('/').unwrap_or(address);
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => {
            Ok(())
        }
        _ => Err(CoordError::Endpoint { endpoint: endpoint.to_owned(), scheme }),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn wrong_endpoints_are_refused_at_once() {
        for endpoint in ["", "localhost", "https://localhost:2379", ":2379", "localhost:port", "http://a/b:1"]
        {
            let refused =
                Etcd::connect(&[endpoint.to_owned()], &EtcdAccess::default(), CALL_DEADLINE).await.err();
            let refused = refused.map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(refused, format!("etcd endpoint {endpoint:?} is not HOST:PORT or http://HOST:PORT"));
        }
        for endpoint in ["localhost:2379", "http://10.0.0.1:2379/", "[::1]:2379"] {
            assert!(check_endpoint(endpoint, "http").is_ok(), "{endpoint}");
        }
    }

    /// What connecting to `endpoint` fails with, which must be in time.
    async fn failure(endpoint: &str) -> String {
        let started = Instant::now();
        let timeout = Duration::from_millis(300);
        let error =
            Etcd::connect(&[endpoint.to_owned()], &EtcdAccess::default(), timeout).await.err().unwrap();
        assert!(started.elapsed() < timeout + Duration::from_secs(1));
        error.to_string()
    }

    #[tokio::test]
    async fn an_etcd_that_is_not_there_is_one_sentence_in_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let sentence = |reason| format!("etcd at {endpoint} does not answer ({reason}): could not connect");
        // The system accepts for the listener, and nobody says anything.
        assert_eq!(failure(&endpoint).await, sentence("no answer within 300ms"));
        drop(listener);
        assert_eq!(failure(&endpoint).await, sentence("Connection refused (os error 111)"));
    }

    #[tokio::test]
    async fn something_else_on_etcds_port_is_one_sentence_in_time() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let web_server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
            }
        });
        let failure = failure(&endpoint).await;
        assert!(failure.starts_with(&format!("etcd at {endpoint} does not answer (")), "{failure}");
        assert!(failure.ends_with("): could not connect"), "{failure}");
        web_server.abort();
    }
}

//! `etcd-client` with what it lacks: every call ends, what a dead connection broke is repeated, and failures
//! are sentences.

use std::error::Error as _;
use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use etcd_client::{
    Channel as EtcdChannel, Client, ConnectOptions, GetOptions, KeyValue, ResponseHeader, Txn, TxnResponse,
    WatchOptions, WatchStream,
};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::access::{Contents, EtcdAccess};
use crate::backoff::Backoff;
use crate::error::{CoordError, root_cause};
use crate::limits::{
    ANSWER_BYTES_MAX, CALL_DEADLINE, DIAL_DEADLINE, HEDGE_AFTER, PING_DEADLINE, PING_INTERVAL,
};

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
    /// Connects, and makes sure within `timeout` that etcd answers, has a quorum and lets us read below `prefix`.
    pub(crate) async fn connect(
        endpoints: &[String],
        access: &EtcdAccess,
        prefix: &str,
        timeout: Duration,
    ) -> Result<Self, CoordError> {
        let scheme = access.scheme();
        if endpoints.is_empty() {
            return Err(CoordError::Endpoint { endpoint: String::new(), scheme });
        }
        endpoints.iter().try_for_each(|endpoint| check_endpoint(endpoint, scheme))?;
        let deadline = Instant::now() + timeout;
        let (access, with) = (Arc::new(access.clone()), access.read().await?);
        let client = make_patiently(endpoints, &access, &with, deadline).await?;
        let made = Arc::new(RwLock::new(Made { client, with }));
        Self { made, access, endpoints: endpoints.join(",").into() }.tried(prefix, (deadline, timeout)).await
    }

    /// The same over a channel that somebody else has made.
    pub(crate) async fn over(channel: Channel, prefix: &str, timeout: Duration) -> Result<Self, CoordError> {
        let (access, deadline) = (Arc::new(EtcdAccess::default()), Instant::now() + timeout);
        let (with, endpoints) = (access.read().await?, "the end of a channel");
        let made = Client::from_channel(EtcdChannel::Tonic(channel), Some(options(timeout))).await;
        let client = made.map_err(|error| failure(&error, &access, endpoints, "connect"))?;
        let made = Arc::new(RwLock::new(Made { client, with }));
        Self { made, access, endpoints: endpoints.into() }.tried(prefix, (deadline, timeout)).await
    }

    /// Makes sure that etcd answers.
    async fn tried(self, prefix: &str, until: (Instant, Duration)) -> Result<Self, CoordError> {
        let read = |mut client: Client| async move { client.get(prefix, None).await };
        self.call_until("connect", until, |client| hedged(move || read(client.clone()))).await?;
        Ok(self)
    }

    fn client(&self) -> Client {
        self.made.read().unwrap_or_else(PoisonError::into_inner).client.clone()
    }

    /// Makes the client anew if the files that it was made with have changed, and returns whether they had:
    /// certificates and passwords end.
    async fn renew(&self) -> Result<bool, CoordError> {
        let with = self.access.read().await?;
        if *with == *self.made.read().unwrap_or_else(PoisonError::into_inner).with {
            return Ok(false);
        }
        let endpoints: Vec<String> = self.endpoints.split(',').map(str::to_owned).collect();
        let client = make(&endpoints, &self.access, &with, DIAL_DEADLINE).await?;
        *self.made.write().unwrap_or_else(PoisonError::into_inner) = Made { client, with };
        tracing::info!("etcd is spoken to with new files");
        Ok(true)
    }

    /// Tells etcd again who asks, by what the files say now.
    async fn log_in(&self) -> Result<(), CoordError> {
        if !self.renew().await? {
            let again = self.client().refresh_token().await;
            again.map_err(|error| failure(&error, &self.access, &self.endpoints, "log in"))?;
        }
        Ok(())
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
        self.call_until(what, (Instant::now() + CALL_DEADLINE, CALL_DEADLINE), attempt).await
    }

    /// The same for what does no harm, whenever it arrives: an attempt that takes long is made at another member, too.
    pub(crate) async fn ask<T, F>(
        &self,
        what: &'static str,
        attempt: impl Fn(Client) -> F,
    ) -> Result<T, CoordError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let attempt = &attempt;
        self.call(what, |client| hedged(move || attempt(client.clone()))).await
    }

    /// As [`call`](Self::call), until a deadline, which is so long after whatever the caller began.
    async fn call_until<T, F>(
        &self,
        what: &'static str,
        (deadline, timeout): (Instant, Duration),
        attempt: impl Fn(Client) -> F,
    ) -> Result<T, CoordError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut reason = format!("no answer within {timeout:?}");
        let mut backoff = Backoff::new();
        let mut may_log_in = self.access.login.is_some();
        loop {
            match timeout_at(deadline, attempt(self.client())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if may_log_in && is_stranger(&error) => {
                    may_log_in = false;
                    match timeout_at(deadline, self.log_in()).await {
                        Ok(known) => known?,
                        Err(_) => break,
                    }
                    continue;
                }
                Ok(Err(error)) if !passes(&error) => {
                    return Err(failure(&error, &self.access, &self.endpoints, what));
                }
                Ok(Err(error)) => reason = self.access.explain(root_cause(&error)),
                Err(_) => break,
            }
            let pause = backoff.pause();
            if Instant::now() + pause >= deadline {
                break;
            }
            sleep(pause).await;
            if let Err(error) = self.renew().await {
                tracing::warn!("{error}"); // the old client goes on
            }
        }
        Err(CoordError::Unreachable { endpoints: self.endpoints.to_string(), what, reason })
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Listing, CoordError> {
        let mut answer = self
            .ask("list the fleet", |client| async move {
                let mut kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
                kv.get(prefix, Some(GetOptions::new().with_prefix())).await
            })
            .await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(Listing { kvs: answer.take_kvs(), revision })
    }

    /// Asks for `key`, of which a quorum must know; it need not be there.
    pub(crate) async fn probe(&self, key: &str) -> Result<(), CoordError> {
        self.ask("read a key", |mut client| async move { client.get(key, None).await }).await.map(drop)
    }

    /// The revision of a key below `prefix` that has changed at `revision` or later, whichever: asked of a quorum.
    pub(crate) async fn changed_since(&self, prefix: &str, revision: i64) -> Result<Option<i64>, CoordError> {
        let options = GetOptions::new().with_prefix().with_keys_only().with_limit(1);
        let options = options.with_min_mod_revision(revision);
        let read = |mut client: Client| {
            let options = options.clone();
            async move { client.get(prefix, Some(options)).await }
        };
        let answer = self.ask("look for changes", read).await?;
        Ok(answer.kvs().first().map(KeyValue::mod_revision))
    }

    /// Events of keys below `prefix` from `revision` on.
    pub(crate) async fn watch(&self, prefix: &str, revision: i64) -> Result<WatchStream, CoordError> {
        self.ask("watch the fleet", |client| async move {
            let mut watch = client.watch_client().max_decoding_message_size(ANSWER_BYTES_MAX);
            let options = WatchOptions::new().with_prefix().with_start_revision(revision);
            watch.watch(prefix, Some(options)).await
        })
        .await
    }

    /// Renews a lease; false if it is lost.
    pub(crate) async fn renew_lease(&self, lease: i64) -> Result<bool, CoordError> {
        let keep_alive = |mut client: Client| async move {
            match client.lease_keep_alive(lease).await {
                Ok(_) => Ok(true),
                Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(etcd_client::Error::GRpcStatus(status)) if is_not_found(&status) => Ok(false),
                Err(error) => Err(error),
            }
        };
        self.ask("keep a lease alive", keep_alive).await
    }

    /// A transaction that must not arrive late: it is made at one member at a time.
    pub(crate) async fn txn(&self, what: &'static str, txn: &Txn) -> Result<TxnResponse, CoordError> {
        self.call(what, |mut client| async move { client.txn(txn.clone()).await }).await
    }

    /// A transaction that compares whatever it replaces, so that of several attempts, however late, one holds at most. An
    /// answer that it does not hold may mean that it has held already.
    pub(crate) async fn exchange(&self, what: &'static str, txn: &Txn) -> Result<TxnResponse, CoordError> {
        self.ask(what, |mut client| async move { client.txn(txn.clone()).await }).await
    }

    /// A lease of so many seconds. One whose number is not heard of ends by itself.
    pub(crate) async fn lease(&self, ttl_s: i64) -> Result<i64, CoordError> {
        let grant = |mut client: Client| async move { client.lease_grant(ttl_s, None).await };
        self.ask("get a lease", grant).await.map(|lease| lease.id())
    }
}

/// The first answer of attempts, of which a second begins after [`HEDGE_AFTER`], a third after twice that, and so on: a member
/// may take calls and be unable to answer, as when the others cannot reach it, and the next attempt is likely to find another
/// one. All of etcd may be slow, too, and must not be asked ever more.
async fn hedged<T, E, F>(attempt: impl Fn() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let mut attempts = FuturesUnordered::new();
    let mut patience = HEDGE_AFTER;
    loop {
        attempts.push(attempt());
        if let Ok(Some(answer)) = timeout(patience, attempts.next()).await {
            return answer;
        }
        patience *= 2;
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

/// Whether etcd does not know, or not any more, who asks: tokens end, by themselves (JWT), when a user changes or when
/// etcd starts anew. `etcd-client` logs in again by itself, but not where a stream tells of it, nor after a change of
/// the password.
fn is_stranger(error: &etcd_client::Error) -> bool {
    const SAYS: [&str; 4] = [
        "invalid auth token",
        "revision of auth store is old",
        "user name is empty",
        "authentication failed",
    ];
    let etcd_client::Error::GRpcStatus(status) = error else { return false };
    status.code() == Code::Unauthenticated || SAYS.iter().any(|says| status.message().contains(says))
}

fn failure(
    error: &etcd_client::Error,
    access: &EtcdAccess,
    endpoints: &str,
    what: &'static str,
) -> CoordError {
    let (endpoints, reason) = (endpoints.to_owned(), access.explain(root_cause(error)));
    match passes(error) {
        true => CoordError::Unreachable { endpoints, what, reason },
        false => CoordError::Refused { endpoints, what, reason },
    }
}

/// The revision at which a transaction wrote what it wrote.
pub(crate) fn revision(answer: &TxnResponse) -> i64 {
    answer.header().map_or(0, ResponseHeader::revision)
}

pub(crate) fn is_not_found(status: &Status) -> bool {
    status.code() == Code::NotFound
}

/// Tries to make a client until `deadline`, as long as etcd is away.
async fn make_patiently(
    endpoints: &[String],
    access: &EtcdAccess,
    with: &Contents,
    deadline: Instant,
) -> Result<Client, CoordError> {
    let mut backoff = Backoff::new();
    loop {
        let made = make(endpoints, access, with, deadline - Instant::now()).await;
        let pause = backoff.pause();
        match made {
            Err(CoordError::Unreachable { .. }) if Instant::now() + pause < deadline => sleep(pause).await,
            made => return made,
        }
    }
}

/// A client of etcd's members. One with a name asks for its token here, so that this may fail.
async fn make(
    endpoints: &[String],
    access: &EtcdAccess,
    with: &Contents,
    timeout: Duration,
) -> Result<Client, CoordError> {
    let made = Client::connect(endpoints, Some(access.apply(with, options(timeout))));
    match self::timeout(timeout, made).await {
        Ok(made) => made.map_err(|error| failure(&error, access, &endpoints.join(","), "connect")),
        Err(_) => {
            let (endpoints, reason) = (endpoints.join(","), format!("no answer within {timeout:?}"));
            Err(CoordError::Unreachable { endpoints, what: "connect", reason })
        }
    }
}

fn options(timeout: Duration) -> ConnectOptions {
    ConnectOptions::new()
        .with_connect_timeout(DIAL_DEADLINE.min(timeout))
        .with_keep_alive(PING_INTERVAL, PING_DEADLINE)
        // etcd takes pings on a connection without streams for an attack.
        .with_keep_alive_while_idle(false)
        .with_require_leader(true)
}

fn check_endpoint(endpoint: &str, scheme: &'static str) -> Result<(), CoordError> {
    if scheme == "http" && endpoint.starts_with("https://") {
        return Err(CoordError::NoAuthority(endpoint.to_owned()));
    }
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
    use std::cell::Cell;

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_member_that_does_not_answer_is_given_up_for_another() {
        let (made, begun) = (Cell::new(0), Instant::now());
        let answer = hedged(|| {
            made.set(made.get() + 1);
            let number = made.get();
            async move {
                match number {
                    3 => Ok::<_, ()>(number),
                    _ => std::future::pending().await,
                }
            }
        });
        assert_eq!((answer.await, begun.elapsed()), (Ok(3), 3 * HEDGE_AFTER));
    }

    async fn connect(endpoint: &str, timeout: Duration) -> Result<Etcd, CoordError> {
        Etcd::connect(&[endpoint.to_owned()], &EtcdAccess::default(), "/galerne/c/groups/", timeout).await
    }

    #[tokio::test]
    async fn wrong_endpoints_are_refused_at_once() {
        for endpoint in ["", "localhost", ":2379", "localhost:port", "http://a/b:1"] {
            let refused = connect(endpoint, CALL_DEADLINE).await.err();
            let refused = refused.map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(refused, format!("etcd endpoint {endpoint:?} is not HOST:PORT or http://HOST:PORT"));
        }
        let refused = connect("https://localhost:2379", CALL_DEADLINE).await.err().unwrap().to_string();
        assert!(refused.ends_with("name the authority of etcd's certificate with --etcd-ca"), "{refused}");
        for endpoint in ["localhost:2379", "http://10.0.0.1:2379/", "[::1]:2379"] {
            assert!(check_endpoint(endpoint, "http").is_ok(), "{endpoint}");
        }
    }

    /// What connecting to `endpoint` fails with, which must be in time.
    async fn failure(endpoint: &str) -> String {
        let started = Instant::now();
        let timeout = Duration::from_millis(300);
        let error = connect(endpoint, timeout).await.err().unwrap();
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

    #[tokio::test]
    async fn who_hangs_up_on_tls_may_not_speak_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap());
        let rude = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                stream.readable().await.unwrap();
                stream.set_zero_linger().unwrap(); // it is closed with a reset
            }
        });
        let authority = rcgen::generate_simple_self_signed(["etcd".to_owned()]).unwrap();
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), authority.cert.pem()).unwrap();
        let tls = crate::EtcdTls { ca: ca.path().to_owned(), identity: None, name: None };
        let access = EtcdAccess { tls: Some(tls), login: None };
        let failure = Etcd::connect(&[endpoint], &access, "/galerne/c/groups/", Duration::from_millis(300))
            .await
            .err()
            .unwrap();
        let failure = failure.to_string();
        assert!(failure.contains("onnection reset"), "{failure}");
        assert!(failure.contains("nobody speaks TLS there"), "{failure}");
        rude.abort();
    }
}

//! A view of records that follows etcd for ever: list at a revision, watch from the next one, and list
//! again after compaction, after any failure, and now and then in any case.

use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use etcd_client::{Event, EventType, KeyValue, WatchStream};
use galerne_types::Fleet;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use crate::backoff::{Backoff, jitter};
use crate::error::{CoordError, root_cause};
use crate::etcd::{Etcd, Listing};
use crate::keys::Keys;
use crate::limits::{ASK_INTERVAL, ASKS_MAX, BACKOFF_MAX, LAG_INTERVAL, LAG_MAX, RECONCILE_INTERVAL};
use crate::view::{self, Apply, Value};

/// What following a prefix shows.
pub(crate) enum News<'a> {
    /// All that is there.
    Listing(&'a Listing),
    /// What has happened since.
    Events(&'a [Event]),
}

/// Follows the keys below `prefix` until the last receiver is dropped. The first change that a receiver sees
/// is the first listing; while etcd is away, the last view stays.
pub(crate) fn follow<V: Default + PartialEq + Send + Sync + 'static>(
    etcd: Etcd,
    keys: Keys,
    prefix: String,
    apply: Apply<V>,
) -> watch::Receiver<V> {
    let (sender, receiver) = watch::channel(V::default());
    tokio::spawn(async move {
        let mut listed = false;
        let tell = |news: News<'_>| match news {
            News::Listing(listing) => {
                let first = !std::mem::replace(&mut listed, true);
                replace(&sender, view_of(&keys, &listing.kvs, apply), first);
            }
            News::Events(events) => take(&sender, &keys, events, apply),
        };
        tokio::select! {
            () = follow_for_ever(&etcd, &prefix, RECONCILE_INTERVAL, tell) => {}
            () = sender.closed() => {}
        }
    });
    receiver
}

/// Puts `view` in the place of what was known: a listing that shows what is known is no change, unless it is the `first`.
pub(crate) fn replace<V: PartialEq>(known: &watch::Sender<V>, view: V, first: bool) {
    known.send_if_modified(|known| {
        let changed = first || *known != view;
        *known = view;
        changed
    });
}

/// Applies what has happened.
pub(crate) fn take<'a, V>(
    known: &watch::Sender<V>,
    keys: &Keys,
    events: impl IntoIterator<Item = &'a Event>,
    apply: Apply<V>,
) {
    known.send_if_modified(|view| {
        events.into_iter().fold(false, |changed, event| changed | happened(view, keys, event, apply))
    });
}

/// The fleet in a listing.
pub(crate) fn fleet_of(keys: &Keys, listing: &Listing) -> Fleet {
    view_of(keys, &listing.kvs, view::apply)
}

/// What a listing shows.
pub(crate) fn view_of<'a, V: Default>(
    keys: &Keys,
    listing: impl IntoIterator<Item = &'a KeyValue>,
    apply: Apply<V>,
) -> V {
    let mut view = V::default();
    for kv in listing {
        let value = Value { bytes: kv.value(), mod_revision: kv.mod_revision() };
        apply(&mut view, keys, kv.key(), Some(value));
    }
    view
}

/// Why a round of listing and watching is over.
enum Over {
    Reconcile,
    Compacted,
    Broken(String),
}

/// Tells what is below `prefix`, and lists it afresh every so often (`reconcile`).
pub(crate) async fn follow_for_ever(
    etcd: &Etcd,
    prefix: &str,
    reconcile: Duration,
    mut tell: impl FnMut(News<'_>),
) {
    let mut backoff = Backoff::new();
    loop {
        let started = Instant::now();
        match round(etcd, prefix, reconcile, &mut tell).await {
            Ok(Over::Reconcile) => {}
            Ok(Over::Compacted) => tracing::info!("etcd compacted events that a watch had not seen"),
            Ok(Over::Broken(reason)) => tracing::warn!(reason, prefix, "a watch broke; the last view stays"),
            Err(error) => tracing::warn!(%error, prefix, "nothing can be watched; the last view stays"),
        }
        if started.elapsed() > BACKOFF_MAX {
            backoff = Backoff::new();
        }
        sleep(backoff.pause()).await;
    }
}

async fn round(
    etcd: &Etcd,
    prefix: &str,
    reconcile: Duration,
    tell: &mut impl FnMut(News<'_>),
) -> Result<Over, CoordError> {
    let listing = etcd.list(prefix).await?;
    tell(News::Listing(&listing));
    let stream = etcd.watch(prefix, listing.revision + 1).await?;
    let seen = AtomicI64::new(listing.revision);
    drop(listing);
    let reconcile_at = Instant::now() + jitter(reconcile);
    tokio::select! {
        over = read(stream, reconcile_at, &seen, tell) => Ok(over),
        () = lagging(etcd, prefix, &seen) => Ok(Over::Broken("its member of etcd lags behind the others".into())),
    }
}

/// Tells events, and in `seen` up to which revision. A member that has stopped, or that cannot be reached any more, leaves
/// the stream open: so it is asked now and then how far it is, which it must answer.
async fn read(
    mut stream: WatchStream,
    reconcile_at: Instant,
    seen: &AtomicI64,
    tell: &mut impl FnMut(News<'_>),
) -> Over {
    let mut asks = interval(ASK_INTERVAL);
    asks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut unanswered = 0;
    loop {
        let told = tokio::select! {
            biased;
            told = stream.message() => told,
            () = sleep_until(reconcile_at) => return Over::Reconcile,
            _ = asks.tick() => {
                if unanswered == ASKS_MAX {
                    return Over::Broken("its member of etcd is silent".into());
                }
                unanswered += 1;
                match stream.request_progress().await {
                    Ok(()) => continue,
                    Err(error) => return Over::Broken(root_cause(&error)),
                }
            }
        };
        let response = match told {
            Ok(Some(response)) => response,
            Ok(None) => return Over::Broken("etcd ended the stream".into()),
            Err(error) => return Over::Broken(root_cause(&error)),
        };
        unanswered = 0;
        if response.canceled() && response.compact_revision() > 0 {
            return Over::Compacted;
        }
        if response.canceled() {
            return Over::Broken(response.cancel_reason().to_owned());
        }
        let told = response.events().iter().filter_map(|event| event.kv());
        seen.fetch_max(told.map(KeyValue::mod_revision).max().unwrap_or(0), Relaxed);
        tell(News::Events(response.events()));
    }
}

/// Waits until etcd holds a change that the watch has not told of in time. A member that the others cannot reach keeps its
/// streams open and says nothing on them; a read, of which a quorum must know, tells. A watch that has just begun is looked at
/// sooner: it may have begun because of such a member, and at it.
async fn lagging(etcd: &Etcd, prefix: &str, seen: &AtomicI64) {
    let mut pause = LAG_MAX;
    loop {
        sleep(pause).await;
        pause = (pause * 2).min(LAG_INTERVAL);
        let Ok(Some(change)) = etcd.changed_since(prefix, seen.load(Relaxed) + 1).await else { continue };
        sleep(LAG_MAX).await;
        if seen.load(Relaxed) < change {
            return;
        }
    }
}

fn happened<V>(view: &mut V, keys: &Keys, event: &Event, apply: Apply<V>) -> bool {
    let Some(kv) = event.kv() else { return false };
    let value = match event.event_type() {
        EventType::Put => Some(Value { bytes: kv.value(), mod_revision: kv.mod_revision() }),
        EventType::Delete => None,
    };
    apply(view, keys, kv.key(), value)
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use etcd_client::proto::{PbKvServer, PbWatchRequest, PbWatchResponse, PbWatchServer};
    use futures_util::{Stream, StreamExt as _};
    use tokio::net::TcpListener;
    use tokio::time::timeout;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response, Status, Streaming, async_trait};

    use super::*;
    use crate::access::EtcdAccess;
    use crate::embedded::Service;

    /// Takes watches and tells them nothing that happens.
    struct Deaf {
        /// Says how far it is when it is asked.
        answers: bool,
        watches: watch::Sender<usize>,
    }

    #[async_trait]
    impl etcd_client::proto::PbWatchService for Deaf {
        type WatchStream = Pin<Box<dyn Stream<Item = Result<PbWatchResponse, Status>> + Send>>;

        async fn watch(
            &self,
            requests: Request<Streaming<PbWatchRequest>>,
        ) -> Result<Response<Self::WatchStream>, Status> {
            self.watches.send_modify(|watches| *watches += 1);
            let (answers, mut created) = (self.answers, false);
            let answer = move |request: Result<PbWatchRequest, Status>| {
                let created = !std::mem::replace(&mut created, true);
                let response = request.map(|_| PbWatchResponse { created, ..PbWatchResponse::default() });
                std::future::ready((created || answers).then_some(response))
            };
            Ok(Response::new(Box::pin(requests.into_inner().filter_map(answer))))
        }
    }

    /// A view of a store whose watches are [`Deaf`].
    async fn followed(answers: bool) -> (Etcd, watch::Receiver<Fleet>, watch::Receiver<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let (watches, watched) = watch::channel(0);
        let server = Server::builder()
            .add_service(PbKvServer::new(Service::new()))
            .add_service(PbWatchServer::new(Deaf { answers, watches }))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(server);
        let (access, limit) = (EtcdAccess::default(), Duration::from_secs(5));
        let etcd = Etcd::connect(&[endpoint], &access, keys().groups(), limit).await.unwrap();
        let mut fleet = follow(etcd.clone(), keys(), keys().groups().to_owned(), view::apply);
        fleet.changed().await.unwrap();
        assert!(fleet.borrow_and_update().groups.is_empty());
        (etcd, fleet, watched)
    }

    fn keys() -> Keys {
        Keys::new("c").unwrap()
    }

    #[tokio::test]
    async fn a_watch_that_tells_nothing_is_given_up() {
        let (etcd, mut fleet, watched) = followed(true).await;
        sleep(2 * ASK_INTERVAL * ASKS_MAX).await;
        assert_eq!(*watched.borrow(), 1, "nothing has happened");
        let group = galerne_types::GroupId("g".into());
        let hold = etcd_client::TxnOp::put(keys().hold(&group), r#"{"why":"a test"}"#, None);
        etcd.txn("hold a group", &etcd_client::Txn::new().and_then([hold])).await.unwrap();
        let told = timeout(4 * LAG_INTERVAL, fleet.wait_for(|fleet| fleet.groups.len() == 1));
        told.await.expect("the change is noticed").unwrap();
    }

    #[tokio::test]
    async fn a_watch_whose_member_is_silent_is_given_up() {
        let (_etcd, _fleet, mut watched) = followed(false).await;
        let again = timeout(20 * ASK_INTERVAL * ASKS_MAX, watched.wait_for(|watches| *watches == 2));
        again.await.expect("it watches anew").unwrap();
    }
}

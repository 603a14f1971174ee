//! A view of the fleet that follows etcd for ever: list at a revision, watch from the next one, and list
//! again after compaction, after any failure, and now and then in any case.

use etcd_client::EventType;
use galerne_types::Fleet;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::backoff::{Backoff, jitter};
use crate::error::{CoordError, root_cause};
use crate::etcd::{Etcd, Listing};
use crate::keys::Keys;
use crate::limits::{BACKOFF_MAX, RECONCILE_INTERVAL};
use crate::view::{Value, apply};

/// Follows the keys below `prefix` until the last receiver is dropped. The first change that a receiver sees
/// is the first listing; while etcd is away, the last view stays.
pub(crate) fn follow(etcd: Etcd, keys: Keys, prefix: String) -> watch::Receiver<Fleet> {
    let (sender, receiver) = watch::channel(Fleet::default());
    tokio::spawn(async move {
        tokio::select! {
            () = follow_for_ever(&etcd, &keys, &prefix, &sender) => {}
            () = sender.closed() => {}
        }
    });
    receiver
}

/// The fleet in a listing.
pub(crate) fn fleet_of(keys: &Keys, listing: &Listing) -> Fleet {
    let mut fleet = Fleet::default();
    for kv in &listing.kvs {
        let value = Value { bytes: kv.value(), mod_revision: kv.mod_revision() };
        apply(&mut fleet, keys, kv.key(), Some(value));
    }
    fleet
}

/// Why a round of listing and watching is over.
enum Over {
    Reconcile,
    Compacted,
    Broken(String),
}

async fn follow_for_ever(etcd: &Etcd, keys: &Keys, prefix: &str, sender: &watch::Sender<Fleet>) {
    let mut backoff = Backoff::new();
    loop {
        let started = Instant::now();
        match round(etcd, keys, prefix, sender).await {
            Ok(Over::Reconcile) => {}
            Ok(Over::Compacted) => tracing::info!("etcd compacted events that the fleet watch had not seen"),
            Ok(Over::Broken(reason)) => tracing::warn!(reason, "the fleet watch broke; the last view stays"),
            Err(error) => tracing::warn!(%error, "the fleet cannot be watched; the last view stays"),
        }
        if started.elapsed() > BACKOFF_MAX {
            backoff = Backoff::new();
        }
        sleep(backoff.pause()).await;
    }
}

async fn round(
    etcd: &Etcd,
    keys: &Keys,
    prefix: &str,
    sender: &watch::Sender<Fleet>,
) -> Result<Over, CoordError> {
    let listing = etcd.list(prefix).await?;
    sender.send_replace(fleet_of(keys, &listing));
    let mut stream = etcd.watch(prefix, listing.revision + 1).await?;
    let reconcile_at = Instant::now() + jitter(RECONCILE_INTERVAL);
    loop {
        let response = match timeout_at(reconcile_at, stream.message()).await {
            Err(_) => return Ok(Over::Reconcile),
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) => return Ok(Over::Broken("etcd ended the stream".into())),
            Ok(Err(error)) => return Ok(Over::Broken(root_cause(&error))),
        };
        if response.canceled() && response.compact_revision() > 0 {
            return Ok(Over::Compacted);
        }
        if response.canceled() {
            return Ok(Over::Broken(response.cancel_reason().to_owned()));
        }
        sender.send_if_modified(|fleet| {
            response.events().iter().fold(false, |changed, event| changed | take(fleet, keys, event))
        });
    }
}

fn take(fleet: &mut Fleet, keys: &Keys, event: &etcd_client::Event) -> bool {
    let Some(kv) = event.kv() else { return false };
    let value = match event.event_type() {
        EventType::Put => Some(Value { bytes: kv.value(), mod_revision: kv.mod_revision() }),
        EventType::Delete => None,
    };
    apply(fleet, keys, kv.key(), value)
}

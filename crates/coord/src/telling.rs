//! A router's record in etcd, and the lease that it hangs on. A rank's registration fences; this one only counts: whoever wrote
//! last is right, and a record that is late is late.

use etcd_client::{Client, PutOptions, Txn, TxnOp};
use galerne_types::RouterRecord;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::coord::{Coord, json};
use crate::error::CoordError;
use crate::limits::{ROUTER_KEEP_ALIVE_INTERVAL, ROUTER_TTL_S};

/// Writes what `records` shows under `key`, until its sender is dropped.
pub(crate) async fn keep(coord: &Coord, key: &str, mut records: watch::Receiver<RouterRecord>) {
    let mut ticks = interval(ROUTER_KEEP_ALIVE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut lease, mut away) = (None, false);
    loop {
        let is_news = tokio::select! {
            _ = ticks.tick() => lease.is_none(),
            changed = records.changed() => match changed {
                Ok(()) => true,
                Err(_) => break,
            },
        };
        let kept = attend(coord, key, &mut records, &mut lease, is_news).await;
        match &kept {
            Err(error) if !away => tracing::warn!(%error, "what this router counts cannot be told"),
            Ok(()) if away => tracing::info!("what this router counts is told again"),
            _ => {}
        }
        away = kept.is_err();
    }
    if let Some(lease) = lease.filter(|_| !away) {
        let revoke = |mut client: Client| async move { client.lease_revoke(lease).await };
        let _ = coord.etcd.ask("give a lease up", revoke).await; // it ends by itself
    }
}

/// Renews the lease, or writes; under a new lease if the old one is lost.
async fn attend(
    coord: &Coord,
    key: &str,
    records: &mut watch::Receiver<RouterRecord>,
    lease: &mut Option<i64>,
    is_news: bool,
) -> Result<(), CoordError> {
    if let Some(held) = *lease
        && !is_news
    {
        if coord.etcd.renew_lease(held).await? {
            return Ok(());
        }
        *lease = None;
    }
    let held = match *lease {
        Some(held) => held,
        None => *lease.insert(coord.etcd.lease(ROUTER_TTL_S).await?),
    };
    let value = json(&*records.borrow_and_update());
    let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(held)));
    let written = coord.etcd.txn("tell what a router counts", &Txn::new().and_then([put])).await;
    if written.is_err() {
        *lease = None; // it may be that one that is not there any more
    }
    written.map(drop)
}

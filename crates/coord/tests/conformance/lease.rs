//! Leases.

use std::rc::Rc;
use std::time::Duration;

use etcd_client::{EventType, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions, WatchOptions};
use tokio::time::{Instant, interval};

use crate::server::Server;

pub(crate) async fn grants_and_revocations(server: Rc<Server>) {
    let mut client = server.client().await;
    let granted = client.lease_grant(60, Some(LeaseGrantOptions::new().with_id(1_234))).await.unwrap();
    assert_eq!((granted.id(), granted.ttl()), (1_234, 60));
    assert!(client.lease_grant(60, Some(LeaseGrantOptions::new().with_id(1_234))).await.is_err());
    let other = client.lease_grant(60, None).await.unwrap().id();
    assert!(other > 0 && other != 1_234);
    let leases = client.leases().await.unwrap();
    assert!([1_234, other].iter().all(|id| leases.leases().iter().any(|lease| lease.id() == *id)));

    for key in ["grant/a", "grant/b"] {
        client.put(key, "v", Some(PutOptions::new().with_lease(1_234))).await.unwrap();
    }
    // A key moves from lease to lease.
    client.put("grant/b", "v", Some(PutOptions::new().with_lease(other))).await.unwrap();
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(1_234, Some(options)).await.unwrap();
    assert!((1..=60).contains(&left.ttl()) && left.granted_ttl() == 60);
    assert_eq!(left.keys(), [b"grant/a".to_vec()]);

    client.lease_revoke(1_234).await.unwrap();
    assert!(client.lease_revoke(1_234).await.is_err());
    assert_eq!(client.get("grant/a", None).await.unwrap().count(), 0);
    assert_eq!(client.get("grant/b", None).await.unwrap().kvs()[0].lease(), other);
    assert_eq!(client.lease_time_to_live(1_234, None).await.unwrap().ttl(), -1);
}

pub(crate) async fn expiry_is_seen_by_watchers(server: Rc<Server>) {
    let mut client = server.client().await;
    let started = Instant::now();
    let lease = client.lease_grant(1, None).await.unwrap();
    let mut watch = client.watch("expire/", Some(WatchOptions::new().with_prefix())).await.unwrap();
    assert!(watch.message().await.unwrap().unwrap().created());
    for key in ["expire/a", "expire/b"] {
        client.put(key, "v", Some(PutOptions::new().with_lease(lease.id()))).await.unwrap();
    }
    let mut deleted = Vec::new();
    while deleted.len() < 2 {
        let response = watch.message().await.unwrap().unwrap();
        let gone = response.events().iter().filter(|event| event.event_type() == EventType::Delete);
        deleted.extend(gone.map(|event| event.kv().unwrap().mod_revision()));
    }
    assert!(started.elapsed().as_millis() >= 900, "not before its time");
    assert_eq!(deleted[0], deleted[1], "one revision");
    assert!(client.lease_keep_alive(lease.id()).await.is_err());
}

pub(crate) async fn keep_alive_prolongs(server: Rc<Server>) {
    let mut client = server.client().await;
    // Without renewals the one that is kept would end first.
    let kept = client.lease_grant(2, None).await.unwrap();
    let dropped = client.lease_grant(3, None).await.unwrap();
    let mut watch = client.watch("kept/", Some(WatchOptions::new().with_prefix())).await.unwrap();
    client.put("kept/yes", "v", Some(PutOptions::new().with_lease(kept.id()))).await.unwrap();
    client.put("kept/no", "v", Some(PutOptions::new().with_lease(dropped.id()))).await.unwrap();
    let (mut keeper, mut answers) = client.lease_keep_alive(kept.id()).await.unwrap();
    let mut renewal = interval(Duration::from_millis(200));
    let mut deleted = None;
    while deleted.is_none() {
        tokio::select! {
            _ = renewal.tick() => {
                keeper.keep_alive().await.unwrap();
                assert_eq!(answers.message().await.unwrap().unwrap().ttl(), kept.ttl());
            }
            response = watch.message() => {
                let response = response.unwrap().unwrap();
                let gone = response.events().iter().find(|event| event.event_type() == EventType::Delete);
                deleted = gone.map(|event| event.kv().unwrap().key().to_vec());
            }
        }
    }
    assert_eq!(deleted.as_deref(), Some(&b"kept/no"[..]));
    assert_eq!(client.get("kept/yes", None).await.unwrap().count(), 1);
}

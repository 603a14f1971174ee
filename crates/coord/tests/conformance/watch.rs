//! Watches.

use std::rc::Rc;

use etcd_client::{EventType, Txn, TxnOp, WatchFilterType, WatchOptions, WatchResponse, WatchStream};

use crate::kv::put;
use crate::server::Server;

pub(crate) async fn events_from_now_and_from_the_past(server: Rc<Server>) {
    let mut client = server.client().await;
    put(&mut client, "watch/a", "1").await;
    let second = put(&mut client, "watch/a", "2").await;
    put(&mut client, "watched", "not").await;

    let options = WatchOptions::new().with_prefix();
    let mut now = client.watch("watch/", Some(options.clone())).await.unwrap();
    assert!(message(&mut now).await.created());
    let past = options.clone().with_start_revision(second).with_prev_key();
    let mut past = client.watch("watch/", Some(past)).await.unwrap();
    assert!(message(&mut past).await.created());
    let deletes = options.with_filters([WatchFilterType::NoPut]);
    let mut deletes = client.watch("watch/", Some(deletes)).await.unwrap();
    assert!(message(&mut deletes).await.created());

    let history = message(&mut past).await;
    assert_eq!(told(&history), ["put watch/a 2 (1)"]);
    let txn = Txn::new().and_then([TxnOp::put("watch/b", "1", None), TxnOp::delete("watch/a", None)]);
    let revision = client.txn(txn).await.unwrap().header().unwrap().revision();

    let response = message(&mut now).await;
    assert_eq!(told(&response), ["put watch/b 1", "delete watch/a "], "one revision, one answer");
    assert!(response.events().iter().all(|event| event.kv().unwrap().mod_revision() == revision));
    assert_eq!(told(&message(&mut past).await), ["put watch/b 1", "delete watch/a  (2)"]);
    assert_eq!(told(&message(&mut deletes).await), ["delete watch/a "]);
}

pub(crate) async fn what_is_compacted_cannot_be_watched(server: Rc<Server>) {
    let mut client = server.client().await;
    let first = put(&mut client, "compact/a", "1").await;
    let second = put(&mut client, "compact/a", "2").await;
    client.compact(second, None).await.unwrap();
    let mut old =
        client.watch("compact/a", Some(WatchOptions::new().with_start_revision(first))).await.unwrap();
    let mut response = message(&mut old).await;
    if response.created() && !response.canceled() {
        response = message(&mut old).await;
    }
    assert!(response.canceled());
    assert_eq!(response.compact_revision(), second);

    let options = WatchOptions::new().with_start_revision(second + 1);
    let mut next = client.watch("compact/a", Some(options)).await.unwrap();
    assert!(message(&mut next).await.created());
    put(&mut client, "compact/a", "3").await;
    assert_eq!(told(&message(&mut next).await), ["put compact/a 3"]);
}

pub(crate) async fn progress_and_cancellation(server: Rc<Server>) {
    let mut client = server.client().await;
    let mut watch = client.watch("progress/a", None).await.unwrap();
    let id = message(&mut watch).await.watch_id();
    let revision = put(&mut client, "progress/other", "1").await;
    // A real etcd answers once its watchers have caught up.
    let progress = loop {
        watch.request_progress().await.unwrap();
        let response = message(&mut watch).await;
        if response.header().unwrap().revision() >= revision {
            break response;
        }
    };
    assert!(progress.events().is_empty() && !progress.canceled());

    watch.watch("progress/b", None).await.unwrap();
    let second = message(&mut watch).await;
    assert!(second.created() && second.watch_id() != id);
    watch.cancel(id).await.unwrap();
    let cancelled = message(&mut watch).await;
    assert!(cancelled.canceled() && cancelled.watch_id() == id);
    put(&mut client, "progress/a", "1").await;
    put(&mut client, "progress/b", "1").await;
    assert_eq!(told(&message(&mut watch).await), ["put progress/b 1"]);
}

async fn message(watch: &mut WatchStream) -> WatchResponse {
    watch.message().await.unwrap().unwrap()
}

fn told(response: &WatchResponse) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let tell = |event: &etcd_client::Event| {
        let kind = if event.event_type() == EventType::Put { "put" } else { "delete" };
        let kv = event.kv().unwrap();
        let before = event.prev_kv().map(|kv| format!(" ({})", text(kv.value()))).unwrap_or_default();
        format!("{kind} {} {}{before}", text(kv.key()), text(kv.value()))
    };
    response.events().iter().map(tell).collect()
}

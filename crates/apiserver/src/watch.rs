//! Watches: what has changed since a version, one JSON a line.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::stream::unfold;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::kinds::Kind;
use crate::request::Query;
use crate::selector::Selector;
use crate::store::{Change, Store};

/// A watch that is told nothing else ends after so long, in seconds.
const TIMEOUT_S: u64 = 300;

struct Watch {
    store: Arc<Store>,
    kind: Kind,
    namespace: Option<String>,
    selector: Selector,
    metadata_only: bool,
    bookmarks: bool,
    /// What has been told, up to this version.
    told: u64,
    /// Objects that were there when it began, if it wants them.
    first: Vec<Value>,
    until: Instant,
    over: bool,
}

/// The answer to a watch.
pub(crate) fn watch(
    store: Arc<Store>,
    kind: Kind,
    namespace: Option<String>,
    query: &Query,
    metadata_only: bool,
) -> Body {
    let resource = format!("{}/{}", kind.group, kind.plural);
    let selector = query.selector();
    let asked = query.number("resourceVersion").filter(|version| *version > 0);
    let (first, told) = {
        let state = store.current();
        let here = state
            .of(&resource, namespace.as_deref())
            .filter(|(_, object)| asked.is_none() && selector.takes(object));
        let first: Vec<Value> =
            here.map(|(_, object)| json!({ "type": "ADDED", "object": **object })).collect();
        (first, asked.unwrap_or(state.version))
    };
    let seconds = query.number("timeoutSeconds").unwrap_or(TIMEOUT_S).min(TIMEOUT_S);
    let watch = Watch {
        store,
        kind,
        namespace,
        selector,
        metadata_only,
        bookmarks: query.says("allowWatchBookmarks"),
        told,
        first,
        until: Instant::now() + Duration::from_secs(seconds),
        over: false,
    };
    Body::from_stream(unfold(watch, |mut watch| async move {
        let lines = watch.next().await?;
        Some((Ok::<Bytes, Infallible>(lines.into()), watch))
    }))
}

impl Watch {
    /// The next events; `None` once it is over.
    async fn next(&mut self) -> Option<String> {
        if !self.first.is_empty() {
            let first = std::mem::take(&mut self.first);
            return Some(self.lines(first));
        }
        let mut versions = self.store.versions();
        while !self.over {
            let events = self.news();
            if !events.is_empty() {
                return Some(self.lines(events));
            }
            let told = self.told;
            if tokio::time::timeout_at(self.until, versions.wait_for(|version| *version > told))
                .await
                .is_err()
            {
                self.over = true;
            }
        }
        None
    }

    fn news(&mut self) -> Vec<Value> {
        let state = self.store.current();
        let changes = match state.since(self.told) {
            Ok(changes) => changes,
            Err(gone) => {
                self.over = true;
                return vec![json!({ "type": "ERROR", "object": gone.status() })];
            }
        };
        let mut events: Vec<Value> = changes.filter_map(|change| self.event(change)).collect();
        let moved = state.version > self.told;
        self.told = state.version;
        if events.is_empty() && moved && self.bookmarks {
            let (version, kind) = (self.told.to_string(), &self.kind);
            let object = json!({
                "apiVersion": kind.api_version(),
                "kind": kind.kind,
                "metadata": { "resourceVersion": version },
            });
            events.push(json!({ "type": "BOOKMARK", "object": object }));
        }
        events
    }

    /// What a change is to this watch: an object that does not fit any more is gone.
    fn event(&self, Change { place: (resource, namespace, _), before, after, .. }: &Change) -> Option<Value> {
        let here = self.namespace.as_ref().is_none_or(|wanted| wanted == namespace);
        if *resource != format!("{}/{}", self.kind.group, self.kind.plural) || !here {
            return None;
        }
        let takes =
            |object: &Option<Arc<Value>>| object.as_ref().is_some_and(|object| self.selector.takes(object));
        let (kind, object) = match (takes(before), takes(after)) {
            (false, true) => ("ADDED", after),
            (true, true) => ("MODIFIED", after),
            (true, false) => ("DELETED", if after.is_some() { after } else { before }),
            (false, false) => return None,
        };
        Some(json!({ "type": kind, "object": **object.as_ref()? }))
    }

    fn lines(&self, events: Vec<Value>) -> String {
        let shown = events.into_iter().map(|mut event| {
            if self.metadata_only && event["type"] != "ERROR" {
                event["object"] = metadata_of(&event["object"]);
            }
            event.to_string() + "\n"
        });
        shown.collect()
    }
}

/// An object as `PartialObjectMetadata`.
pub(crate) fn metadata_of(object: &Value) -> Value {
    json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"] })
}

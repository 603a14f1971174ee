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
use crate::status::Failure;
use crate::store::{Change, Store};

/// A watch that is told nothing else ends after so long, in seconds.
const TIMEOUT_S: u64 = 300;

/// Between two bookmarks lies as much time at least. The real one takes about a minute.
const BOOKMARKS_APART: Duration = Duration::from_secs(1);

struct Watch {
    store: Arc<Store>,
    kind: Arc<Kind>,
    resource: String,
    namespace: Option<String>,
    selector: Selector,
    metadata_only: bool,
    bookmarks: bool,
    /// What has been told, up to this version.
    told: u64,
    /// Objects that were there when it began, if it wants them.
    first: Vec<Arc<Value>>,
    until: Instant,
    /// No bookmark before.
    bookmark_at: Instant,
    over: bool,
}

/// What a change is to a watch, with the object.
type Event = (&'static str, Arc<Value>);

/// The answer to a watch.
pub(crate) fn watch(
    store: Arc<Store>,
    kind: Arc<Kind>,
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
        let first = here.map(|(_, object)| object.clone()).collect();
        (first, asked.unwrap_or(state.version))
    };
    let seconds = query.number("timeoutSeconds").unwrap_or(TIMEOUT_S).min(TIMEOUT_S);
    let watch = Watch {
        store,
        kind,
        resource,
        namespace,
        selector,
        metadata_only,
        bookmarks: query.says("allowWatchBookmarks"),
        told,
        first,
        until: Instant::now() + Duration::from_secs(seconds),
        bookmark_at: Instant::now(),
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
            return Some(first.iter().map(|object| self.line("ADDED", object)).collect());
        }
        let mut versions = self.store.versions();
        let mut behind = false;
        while !self.over {
            let told = self.told;
            let lines = match self.news() {
                Err(gone) => {
                    self.over = true;
                    return Some(line("ERROR", &gone.status()));
                }
                Ok(events) => events.iter().map(|(kind, object)| self.line(kind, object)).collect::<String>(),
            };
            if !lines.is_empty() {
                return Some(lines);
            }
            behind |= self.bookmarks && self.told > told;
            if behind && Instant::now() >= self.bookmark_at {
                self.bookmark_at = Instant::now() + BOOKMARKS_APART;
                return Some(self.bookmark());
            }
            let (told, until) =
                (self.told, if behind { self.bookmark_at.min(self.until) } else { self.until });
            let news = versions.wait_for(|version| *version > told);
            if tokio::time::timeout_at(until, news).await.is_err() {
                self.over = Instant::now() >= self.until;
            }
        }
        None
    }

    fn news(&mut self) -> Result<Vec<Event>, Failure> {
        let state = self.store.current();
        let events = state.since(self.told)?.filter_map(|change| self.event(change)).collect();
        self.told = state.version;
        Ok(events)
    }

    fn bookmark(&self) -> String {
        let (version, kind) = (self.told.to_string(), &self.kind);
        let object = json!({
            "apiVersion": kind.api_version(), "kind": kind.kind, "metadata": { "resourceVersion": version },
        });
        self.line("BOOKMARK", &object)
    }

    /// What a change is to this watch: an object that does not fit any more is gone.
    fn event(&self, Change { place: (resource, namespace, _), before, after, .. }: &Change) -> Option<Event> {
        let here = self.namespace.as_ref().is_none_or(|wanted| wanted == namespace);
        if *resource != self.resource || !here {
            return None;
        }
        let takes =
            |object: &Option<Arc<Value>>| object.as_ref().is_some_and(|object| self.selector.takes(object));
        let (kind, object) = match (takes(before), takes(after)) {
            (false, true) => ("ADDED", after),
            (true, true) => ("MODIFIED", after),
            (true, false) => ("DELETED", before),
            (false, false) => return None,
        };
        let mut object = object.clone()?;
        if let ("DELETED", Some(after)) = (kind, after) {
            // As it was when it fitted last, at the version at which it does not any more.
            Arc::make_mut(&mut object)["metadata"]["resourceVersion"] =
                after["metadata"]["resourceVersion"].clone();
        }
        Some((kind, object))
    }

    fn line(&self, kind: &str, object: &Value) -> String {
        if self.metadata_only { line(kind, &metadata_of(object)) } else { line(kind, object) }
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

/// An object as `PartialObjectMetadata`.
pub(crate) fn metadata_of(object: &Value) -> Value {
    json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": object["metadata"] })
}

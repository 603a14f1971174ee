//! One client's watch stream. It is polled when the client has room, so it needs no queue of events.

use std::collections::VecDeque;

use etcd_client::proto::{PbWatchRequest, PbWatchRequestUnion, PbWatchResponse};
use futures_util::{Stream, stream};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, interval_at};
use tonic::{Status, Streaming};

use super::PROGRESS_INTERVAL;
use super::range::KeyRange;
use super::service::Service;
use super::watch::{Watcher, Watchers};

/// The stream's state.
pub(crate) struct Session {
    service: Service,
    requests: Streaming<PbWatchRequest>,
    revisions: watch::Receiver<i64>,
    progress: Interval,
    watchers: Watchers,
    /// Answers to requests, and notes of progress: at most one a request or watcher.
    ready: VecDeque<PbWatchResponse>,
}

impl Session {
    pub(crate) fn new(service: Service, requests: Streaming<PbWatchRequest>) -> Self {
        Self {
            revisions: service.revisions(),
            service,
            requests,
            progress: interval_at(Instant::now() + PROGRESS_INTERVAL, PROGRESS_INTERVAL),
            watchers: Watchers::default(),
            ready: VecDeque::new(),
        }
    }

    pub(crate) fn answers(self) -> impl Stream<Item = Result<PbWatchResponse, Status>> + Send {
        stream::try_unfold(self, |mut session| async move {
            Ok(session.next().await?.map(|answer| (answer, session)))
        })
    }

    /// The next answer; `None` when the client has ended the stream.
    async fn next(&mut self) -> Result<Option<PbWatchResponse>, Status> {
        loop {
            let Self { service, watchers, ready, .. } = self;
            let next = ready.pop_front().or_else(|| service.with(|store, _| watchers.next(store)));
            if next.is_some() {
                return Ok(next);
            }
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.take(request),
                    None => return Ok(None),
                },
                Ok(()) = self.revisions.changed() => {}
                _ = self.progress.tick() => {
                    ready.extend(service.with(|store, _| watchers.notify_progress(store)));
                }
            }
        }
    }

    fn take(&mut self, request: PbWatchRequest) {
        let watchers = &mut self.watchers;
        let answer = self.service.with(|store, _| match request.request_union {
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                // An empty key stands for the first one there can be.
                let key = if create.key.is_empty() { vec![0] } else { create.key };
                let watcher = Watcher {
                    range: KeyRange::new(&key, &create.range_end),
                    next: create.start_revision,
                    prev_kv: create.prev_kv,
                    filters: create.filters,
                    progress_notify: create.progress_notify,
                };
                Some(watchers.create(store, create.watch_id, watcher))
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => watchers.cancel(store, cancel.watch_id),
            Some(PbWatchRequestUnion::ProgressRequest(_)) => Some(watchers.progress(store)),
            None => None,
        });
        self.ready.extend(answer);
    }
}

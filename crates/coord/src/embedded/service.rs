//! The etcd v3 gRPC services on a store: a lock, a clock, and streams.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcd_client::proto::{
    PbAlarmRequest, PbAlarmResponse, PbCompactionRequest, PbCompactionResponse, PbDefragmentRequest,
    PbDefragmentResponse, PbDeleteRequest, PbDeleteResponse, PbDowngradeRequest, PbDowngradeResponse,
    PbHashKvRequest, PbHashKvResponse, PbHashRequest, PbHashResponse, PbKvService, PbLeaseGrantRequest,
    PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest,
    PbLeaseLeasesResponse, PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseService,
    PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse, PbMaintenanceService, PbMoveLeaderRequest,
    PbMoveLeaderResponse, PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse,
    PbRangeStreamResponse, PbSnapshotRequest, PbSnapshotResponse, PbStatusRequest, PbStatusResponse,
    PbTxnRequest, PbTxnResponse, PbWatchRequest, PbWatchResponse, PbWatchService,
};
use futures_util::{Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::refusal::Refusal;
use super::session::Session;
use super::store::{MEMBER_ID, Store};

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A store that is served. Clones are handles on the same store.
#[derive(Clone)]
pub(crate) struct Service {
    store: Arc<Mutex<Store>>,
    started: Instant,
    /// The last revision: wakes watchers.
    revision: watch::Sender<i64>,
    stopped: CancellationToken,
}

impl Service {
    pub(crate) fn new() -> Self {
        let store = Store::new();
        let revision = watch::Sender::new(store.revision());
        Self {
            store: Arc::new(Mutex::new(store)),
            started: Instant::now(),
            revision,
            stopped: CancellationToken::new(),
        }
    }

    /// Ends all streams when it is cancelled.
    pub(crate) fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }

    /// Changes with each revision.
    pub(crate) fn revisions(&self) -> watch::Receiver<i64> {
        self.revision.subscribe()
    }

    /// Ends the leases whose time is over.
    pub(crate) fn expire(&self) {
        self.with(|store, now| store.expire(now));
    }

    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Store, Duration) -> T) -> T {
        // The store's methods leave it whole.
        let mut store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = f(&mut store, self.started.elapsed());
        let revision = store.revision();
        self.revision.send_if_modified(|last| std::mem::replace(last, revision) != revision);
        answer
    }
}

#[async_trait]
impl PbKvService for Service {
    type RangeStreamStream = Answers<PbRangeStreamResponse>;

    async fn range(&self, request: Request<PbRangeRequest>) -> Answer<PbRangeResponse> {
        Ok(Response::new(self.with(|store, _| store.range(request.get_ref()))?))
    }

    async fn range_stream(&self, _: Request<PbRangeRequest>) -> Answer<Self::RangeStreamStream> {
        Err(Refusal::Unknown("streamed ranges").into())
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Answer<PbPutResponse> {
        Ok(Response::new(self.with(|store, _| store.put(request.into_inner()))?))
    }

    async fn delete_range(&self, request: Request<PbDeleteRequest>) -> Answer<PbDeleteResponse> {
        Ok(Response::new(self.with(|store, _| store.delete_range(request.get_ref()))?))
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Answer<PbTxnResponse> {
        Ok(Response::new(self.with(|store, _| store.txn(request.into_inner()))?))
    }

    async fn compact(&self, request: Request<PbCompactionRequest>) -> Answer<PbCompactionResponse> {
        Ok(Response::new(self.with(|store, _| store.compaction(request.get_ref()))?))
    }
}

#[async_trait]
impl PbLeaseService for Service {
    type LeaseKeepAliveStream = Answers<PbLeaseKeepAliveResponse>;

    async fn lease_grant(&self, request: Request<PbLeaseGrantRequest>) -> Answer<PbLeaseGrantResponse> {
        let random = getrandom::u64().map_err(|error| Status::internal(error.to_string()))?;
        // Positive, as etcd's are, and not 0, which is no lease.
        let fresh_id = i64::try_from(random >> 1).unwrap_or(i64::MAX).max(1);
        Ok(Response::new(self.with(|store, now| store.lease_grant(now, request.get_ref(), fresh_id))?))
    }

    async fn lease_revoke(&self, request: Request<PbLeaseRevokeRequest>) -> Answer<PbLeaseRevokeResponse> {
        Ok(Response::new(self.with(|store, _| store.lease_revoke(request.get_ref()))?))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Answer<Self::LeaseKeepAliveStream> {
        let service = self.clone();
        let answers = request.into_inner().map(move |request| {
            let id = request?.id;
            Ok(service.with(|store, now| store.lease_keep_alive(now, id)))
        });
        Ok(Response::new(Box::pin(answers.take_until(self.stopped.clone().cancelled_owned()))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<PbLeaseTimeToLiveRequest>,
    ) -> Answer<PbLeaseTimeToLiveResponse> {
        Ok(Response::new(self.with(|store, now| store.lease_time_to_live(now, request.get_ref()))))
    }

    async fn lease_leases(&self, _: Request<PbLeaseLeasesRequest>) -> Answer<PbLeaseLeasesResponse> {
        Ok(Response::new(self.with(|store, _| store.lease_leases())))
    }
}

#[async_trait]
impl PbWatchService for Service {
    type WatchStream = Answers<PbWatchResponse>;

    async fn watch(&self, request: Request<Streaming<PbWatchRequest>>) -> Answer<Self::WatchStream> {
        let answers = Session::new(self.clone(), request.into_inner()).answers();
        Ok(Response::new(Box::pin(answers.take_until(self.stopped.clone().cancelled_owned()))))
    }
}

#[async_trait]
impl PbMaintenanceService for Service {
    type SnapshotStream = Answers<PbSnapshotResponse>;

    async fn status(&self, _: Request<PbStatusRequest>) -> Answer<PbStatusResponse> {
        Ok(Response::new(self.with(|store, _| {
            let bytes = i64::try_from(store.live_bytes()).unwrap_or(i64::MAX);
            let applied = store.revision().unsigned_abs();
            PbStatusResponse {
                header: store.header(),
                version: concat!("3.5.0-galerne-", env!("CARGO_PKG_VERSION")).into(),
                db_size: bytes,
                db_size_in_use: bytes,
                leader: MEMBER_ID,
                raft_index: applied,
                raft_applied_index: applied,
                raft_term: 1,
                ..Default::default()
            }
        })))
    }

    async fn alarm(&self, _: Request<PbAlarmRequest>) -> Answer<PbAlarmResponse> {
        Err(Refusal::Unknown("alarms").into())
    }

    async fn defragment(&self, _: Request<PbDefragmentRequest>) -> Answer<PbDefragmentResponse> {
        Err(Refusal::Unknown("defragmentation").into())
    }

    async fn hash(&self, _: Request<PbHashRequest>) -> Answer<PbHashResponse> {
        Err(Refusal::Unknown("hashes").into())
    }

    async fn hash_kv(&self, _: Request<PbHashKvRequest>) -> Answer<PbHashKvResponse> {
        Err(Refusal::Unknown("hashes").into())
    }

    async fn snapshot(&self, _: Request<PbSnapshotRequest>) -> Answer<Self::SnapshotStream> {
        Err(Refusal::Unknown("snapshots").into())
    }

    async fn move_leader(&self, _: Request<PbMoveLeaderRequest>) -> Answer<PbMoveLeaderResponse> {
        Err(Refusal::Unknown("other members").into())
    }

    async fn downgrade(&self, _: Request<PbDowngradeRequest>) -> Answer<PbDowngradeResponse> {
        Err(Refusal::Unknown("downgrades").into())
    }
}

//! Leases: keys that live as long as somebody says so. Pure; `now` is the time since the store's start.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use etcd_client::proto::{
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveResponse, PbLeaseLeasesResponse,
    PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseStatus, PbLeaseTimeToLiveRequest,
    PbLeaseTimeToLiveResponse,
};

use super::refusal::Refusal;
use super::store::Store;
use super::{LEASE_TTL_S_MAX, LEASE_TTL_S_MIN, LEASES_MAX};

/// All leases and what hangs on them.
#[derive(Default)]
pub(crate) struct Leases {
    table: BTreeMap<i64, Lease>,
}

struct Lease {
    ttl_s: i64,
    ends: Duration,
    keys: BTreeSet<Vec<u8>>,
}

impl Lease {
    fn renew(&mut self, now: Duration) {
        self.ends = now + Duration::from_secs(self.ttl_s.unsigned_abs());
    }
}

impl Leases {
    pub(super) fn exists(&self, id: i64) -> bool {
        self.table.contains_key(&id)
    }

    pub(super) fn attach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.table.get_mut(&id) {
            lease.keys.insert(key.to_vec());
        }
    }

    pub(super) fn detach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.table.get_mut(&id) {
            lease.keys.remove(key);
        }
    }
}

impl Store {
    /// Grants a lease under the asked id, or else under `fresh_id`.
    pub(crate) fn lease_grant(
        &mut self,
        now: Duration,
        request: &PbLeaseGrantRequest,
        fresh_id: i64,
    ) -> Result<PbLeaseGrantResponse, Refusal> {
        if request.ttl > LEASE_TTL_S_MAX {
            return Err(Refusal::LeaseTtlTooLarge);
        }
        let id = if request.id == 0 { fresh_id } else { request.id };
        if self.leases.exists(id) {
            return Err(Refusal::LeaseExists);
        }
        if self.leases.table.len() >= LEASES_MAX {
            return Err(Refusal::TooManyLeases);
        }
        let ttl_s = request.ttl.max(LEASE_TTL_S_MIN);
        let mut lease = Lease { ttl_s, ends: now, keys: BTreeSet::new() };
        lease.renew(now);
        self.leases.table.insert(id, lease);
        Ok(PbLeaseGrantResponse { header: self.header(), id, ttl: ttl_s, error: String::new() })
    }

    /// Ends a lease; its keys go in one revision.
    pub(crate) fn lease_revoke(
        &mut self,
        request: &PbLeaseRevokeRequest,
    ) -> Result<PbLeaseRevokeResponse, Refusal> {
        self.end_lease(request.id)?;
        Ok(PbLeaseRevokeResponse { header: self.header() })
    }

    /// Renews a lease. A TTL of 0 says that there is none.
    pub(crate) fn lease_keep_alive(&mut self, now: Duration, id: i64) -> PbLeaseKeepAliveResponse {
        let ttl = self.leases.table.get_mut(&id).map_or(0, |lease| {
            lease.renew(now);
            lease.ttl_s
        });
        PbLeaseKeepAliveResponse { header: self.header(), id, ttl }
    }

    /// What is left of a lease. A TTL of -1 says that there is none.
    pub(crate) fn lease_time_to_live(
        &self,
        now: Duration,
        request: &PbLeaseTimeToLiveRequest,
    ) -> PbLeaseTimeToLiveResponse {
        let mut response = PbLeaseTimeToLiveResponse {
            header: self.header(),
            id: request.id,
            ttl: -1,
            ..Default::default()
        };
        if let Some(lease) = self.leases.table.get(&request.id) {
            response.ttl = i64::try_from(lease.ends.saturating_sub(now).as_secs()).unwrap_or(i64::MAX);
            response.granted_ttl = lease.ttl_s;
            if request.keys {
                response.keys = lease.keys.iter().cloned().collect();
            }
        }
        response
    }

    pub(crate) fn lease_leases(&self) -> PbLeaseLeasesResponse {
        let leases = self.leases.table.keys().map(|id| PbLeaseStatus { id: *id }).collect();
        PbLeaseLeasesResponse { header: self.header(), leases }
    }

    /// Ends every lease whose time is over.
    pub(crate) fn expire(&mut self, now: Duration) {
        let over: Vec<i64> =
            self.leases.table.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect();
        for id in over {
            // It is in the table: this cannot be refused.
            let _ = self.end_lease(id);
        }
    }

    fn end_lease(&mut self, id: i64) -> Result<(), Refusal> {
        let lease = self.leases.table.remove(&id).ok_or(Refusal::LeaseNotFound)?;
        self.write(|store| lease.keys.iter().for_each(|key| drop(store.delete_key(key))));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::PbPutRequest;

    use super::*;

    fn second(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    fn grant(store: &mut Store, now: Duration, id: i64, ttl: i64) -> Result<i64, Refusal> {
        store.lease_grant(now, &PbLeaseGrantRequest { ttl, id }, 77).map(|response| response.id)
    }

    fn put(store: &mut Store, key: &str, lease: i64) -> Result<(), Refusal> {
        store.put(PbPutRequest { key: key.into(), lease, ..Default::default() }).map(drop)
    }

    #[test]
    fn keys_go_with_their_lease_in_one_revision() {
        let mut store = Store::new();
        assert_eq!(grant(&mut store, second(0), 0, 3), Ok(77));
        for key in ["a", "b"] {
            put(&mut store, key, 77).unwrap();
        }
        put(&mut store, "c", 0).unwrap();
        put(&mut store, "b", 0).unwrap();
        put(&mut store, "d", 77).unwrap();
        let before = store.revision();
        store.expire(second(2));
        assert_eq!((store.live().len(), store.revision()), (4, before));
        store.expire(second(3));
        assert_eq!(store.live().keys().collect::<Vec<_>>(), [b"b", b"c"], "b was let off the lease");
        assert_eq!(store.revision(), before + 1);
        assert_eq!(put(&mut store, "a", 77), Err(Refusal::LeaseNotFound));
    }

    #[test]
    fn a_renewed_lease_lives_on() {
        let mut store = Store::new();
        grant(&mut store, second(0), 5, 3).unwrap();
        assert_eq!(store.lease_keep_alive(second(2), 5).ttl, 3);
        store.expire(second(4));
        let ttl = |store: &Store, now| {
            store.lease_time_to_live(second(now), &PbLeaseTimeToLiveRequest { id: 5, keys: true }).ttl
        };
        assert_eq!(ttl(&store, 4), 1);
        store.expire(second(5));
        assert_eq!(ttl(&store, 5), -1);
        assert_eq!(store.lease_keep_alive(second(5), 5).ttl, 0);
    }

    #[test]
    fn leases_that_cannot_be_are_refused() {
        let mut store = Store::new();
        assert_eq!(grant(&mut store, second(0), 5, -1), Ok(5), "a short one is made longer");
        assert_eq!(grant(&mut store, second(0), 5, 3), Err(Refusal::LeaseExists));
        assert_eq!(grant(&mut store, second(0), 6, i64::MAX), Err(Refusal::LeaseTtlTooLarge));
        assert_eq!(store.lease_revoke(&PbLeaseRevokeRequest { id: 6 }).err(), Some(Refusal::LeaseNotFound));
        for id in 1_000..999 + i64::try_from(LEASES_MAX).unwrap() {
            grant(&mut store, second(0), id, 3).unwrap();
        }
        assert_eq!(grant(&mut store, second(0), 6, 3), Err(Refusal::TooManyLeases));
    }
}

//! The KV service's requests. Pure.

use std::borrow::Cow;
use std::cmp::Ordering;

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbCompare, PbCompareTarget, PbDeleteRequest, PbDeleteResponse,
    PbKeyValue, PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse, PbResponseOp, PbTargetUnion,
    PbTxnOpRequest, PbTxnOpResponse, PbTxnRequest, PbTxnRequestOp, PbTxnResponse,
};
use etcd_client::{CompareOp, SortOrder, SortTarget};

use super::range::KeyRange;
use super::refusal::Refusal;
use super::store::Store;
use super::{REQUEST_BYTES_MAX, STORE_BYTES_MAX, TXN_OPS_MAX};

impl Store {
    pub(crate) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        check_key(&request.key)?;
        let range = KeyRange::new(&request.key, &request.range_end);
        let keys = match request.revision {
            revision if revision <= 0 || revision == self.revision() => Cow::Borrowed(self.live()),
            revision => Cow::Owned(self.past(&range, revision)?),
        };
        let mut kvs: Vec<&PbKeyValue> = keys.range::<[u8], _>(range.bounds()).map(|(_, kv)| kv).collect();
        let mut response = PbRangeResponse { header: self.header(), ..PbRangeResponse::default() };
        response.count = count(kvs.len());
        if request.count_only {
            return Ok(response);
        }
        kvs.retain(|kv| within_revisions(request, kv));
        sort(request, &mut kvs);
        if request.limit > 0 && count(kvs.len()) > request.limit {
            kvs.truncate(usize::try_from(request.limit).unwrap_or(usize::MAX));
            response.more = true;
        }
        response.kvs = kvs.into_iter().cloned().collect();
        if request.keys_only {
            response.kvs.iter_mut().for_each(|kv| kv.value.clear());
        }
        Ok(response)
    }

    pub(crate) fn put(&mut self, request: PbPutRequest) -> Result<PbPutResponse, Refusal> {
        check_put(&request)?;
        self.check_room(std::iter::once(&request))?;
        let mut response = self.write(|store| store.put_op(request));
        response.header = self.header();
        Ok(response)
    }

    pub(crate) fn delete_range(&mut self, request: &PbDeleteRequest) -> Result<PbDeleteResponse, Refusal> {
        check_key(&request.key)?;
        let mut response = self.write(|store| store.delete_op(request));
        response.header = self.header();
        Ok(response)
    }

    /// All or nothing: what could be refused is looked at before anything is written.
    pub(crate) fn txn(&mut self, request: PbTxnRequest) -> Result<PbTxnResponse, Refusal> {
        if [request.compare.len(), request.success.len(), request.failure.len()].into_iter().max()
            > Some(TXN_OPS_MAX)
        {
            return Err(Refusal::TooManyOps);
        }
        check_branch(&request.success)?;
        check_branch(&request.failure)?;
        let mut succeeded = true;
        for compare in &request.compare {
            succeeded &= self.holds(compare)?;
        }
        let ops: Vec<PbTxnOpRequest> = if succeeded { request.success } else { request.failure }
            .into_iter()
            .filter_map(|op| op.request)
            .collect();
        self.check_room(ops.iter().filter_map(|op| match op {
            PbTxnOpRequest::RequestPut(put) => Some(put),
            _ => None,
        }))?;
        for op in &ops {
            if let PbTxnOpRequest::RequestRange(range) = op {
                // Its revision may be out of reach.
                self.range(&PbRangeRequest { count_only: true, ..range.clone() })?;
            }
        }
        let responses =
            self.write(|store| ops.into_iter().map(|op| store.op(op)).collect::<Result<_, _>>())?;
        Ok(PbTxnResponse { header: self.header(), succeeded, responses })
    }

    pub(crate) fn compaction(
        &mut self,
        request: &PbCompactionRequest,
    ) -> Result<PbCompactionResponse, Refusal> {
        self.compact(request.revision)?;
        Ok(PbCompactionResponse { header: self.header() })
    }

    fn op(&mut self, op: PbTxnOpRequest) -> Result<PbResponseOp, Refusal> {
        let response = match op {
            PbTxnOpRequest::RequestRange(range) => PbTxnOpResponse::ResponseRange(self.range(&range)?),
            PbTxnOpRequest::RequestPut(put) => PbTxnOpResponse::ResponsePut(self.put_op(put)),
            PbTxnOpRequest::RequestDeleteRange(delete) => {
                PbTxnOpResponse::ResponseDeleteRange(self.delete_op(&delete))
            }
            PbTxnOpRequest::RequestTxn(_) => return Err(Refusal::Unknown("nested transactions")),
        };
        Ok(PbResponseOp { response: Some(response) })
    }

    fn put_op(&mut self, request: PbPutRequest) -> PbPutResponse {
        let before = self.put_key(request.key, request.value, request.lease);
        PbPutResponse { header: self.header(), prev_kv: before.filter(|_| request.prev_kv) }
    }

    fn delete_op(&mut self, request: &PbDeleteRequest) -> PbDeleteResponse {
        let range = KeyRange::new(&request.key, &request.range_end);
        let keys: Vec<Vec<u8>> =
            self.live().range::<[u8], _>(range.bounds()).map(|(key, _)| key.clone()).collect();
        let prev_kvs: Vec<PbKeyValue> = keys.iter().filter_map(|key| self.delete_key(key)).collect();
        PbDeleteResponse {
            header: self.header(),
            deleted: count(prev_kvs.len()),
            prev_kvs: if request.prev_kv { prev_kvs } else { Vec::new() },
        }
    }

    /// Whether puts fit in and their leases exist.
    fn check_room<'a>(&self, puts: impl Iterator<Item = &'a PbPutRequest>) -> Result<(), Refusal> {
        let mut bytes = 0;
        for put in puts {
            if put.lease != 0 && !self.leases.exists(put.lease) {
                return Err(Refusal::LeaseNotFound);
            }
            bytes += put.key.len() + put.value.len();
        }
        if bytes > REQUEST_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        if bytes > 0 && self.live_bytes() + bytes > STORE_BYTES_MAX {
            return Err(Refusal::NoSpace);
        }
        Ok(())
    }

    /// Whether a comparison holds, for every key that it names. A missing key compares as zeros, and as no
    /// value at all.
    fn holds(&self, compare: &PbCompare) -> Result<bool, Refusal> {
        check_key(&compare.key)?;
        let range = KeyRange::new(&compare.key, &compare.range_end);
        let target = PbCompareTarget::try_from(compare.target);
        let target = target.map_err(|_| Refusal::Unknown("this target of a comparison"))?;
        let wanted =
            CompareOp::try_from(compare.result).map_err(|_| Refusal::Unknown("this kind of comparison"))?;
        let holds = |kv: &PbKeyValue| {
            let ordering = compare_field(target, kv, compare.target_union.as_ref());
            match wanted {
                CompareOp::Equal => ordering == Ordering::Equal,
                CompareOp::Greater => ordering == Ordering::Greater,
                CompareOp::Less => ordering == Ordering::Less,
                CompareOp::NotEqual => ordering != Ordering::Equal,
            }
        };
        let mut kvs = self.live().range::<[u8], _>(range.bounds()).map(|(_, kv)| kv).peekable();
        if kvs.peek().is_none() {
            return Ok(target != PbCompareTarget::Value && holds(&PbKeyValue::default()));
        }
        Ok(kvs.all(holds))
    }
}

fn compare_field(target: PbCompareTarget, kv: &PbKeyValue, given: Option<&PbTargetUnion>) -> Ordering {
    let number = match given {
        Some(
            PbTargetUnion::Version(number)
            | PbTargetUnion::CreateRevision(number)
            | PbTargetUnion::ModRevision(number)
            | PbTargetUnion::Lease(number),
        ) => *number,
        _ => 0,
    };
    match target {
        PbCompareTarget::Version => kv.version.cmp(&number),
        PbCompareTarget::Create => kv.create_revision.cmp(&number),
        PbCompareTarget::Mod => kv.mod_revision.cmp(&number),
        PbCompareTarget::Lease => kv.lease.cmp(&number),
        PbCompareTarget::Value => match given {
            Some(PbTargetUnion::Value(value)) => kv.value.cmp(value),
            _ => kv.value.as_slice().cmp(&[]),
        },
    }
}

fn within_revisions(request: &PbRangeRequest, kv: &PbKeyValue) -> bool {
    let at_least = |revision: i64, min: i64| min == 0 || revision >= min;
    let at_most = |revision: i64, max: i64| max == 0 || revision <= max;
    at_least(kv.mod_revision, request.min_mod_revision)
        && at_most(kv.mod_revision, request.max_mod_revision)
        && at_least(kv.create_revision, request.min_create_revision)
        && at_most(kv.create_revision, request.max_create_revision)
}

/// Keys come in ascending order; another target, or descending order, must be asked for.
fn sort(request: &PbRangeRequest, kvs: &mut [&PbKeyValue]) {
    match SortTarget::try_from(request.sort_target) {
        Ok(SortTarget::Key) | Err(_) => {}
        Ok(SortTarget::Version) => kvs.sort_by_key(|kv| kv.version),
        Ok(SortTarget::Create) => kvs.sort_by_key(|kv| kv.create_revision),
        Ok(SortTarget::Mod) => kvs.sort_by_key(|kv| kv.mod_revision),
        Ok(SortTarget::Value) => kvs.sort_by(|a, b| a.value.cmp(&b.value)),
    }
    if request.sort_order == SortOrder::Descend as i32 {
        kvs.reverse();
    }
}

fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if key.is_empty() { Err(Refusal::EmptyKey) } else { Ok(()) }
}

fn check_put(request: &PbPutRequest) -> Result<(), Refusal> {
    check_key(&request.key)?;
    if request.ignore_value || request.ignore_lease {
        return Err(Refusal::Unknown("puts that keep a value or a lease"));
    }
    Ok(())
}

/// A transaction may write a key only once.
fn check_branch(ops: &[PbTxnRequestOp]) -> Result<(), Refusal> {
    let mut puts: Vec<&[u8]> = Vec::new();
    let mut deletes: Vec<KeyRange> = Vec::new();
    for op in ops {
        match &op.request {
            Some(PbTxnOpRequest::RequestRange(range)) => check_key(&range.key)?,
            Some(PbTxnOpRequest::RequestPut(put)) => {
                check_put(put)?;
                puts.push(&put.key);
            }
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                check_key(&delete.key)?;
                deletes.push(KeyRange::new(&delete.key, &delete.range_end));
            }
            Some(PbTxnOpRequest::RequestTxn(_)) => return Err(Refusal::Unknown("nested transactions")),
            None => return Err(Refusal::Unknown("an empty operation")),
        }
    }
    puts.sort_unstable();
    let twice = puts.windows(2).any(|pair| pair[0] == pair[1]);
    if twice || puts.iter().any(|key| deletes.iter().any(|range| range.contains(key))) {
        return Err(Refusal::DuplicateKey);
    }
    Ok(())
}

fn count(len: usize) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> PbPutRequest {
        PbPutRequest { key: key.into(), value: value.into(), ..Default::default() }
    }

    fn put_op(key: &str) -> PbTxnRequestOp {
        PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestPut(put(key, "txn"))) }
    }

    fn delete_op(key: &str, range_end: &str) -> PbTxnRequestOp {
        let delete = PbDeleteRequest { key: key.into(), range_end: range_end.into(), prev_kv: false };
        PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestDeleteRange(delete)) }
    }

    fn all() -> PbRangeRequest {
        PbRangeRequest { key: vec![0], range_end: vec![0], ..Default::default() }
    }

    fn keys(response: &PbRangeResponse) -> Vec<&str> {
        response.kvs.iter().map(|kv| std::str::from_utf8(&kv.key).unwrap()).collect()
    }

    #[test]
    fn ranges_sort_limit_and_filter() {
        let mut store = Store::new();
        for (key, value) in [("a", "3"), ("b", "2"), ("c", "1"), ("b", "2")] {
            store.put(put(key, value)).unwrap();
        }
        let by = |target: SortTarget, order: SortOrder| PbRangeRequest {
            sort_target: target as i32,
            sort_order: order as i32,
            ..all()
        };
        for (request, expected) in [
            (all(), vec!["a", "b", "c"]),
            (by(SortTarget::Key, SortOrder::Descend), vec!["c", "b", "a"]),
            (by(SortTarget::Value, SortOrder::None), vec!["c", "b", "a"]),
            (by(SortTarget::Mod, SortOrder::Ascend), vec!["a", "c", "b"]),
            (by(SortTarget::Version, SortOrder::Descend), vec!["b", "c", "a"]),
            (PbRangeRequest { limit: 2, ..all() }, vec!["a", "b"]),
            (PbRangeRequest { min_create_revision: 3, ..all() }, vec!["b", "c"]),
            (PbRangeRequest { max_mod_revision: 4, ..all() }, vec!["a", "c"]),
            (PbRangeRequest { revision: 2, ..all() }, vec!["a"]),
        ] {
            let response = store.range(&request).unwrap();
            assert_eq!(keys(&response), expected, "{request:?}");
            assert_eq!(response.more, request.limit > 0);
        }
        let counted = store.range(&PbRangeRequest { count_only: true, ..all() }).unwrap();
        assert_eq!((counted.count, counted.kvs.len()), (3, 0));
        let bare = store.range(&PbRangeRequest { keys_only: true, ..all() }).unwrap();
        assert!(bare.kvs.iter().all(|kv| kv.value.is_empty()));
    }

    #[test]
    fn what_a_transaction_cannot_do_leaves_no_trace() {
        let mut store = Store::new();
        let mut with_lease = put_op("b");
        if let Some(PbTxnOpRequest::RequestPut(put)) = &mut with_lease.request {
            put.lease = 9;
        }
        let future = PbTxnRequestOp {
            request: Some(PbTxnOpRequest::RequestRange(PbRangeRequest { revision: 99, ..all() })),
        };
        let nested = PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestTxn(PbTxnRequest::default())) };
        for (success, refusal) in [
            (vec![put_op("a"), put_op("a")], Refusal::DuplicateKey),
            (vec![put_op("b"), delete_op("a", "c")], Refusal::DuplicateKey),
            (vec![put_op("a"), put_op("")], Refusal::EmptyKey),
            (vec![put_op("a"), with_lease], Refusal::LeaseNotFound),
            (vec![put_op("a"), future], Refusal::Future),
            (vec![put_op("a"), nested], Refusal::Unknown("nested transactions")),
            (vec![delete_op("a", ""); TXN_OPS_MAX + 1], Refusal::TooManyOps),
        ] {
            let refused = store.txn(PbTxnRequest { success, ..Default::default() });
            assert_eq!(refused, Err(refusal));
            assert_eq!((store.revision(), store.live().len()), (1, 0));
        }
    }

    #[test]
    fn sizes_are_limited() {
        let mut store = Store::new();
        let value = "x".repeat(REQUEST_BYTES_MAX - 4);
        assert_eq!(store.put(put("12345", &value)).err(), Some(Refusal::TooLarge));
        let room = STORE_BYTES_MAX / REQUEST_BYTES_MAX;
        for count in 0..room {
            store.put(put(&format!("{count:04}"), &value)).unwrap();
        }
        assert_eq!(store.put(put("full", &value)).err(), Some(Refusal::NoSpace));
        let everything = PbDeleteRequest { key: vec![0], range_end: vec![0], prev_kv: false };
        assert_eq!(usize::try_from(store.delete_range(&everything).unwrap().deleted), Ok(room));
        assert_eq!(store.live_bytes(), 0);
    }
}

//! Ranges of keys as etcd writes them. Pure.

use std::ops::Bound;

/// All keys `k` with `start <= k < end`.
#[derive(Clone, Debug)]
pub(crate) struct KeyRange {
    start: Vec<u8>,
    end: Bound<Vec<u8>>,
}

impl KeyRange {
    /// No end: the key alone. An end of one zero byte: every key from `key` on.
    pub(crate) fn new(key: &[u8], range_end: &[u8]) -> Self {
        let end = match range_end {
            [] => Bound::Included(key.to_vec()),
            [0] => Bound::Unbounded,
            // A range that ends before it starts holds nothing.
            end => Bound::Excluded(end.max(key).to_vec()),
        };
        Self { start: key.to_vec(), end }
    }

    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        let before_end = match &self.end {
            Bound::Included(end) => key <= end.as_slice(),
            Bound::Excluded(end) => key < end.as_slice(),
            Bound::Unbounded => true,
        };
        key >= self.start.as_slice() && before_end
    }

    /// For `BTreeMap::range`.
    pub(crate) fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (Bound::Included(&self.start), self.end.as_ref().map(Vec::as_slice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_mean_what_they_mean_in_etcd() {
        for (key, end, inside, outside) in [
            (&b"b"[..], &b""[..], &[&b"b"[..]][..], &[&b"a"[..], b"b\0", b"c"][..]),
            (b"b", b"d", &[b"b", b"b\0", b"c"], &[b"a", b"d"]),
            (b"b", b"\0", &[b"b", b"zzz", b"\xff"], &[b"a"]),
            (b"b", b"a", &[], &[b"a", b"b", b"c"]),
        ] {
            let range = KeyRange::new(key, end);
            let map: std::collections::BTreeMap<Vec<u8>, ()> =
                inside.iter().chain(outside).map(|key| (key.to_vec(), ())).collect();
            assert!(inside.iter().all(|key| range.contains(key)), "{range:?}");
            assert!(!outside.iter().any(|key| range.contains(key)), "{range:?}");
            assert_eq!(map.range::<[u8], _>(range.bounds()).count(), inside.len(), "{range:?}");
        }
    }
}

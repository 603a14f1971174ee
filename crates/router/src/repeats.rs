//! Requests that their clients send again: a repeat takes the place of the one that is under way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use axum::http::{HeaderMap, HeaderName};
use galerne_types::TenantId;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::limits::{REPEAT_KEY_BYTES_MAX, REPEATS_MAX};
use crate::link::Cut;

/// The headers that name a request, the first of them first. gRPC's metadata are headers too.
const NAMES: [HeaderName; 2] =
    [HeaderName::from_static("idempotency-key"), HeaderName::from_static("x-request-id")];

/// A tenant's name for a request, by its digest: the same at every router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RepeatKey([u8; 32]);

impl RepeatKey {
    /// The name that a request's headers give it. A header that is no name is what some proxy adds: it is ignored.
    pub(crate) fn of(tenant: TenantId, headers: &HeaderMap) -> Option<Self> {
        let name = NAMES.iter().find_map(|name| headers.get(name))?.as_bytes();
        let fits = (1..=REPEAT_KEY_BYTES_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
        let digest = || Sha256::new().chain_update(tenant.0.to_le_bytes()).chain_update(name).finalize();
        fits.then(|| Self(digest().into()))
    }

    /// The seed of a request that says none: a repeat gets the same tokens, whichever router it reaches.
    pub(crate) fn seed(self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().expect("eight bytes"))
    }
}

/// The named requests under way at this router.
#[derive(Default)]
pub(crate) struct Repeats(Mutex<HashMap<RepeatKey, Weak<Claim>>>);

/// A request's claim to its name, until it is dropped.
pub(crate) struct Claim {
    key: RepeatKey,
    repeats: Arc<Repeats>,
    superseded: CancellationToken,
    /// Its ends of links to leaders.
    cuts: Mutex<Vec<Cut>>,
}

impl Repeats {
    /// Gives a name to a request. One that has it is over: its work has been cancelled when this returns.
    pub(crate) fn claim(self: &Arc<Self>, key: RepeatKey) -> Result<Arc<Claim>, Failure> {
        let claim = Arc::new(Claim {
            key,
            repeats: self.clone(),
            superseded: CancellationToken::new(),
            cuts: Mutex::default(),
        });
        let mut claims = self.claims();
        if claims.len() >= REPEATS_MAX && !claims.contains_key(&key) {
            let says = format!("{REPEATS_MAX} named requests are under way here: retry later");
            return Err(Failure::Overloaded(says));
        }
        let before = claims.insert(key, Arc::downgrade(&claim)).and_then(|before| before.upgrade());
        drop(claims);
        if let Some(before) = before {
            before.supersede();
        }
        Ok(claim)
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<RepeatKey, Weak<Claim>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// Whether a repeat has taken the request's place.
    pub(crate) fn is_over(&self) -> bool {
        self.superseded.is_cancelled()
    }

    /// Tells when one does.
    pub(crate) fn superseded(&self) -> CancellationToken {
        self.superseded.clone()
    }

    /// The request was sent to a leader.
    pub(crate) fn sent(&self, cut: Cut) {
        let mut cuts = self.cuts();
        if self.is_over() {
            cut.cut();
        } else {
            cuts.retain(Cut::holds);
            cuts.push(cut);
        }
    }

    fn supersede(&self) {
        let mut cuts = self.cuts();
        self.superseded.cancel();
        cuts.drain(..).for_each(|cut| cut.cut());
    }

    fn cuts(&self) -> MutexGuard<'_, Vec<Cut>> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Claim").field("over", &self.is_over()).finish_non_exhaustive()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.repeats.claims();
        if claims.get(&self.key).is_some_and(|claim| std::ptr::eq(claim.as_ptr(), self)) {
            claims.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tenant: u64, header: &'static str, name: &str) -> Option<RepeatKey> {
        let headers = HeaderMap::from_iter([(HeaderName::from_static(header), name.parse().unwrap())]);
        RepeatKey::of(TenantId(tenant), &headers)
    }

    #[test]
    fn a_name_is_its_tenants() {
        let mine = key(1, "idempotency-key", "a").unwrap();
        assert_eq!(Some(mine), key(1, "x-request-id", "a"));
        for other in [key(2, "x-request-id", "a"), key(1, "x-request-id", "b")] {
            assert_ne!(mine.seed(), other.unwrap().seed());
        }
        assert_eq!(key(1, "x-request-id", "two words"), None);
        assert_eq!(key(1, "x-request-id", &"a".repeat(REPEAT_KEY_BYTES_MAX + 1)), None);
    }

    #[test]
    fn the_latest_holds_the_name_until_it_ends() {
        let (repeats, key) = (Arc::new(Repeats::default()), key(1, "x-request-id", "a").unwrap());
        let first = repeats.claim(key).unwrap();
        let second = repeats.claim(key).unwrap();
        assert!(first.is_over() && first.superseded().is_cancelled() && !second.is_over());
        drop(first);
        assert_eq!(repeats.claims().len(), 1);
        drop(second);
        assert!(repeats.claims().is_empty());
    }
}

//! Requests that their clients send again: a repeat takes the place of the one that is under way.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use axum::http::{HeaderMap, HeaderName};
use galerne_types::TenantId;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::limits::{REPEAT_KEY_BYTES_MAX, REPEATS_MAX};
use crate::link::Cut;

/// Names a request that its client may send again, and no other.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Names a request, or several that some proxy takes for parts of one. gRPC's metadata are headers too.
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

type Sum = [u8; 32];

/// A tenant's name for a request, and what has been read of the request.
#[derive(Debug)]
pub(crate) struct Named {
    /// Digest of the name: the same at every router.
    name: Sum,
    /// A request of that name with another body is a mistake, and not just another request.
    binding: bool,
    body: Mutex<Sha256>,
}

impl Named {
    /// The name that a request's headers give it. A header that is no name is what some proxy adds: it is ignored.
    pub(crate) fn of(tenant: TenantId, headers: &HeaderMap) -> Option<Self> {
        let binding = headers.contains_key(IDEMPOTENCY_KEY);
        let name = headers.get(if binding { IDEMPOTENCY_KEY } else { X_REQUEST_ID })?.as_bytes();
        let fits = (1..=REPEAT_KEY_BYTES_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
        let digest = || Sha256::new().chain_update(tenant.0.to_le_bytes()).chain_update(name).finalize();
        fits.then(|| Self { name: digest().into(), binding, body: Mutex::default() })
    }

    /// A piece of the body has come.
    pub(crate) fn piece(&self, piece: &[u8]) {
        self.hasher().update(piece);
    }

    /// The body counts as this instead of what has come.
    pub(crate) fn says(&self, body: &[u8]) {
        *self.hasher() = Sha256::new_with_prefix(body);
    }

    /// The seed of a request that says none: a repeat gets the same tokens, whichever router it reaches.
    pub(crate) fn seed(&self) -> u64 {
        u64::from_le_bytes(self.name[..8].try_into().expect("eight bytes"))
    }

    fn body(&self) -> Sum {
        self.hasher().clone().finalize().into()
    }

    fn hasher(&self) -> MutexGuard<'_, Sha256> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The named requests under way at this router.
#[derive(Default)]
pub(crate) struct Repeats(Mutex<Claims>);

#[derive(Default)]
struct Claims {
    /// By their names: of each body one.
    names: HashMap<Sum, Vec<Held>>,
    count: usize,
}

struct Held {
    body: Sum,
    binding: bool,
    claim: Weak<Claim>,
}

/// A request's claim to its name, until it is dropped.
pub(crate) struct Claim {
    name: Sum,
    body: Sum,
    repeats: Arc<Repeats>,
    superseded: CancellationToken,
    /// Its ends of links to leaders.
    cuts: Mutex<Vec<Cut>>,
}

impl Repeats {
    /// Gives a request its name. One that has it and is the same is over: its work has been cancelled when this returns.
    ///
    /// # Errors
    /// If the name binds and another request has it, or if too many have one.
    pub(crate) fn claim(self: &Arc<Self>, named: &Named) -> Result<Arc<Claim>, Failure> {
        let claim = Arc::new(Claim {
            name: named.name,
            body: named.body(),
            repeats: self.clone(),
            superseded: CancellationToken::new(),
            cuts: Mutex::default(),
        });
        let before = self.claims().take_in(&claim, named.binding)?;
        if let Some(before) = before {
            before.supersede();
        }
        Ok(claim)
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims {
    /// Who had the name for the same request.
    fn take_in(&mut self, claim: &Arc<Claim>, binding: bool) -> Result<Option<Arc<Claim>>, Failure> {
        let held = self.names.get(&claim.name).map_or(&[][..], Vec::as_slice);
        if binding && held.iter().any(|held| held.binding && held.body != claim.body) {
            return Err(Failure::KeyReused);
        }
        if self.count >= REPEATS_MAX {
            let says = format!("{REPEATS_MAX} named requests are under way here: retry later");
            return Err(Failure::Overloaded(says));
        }
        let held = self.names.entry(claim.name).or_default();
        let own = Held { body: claim.body, binding, claim: Arc::downgrade(claim) };
        if let Some(before) = held.iter_mut().find(|held| held.body == claim.body) {
            return Ok(std::mem::replace(before, own).claim.upgrade());
        }
        held.push(own);
        self.count += 1;
        Ok(None)
    }

    fn forget(&mut self, claim: &Claim) {
        let Entry::Occupied(mut held) = self.names.entry(claim.name) else { return };
        let before = held.get().len();
        held.get_mut().retain(|held| !std::ptr::eq(held.claim.as_ptr(), claim));
        self.count -= before - held.get().len();
        if held.get().is_empty() {
            held.remove();
        }
    }
}

impl Claim {
    /// What leaders know its answer of that number by: the same for a repeat, whichever router that reaches.
    pub(crate) fn key(&self, answer: u32) -> Sum {
        let parts = Sha256::new().chain_update(self.name).chain_update(self.body);
        parts.chain_update(answer.to_le_bytes()).finalize().into()
    }

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
        self.repeats.claims().forget(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(tenant: u64, header: &'static str, name: &str) -> Option<Named> {
        let headers = HeaderMap::from_iter([(HeaderName::from_static(header), name.parse().unwrap())]);
        Named::of(TenantId(tenant), &headers)
    }

    /// A request of the name `a` with that body.
    fn saying(header: &'static str, body: &str) -> Named {
        let named = named(1, header, "a").unwrap();
        body.as_bytes().chunks(2).for_each(|piece| named.piece(piece));
        named
    }

    #[test]
    fn a_name_is_its_tenants() {
        let mine = named(1, "idempotency-key", "a").unwrap();
        assert_eq!(mine.seed(), named(1, "x-request-id", "a").unwrap().seed());
        for other in [named(2, "x-request-id", "a"), named(1, "x-request-id", "b")] {
            assert_ne!(mine.seed(), other.unwrap().seed());
        }
        assert!(named(1, "x-request-id", "two words").is_none());
        assert!(named(1, "x-request-id", &"a".repeat(REPEAT_KEY_BYTES_MAX + 1)).is_none());
    }

    #[test]
    fn the_latest_holds_the_name_until_it_ends() {
        let repeats = Arc::new(Repeats::default());
        let first = repeats.claim(&saying("x-request-id", "body")).unwrap();
        let second = repeats.claim(&saying("idempotency-key", "body")).unwrap();
        assert!(first.is_over() && first.superseded().is_cancelled() && !second.is_over());
        assert_eq!((first.key(0), first.key(1) == first.key(0)), (second.key(0), false));
        drop(first);
        assert_eq!(repeats.claims().count, 1);
        drop(second);
        assert!(repeats.claims().names.is_empty() && repeats.claims().count == 0);
    }

    #[test]
    fn a_key_stands_for_one_body_and_an_id_for_many() {
        let repeats = Arc::new(Repeats::default());
        let first = repeats.claim(&saying("idempotency-key", "one")).unwrap();
        let id = repeats.claim(&saying("x-request-id", "other")).unwrap();
        assert_eq!(repeats.claim(&saying("idempotency-key", "other")).unwrap_err(), Failure::KeyReused);
        assert!(!first.is_over() && !id.is_over() && first.key(0) != id.key(0));
        drop(first);
        repeats.claim(&saying("idempotency-key", "other")).unwrap();
        assert!(id.is_over());
        let resumed = saying("idempotency-key", "another");
        resumed.says(b"one");
        assert_eq!(resumed.body(), saying("idempotency-key", "one").body());
    }
}

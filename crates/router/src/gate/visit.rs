//! One request of a tenant: what it may use, and what it has used.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::HeaderMap;
use galerne_dispatch::{Admission, Exceeded};
use galerne_types::TenantId;

use super::Gate;
use crate::failure::Failure;
use crate::repeats::{Claim, Named, Repeats};
use crate::server::Held;

/// Who asks, as the faces found out. Its clones stand for one request, however many answers that asks for: it is
/// counted when the first of them begins, and settled when the last clone is dropped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// Whose share of the fleet it takes; 0 for all who need no key.
    pub(crate) tenant: TenantId,
    visit: Option<Arc<Visit>>,
    /// What the request's body holds until it has become tokens.
    body: Option<Arc<Held>>,
    /// What its client calls the request.
    name: Option<Arc<Named>>,
    /// Its claim to that, once it runs.
    claim: Option<Arc<Claim>>,
}

struct Visit {
    gate: Arc<Gate>,
    tenant: TenantId,
    admission: Mutex<Option<Admission>>,
    used_tokens: AtomicU64,
}

impl Caller {
    pub(super) fn new(tenant: TenantId, gate: Arc<Gate>) -> Self {
        let visit = Visit { gate, tenant, admission: Mutex::default(), used_tokens: AtomicU64::new(0) };
        Self { tenant, visit: Some(Arc::new(visit)), ..Self::default() }
    }

    /// With the name that the request's headers give it.
    pub(crate) fn naming(self, headers: &HeaderMap) -> Self {
        Self { name: Named::of(self.tenant, headers).map(Arc::new), ..self }
    }

    /// For its name the request is what this makes, instead of what has come of it.
    pub(crate) fn says(&self, body: impl FnOnce() -> Vec<u8>) {
        if let Some(name) = &self.name {
            name.says(&body());
        }
    }

    /// Takes the place of the same request, if that is under way under the same name.
    pub(crate) fn claim(&mut self, repeats: &Arc<Repeats>) -> Result<(), Failure> {
        self.claim = self.name.as_deref().map(|name| repeats.claim(name)).transpose()?;
        Ok(())
    }

    /// Its claim to its name, if it has one.
    pub(crate) fn claimed(&self) -> Option<&Arc<Claim>> {
        self.claim.as_ref()
    }

    /// The seed that its name gives it.
    pub(crate) fn seed(&self) -> Option<u64> {
        self.name.as_deref().map(Named::seed)
    }

    /// With a body that counts among all.
    pub(crate) fn holding(self, body: Arc<Held>) -> Self {
        Self { body: Some(body), ..self }
    }

    /// Holds a piece of the request's body, if there is room for it.
    pub(crate) fn hold(&self, piece: &[u8]) -> Result<(), Failure> {
        if let Some(name) = &self.name {
            name.piece(piece);
        }
        self.body.as_ref().map_or(Ok(()), |body| body.piece(piece))
    }

    /// Bytes that the body holds.
    pub(crate) fn held(&self) -> usize {
        self.body.as_ref().map_or(0, |body| body.bytes())
    }

    /// Holds so many bytes with the body: something else that is kept of the request.
    pub(crate) fn keep(&self, bytes: usize) -> Result<(), Failure> {
        self.body.as_ref().map_or(Ok(()), |body| body.more(bytes))
    }

    /// Gives back what the body held: it has become something else, or is thrown away.
    pub(crate) fn release(&self) {
        if let Some(body) = &self.body {
            body.release();
        }
    }

    /// Counts the request, unless it has been.
    pub(crate) fn begin(&self) -> Result<(), Exceeded> {
        self.with(|_, _| Ok(()))
    }

    /// Charges the tokens that an answer may take, before it takes them.
    pub(crate) fn reserve(&self, tokens: u64) -> Result<(), Exceeded> {
        self.with(|visit, admission| {
            visit.gate.quotas().reserve(admission, tokens, visit.gate.began.elapsed())
        })
    }

    /// Tells of tokens that were used.
    pub(crate) fn used(&self, tokens: u64) {
        if let Some(visit) = &self.visit {
            visit.used_tokens.fetch_add(tokens, Ordering::Relaxed);
        }
    }

    fn with(
        &self,
        then: impl FnOnce(&Visit, &mut Admission) -> Result<(), Exceeded>,
    ) -> Result<(), Exceeded> {
        let Some(visit) = &self.visit else { return Ok(()) };
        let mut admission = visit.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let admission = match &mut *admission {
            Some(admission) => admission,
            none => none.insert(visit.gate.quotas().begin(visit.tenant, visit.gate.began.elapsed())?),
        };
        then(visit, admission)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let admission = self.admission.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(admission) = admission {
            let used = self.used_tokens.load(Ordering::Relaxed);
            self.gate.quotas().end(admission, used, self.gate.began.elapsed());
        }
    }
}

impl fmt::Debug for Visit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Visit").field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

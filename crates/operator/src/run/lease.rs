//! Who of several operators acts: the one that holds a Lease and renews it in time.
//!
//! Clocks of others are not trusted: a lease is over when nobody has renewed it for its duration by the clock of whoever waits.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// A lease that is not renewed for so long is anybody's.
const DURATION: Duration = Duration::from_secs(15);
/// Pause between two renewals, or two looks at another one's lease.
const PAUSE: Duration = Duration::from_secs(3);
/// A holder that could not renew for so long stops acting: well before anybody else may begin.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);
/// How long the API server may take to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

/// A candidate for the one that acts.
pub(crate) struct Candidate {
    leases: Api<Lease>,
    name: String,
    me: String,
    /// The lease as it was seen to change last, and when that was.
    seen: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    pub(crate) fn new(client: Client, namespace: &str, name: &str, me: &str) -> Self {
        Self { leases: Api::namespaced(client, namespace), name: name.into(), me: me.into(), seen: None }
    }

    /// Returns once this one holds the lease: from when on, at the latest, nobody else will take it for [`DURATION`].
    pub(crate) async fn elected(&mut self) -> Instant {
        loop {
            let asked = Instant::now();
            match timeout(CALL_TIMEOUT, self.claim()).await {
                Ok(Ok(true)) => return asked,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the lease cannot be had"),
                Err(_) => tracing::warn!(lease = self.name, "the API server does not answer"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Renews the lease, which was had at `renewed`, until `stop`, and then gives it up; returns early when it is lost.
    pub(crate) async fn hold(&mut self, mut renewed: Instant, stop: &CancellationToken) {
        loop {
            let lost_at = renewed + GIVE_UP_AFTER;
            tokio::select! {
                () = sleep_until(lost_at) => return,
                () = stop.cancelled() => return self.give_up().await,
                () = sleep(PAUSE) => {}
            }
            // It counts from when it was asked for: whoever waits may have seen it long before the answer came.
            let asked = Instant::now();
            match timeout_at(lost_at.min(asked + CALL_TIMEOUT), self.claim()).await {
                Ok(Ok(true)) => renewed = asked,
                Ok(Ok(false)) => return, // somebody else has it
                Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the lease cannot be renewed"),
                Err(_) => tracing::warn!(lease = self.name, "the API server does not answer"),
            }
        }
    }

    /// Takes or renews the lease if that is due. False when it is another one's, or another one was faster.
    async fn claim(&mut self) -> kube::Result<bool> {
        let Some(lease) = self.leases.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: next(None, &self.me, Duration::MAX, Timestamp::now()) };
            return won(self.leases.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let unchanged = self.seen.take().filter(|(seen, _)| *seen == spec);
        let (_, since) = self.seen.insert(unchanged.unwrap_or_else(|| (spec.clone(), Instant::now())));
        let Some(spec) = next(Some(&spec), &self.me, since.elapsed(), Timestamp::now()) else {
            return Ok(false);
        };
        // The resource version is the one that was read: of two that claim it, one wins.
        let claimed = Lease { metadata: lease.metadata, spec: Some(spec) };
        won(self.leases.replace(&self.name, &PostParams::default(), &claimed).await)
    }

    /// Leaves the lease to whoever waits.
    async fn give_up(&mut self) {
        let given_up = async {
            let Some(mut lease) = self.leases.get_opt(&self.name).await? else { return Ok(()) };
            if let Some(spec) =
                lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.me))
            {
                spec.holder_identity = None;
                self.leases.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        // It ends by itself if this fails.
        let _ = timeout(CALL_TIMEOUT, given_up).await;
    }
}

fn won(written: kube::Result<Lease>) -> kube::Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(false),
        Err(error) => Err(error),
    }
}

/// The lease as `me` writes it next; `None` while it is another one's, who was seen to renew it `ago`.
fn next(lease: Option<&LeaseSpec>, me: &str, ago: Duration, now: Timestamp) -> Option<LeaseSpec> {
    let holder = lease.and_then(|lease| lease.holder_identity.as_deref()).filter(|holder| !holder.is_empty());
    let seconds = lease.and_then(|lease| lease.lease_duration_seconds).unwrap_or(0);
    let lasts = Duration::from_secs(seconds.unsigned_abs().into());
    if holder.is_some_and(|holder| holder != me) && ago < lasts {
        return None;
    }
    let mine = holder == Some(me);
    let transitions = lease.and_then(|lease| lease.lease_transitions).unwrap_or(0);
    let acquired = lease.and_then(|lease| lease.acquire_time.clone()).filter(|_| mine);
    Some(LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(DURATION.as_secs() as i32),
        acquire_time: Some(acquired.unwrap_or(MicroTime(now))),
        renew_time: Some(MicroTime(now)),
        lease_transitions: Some(transitions + i32::from(!mine && lease.is_some())),
        ..LeaseSpec::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);
    const LATE: Duration = Duration::from_secs(16);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_lease_is_its_holders_for_as_long_as_it_is_renewed() {
        let first = next(None, "a", SOON, at(1)).unwrap();
        assert_eq!(next(Some(&first), "b", SOON, at(2)), None);
        let renewed = next(Some(&first), "a", SOON, at(3)).unwrap();
        assert_eq!((renewed.acquire_time, renewed.lease_transitions), (first.acquire_time.clone(), Some(0)));
        let taken = next(Some(&first), "b", LATE, at(20)).unwrap();
        assert_eq!((taken.holder_identity.as_deref(), taken.lease_transitions), (Some("b"), Some(1)));
        assert_eq!(taken.acquire_time, Some(MicroTime(at(20))));
    }

    #[test]
    fn a_lease_that_was_given_up_is_anybodys_at_once() {
        let given_up = LeaseSpec { holder_identity: None, ..next(None, "a", SOON, at(1)).unwrap() };
        assert!(next(Some(&given_up), "b", SOON, at(2)).is_some());
    }
}

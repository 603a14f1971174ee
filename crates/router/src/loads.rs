//! Listens to the leaders' reports of their load, one stream a ready group.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use galerne_types::{Epoch, GroupId};
use tokio_util::task::AbortOnDropHandle;

use crate::groups::Leading;
use crate::limits::LOAD_RETRY_MS;
use crate::serve::Router;

/// Listens to every group that serves, for ever.
pub(crate) async fn listen(router: Arc<Router>) -> Infallible {
    let mut seen = router.groups.watch();
    let mut streams: BTreeMap<GroupId, (Epoch, AbortOnDropHandle<Infallible>)> = BTreeMap::new();
    loop {
        let leading: BTreeMap<_, _> =
            router.groups.leading().into_iter().map(|leading| (leading.group.clone(), leading)).collect();
        let serves = |group: &GroupId, epoch: Epoch| leading.get(group).is_some_and(|now| now.epoch == epoch);
        streams.retain(|group, (epoch, _)| serves(group, *epoch));
        router.metrics.loads.retain(serves);
        for (group, leading) in leading {
            let epoch = leading.epoch;
            streams.entry(group).or_insert_with(|| {
                let stream = tokio::spawn(follow(router.clone(), leading));
                (epoch, AbortOnDropHandle::new(stream))
            });
        }
        router.groups.changed(&mut seen).await;
    }
}

/// Listens to one group, again and again until the fleet shows another epoch of it.
async fn follow(router: Arc<Router>, leading: Leading) -> Infallible {
    loop {
        if let Err(status) = reports(&router, &leading).await {
            let (group, code) = (&leading.group, status.code());
            tracing::debug!(%group, ?code, "a leader's reports have ended");
        }
        tokio::time::sleep(LOAD_RETRY_MS).await;
    }
}

async fn reports(router: &Router, leading: &Leading) -> Result<(), tonic::Status> {
    let mut reports = leading.reports().await?;
    while let Some(report) = reports.message().await? {
        router.metrics.loads.record(&leading.group, &leading.model, leading.epoch, report);
    }
    Ok(())
}

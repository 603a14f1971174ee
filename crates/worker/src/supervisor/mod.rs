//! A host's share of a group: one child process a rank, restarted when it dies.

pub(crate) mod child;
mod missing;
mod ward;

use std::path::PathBuf;
use std::time::Duration;

use galerne_coord::Coord;
use galerne_types::{Drain, Fleet, GroupId, RankId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::WorkerError;
use crate::options::{SupervisorOptions, rank_args};
use missing::missing;
use ward::{Registry, Ward};

/// How long etcd may take to answer.
pub(crate) const COORD_TIMEOUT: Duration = Duration::from_secs(4);

/// Runs this host's ranks until `shutdown`, as children of this process that execute its own binary with
/// [`rank_args`]. A rank that dies or hangs is evicted from its group and restarted with backoff. Returns early when the
/// group was drained.
///
/// # Errors
/// [`WorkerError::Child`] when a rank says that it can never start, [`WorkerError::StartTimeout`] when the group is
/// not ready in time; in both cases all children have ended. [`WorkerError::Coord`] when etcd cannot be reached
/// at start.
pub async fn supervise(options: SupervisorOptions, shutdown: CancellationToken) -> Result<(), WorkerError> {
    let program = std::env::current_exe().map_err(WorkerError::Spawn)?;
    // A child is killed when the thread that started it ends (see `Child::spawn`), so that thread is our own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(WorkerError::Spawn)?;
    let stop = shutdown.child_token();
    let _stop_when_dropped = stop.clone().drop_guard();
    let (result, supervised) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("supervisor".into());
    let body = move || result.send(runtime.block_on(run(program, options, stop)));
    thread.spawn(body).map_err(WorkerError::Spawn)?;
    supervised.await.unwrap_or_else(|_| Err(WorkerError::Panicked("the supervisor's thread".into())))
}

async fn run(
    program: PathBuf,
    options: SupervisorOptions,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let first = &options.first;
    let coord = Coord::connect_as(&first.etcd_access, &first.etcd, &first.cluster, COORD_TIMEOUT).await?;
    let before = wish(&coord.fleet().await?, &first.group).map_or(0, |drain| drain.revision);
    let fleet = coord.watch_fleet();
    let (drain, drained) = watch::channel(None);
    tokio::spawn(until_drained(fleet.clone(), first.group.clone(), before, drain));
    let mut wards = JoinSet::new();
    for index in options.indices() {
        let args = rank_args(&options, index);
        let id = RankId(format!("{}/{index}", first.host));
        let (program, stop, drained) = (program.clone(), stop.clone(), drained.clone());
        let ward = Ward { program, args, id: id.clone(), stop, drained };
        let registry =
            Standing { coord: coord.clone(), fleet: fleet.clone(), group: first.group.clone(), id };
        wards.spawn(ward.keep(registry));
    }
    let mut started = std::pin::pin!(start(&options, fleet));
    let mut starting = true;
    let mut result = Ok(());
    loop {
        let ended = tokio::select! {
            ended = wards.join_next() => ended,
            start = &mut started, if starting => {
                starting = false;
                Some(Ok(start))
            }
        };
        let outcome = match ended {
            None => return result,
            Some(Ok(outcome)) => outcome,
            Some(Err(error)) => Err(WorkerError::Panicked(error.to_string())),
        };
        if let Err(error) = outcome {
            stop.cancel();
            starting = false;
            result = result.and(Err(error));
        }
    }
}

/// What somebody says who wants the group to end.
fn wish<'a>(fleet: &'a Fleet, group: &GroupId) -> Option<&'a Drain> {
    fleet.groups.get(group)?.drain.as_ref()
}

/// Tells by when the group is to have ended, when somebody wants that after revision `before`. A rank that comes back
/// afterwards would not be meant: whoever drains waits only for those that were there.
async fn until_drained(
    mut fleet: watch::Receiver<Fleet>,
    group: GroupId,
    before: u64,
    drain: watch::Sender<Option<Instant>>,
) {
    let newer = |fleet: &Fleet| wish(fleet, &group).is_some_and(|drain| drain.revision > before);
    if let Ok(fleet) = fleet.wait_for(newer).await {
        let grace_ms = wish(&fleet, &group).map_or(0, |drain| drain.grace_ms);
        drain.send_replace(Some(Instant::now() + Duration::from_millis(grace_ms)));
    }
}

/// Waits until the group serves for the first time, or says who is missing.
async fn start(options: &SupervisorOptions, mut fleet: watch::Receiver<Fleet>) -> Result<(), WorkerError> {
    let group = &options.first.group;
    // Once it is drained nobody waits for it any more: `run` ends when all ranks have.
    let serves = |fleet: &Fleet| fleet.groups.get(group).is_some_and(|group| group.serving().is_some());
    if tokio::time::timeout(options.start_timeout, fleet.wait_for(serves)).await.is_ok() {
        return Ok(());
    }
    let missing = missing(options, fleet.borrow().groups.get(group));
    Err(WorkerError::StartTimeout { group: group.clone(), timeout: options.start_timeout, missing })
}

/// What etcd knows of one rank.
struct Standing {
    coord: Coord,
    fleet: watch::Receiver<Fleet>,
    group: GroupId,
    id: RankId,
}

impl Registry for Standing {
    async fn was_ready(&mut self, pid: u32) {
        let Self { coord: _, fleet, group, id } = self;
        let ready = |fleet: &Fleet| {
            let record = fleet.groups.get(group).and_then(|group| group.ranks.get(id));
            record.is_some_and(|rank| rank.pid == pid && rank.state == galerne_types::RankState::Ready)
        };
        if fleet.wait_for(ready).await.is_err() {
            std::future::pending::<()>().await; // the watch ends with the process: nothing more will be seen
        }
    }

    async fn evict(&mut self, pid: u32) {
        let evicted = self.coord.evict(&self.group, &self.id, pid);
        match tokio::time::timeout(COORD_TIMEOUT, evicted).await {
            Ok(Ok(_was_there)) => {}
            Ok(Err(error)) => {
                tracing::warn!(rank = %self.id, %error, "cannot evict; its lease will expire");
            }
            Err(_) => tracing::warn!(rank = %self.id, "etcd is silent: cannot evict; its lease will expire"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::options::tests::options;

    /// Supervises two ranks that `program` stands for.
    async fn supervise_with(program: &str, start_timeout: Duration) -> WorkerError {
        let store = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = options();
        options.first.etcd = vec![store.local_addr().unwrap().to_string()];
        options.start_timeout = start_timeout;
        tokio::spawn(galerne_coord::embedded::serve(store, std::future::pending()));
        run(program.into(), options, CancellationToken::new()).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_rank_that_can_never_start_ends_all() {
        // A shell takes the arguments for a script, finds none, and ends with 2.
        let error = supervise_with("/bin/sh", Duration::from_secs(60)).await;
        assert!(matches!(error, WorkerError::Child { .. }), "{error}");
    }

    #[tokio::test]
    async fn ranks_that_die_at_start_are_named_in_the_end() {
        let error = supervise_with("/bin/false", Duration::from_millis(250)).await;
        let says =
            "group g is not ready after 0.25 s: rank h/0 is not registered, rank h/1 is not registered";
        assert_eq!(error.to_string(), says);
    }
}

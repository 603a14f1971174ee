//! Keeps one rank process alive.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use galerne_types::RankId;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::child::{Child, Exit};
use crate::backoff::Backoff;
use crate::error::{ERROR_PREFIX, EXIT_CONFIG, EXIT_DRAINED, EXIT_REPLACED, WorkerError};

/// How long a rank may take to end when it is asked to.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// What a ward knows of its rank from elsewhere.
pub(crate) trait Registry: Send {
    /// Waits until the process has been ready; may wait for ever.
    fn was_ready(&mut self, pid: u32) -> impl Future<Output = ()> + Send;
    /// Takes the dead process out of its group; does what it can within a deadline.
    fn evict(&mut self, pid: u32) -> impl Future<Output = ()> + Send;
}

/// One rank process to keep alive.
pub(crate) struct Ward {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) id: RankId,
    pub(crate) stop: CancellationToken,
    /// By when the group is to have ended, once somebody wants that.
    pub(crate) drained: watch::Receiver<Option<Instant>>,
}

impl Ward {
    /// Starts the process, and again whenever it ends, until `stop` or until its group is drained; then ends it.
    pub(crate) async fn keep(self, mut registry: impl Registry) -> Result<(), WorkerError> {
        let mut backoff = Backoff::new();
        while self.drained.borrow().is_none() {
            let started = Instant::now();
            let mut child = Child::spawn(&self.program, &self.args).map_err(WorkerError::Spawn)?;
            let pid = child.pid();
            tracing::info!(rank = %self.id, pid, "rank process started");
            let mut ready = false;
            let exit = loop {
                tokio::select! {
                    exit = child.ends() => break exit,
                    () = registry.was_ready(pid), if !ready => ready = true,
                    () = self.stop.cancelled() => return self.end(child, &mut registry).await,
                    () = overdue(self.drained.clone()) => return self.end(child, &mut registry).await,
                }
            };
            if exit.code == Some(EXIT_DRAINED.into()) {
                tracing::info!(rank = %self.id, pid, "rank process has ended: its group is drained");
                return Ok(());
            }
            if let Some(sentence) = gives_up(&exit, ready) {
                registry.evict(pid).await;
                return Err(WorkerError::Child { rank: self.id, sentence });
            }
            let wait = backoff.after(started.elapsed());
            tracing::warn!(rank = %self.id, pid, status = exit.status, says = exit.last_line, restart_ms = wait.as_millis(), "rank process died");
            tokio::select! {
                _ = async { tokio::join!(registry.evict(pid), tokio::time::sleep(wait)) } => {}
                () = self.stop.cancelled() => return Ok(()),
            }
        }
        tracing::info!(rank = %self.id, "rank process stays down: its group is drained");
        Ok(())
    }

    async fn end(&self, child: Child, registry: &mut impl Registry) -> Result<(), WorkerError> {
        let pid = child.pid();
        let exit = child.end(END_DEADLINE).await;
        if exit.code != Some(0) {
            tracing::warn!(rank = %self.id, pid, status = exit.status, "rank process did not end by itself");
            registry.evict(pid).await;
        }
        Ok(())
    }
}

/// Waits until the time to end is over, should there ever be one.
async fn overdue(mut drained: watch::Receiver<Option<Instant>>) {
    let due = match drained.wait_for(Option::is_some).await {
        Ok(due) => *due,
        Err(_) => None,
    };
    match due {
        Some(due) => tokio::time::sleep_until(due + END_DEADLINE).await,
        None => std::future::pending().await,
    }
}

/// A process that says that it can never start, and never did, is not started again, nor is one whose place another
/// supervisor's process has taken; this is what it says.
fn gives_up(exit: &Exit, was_ready: bool) -> Option<String> {
    let config = exit.code == Some(EXIT_CONFIG.into()) && !was_ready;
    let permanent = config || exit.code == Some(EXIT_REPLACED.into());
    permanent.then(|| exit.last_line.trim_start_matches(ERROR_PREFIX).to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::mpsc;

    use super::*;

    /// Reports evictions; every process was ready at once if `ready`.
    struct Fake {
        ready: bool,
        evicted: mpsc::UnboundedSender<u32>,
    }

    impl Registry for Fake {
        async fn was_ready(&mut self, _pid: u32) {
            if !self.ready {
                std::future::pending::<()>().await;
            }
        }
        async fn evict(&mut self, pid: u32) {
            let _ = self.evicted.send(pid);
        }
    }

    fn ward(script: &str) -> Ward {
        let args = vec!["-c".into(), script.into()];
        let id = RankId("h/0".into());
        let (_, drained) = watch::channel(None);
        Ward { program: "/bin/sh".into(), args, id, stop: CancellationToken::new(), drained }
    }

    #[test]
    fn only_a_permanent_error_before_the_first_readiness_and_a_taken_place_are_final() {
        let exit = |code| Exit { code, status: String::new(), last_line: "error: no such file".into() };
        assert_eq!(gives_up(&exit(Some(2)), false).as_deref(), Some("no such file"));
        assert_eq!(gives_up(&exit(Some(2)), true), None);
        assert_eq!(gives_up(&exit(Some(1)), false), None);
        assert_eq!(gives_up(&exit(Some(3)), true).as_deref(), Some("no such file"));
        assert_eq!(gives_up(&exit(Some(0)), false), None);
        assert_eq!(gives_up(&exit(None), false), None);
    }

    #[tokio::test]
    async fn a_permanent_error_is_passed_on() {
        let (evicted, _) = mpsc::unbounded_channel();
        let ward = ward("echo 'a log line' >&2; echo 'error: the model is cut short' >&2; exit 2");
        let error = ward.keep(Fake { ready: false, evicted }).await.unwrap_err();
        assert_eq!(error.to_string(), "rank h/0 cannot start: the model is cut short");
        assert_eq!(error.exit_code(), EXIT_CONFIG);
    }

    #[tokio::test]
    async fn a_dead_process_is_evicted_and_restarted_until_the_end() {
        let (evicted, mut evictions) = mpsc::unbounded_channel();
        let ward = ward("kill -9 $$");
        let stop = ward.stop.clone();
        let kept = tokio::spawn(ward.keep(Fake { ready: true, evicted }));
        let first = evictions.recv().await.unwrap();
        let second = evictions.recv().await.unwrap();
        assert_ne!(first, second);
        stop.cancel();
        kept.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_process_that_falls_silent_is_killed_and_restarted() {
        let (evicted, mut evictions) = mpsc::unbounded_channel();
        let ward = ward("echo . ; kill -STOP $$");
        let stop = ward.stop.clone();
        let kept = tokio::spawn(ward.keep(Fake { ready: true, evicted }));
        assert_ne!(evictions.recv().await, evictions.recv().await);
        stop.cancel();
        kept.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn at_the_end_a_process_is_asked_to_go() {
        let mark = Arc::new(Mutex::new(tempfile::NamedTempFile::new().unwrap()));
        let path = mark.lock().unwrap().path().to_owned();
        let script =
            format!("trap 'exit 0' TERM; echo up > {}; while :; do sleep 0.01; done", path.display());
        let (evicted, mut evictions) = mpsc::unbounded_channel();
        let ward = ward(&script);
        let stop = ward.stop.clone();
        let kept = tokio::spawn(ward.keep(Fake { ready: true, evicted }));
        while std::fs::read_to_string(&path).unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        stop.cancel();
        kept.await.unwrap().unwrap();
        assert!(evictions.try_recv().is_err(), "it ended by itself");
    }

    #[tokio::test]
    async fn a_process_that_dies_while_its_group_is_drained_stays_down() {
        let (evicted, mut evictions) = mpsc::unbounded_channel();
        let (drain, drained) = watch::channel(None);
        let ward = Ward { drained, ..ward("kill -9 $$") };
        let kept = tokio::spawn(ward.keep(Fake { ready: true, evicted }));
        evictions.recv().await.unwrap();
        drain.send_replace(Some(Instant::now() + Duration::from_secs(600)));
        kept.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_does_not_end_when_its_group_does_is_ended() {
        let (evicted, _evictions) = mpsc::unbounded_channel();
        let (drain, drained) = watch::channel(None);
        let ward = Ward { drained, ..ward("while :; do echo .; sleep 0.01; done") };
        let kept = tokio::spawn(ward.keep(Fake { ready: true, evicted }));
        drain.send_replace(Some(Instant::now()));
        kept.await.unwrap().unwrap();
    }
}

//! One child process: started so that it cannot outlive its parent, its standard error passed on.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::error::ERROR_PREFIX;

/// Bytes of one line of a child's standard error; a longer one is cut in two.
const LINE_BYTES_MAX: u64 = 16 << 10;

/// How long a dead child's pipe may stay open, in the hands of some process that it left behind.
const PIPE_TIMEOUT: Duration = Duration::from_secs(1);

/// Set in a child's environment: it is to write to its standard output that it lives.
pub(crate) const BEATS_VARIABLE: &str = "GALERNE_SUPERVISED";

/// How often it does.
pub(crate) const BEAT_INTERVAL: Duration = Duration::from_millis(200);

/// A child that has told that it lives, and then has not for so many of our own intervals, hangs. Time in which this
/// process did not run does not count.
const QUIET_BEATS_MAX: u32 = 10;

/// A running child process.
pub(crate) struct Child {
    process: tokio::process::Child,
    pid: u32,
    stderr: JoinHandle<String>,
    beats: Beats,
}

/// What a child says of being alive.
struct Beats {
    from: ChildStdout,
    /// It has said it; from then on it must go on.
    begun: bool,
}

impl Beats {
    /// Waits until the child has said that it lives, and then nothing for too long.
    async fn end(&mut self) -> Duration {
        let mut ticks = interval(BEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut heard, mut quiet) = ([0; 64], 0);
        while quiet <= QUIET_BEATS_MAX {
            tokio::select! {
                read = self.from.read(&mut heard) => match read {
                    Ok(count) if count > 0 => (self.begun, quiet) = (true, 0),
                    _ => std::future::pending().await, // it has ended, or is about to
                },
                _ = ticks.tick() => quiet += u32::from(self.begun),
            }
        }
        BEAT_INTERVAL * QUIET_BEATS_MAX
    }
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its code, or `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// What the system says about it: `exit status: 1`, `signal: 9 (SIGKILL)`.
    pub(crate) status: String,
    /// The last line that it wrote to its standard error.
    pub(crate) last_line: String,
}

impl Child {
    /// Starts `program`. It is killed when the thread that calls this ends: call it from one that lives as long
    /// as the supervisor. It has a process group of its own, so that Ctrl-C reaches the supervisor alone.
    pub(crate) fn spawn(program: &Path, args: &[OsString]) -> std::io::Result<Self> {
        let parent = std::process::id();
        let mut command = Command::new(program);
        command.args(args).env(BEATS_VARIABLE, "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid.
        unsafe { command.pre_exec(move || die_with(parent)) };
        let mut process = command.spawn()?;
        let pid = process.id().unwrap_or_default();
        let stderr = process.stderr.take().ok_or_else(|| std::io::Error::other("no pipe for stderr"))?;
        let from = process.stdout.take().ok_or_else(|| std::io::Error::other("no pipe for stdout"))?;
        let beats = Beats { from, begun: false };
        Ok(Self { process, pid, stderr: tokio::spawn(pass_on(stderr)), beats })
    }

    /// Waits until it ends, by itself or because it hangs and is killed. May be dropped and called again.
    pub(crate) async fn ends(&mut self) -> Exit {
        tokio::select! {
            _ = self.process.wait() => {}
            silence = self.beats.end() => {
                tracing::warn!(pid = self.pid, silent_ms = silence.as_millis(), "the rank process hangs: killing it");
                self.kill();
            }
        }
        self.wait().await
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        if let Err(error) = self.process.start_kill() {
            tracing::warn!(pid = self.pid, %error, "cannot kill the rank process");
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it ends. May be dropped and called again.
    pub(crate) async fn wait(&mut self) -> Exit {
        let status = self.process.wait().await;
        let last_line = match tokio::time::timeout(PIPE_TIMEOUT, &mut self.stderr).await {
            Ok(Ok(line)) => line,
            Ok(Err(_)) | Err(_) => String::new(),
        };
        match status {
            Ok(status) => Exit { code: status.code(), status: ExitStatus::to_string(&status), last_line },
            Err(error) => Exit { code: None, status: error.to_string(), last_line },
        }
    }

    /// Asks it to end; kills it when it has not after `deadline`.
    pub(crate) async fn end(mut self, deadline: Duration) -> Exit {
        if let Some(pid) = self.process.id().and_then(|pid| i32::try_from(pid).ok()) {
            // SAFETY: kill touches no memory of ours; the pid is our child's, which nobody has waited for yet.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        if let Ok(exit) = tokio::time::timeout(deadline, self.wait()).await {
            return exit;
        }
        self.kill();
        self.wait().await
    }
}

/// Runs in the child before the new program: the kernel shall kill it when its parent is gone.
fn die_with(parent: u32) -> std::io::Result<()> {
    // SAFETY: plain system calls without pointers.
    let (result, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    if u32::try_from(now) != Ok(parent) {
        return Err(std::io::ErrorKind::BrokenPipe.into()); // the parent died before the call above
    }
    Ok(())
}

/// Writes what the child writes to our standard error, line by line; returns its last line. The sentence with which
/// it ends is not written but returned: it is the supervisor's to say.
async fn pass_on(stderr: ChildStderr) -> String {
    let mut reader = BufReader::new(stderr);
    let mut last = String::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return last,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if !text.starts_with(ERROR_PREFIX) {
            // A closed standard error must not stop the child, which would block on a full pipe.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
        if !text.is_empty() {
            text.clone_into(&mut last);
        }
    }
}

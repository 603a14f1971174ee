//! Child processes whose output is watched, and which never outlive their test.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything that should happen may take before a test gives up: generous, since nothing waits for it
/// when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A running child process.
pub(crate) struct Process {
    child: Child,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

impl Process {
    /// Starts the command; it is killed when the test's process ends, however that happens.
    pub(crate) fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: prctl is async-signal-safe and touches only the child.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let output = Arc::new(Output::default());
        let readers = vec![
            output.clone().collect(child.stdout.take().expect("a pipe")),
            output.clone().collect(child.stderr.take().expect("a pipe")),
        ];
        Self { child, output, readers }
    }

    /// The first line of its output that contains `text`, as soon as there is one.
    pub(crate) fn line_with(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.output.lines.lock().expect("no panic while locked");
        loop {
            if let Some(line) = lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no line with {text:?} in:\n{}", lines.join("\n"));
            (lines, _) = self.output.grown.wait_timeout(lines, left).expect("no panic while locked");
        }
    }

    /// Everything it has written so far.
    pub(crate) fn output(&self) -> String {
        self.output.lines.lock().expect("no panic while locked").join("\n")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: i32) {
        send(self.pid(), signal);
    }

    /// Its exit status, within `limit`; then [`Process::output`] is all that it wrote.
    pub(crate) fn exit_within(&mut self, limit: Duration) -> ExitStatus {
        let exited = eventually_within(limit, || self.child.try_wait().expect("a child to wait for"));
        let status = exited.unwrap_or_else(|| panic!("still running after {limit:?}:\n{}", self.output()));
        self.readers.drain(..).for_each(|reader| reader.join().expect("no panic while reading"));
        status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(libc::SIGTERM);
        if eventually_within(Duration::from_secs(10), || self.child.try_wait().ok().flatten()).is_none() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

impl Output {
    fn collect(self: Arc<Self>, pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines() {
                let Ok(line) = line else { return };
                self.lines.lock().expect("no panic while locked").push(line);
                self.grown.notify_all();
            }
        })
    }
}

/// Sends a signal to a process of this test.
pub(crate) fn send(pid: u32, signal: i32) {
    // SAFETY: kill has no memory effects; the pid is that of a process that this test started.
    unsafe { libc::kill(pid.try_into().expect("a pid"), signal) };
}

/// Whether a process exists and is no zombie.
pub(crate) fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// The most memory that a process has had in RAM.
pub(crate) fn peak_memory_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    1024 * peak.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes")
}

/// The first `Some` of `attempt`, tried again until [`PATIENCE`] is over.
pub(crate) fn eventually<T>(what: &str, attempt: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, attempt).unwrap_or_else(|| panic!("not within {PATIENCE:?}: {what}"))
}

fn eventually_within<T>(limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(result) = attempt() {
            return Some(result);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

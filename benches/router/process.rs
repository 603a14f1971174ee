//! The processes under test, and what they use.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A router that serves, and ends with this value.
pub(crate) struct Running {
    child: Child,
    pub(crate) http: String,
}

impl Running {
    /// `galerne up` with a rehearsal of `model` under `law`.
    pub(crate) fn up(model: &str, law: &str, arguments: &[&str]) -> Self {
        let mut command = galerne();
        let any = "127.0.0.1:0";
        command.args([
            "up",
            "--model",
            model,
            "--rehearse",
            law,
            "--http",
            any,
            "--grpc",
            any,
            "--admin",
            any,
        ]);
        command.args(arguments);
        Self::serving(command)
    }

    /// `galerne router` for the groups in a store.
    pub(crate) fn router(model: &str, store: &str) -> Self {
        let mut command = galerne();
        let any = "127.0.0.1:0";
        command.args([
            "router", "--model", model, "--etcd", store, "--http", any, "--grpc", any, "--admin", any,
        ]);
        let running = Self::serving(command);
        running.until_ready();
        running
    }

    /// Waits until the router has found a group.
    fn until_ready(&self) {
        let deadline = Instant::now() + START_TIMEOUT;
        let address = self.http.trim_start_matches("http://");
        loop {
            let mut stream = TcpStream::connect(address).expect("a router that listens");
            stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer");
            if answer.contains(" 200 ") {
                return;
            }
            assert!(Instant::now() < deadline, "the router finds no group: {answer}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a process says where it listens.
    fn serving(mut command: Command) -> Self {
        let mut child = spawn(command.stdout(Stdio::piped()));
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
        let line = lines
            .find(|line| line.starts_with("HTTP "))
            .expect("a router that serves: run `make build` first");
        std::thread::spawn(move || lines.for_each(drop)); // nobody waits for a full pipe
        let address = line.split_whitespace().find(|word| word.starts_with("http://"));
        let http = address.expect("an address").trim_end_matches("/v1").to_owned();
        Self { child, http }
    }

    /// Another router in front of `worker`, started by a shell.
    pub(crate) fn peer(command: &str, worker: &str) -> Self {
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
        let command = command.replace("{worker}", worker).replace("{port}", &port.to_string());
        let child = spawn(Command::new("sh").args(["-c", &format!("exec {command}")]).stdout(Stdio::null()));
        let http = format!("http://127.0.0.1:{port}");
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the peer does not listen");
            std::thread::sleep(Duration::from_millis(100));
        }
        std::thread::sleep(Duration::from_secs(5)); // it looks at its worker first
        Self { child, http }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: kill has no memory effects; the pid is that of our own child.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.child.wait().ok();
    }
}

fn galerne() -> Command {
    let this = std::env::current_exe().expect("this program");
    Command::new(this.ancestors().nth(2).expect("target/release").join("galerne"))
}

fn spawn(command: &mut Command) -> Child {
    // SAFETY: prctl is async-signal-safe and touches only the child.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.stdin(Stdio::null()).spawn().expect("a program that starts")
}

/// Processor time that a process has used.
pub(crate) fn cpu(pid: u32) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write to the variables that they are given.
    let code = unsafe {
        let mut clock = 0;
        match libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) {
            0 => libc::clock_gettime(clock, &raw mut time),
            code => code,
        }
    };
    assert_eq!(code, 0, "a running process");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Resident memory of a process.
pub(crate) fn memory_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    1024 * resident.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes")
}

/// Raises the limit of open files, which children inherit, as far as it goes.
pub(crate) fn allow_many_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid structure of their own.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

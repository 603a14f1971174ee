//! Places where a test may have a process stop, so that faults can be put exactly there.
//!
//! A process in whose environment [`VARIABLE`] names a folder looks there, at each [`Point`] that it comes to, for a file of
//! the point's name. If there is one it adds its process id to that name, and stops (`SIGSTOP`). Whoever made the file sees
//! who has stopped, and decides what becomes of it: it is killed, or left as it is, or it goes on once something else was
//! broken. A file can be renamed by one process only, and once; it may be made at any time. Without the variable, a point
//! costs one comparison.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Names the folder. It is read at the first point, and ranks get it from their supervisor.
pub const VARIABLE: &str = "GALERNE_FAILPOINTS";

/// A place in a process's life. A rank's have its number in the group, those of its leader have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// This rank has written an epoch, and has not heard of it yet.
    Written,
    /// It has heard of an epoch that it is a member of, and has done nothing about it.
    Forming(usize),
    /// It has read some of its weights.
    Loading(usize),
    /// All hold their weights; it has not met the others in the collective.
    Meeting(usize),
    /// The leader has told etcd, hence routers, that its group serves, and takes no request yet.
    Declared,
    /// The followers have a step that the leader itself has not begun.
    Planned,
    /// It is to run a step in which a prompt is run.
    Prefill(usize),
    /// It is to run a step in which answers go on, and nothing else.
    Decode(usize),
    /// The others wait for its part of a sum.
    AllReduce(usize),
    /// All ranks have run a step whose tokens no router has yet.
    Committed,
    /// The router holds a token that its client has not.
    Relayed,
    /// An epoch is over for it, which it has told nobody.
    Leaving(usize),
    /// The leader has heard that its group is to end, and has told nobody.
    Draining,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Written => f.write_str("written"),
            Self::Forming(rank) => write!(f, "forming-{rank}"),
            Self::Loading(rank) => write!(f, "loading-{rank}"),
            Self::Meeting(rank) => write!(f, "meeting-{rank}"),
            Self::Declared => f.write_str("declared"),
            Self::Planned => f.write_str("planned"),
            Self::Prefill(rank) => write!(f, "prefill-{rank}"),
            Self::Decode(rank) => write!(f, "decode-{rank}"),
            Self::AllReduce(rank) => write!(f, "all-reduce-{rank}"),
            Self::Committed => f.write_str("committed"),
            Self::Relayed => f.write_str("relayed"),
            Self::Leaving(rank) => write!(f, "leaving-{rank}"),
            Self::Draining => f.write_str("draining"),
        }
    }
}

/// This process has come to `point`; returns when it may go on, mostly at once.
pub fn meet(point: Point) {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from));
    if let Some(folder) = folder
        && claim(folder, point)
    {
        // SAFETY: a call without pointers. The thread that makes it does not return from it before the process goes on.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}

/// Whether this process is the one that is to stop at `point`.
fn claim(folder: &Path, point: Point) -> bool {
    let claimed = format!("{point}.{}", std::process::id());
    std::fs::rename(folder.join(point.to_string()), folder.join(claimed)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_point_is_claimed_once_and_tells_by_whom() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("all-reduce-1");
        assert!(!claim(folder.path(), Point::AllReduce(1)), "nobody has asked for it");
        std::fs::write(&file, "").unwrap();
        assert!(!claim(folder.path(), Point::AllReduce(0)), "another rank's");
        assert!(claim(folder.path(), Point::AllReduce(1)));
        assert!(!claim(folder.path(), Point::AllReduce(1)), "it was claimed");
        assert!(folder.path().join(format!("all-reduce-1.{}", std::process::id())).exists());
    }

    /// The test below runs this one in a process of its own.
    #[test]
    fn a_process_comes_to_a_point() {
        meet(Point::Declared);
    }

    #[test]
    fn whoever_claims_a_point_stops_until_it_is_sent_on() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("declared");
        std::fs::write(&file, "").unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "tests::a_process_comes_to_a_point"]).env(VARIABLE, folder.path());
        let mut child = command.spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut status = 0;
        // SAFETY: `status` lives as long as the call, and the child was not waited for.
        let told = unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) };
        assert_eq!(told, pid);
        assert!(libc::WIFSTOPPED(status), "it has ended instead: {status}");
        assert!(folder.path().join(format!("declared.{pid}")).exists());
        // SAFETY: a call without pointers, for a child that was not waited for to its end.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGCONT) }, 0);
        assert!(child.wait().unwrap().success());
    }
}

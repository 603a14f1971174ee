//! What is kept on disk: the input that runs now, so that it is there when the process dies of it; what was found; and,
//! for `make fuzz`, inputs to go on from.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::mutate::INPUT_BYTES_MAX;

/// An input that runs longer than this, on any machine, runs for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// The input that runs now, for the watchman.
static RUNNING: Mutex<Option<(PathBuf, Instant)>> = Mutex::new(None);

pub(crate) struct Record {
    folder: PathBuf,
    running: File,
    left_behind: Option<Vec<u8>>,
}

fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn read_all(folder: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    let small = |input: &Vec<u8>| input.len() <= 4 * INPUT_BYTES_MAX;
    paths.iter().filter_map(|path| fs::read(path).ok()).filter(small).collect()
}

impl Record {
    pub(crate) fn open(target: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz").join(target);
        for part in ["corpus", "found"] {
            fs::create_dir_all(folder.join(part)).expect("a folder in target/tmp");
        }
        let path = folder.join("running");
        let left_behind = fs::read(&path).ok();
        if let Some(input) = &left_behind {
            let kept = folder.join("found").join(format!("fatal-{:016x}", hash(input)));
            fs::write(&kept, input).expect("a file in target/tmp");
            eprintln!("{target}: the last run ended within an input, which is kept as {}", kept.display());
        }
        let running = File::create(&path).expect("a file in target/tmp");
        watch();
        Self { folder, running, left_behind }
    }

    /// The input that the process before this one died of.
    pub(crate) fn left_behind(&mut self) -> Option<Vec<u8>> {
        self.left_behind.take()
    }

    pub(crate) fn running(&self, input: &[u8]) {
        let written = self.running.set_len(0).and_then(|()| self.running.write_all_at(input, 0));
        written.expect("a file in target/tmp");
        if let Ok(mut running) = RUNNING.lock() {
            *running = Some((self.folder.join("running"), Instant::now()));
        }
    }

    pub(crate) fn ended(&self) {
        if let Ok(mut running) = RUNNING.lock() {
            *running = None;
        }
    }

    pub(crate) fn found(&self, input: &[u8]) -> PathBuf {
        self.write("found", input)
    }

    pub(crate) fn keep(&self, input: &[u8]) {
        self.write("corpus", input);
    }

    fn write(&self, part: &str, input: &[u8]) -> PathBuf {
        let path = self.folder.join(part).join(format!("{:016x}", hash(input)));
        fs::write(&path, input).expect("a file in target/tmp");
        path
    }

    pub(crate) fn corpus(&self) -> Vec<Vec<u8>> {
        read_all(&self.folder.join("corpus"))
    }

    pub(crate) fn close(&self) {
        fs::remove_file(self.folder.join("running")).expect("a file in target/tmp");
    }
}

/// Ends the process when an input runs for ever: its file stays.
fn watch() {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    if WATCHED.swap(true, Ordering::SeqCst) {
        return;
    }
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let running = RUNNING.lock().ok().and_then(|running| running.clone());
            if let Some((path, since)) = running
                && since.elapsed() > PATIENCE
            {
                eprintln!("an input has run for {PATIENCE:?}: {}", path.display());
                std::process::abort();
            }
        }
    });
}

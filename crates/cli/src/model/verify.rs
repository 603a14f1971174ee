//! `galerne model verify`: the files are what they were.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::manifest::{self, Entry};

/// Holds a checkpoint's files against its SHA-256 manifest, or writes one.
///
/// A manifest is what `sha256sum` writes and reads: SHA256SUMS beside the files.
#[derive(Args)]
pub(super) struct Verify {
    /// Checkpoint: a folder or a GGUF file.
    path: PathBuf,
    /// The manifest; by default SHA256SUMS beside the files.
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
    /// Write the manifest from the files as they are now.
    #[arg(long)]
    write: bool,
}

impl Verify {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (folder, names) = manifest::files(&self.path)?;
        let manifest = self.manifest.unwrap_or_else(|| folder.join(manifest::NAME));
        if self.write {
            let entries = hash_all(&folder, names)?;
            let count = entries.len();
            manifest::write(&manifest, entries)?;
            println!("{} lists {count} file(s)", manifest.display());
            return Ok(());
        }
        anyhow::ensure!(
            manifest.exists(),
            "no manifest to hold the files against: `galerne model verify --write {}` makes one",
            self.path.display()
        );
        let mut expected = manifest::read(&manifest)?;
        if self.path.is_file() {
            expected.retain(|entry| names.contains(&entry.name));
            anyhow::ensure!(!expected.is_empty(), "{} does not list {}", manifest.display(), names[0]);
        }
        compare(&folder, &names, &expected)
    }
}

/// Says of each file whether it is as expected.
fn compare(folder: &Path, names: &[String], expected: &[Entry]) -> anyhow::Result<()> {
    let listed = expected.iter().map(|entry| entry.name.clone());
    let (present, missing): (Vec<_>, Vec<_>) = listed.partition(|name| folder.join(name).is_file());
    let found = hash_all(folder, present)?;
    let mut wrong = missing.len();
    for name in missing {
        println!("{name}: MISSING");
    }
    for Entry { name, sha256 } in found {
        let same = expected.iter().any(|entry| entry.name == name && entry.sha256 == sha256);
        wrong += usize::from(!same);
        println!("{name}: {}", if same { "ok" } else { "CHANGED" });
    }
    for name in names.iter().filter(|name| expected.iter().all(|entry| entry.name != **name)) {
        println!("{name}: not listed");
    }
    if wrong > 0 {
        bail!("{wrong} file(s) are not what the manifest lists: fetch them again");
    }
    Ok(())
}

/// SHA-256 of each file, with a progress bar on a terminal.
fn hash_all(folder: &Path, names: Vec<String>) -> anyhow::Result<Vec<Entry>> {
    let size = |name: &String| fs::metadata(folder.join(name)).map_or(0, |file| file.len());
    let bar = progress(names.iter().map(size).sum());
    let hashed = names.into_iter().map(|name| {
        bar.set_message(name.clone());
        let sha256 = manifest::hash(&folder.join(&name), &mut |read| bar.inc(read))?;
        Ok(Entry { name, sha256 })
    });
    let entries = hashed.collect();
    bar.finish_and_clear();
    entries
}

/// A bar over a number of bytes; silent where there is no terminal.
pub(super) fn progress(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("=> "))
}

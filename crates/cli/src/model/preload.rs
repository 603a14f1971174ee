//! `galerne model preload`: a checkpoint's files into the machine's memory, before ranks want them.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::{bytes, manifest, verify};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 4 << 20;

/// Reads a checkpoint's files from one end to the other, so that ranks that start on this machine find them in its page cache.
#[derive(Args)]
pub(super) struct Preload {
    /// Checkpoint: a folder or a GGUF file.
    path: PathBuf,
}

impl Preload {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (folder, names) = manifest::files(&self.path)?;
        let size = |name: &String| std::fs::metadata(folder.join(name)).map_or(0, |file| file.len());
        let bar = verify::progress(names.iter().map(size).sum());
        let (began, mut total, mut chunk) = (Instant::now(), 0, vec![0; CHUNK_BYTES]);
        for name in &names {
            bar.set_message(name.clone());
            let path = folder.join(name);
            let wrong = |error: std::io::Error| anyhow::anyhow!("cannot read {}: {error}", path.display());
            let mut file = File::open(&path).map_err(wrong)?;
            loop {
                let read = file.read(&mut chunk).map_err(wrong)?;
                if read == 0 {
                    break;
                }
                total += read as u64;
                bar.inc(read as u64);
            }
        }
        bar.finish_and_clear();
        println!("{} file(s), {}, read in {:.1?}", names.len(), bytes(total), began.elapsed());
        Ok(())
    }
}

//! SHA-256 of a checkpoint's files, in the format of `sha256sum`: `HEX  NAME`, one line a file.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use galerne_types::hex;
use sha2::{Digest, Sha256};

/// The manifest's name beside the files that it lists.
pub(super) const NAME: &str = "SHA256SUMS";

/// Bytes of a manifest, far above any checkpoint's.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Bytes that are read and hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// A file and its SHA-256 in lower-case hex.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) sha256: String,
}

/// Reads a manifest.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Entry>> {
    let shown = path.display();
    let size = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
    ensure!(
        size <= MANIFEST_BYTES_MAX,
        "{shown} has {size} bytes; a manifest has at most {MANIFEST_BYTES_MAX}"
    );
    let text = fs::read_to_string(path).map_err(|error| anyhow::anyhow!("cannot read {shown}: {error}"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entries: Vec<Entry> = lines
        .map(|(at, line)| {
            entry(line).with_context(|| format!("{shown}, line {}, is not `SHA-256  NAME`", at + 1))
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(!entries.is_empty(), "{shown} lists no file");
    Ok(entries)
}

fn entry(line: &str) -> Option<Entry> {
    let (sha256, name) = line.split_at_checked(64)?;
    let name = name.strip_prefix("  ").or_else(|| name.strip_prefix(" *"))?;
    let hex = sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
    (hex && is_inside(name)).then(|| Entry { name: name.to_owned(), sha256: sha256.to_lowercase() })
}

/// Whether a name is that of a file in a folder or below it.
pub(super) fn is_inside(name: &str) -> bool {
    let parts_ok = name.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    parts_ok && !name.contains(['\\', '\0', '\n'])
}

/// Writes a manifest in order of the names.
pub(super) fn write(path: &Path, mut entries: Vec<Entry>) -> anyhow::Result<()> {
    entries.sort();
    let text: String = entries.iter().map(|Entry { name, sha256 }| format!("{sha256}  {name}\n")).collect();
    fs::write(path, text).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", path.display()))
}

/// The folder of a checkpoint and the names of its files, a manifest not included.
pub(super) fn files(model: &Path) -> anyhow::Result<(PathBuf, Vec<String>)> {
    let shown = model.display();
    let kind = fs::metadata(model).map_err(|error| anyhow::anyhow!("cannot read {shown}: {error}"))?;
    if kind.is_file() {
        let name = model.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{shown} is no name of a file"))?;
        return Ok((model.parent().unwrap_or(Path::new("")).to_owned(), vec![name.to_owned()]));
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(model).map_err(|error| anyhow::anyhow!("cannot read {shown}: {error}"))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            bail!("{shown} has a file whose name is not UTF-8")
        };
        // Links are followed: a checkpoint's files often are links into a store.
        let is_file = fs::metadata(entry.path()).is_ok_and(|kind| kind.is_file());
        if is_file && name != NAME && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    ensure!(!names.is_empty(), "{shown} holds no files");
    Ok((model.to_owned(), names))
}

/// The SHA-256 of a file; `progress` is told of the bytes as they are read.
pub(super) fn hash(path: &Path, progress: &mut dyn FnMut(u64)) -> anyhow::Result<String> {
    let failed = |error| anyhow::anyhow!("cannot read {}: {error}", path.display());
    let mut file = fs::File::open(path).map_err(failed)?;
    let (mut hasher, mut chunk) = (Sha256::new(), vec![0; CHUNK_BYTES]);
    loop {
        let read = file.read(&mut chunk).map_err(failed)?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&chunk[..read]);
        progress(read as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_survives_the_disk_and_lists_what_sha256sum_lists() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b.txt"), "abc").unwrap();
        fs::write(folder.path().join("a.txt"), "").unwrap();
        fs::write(folder.path().join(".hidden"), "").unwrap();
        let (at, names) = files(folder.path()).unwrap();
        assert_eq!(names, ["a.txt", "b.txt"]);
        let entry =
            |name: &String| Entry { name: name.clone(), sha256: hash(&at.join(name), &mut |_| {}).unwrap() };
        let path = folder.path().join(NAME);
        write(&path, names.iter().rev().map(entry).collect()).unwrap();
        let read = read(&path).unwrap();
        // FIPS 180-4's example.
        assert_eq!(read[1].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(read.iter().map(|entry| &entry.name).collect::<Vec<_>>(), ["a.txt", "b.txt"]);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let sum = "0".repeat(64);
        for (name, ok) in
            [("a", true), ("a/b", true), ("../a", false), ("/etc/a", false), ("a//b", false), ("", false)]
        {
            assert_eq!(entry(&format!("{sum}  {name}")).is_some(), ok, "{name}");
        }
        assert!(entry("abc  file").is_none());
        assert!(entry(&format!("{}  file", "x".repeat(64))).is_none());
    }
}

use std::fs::{self, File};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use serde::de::DeserializeOwned;

use crate::error::{CheckpointError, clip};

/// An open file that tensors are read from, by offset and without a shared position.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    file: File,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = open_regular(path)?;
        let bytes = file.metadata().map_err(|source| io_error(path, "inspect it", source))?.len();
        Ok(Self { path: path.to_owned(), bytes, file })
    }

    /// Asks the system to have these bytes in its cache.
    pub(crate) fn warm(&self, bytes: Range<u64>) -> Result<(), CheckpointError> {
        let Some(length) = NonZeroU64::new(bytes.end.saturating_sub(bytes.start)) else { return Ok(()) };
        let asked = fadvise(&self.file, bytes.start, Some(length), Advice::WillNeed);
        asked.map_err(|errno| io_error(&self.path, "have it cached", errno.into()))
    }

    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.file
            .read_exact_at(out, offset)
            .map_err(|source| io_error(&self.path, "read it as far as its header says", source))
    }
}

/// The whole of a small text file; `None` if there is none.
pub(crate) fn read_text(path: &Path, bytes_max: u64) -> Result<Option<String>, CheckpointError> {
    if !path.exists() {
        return Ok(None);
    }
    let text = String::from_utf8(read_bytes(path, bytes_max)?);
    text.map(Some).map_err(|error| CheckpointError::malformed(path, format!("it is not text: {error}")))
}

/// The whole of a small file.
pub(crate) fn read_bytes(path: &Path, bytes_max: u64) -> Result<Vec<u8>, CheckpointError> {
    let mut content = Vec::new();
    open_regular(path)?
        .take(bytes_max + 1)
        .read_to_end(&mut content)
        .map_err(|source| io_error(path, "read it", source))?;
    if u64::try_from(content.len()).is_ok_and(|bytes| bytes > bytes_max) {
        let problem = format!("it is longer than {bytes_max} bytes, which no such file of a model is");
        return Err(CheckpointError::malformed(path, problem));
    }
    Ok(content)
}

/// A JSON file with the fields of `T`; `None` if there is none.
pub(crate) fn read_json<T: DeserializeOwned>(
    path: &Path,
    bytes_max: u64,
) -> Result<Option<T>, CheckpointError> {
    read_text(path, bytes_max)?.map(|text| parse_json(path, text.as_bytes())).transpose()
}

pub(crate) fn parse_json<T: DeserializeOwned>(path: &Path, json: &[u8]) -> Result<T, CheckpointError> {
    serde_json::from_slice(json).map_err(|error| {
        CheckpointError::malformed(path, format!("its JSON is not as expected: {}", clip(error)))
    })
}

/// Opens nothing that would block or never end, such as a pipe or a device.
fn open_regular(path: &Path) -> Result<File, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|source| io_error(path, "find it", source))?;
    if !metadata.is_file() {
        return Err(CheckpointError::malformed(path, "it is not a regular file"));
    }
    File::open(path).map_err(|source| io_error(path, "open it", source))
}

pub(crate) fn io_error(path: &Path, action: &'static str, source: io::Error) -> CheckpointError {
    CheckpointError::Io { path: path.to_owned(), action, source }
}

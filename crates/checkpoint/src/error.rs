use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::weight::Weight;

/// Why a checkpoint was refused or could not be read. Each message is a sentence that names the file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused to open or read a file.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The system's own reason.
        source: io::Error,
    },
    /// A file is not what its name or its header says, or contradicts another file.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        problem: String,
    },
    /// The file is sound, but describes a model that this engine would compute wrongly.
    #[error("{}: {problem}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What the model asks for, and what the engine computes.
        problem: String,
    },
    /// One tensor is missing, superfluous, or not as the model's configuration demands.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in that file.
        tensor: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// [`Checkpoint::read_rows`](crate::Checkpoint::read_rows) was asked for a part that does not exist.
    #[error(
        "cannot read rows {rows:?}, columns {cols:?} of {weight}: it has {} rows and {} columns, cut only at multiples of {block}",
        shape.0, shape.1
    )]
    Range {
        /// The tensor.
        weight: Weight,
        /// The rows asked for.
        rows: Range<usize>,
        /// The columns asked for.
        cols: Range<usize>,
        /// Its rows and columns.
        shape: (usize, usize),
        /// Elements in a block of its dtype.
        block: usize,
    },
}

impl CheckpointError {
    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn unsupported(path: &Path, problem: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: quote(tensor),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

/// A name out of a file, fit for a message.
pub(crate) fn quote(text: impl fmt::Display) -> String {
    format!("`{}`", clip(text))
}

/// Text out of a file, on one line, and cut where someone meant to flood the log.
pub(crate) fn clip(text: impl fmt::Display) -> String {
    const SHOWN_CHARS_MAX: usize = 160;
    let text = text.to_string();
    let plain = |char: char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char };
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).map(plain).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        shown.push('…');
    }
    shown
}

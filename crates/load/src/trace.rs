//! Traces from files.

use std::path::Path;

use galerne_workload::Trace;

use crate::error::LoadError;

/// Bytes of a trace's file, which is read into memory.
const TRACE_BYTES_MAX: u64 = 1 << 30;

/// Reads a trace: a JSON object a line.
///
/// # Errors
/// Which line is wrong, and how.
pub fn read_trace(path: &Path) -> Result<Trace, LoadError> {
    let unreadable = |reason: String| LoadError::TraceFile { file: path.display().to_string(), reason };
    let bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if bytes > TRACE_BYTES_MAX {
        return Err(unreadable(format!("it has {bytes} bytes, more than {TRACE_BYTES_MAX}: cut it")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let lines = lines.map(|(place, line)| {
        serde_json::from_str(line).map_err(|error| unreadable(format!("line {}: {error}", place + 1)))
    });
    Ok(Trace::new(lines.collect::<Result<_, _>>()?)?)
}

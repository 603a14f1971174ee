//! Requests that were recorded: a line of JSON each.

use std::time::Duration;

use serde::Deserialize;

use crate::dice::Purpose;
use crate::error::WorkloadError;
use crate::length::LENGTH_TOKENS_MAX;
use crate::prompt::{Part, Prompt};

/// Tokens of a block that `hash_ids` name, as in Mooncake's traces (FAST 2025).
const BLOCK_TOKENS: u32 = 512;

/// One line. Mooncake's traces are such lines, too.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TraceLine {
    /// When the request comes, in milliseconds; only differences count.
    #[serde(default)]
    pub timestamp: f64,
    /// Tokens of the prompt, which is made up.
    #[serde(alias = "input_length")]
    pub prompt_tokens: Option<u32>,
    /// Tokens of the answer.
    #[serde(alias = "output_length")]
    pub output_tokens: u32,
    /// The prompt as text.
    pub prompt: Option<String>,
    /// Blocks of 512 tokens that the prompt begins with: the same id, the same tokens.
    #[serde(default)]
    pub hash_ids: Vec<u64>,
}

/// Lines that can be replayed.
#[derive(Clone, Debug)]
pub struct Trace(Vec<TraceLine>);

impl Trace {
    /// Checks the lines.
    ///
    /// # Errors
    /// Which line cannot be replayed, and why.
    pub fn new(lines: Vec<TraceLine>) -> Result<Self, WorkloadError> {
        let mut before = f64::NEG_INFINITY;
        for (place, line) in lines.iter().enumerate() {
            let length = 1..=LENGTH_TOKENS_MAX;
            let reason = if !line.timestamp.is_finite() {
                "has a timestamp that is no number"
            } else if line.timestamp < before {
                "comes before the line above it: sort the lines by their timestamp"
            } else if line.prompt.is_none()
                && line.prompt_tokens.is_none_or(|tokens| !length.contains(&tokens))
            {
                "has neither a prompt nor a sound number of prompt_tokens (input_length)"
            } else if !length.contains(&line.output_tokens) {
                "has no sound number of output_tokens (output_length)"
            } else {
                before = line.timestamp;
                continue;
            };
            return Err(WorkloadError::Trace { line: place + 1, reason });
        }
        Ok(Self(lines))
    }

    /// Requests in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing to replay.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The `number`th request, from 0 on: when, counted from the first one and `speed` times as fast; the prompt; tokens
    /// of its answer.
    pub(crate) fn request(&self, number: u64, speed: f64) -> Option<(Duration, Prompt, u32)> {
        let line = self.0.get(usize::try_from(number).ok()?)?;
        let seconds = (line.timestamp - self.0[0].timestamp) / 1e3 / speed;
        let due = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Some((due, line.asks(number), line.output_tokens))
    }
}

impl TraceLine {
    fn asks(&self, number: u64) -> Prompt {
        if let Some(text) = &self.prompt {
            return Prompt::Text(text.clone());
        }
        let mut left = self.prompt_tokens.unwrap_or_default();
        let mut parts = Vec::new();
        for id in &self.hash_ids {
            let tokens = left.min(BLOCK_TOKENS);
            left -= tokens;
            parts.push(Part { purpose: Purpose::Block, number: *id, tokens });
        }
        parts.push(Part { purpose: Purpose::Own, number, tokens: left });
        parts.retain(|part| part.tokens > 0);
        Prompt::Parts(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::TokenIds;

    fn trace(text: &str) -> Result<Trace, WorkloadError> {
        Trace::new(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    #[test]
    fn traces_of_mooncake_are_replayed_with_their_shared_blocks() {
        let trace = trace(
            "{\"timestamp\": 1000, \"input_length\": 1100, \"output_length\": 52, \"hash_ids\": [4, 5, 6]}\n\
             {\"timestamp\": 1500, \"input_length\": 600, \"output_length\": 7, \"hash_ids\": [4, 9], \"type\": \"x\"}",
        );
        let trace = trace.unwrap();
        let (due, one, answer) = trace.request(0, 2.0).unwrap();
        assert_eq!((trace.len(), due, one.tokens(), answer), (2, Duration::ZERO, Some(1100), 52));
        let (due, other, _) = trace.request(1, 2.0).unwrap();
        assert_eq!((due, other.tokens()), (Duration::from_millis(250), Some(600)));
        let ids = |prompt: &Prompt| prompt.ids(1, TokenIds { first: 1, last: 9999 }).unwrap();
        let (one, other) = (ids(&one), ids(&other));
        assert!(one[..512] == other[..512] && one[512..520] != other[512..520]);
        assert!(trace.request(2, 2.0).is_none());
    }

    #[test]
    fn lines_are_checked() {
        for (text, line, reason) in [
            ("{\"prompt\":\"a\",\"output_tokens\":1}\n{\"output_tokens\":1}", 2, "neither a prompt"),
            ("{\"prompt_tokens\":0,\"output_tokens\":1}", 1, "neither a prompt"),
            ("{\"prompt\":\"a\",\"output_tokens\":0}", 1, "output_tokens"),
            (
                "{\"timestamp\":2,\"prompt\":\"a\",\"output_tokens\":1}\n{\"prompt\":\"a\",\"output_tokens\":1}",
                2,
                "sort the lines",
            ),
        ] {
            let error = trace(text).unwrap_err().to_string();
            assert!(error.contains(&format!("line {line} ")) && error.contains(reason), "{error}");
        }
    }
}

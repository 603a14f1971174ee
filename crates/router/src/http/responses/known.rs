//! Fields of the Responses API that are not taken.

use crate::http::fields::Known;

pub(super) const KNOWN: Known = Known { harmless: HARMLESS, neutral: NEUTRAL, advice: ADVICE };

const HARMLESS: &[&str] = &[
    "access_programs",
    "background_options",
    "max_tool_calls", // of tools that a server runs
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store", // nothing is stored, and the answer says so
];

const NEUTRAL: &[(&str, &[&str])] = &[
    ("background", &["false"]),
    ("context_management", &["[]"]),
    ("conversation", &[]),
    ("image", &["{}"]),
    ("moderation", &[]),
    ("previous_response_id", &[]),
    ("prompt", &[]),
    ("truncation", &["\"disabled\""]),
];

const ADVICE: &[(&str, &str)] = &[
    ("background", "nothing is stored here: wait for the answer, or set stream to true"),
    ("conversation", "nothing is stored here: send the whole conversation in input"),
    ("previous_response_id", "nothing is stored here: send what was said before in input"),
    ("prompt", "no prompts are stored here: send the text in instructions and input"),
    ("truncation", "shorten input until it fits the model's context"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_sorted_and_without_doubles() {
        assert!(HARMLESS.is_sorted_by(|a, b| a < b));
        assert!(NEUTRAL.is_sorted_by(|a, b| a.0 < b.0));
        assert!(ADVICE.iter().all(|(name, _)| NEUTRAL.iter().any(|(known, _)| known == name)));
    }
}

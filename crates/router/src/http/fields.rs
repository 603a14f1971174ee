//! The fields of a JSON body, taken one by one; what is left over at the end is judged by name.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::ApiError;
use crate::limits::ECHO_CHARS_MAX;

/// Fields that say something about the client or its books, and nothing about the answer.
const HARMLESS: [&str; 10] = [
    "metadata",
    "parallel_tool_calls", // without tools there are no calls
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Fields that would change the answer in a way that is not served, with the values at which they do not.
const NEUTRAL: [(&str, &[&str]); 36] = [
    ("add_generation_prompt", &["true"]),
    ("add_special_tokens", &["true", "false"]),
    ("allowed_token_ids", &[]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("best_of", &["1"]),
    ("continue_final_message", &["false"]),
    ("echo", &["false"]),
    ("frequency_penalty", &["0"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("include_stop_str_in_output", &["false"]),
    ("length_penalty", &["1"]),
    ("logit_bias", &["{}"]),
    ("min_p", &["0"]),
    ("modalities", &["[\"text\"]"]),
    ("n", &["1"]),
    ("prediction", &[]),
    ("presence_penalty", &["0"]),
    ("prompt_logprobs", &[]),
    ("reasoning_effort", &["\"none\""]),
    ("repetition_penalty", &["1"]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("structured_outputs", &[]),
    ("suffix", &["\"\""]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("tools", &["[]"]),
    ("truncate_prompt_tokens", &[]),
    ("use_beam_search", &["false"]),
];

/// What of a body has not been taken yet.
pub(super) struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Reads a body, which must be a JSON object. The values are only looked at when they are taken.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map(Self).map_err(|error| {
            let what = match error.classify() {
                serde_json::error::Category::Data => "the body must be a JSON object".to_owned(),
                _ => format!("the body is not valid JSON: {error}"),
            };
            ApiError::invalid(None, what)
        })
    }

    /// Takes a field; `None` if it is absent or null. `expected` completes the sentence "NAME must be …".
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.0.remove(name) else { return Ok(None) };
        serde_json::from_str(raw.get())
            .map_err(|_| ApiError::invalid(Some(name), format!("{name} must be {expected}")))
    }

    /// Takes an integer that is not negative.
    pub(super) fn take_u32(&mut self, name: &'static str) -> Result<Option<u32>, ApiError> {
        self.take(name, "an integer of at least 0 and below 2^32")
    }

    /// Takes a truth value; absent is false.
    pub(super) fn take_bool(&mut self, name: &'static str) -> Result<bool, ApiError> {
        Ok(self.take(name, "true or false")?.unwrap_or(false))
    }

    /// Refuses what is left over, unless it changes nothing.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        for (name, raw) in self.0 {
            if raw.get() == "null" || HARMLESS.contains(&name.as_str()) {
                continue;
            }
            let shown: String = name.chars().take(ECHO_CHARS_MAX).collect();
            let Some((_, neutral)) = NEUTRAL.iter().find(|(known, _)| *known == name) else {
                let message = format!("{shown:?} is not a field of this request: leave it out");
                return Err(ApiError::unknown_field(shown, message));
            };
            if !neutral.iter().any(|neutral| same(raw.get(), neutral)) {
                let or = neutral.first().map_or(String::new(), |value| format!(" or set it to {value}"));
                let message = format!("{shown} is not supported with this value: leave it out{or}");
                return Err(ApiError::unsupported(shown, message));
            }
        }
        Ok(())
    }
}

/// Whether two JSON texts mean the same; numbers by their value, so that 1.0 is 1.
fn same(a: &str, b: &str) -> bool {
    let parse = |text| serde_json::from_str::<Value>(text).ok();
    match (parse(a), parse(b)) {
        (Some(Value::Number(a)), Some(Value::Number(b))) => a.as_f64() == b.as_f64(),
        (a, b) => a.is_some() && a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_judged_by_name_and_value() {
        for (body, refused) in [
            (r#"{"user":"u","metadata":{"a":1}}"#, None),
            (r#"{"n":1,"best_of":1.0,"echo":false,"logit_bias":{},"suffix":null}"#, None),
            (r#"{"response_format":{"type":"text"},"presence_penalty":0.0}"#, None),
            (r#"{"n":2}"#, Some("n")),
            (r#"{"tools":[{}]}"#, Some("tools")),
            (r#"{"temprature":0}"#, Some("temprature")),
            (r#"{"guided_regex":"a"}"#, Some("guided_regex")),
        ] {
            let outcome = Fields::parse(body.as_bytes()).unwrap().finish();
            assert_eq!(outcome.err().and_then(|error| error.param), refused.map(str::to_owned), "{body}");
        }
    }

    #[test]
    fn lists_are_sorted_and_without_doubles() {
        assert!(HARMLESS.is_sorted_by(|a, b| a < b));
        assert!(NEUTRAL.is_sorted_by(|a, b| a.0 < b.0));
    }
}

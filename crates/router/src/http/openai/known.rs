//! Fields of OpenAI's API, of vLLM's additions to it, of older versions of both, and of other engines' APIs (SGLang,
//! TensorRT-LLM, TGI, llama.cpp), that are not taken.

use crate::http::fields::Known;

/// What is known of fields that neither body takes.
pub(in crate::http) const KNOWN: Known = Known { harmless: HARMLESS, neutral: NEUTRAL, advice: ADVICE };

const HARMLESS: &[&str] = &[
    "guided_decoding_backend",   // there is one
    "guided_whitespace_pattern", // whitespace is as the grammar says
    "include_reasoning",         // no reasoning is told apart
    "length_penalty",            // of beam search only
    "metadata",
    "mm_payload",          // of endpoints that only render a prompt
    "parallel_tool_calls", // without tools there are no calls
    "prediction",          // for speed only
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "return_mm_kwargs", // of endpoints that only render a prompt
    "return_token_offsets",
    "routed_experts_prompt_start", // there are no experts
    "safety_identifier",
    "separate_reasoning", // as include_reasoning
    "service_tier",
    "session_id",
    "spaces_between_special_tokens", // fast tokenizers put none
    "store",
    "stream_interval", // whatever is ready is sent
    "stream_reasoning",
    "user",
];

const NEUTRAL: &[(&str, &[&str])] = &[
    ("add_generation_prompt", &["true"]),
    ("add_special_tokens", &["false"]),
    ("allowed_token_ids", &["[]"]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("best_of", &["1"]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &["{}"]),
    ("continue_final_message", &["false"]),
    ("custom_logit_processor", &["\"\""]),
    ("documents", &["[]"]),
    ("dry_multiplier", &["0"]),
    ("dynatemp_range", &["0"]),
    ("early_stopping", &["false"]),
    ("ebnf", &["\"\""]),
    ("ec_transfer_params", &["{}"]),
    ("echo", &["false"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &["[]"]),
    ("grammar", &["\"\""]),
    ("guardrails", &["[]"]),
    ("guidance_scale", &["1"]),
    ("json_schema", &["\"\""]),
    ("kv_transfer_params", &["{}"]),
    ("logits_processors", &["[]"]),
    ("logprob_token_ids", &["[]"]),
    ("lora_path", &["\"\""]),
    ("max_new_tokens", &[]),
    ("max_repetition_pattern_size", &["0"]),
    ("media_io_kwargs", &["{}"]),
    ("min_repetition_pattern_size", &["0"]),
    ("mirostat", &["0"]),
    ("mm_processor_kwargs", &["{}"]),
    ("modalities", &["[\"text\"]"]),
    ("moderation", &[]),
    ("n_predict", &["-1"]),
    ("n_probs", &["0"]),
    ("negative_prompt", &["\"\""]),
    ("no_repeat_ngram_size", &["0"]),
    ("no_stop_trim", &["false"]),
    ("num_beams", &["1"]),
    ("num_predict", &[]),
    ("num_return_sequences", &["1"]),
    ("penalty_alpha", &["0"]),
    ("prompt_embeds", &[]),
    ("prompt_mode", &[]),
    ("reasoning_effort", &["\"none\""]),
    ("regex", &["\"\""]),
    ("repeat_penalty", &["1"]),
    ("repetition_detection", &[]),
    ("repetition_min_count", &["0"]),
    ("return_hidden_states", &["false"]),
    ("return_prompt_text", &["false"]),
    ("return_weight_versions", &["false"]),
    ("safe_prompt", &["false"]),
    ("session_params", &["{}"]),
    ("suffix", &["\"\""]),
    ("tfs_z", &["1"]),
    ("thinking_token_budget", &["-1"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("tools", &["[]"]),
    ("top_a", &["0"]),
    ("typical_p", &["1"]),
    ("use_beam_search", &["false"]),
    ("verbosity", &["\"medium\""]),
    ("vllm_xargs", &["{}"]),
    ("watermarking", &["false"]),
    ("web_search_options", &[]),
    ("xtc_probability", &["0"]),
];

const ADVICE: &[(&str, &str)] = &[
    ("allowed_token_ids", "leave it out, or say what the answer must be with guided_choice or guided_regex"),
    ("bad_words", "leave it out, or lower single tokens with logit_bias"),
    ("chat_template", "the model's own is used; forced at the router's start with --chat-format"),
    ("ebnf", "use guided_grammar"),
    ("function_call", "it is OpenAI's older form: use tool_choice"),
    ("functions", "it is OpenAI's older form: use tools"),
    ("grammar", "use guided_grammar"),
    ("guardrails", "nothing here moderates: leave it out, or set safe_prompt to true for a chat"),
    ("json_schema", "use response_format or guided_json"),
    ("logprob_token_ids", "leave it out, and read the tokens' log probabilities out of the most likely ones"),
    ("max_new_tokens", "use max_tokens"),
    ("n_predict", "use max_tokens"),
    ("no_stop_trim", "use include_stop_str_in_output"),
    ("num_predict", "use max_tokens"),
    ("num_return_sequences", "use n"),
    ("prompt_mode", "leave it out, and say in a system message how the model shall reason"),
    ("regex", "use guided_regex"),
    ("repeat_penalty", "use repetition_penalty"),
    ("return_prompt_text", "leave it out, or ask /tokenize for the prompt with return_token_strs"),
    ("use_beam_search", "leave it out, or use best_of with a text completion"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::Fields;

    #[test]
    fn leftovers_are_judged_by_name_and_value() {
        for (body, refused) in [
            (r#"{"user":"u","metadata":{"a":1}}"#, None),
            (r#"{"best_of":1.0,"echo":false,"bad_words":[],"suffix":null}"#, None),
            (r#"{"use_beam_search":false,"kv_transfer_params":{}}"#, None),
            (r#"{"best_of":2}"#, Some("best_of")),
            (r#"{"functions":[{}]}"#, Some("functions")),
            (r#"{"of_another_engine":1,"x-trace":"a","no_stop_trim":false}"#, None),
            (r#"{"temprature":0}"#, Some("temprature")),
            (r#"{"minTokens":3}"#, Some("minTokens")),
            (r#"{"top_kk":3}"#, Some("top_kk")),
            (r#"{"regex":"a+"}"#, Some("regex")),
            (r#"{"logits_processors":["a"]}"#, Some("logits_processors")),
        ] {
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            for name in ["temperature", "min_tokens", "top_k", "n"] {
                assert!(fields.take_u32(name).unwrap().is_none());
            }
            let outcome = fields.finish(&KNOWN);
            assert_eq!(outcome.err().and_then(|error| error.param), refused.map(str::to_owned), "{body}");
        }
    }

    #[test]
    fn lists_are_sorted_and_without_doubles() {
        assert!(HARMLESS.is_sorted_by(|a, b| a < b));
        assert!(NEUTRAL.is_sorted_by(|a, b| a.0 < b.0));
        assert!(ADVICE.iter().all(|(name, _)| NEUTRAL.iter().any(|(known, _)| known == name)));
    }
}

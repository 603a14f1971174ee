//! Bodies of `/v1/fim/completions`.

use crate::ask::{Caller, MaxTokens, Prompt, Several};
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::name::RequestName;
use crate::http::openai::options::{count, options, view};
use crate::http::openai::{KNOWN, Wanted};
use crate::http::shape::Calls;
use crate::limits::RequestLimits;

/// Reads a body. Without a suffix the gap is at the end, which Mistral's models were taught, too.
pub(super) fn parse(limits: &RequestLimits, body: &[u8]) -> Result<Wanted, ApiError> {
    let mut fields = Fields::parse(body)?;
    let prompt: Option<String> = fields.take("prompt", "a string")?;
    let prompt = prompt.ok_or_else(|| {
        ApiError::invalid(Some("prompt"), "prompt is missing: give the text before the gap")
    })?;
    let suffix: Option<String> = fields.take("suffix", "a string")?;
    let max_tokens = fields.take_u32("max_tokens")?;
    let max_tokens = max_tokens.map_or(MaxTokens::UpTo(u32::MAX), MaxTokens::Exactly);
    let options = options(&mut fields, max_tokens, None)?;
    let each = count(&mut fields, "n", limits)?.unwrap_or(1);
    let view = view(&mut fields, &options)?;
    let name = RequestName::take(&mut fields)?;
    let model: String = fields.take("model", "a string")?.unwrap_or_default();
    fields.finish(&KNOWN)?;
    let prompts = vec![Prompt::Fim { prompt, suffix: suffix.unwrap_or_default() }];
    let asked = Several { model, prompts, each, options, caller: Caller::default() };
    Ok(Wanted { asked, view, calls: Calls::Never, lead: String::new(), name, mistral: true })
}

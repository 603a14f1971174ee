//! What a `tokenizer.json` may ask of the `tokenizers` crate, which does whatever it is asked.

use serde::Deserialize;
use serde_json::Value;

/// Normalizers, pre-tokenizers, post-processors and decoders, all in all. Real files have up to ten.
const PARTS_MAX: usize = 32;
/// How many times as long a text may become before it is cut into tokens. SentencePiece's space takes 3 bytes,
/// byte-level text twice its own.
const GROWTH_MAX: usize = 512;
/// Text that a part puts before another.
const PREPENDED_BYTES_MAX: usize = 64;

/// The parts that work on text; the vocabulary is not looked at.
#[derive(Deserialize)]
struct Shape {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

/// Refuses a file whose parts, one behind another, would turn a short text into one that fills the memory.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let shape = serde_json::from_slice::<Shape>(json).map_err(|error| error.to_string())?;
    let (mut parts, mut growth) = (0, 1_usize);
    for part in [&shape.normalizer, &shape.pre_tokenizer] {
        walk(part, &mut |part| {
            parts += 1;
            growth = growth.saturating_mul(growth_of(part)?);
            Ok(())
        })?;
    }
    for part in [&shape.post_processor, &shape.decoder] {
        walk(part, &mut |_| {
            parts += 1;
            Ok(())
        })?;
    }
    if parts > PARTS_MAX {
        return Err(format!(
            "it has {parts} normalizers, pre-tokenizers and the like; expected at most {PARTS_MAX}"
        ));
    }
    if growth > GROWTH_MAX {
        return Err(format!("its normalizers could make a text more than {GROWTH_MAX} times as long"));
    }
    Ok(())
}

/// Shows every object with a `type`, also within others.
fn walk(value: &Value, each: &mut dyn FnMut(&Value) -> Result<(), String>) -> Result<(), String> {
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, each)),
        Value::Object(fields) => {
            if fields.get("type").is_some_and(Value::is_string) {
                each(value)?;
            }
            fields.values().try_for_each(|field| walk(field, each))
        }
        _ => Ok(()),
    }
}

fn growth_of(part: &Value) -> Result<usize, String> {
    let bytes = |field: &str| part[field].as_str().map_or(0, str::len);
    let prepended = bytes("prepend").max(bytes("replacement"));
    if prepended > PREPENDED_BYTES_MAX {
        return Err(format!(
            "it puts {prepended} bytes before a text; expected at most {PREPENDED_BYTES_MAX}"
        ));
    }
    Ok(match part["type"].as_str() {
        // An expression may match the empty text, between any two characters.
        Some("Replace") => 1 + bytes("content"),
        Some("ByteLevel") => 2,
        Some("Metaspace") => bytes("replacement").max(1),
        _ => 1,
    })
}

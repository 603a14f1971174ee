//! What a message says, in the two forms that OpenAI's APIs share: a text, or parts.

use serde::Deserialize;
use serde_json::{Value, json};

/// A text, or a list of parts.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Deserialize)]
pub(super) struct Part {
    r#type: String,
    text: Option<String>,
    refusal: Option<String>,
}

impl Content {
    /// Its text, or the texts of its parts, if it has nothing else. What stands between two parts is for the model's
    /// chat format to say.
    pub(super) fn text(self) -> Option<Value> {
        let parts = match self {
            Self::Text(text) => return Some(text.into()),
            Self::Parts(parts) => parts,
        };
        let texts = parts.into_iter().map(|Part { r#type, text, refusal }| match r#type.as_str() {
            "text" | "input_text" | "output_text" => text,
            "refusal" => refusal,
            _ => None,
        });
        texts.map(|text| Some(json!({ "type": "text", "text": text? }))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_nothing_else() {
        let parts = |texts: [&str; 2]| json!(texts.map(|text| json!({ "type": "text", "text": text })));
        for (content, text) in [
            (r#""To be""#, Some(json!("To be"))),
            (
                r#"[{"type":"text","text":"To be"},{"type":"refusal","refusal":"or not"}]"#,
                Some(parts(["To be", "or not"])),
            ),
            (
                r#"[{"type":"input_text","text":"To"},{"type":"output_text","text":"be"}]"#,
                Some(parts(["To", "be"])),
            ),
            ("[]", Some(json!([]))),
            (r#"[{"type":"text","text":"To be"},{"type":"image_url"}]"#, None),
            (r#"[{"type":"text"}]"#, None),
        ] {
            let content: Content = serde_json::from_str(content).unwrap();
            assert_eq!(content.text(), text);
        }
    }
}

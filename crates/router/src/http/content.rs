//! What a message says, in the two forms that OpenAI's APIs share: a text, or parts.

use serde::Deserialize;

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

/// What stands between two parts of one message.
const SEPARATOR: &str = "\n";

impl Content {
    /// Its text, if it has nothing else.
    pub(super) fn text(self) -> Option<String> {
        let parts = match self {
            Self::Text(text) => return Some(text),
            Self::Parts(parts) => parts,
        };
        let texts = parts.into_iter().map(|Part { r#type, text, refusal }| match r#type.as_str() {
            "text" | "input_text" | "output_text" => text,
            "refusal" => refusal,
            _ => None,
        });
        Some(texts.collect::<Option<Vec<_>>>()?.join(SEPARATOR))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_nothing_else() {
        for (content, text) in [
            (r#""To be""#, Some("To be")),
            (
                r#"[{"type":"text","text":"To be"},{"type":"refusal","refusal":"or not"}]"#,
                Some("To be\nor not"),
            ),
            (r#"[{"type":"input_text","text":"To"},{"type":"output_text","text":"be"}]"#, Some("To\nbe")),
            (r#"[{"type":"text","text":"To be"},{"type":"image_url"}]"#, None),
            (r#"[{"type":"text"}]"#, None),
        ] {
            let content: Content = serde_json::from_str(content).unwrap();
            assert_eq!(content.text().as_deref(), text);
        }
    }
}

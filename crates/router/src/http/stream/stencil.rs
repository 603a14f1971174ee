//! Events of which only one string differs: the serializer writes the first one, the others are copied around it.

use bytes::{BufMut, BytesMut};

use super::json;
use crate::failure::Failure;

/// What stands before and behind the string.
#[derive(Debug)]
pub(in crate::http) struct Stencil {
    before: Vec<u8>,
    behind: Vec<u8>,
}

/// The string that a stencil is cut at, and as JSON.
const GAP: &str = "\u{1}GAP";
const GAP_JSON: &[u8] = br#""\u0001GAP""#;

impl Stencil {
    /// Cuts the event that `write` writes for a string, behind which must stand nothing of a client's or a model's.
    fn of(write: impl FnOnce(&str, &mut BytesMut) -> Result<(), Failure>) -> Result<Self, Failure> {
        let mut event = BytesMut::new();
        write(GAP, &mut event)?;
        let at = event.windows(GAP_JSON.len()).rposition(|part| part == GAP_JSON);
        let at = at.ok_or_else(|| Failure::Engine("its event has no place for text".to_owned()))?;
        Ok(Self { before: event[..at].to_vec(), behind: event[at + GAP_JSON.len()..].to_vec() })
    }

    /// Writes the event that `write` writes for `text`: with the stencil that was cut before, or one that is cut now.
    pub(in crate::http) fn write(
        cut: &mut Option<Self>,
        text: &str,
        out: &mut BytesMut,
        write: impl FnOnce(&str, &mut BytesMut) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let stencil = match cut {
            Some(stencil) => stencil,
            none => none.insert(Self::of(write)?),
        };
        stencil.fill(text, out)
    }

    fn fill(&self, text: &str, out: &mut BytesMut) -> Result<(), Failure> {
        out.put_slice(&self.before);
        json(out, &text)?;
        out.put_slice(&self.behind);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_stencil_is_what_the_serializer_writes() {
        let event = |text: &str| serde_json::json!({ "a": GAP, "text": text, "z": [null] });
        let stencil = Stencil::of(|text, out| json(out, &event(text))).unwrap();
        for text in ["", "word", "\"\\\n\u{1}GAP", "\u{7f}Wörter 𝄞"] {
            let mut out = BytesMut::new();
            stencil.fill(text, &mut out).unwrap();
            assert_eq!(out, event(text).to_string().as_bytes());
        }
        assert!(Stencil::of(|_, _| Ok(())).is_err());
    }
}

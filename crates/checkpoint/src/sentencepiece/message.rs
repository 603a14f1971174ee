//! The fields of a protobuf message, out of bytes that may be anything.

/// The value of one field, as it stands.
pub(super) enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    /// Text, bytes, or a message.
    Bytes(&'a [u8]),
    /// A kind that SentencePiece's messages do not use.
    Other,
}

/// Numbers and values of the fields of `message`, one after another; nothing follows an error.
pub(super) fn fields(message: &[u8]) -> impl Iterator<Item = Result<(u64, Field<'_>), String>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let before = message.len() - rest.len();
        let field = next(&mut rest);
        if field.is_none() {
            rest = &[];
        }
        Some(field.ok_or_else(|| format!("a message of it is damaged {before} bytes from its beginning")))
    })
}

fn next<'a>(rest: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let key = varint(rest)?;
    let field = match key & 7 {
        0 => Field::Varint(varint(rest)?),
        1 => {
            take(rest, 8)?;
            Field::Other
        }
        2 => {
            let bytes = usize::try_from(varint(rest)?).ok()?;
            Field::Bytes(take(rest, bytes)?)
        }
        5 => Field::Fixed32(u32::from_le_bytes(take(rest, 4)?.try_into().ok()?)),
        // Groups are of before protobuf 3, and 6 and 7 mean nothing.
        _ => return None,
    };
    Some((key >> 3, field))
}

fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Option<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(bytes)?;
    *rest = behind;
    Some(taken)
}

/// Seven bits a byte, the lowest first; what does not fit into 64 bits is damage.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for place in 0..10 {
        let byte = take(rest, 1)?[0];
        let bits = u64::from(byte & 0x7f);
        if place == 9 && bits > 1 {
            return None;
        }
        value |= bits << (7 * place);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

//! The byte-level alphabet of GPT-2: every byte as one printable character, so that BPE can work on text.

/// The byte that `c` stands for. Printable Latin-1 stands for itself; the other 68 bytes, in order, are the
/// characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let byte = match u32::from(c) {
        n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => n,
        n @ 0x100..=0x120 => n - 0x100,
        n @ 0x121..=0x142 => n - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The bytes of a token of a byte-level vocabulary; a token that is not in that alphabet is ordinary text.
pub(crate) fn token_bytes(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

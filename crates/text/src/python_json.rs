//! JSON as Python's standard library reads and writes it, to the letter: what models were trained on.

use std::io::{self, Read as _, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::Formatter;

/// Containers within containers; Python gives up at its recursion limit, about as deep.
const DEPTH_MAX: usize = 512;

/// How Python's `json.dumps` writes.
pub(crate) struct PythonJson {
    /// Between items, and between a key and its value.
    separators: (String, String),
    indent: Option<usize>,
    ascii: bool,
    depth: usize,
    /// Nothing was written yet into the innermost container.
    empty: bool,
}

/// Memory that takes so many bytes and no more.
struct Limited {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl Write for Limited {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if more.len() > self.bytes_max - self.bytes.len() {
            return Err(io::Error::other(format!("more than {} bytes of JSON", self.bytes_max)));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Default for PythonJson {
    /// `json.dumps(value, ensure_ascii=False)`.
    fn default() -> Self {
        Self::new((", ".to_owned(), ": ".to_owned()), None, false)
    }
}

impl PythonJson {
    pub(crate) fn new(separators: (String, String), indent: Option<usize>, ascii: bool) -> Self {
        Self { separators, indent, ascii, depth: 0, empty: true }
    }

    /// # Errors
    /// None for values that are JSON.
    pub(crate) fn write<T: Serialize + ?Sized>(self, value: &T) -> serde_json::Result<String> {
        self.write_within(value, usize::MAX)
    }

    /// As [`write`](Self::write), but at most `bytes_max` bytes.
    ///
    /// # Errors
    /// For values that are no JSON, or longer, or nested deeper than Python would write.
    pub(crate) fn write_within<T: Serialize + ?Sized>(
        self,
        value: &T,
        bytes_max: usize,
    ) -> serde_json::Result<String> {
        let mut text = Limited { bytes: Vec::new(), bytes_max };
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, self))?;
        String::from_utf8(text.bytes).map_err(serde::ser::Error::custom)
    }

    fn new_line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => {
                out.write_all(b"\n")?;
                let blanks = (indent as u64).saturating_mul(self.depth as u64);
                io::copy(&mut io::repeat(b' ').take(blanks), out).map(drop) // ends at the writer's limit
            }
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(io::Error::other(format!("more than {DEPTH_MAX} containers within each other")));
        }
        self.empty = true;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.separators.0.as_bytes())?;
        }
        self.new_line(out)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }
}

impl Formatter for PythonJson {
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if !self.ascii {
            return out.write_all(text.as_bytes());
        }
        for unit in text.encode_utf16() {
            match u8::try_from(unit) {
                Ok(printable @ b' '..=b'~') => out.write_all(&[printable])?,
                _ => write!(out, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.separators.1.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
}

/// Python's `repr` of a float: the shortest digits that read back, in scientific notation below 1e-4 and from
/// 1e16 on.
fn repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

/// `value` as `json.dumps(value, ensure_ascii=False)` writes it.
pub(crate) fn dumps(value: &Value) -> String {
    // A `Value` has text for keys and no number that JSON has not, so nothing in it can fail.
    PythonJson::default().write(value).unwrap_or_default()
}

/// `text` as JSON, written as `json.dumps(json.loads(text), ensure_ascii=False)`; `None` if it is not JSON to Python,
/// which also knows NaN and Infinity.
///
/// # Errors
/// A sentence on JSON that Python reads but cannot hand on.
pub(crate) fn reformat(text: &str) -> Result<Option<String>, String> {
    let mut reader = Reader { text, at: 0, out: String::with_capacity(text.len()) };
    match reader.document() {
        Ok(()) => Ok(Some(reader.out)),
        Err(Stop::NotJson) => Ok(None),
        Err(Stop::Refused(why)) => Err(why),
    }
}

enum Stop {
    NotJson,
    Refused(String),
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    out: String,
}

impl Reader<'_> {
    fn document(&mut self) -> Result<(), Stop> {
        self.space();
        self.value(0)?;
        self.space();
        if self.at == self.text.len() { Ok(()) } else { Err(Stop::NotJson) }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, literal: &str) -> bool {
        let here = self.text.as_bytes()[self.at..].starts_with(literal.as_bytes());
        if here {
            self.at += literal.len();
        }
        here
    }

    fn value(&mut self, depth: usize) -> Result<(), Stop> {
        if depth > DEPTH_MAX {
            return Err(Stop::Refused(format!("its JSON is nested deeper than {DEPTH_MAX} levels")));
        }
        match self.peek() {
            Some(b'"') => {
                let text = self.string()?;
                self.write_string(&text);
                Ok(())
            }
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            _ => {
                for literal in ["null", "true", "false", "NaN", "Infinity", "-Infinity"] {
                    if self.take(literal) {
                        self.out.push_str(literal);
                        return Ok(());
                    }
                }
                self.number()
            }
        }
    }

    fn write_string(&mut self, text: &str) {
        self.out.push_str(&dumps(&Value::from(text)));
    }

    fn array(&mut self, depth: usize) -> Result<(), Stop> {
        self.at += 1;
        self.out.push('[');
        self.space();
        let mut first = true;
        while !(first && self.take("]")) {
            if !first {
                self.out.push_str(", ");
            }
            first = false;
            self.value(depth + 1)?;
            self.space();
            if self.take("]") {
                break;
            }
            if !self.take(",") {
                return Err(Stop::NotJson);
            }
            self.space();
        }
        self.out.push(']');
        Ok(())
    }

    /// Of equal keys the last value counts, at the place of the first.
    fn object(&mut self, depth: usize) -> Result<(), Stop> {
        self.at += 1;
        self.space();
        let before = std::mem::take(&mut self.out);
        let mut entries = serde_json::Map::new();
        while !(entries.is_empty() && self.take("}")) {
            if self.peek() != Some(b'"') {
                return Err(Stop::NotJson);
            }
            let key = self.string()?;
            self.space();
            if !self.take(":") {
                return Err(Stop::NotJson);
            }
            self.space();
            self.value(depth + 1)?;
            entries.insert(key, Value::String(std::mem::take(&mut self.out)));
            self.space();
            if self.take("}") {
                break;
            }
            if !self.take(",") {
                return Err(Stop::NotJson);
            }
            self.space();
        }
        self.out = before;
        self.out.push('{');
        for (place, (key, value)) in entries.iter().enumerate() {
            if place > 0 {
                self.out.push_str(", ");
            }
            self.write_string(key);
            self.out.push_str(": ");
            self.out.push_str(value.as_str().unwrap_or_default());
        }
        self.out.push('}');
        Ok(())
    }

    /// The text between two quotes, its escapes resolved.
    fn string(&mut self) -> Result<String, Stop> {
        self.at += 1;
        let mut text = String::new();
        loop {
            let rest = &self.text[self.at..];
            let end = rest.find(|c: char| c == '"' || c == '\\' || c < ' ').ok_or(Stop::NotJson)?;
            text.push_str(&rest[..end]);
            self.at += end;
            if self.take("\"") {
                return Ok(text);
            }
            if !self.take("\\") {
                return Err(Stop::NotJson);
            }
            let escape = self.peek().ok_or(Stop::NotJson)?;
            self.at += 1;
            text.push(match escape {
                b'"' | b'\\' | b'/' => char::from(escape),
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                b'u' => self.escaped_char()?,
                _ => return Err(Stop::NotJson),
            });
        }
    }

    fn escaped_char(&mut self) -> Result<char, Stop> {
        let first = self.hex4()?;
        let after_first = self.at;
        if (0xd800..0xdc00).contains(&first) && self.take("\\u") {
            let second = self.hex4()?;
            if (0xdc00..0xe000).contains(&second) {
                let code = 0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00);
                return char::from_u32(code).ok_or(Stop::NotJson);
            }
            self.at = after_first;
        }
        char::from_u32(first)
            .ok_or_else(|| Stop::Refused("its JSON escapes half a character (a lone surrogate)".to_owned()))
    }

    fn hex4(&mut self) -> Result<u32, Stop> {
        let digits = self.text.as_bytes().get(self.at..self.at + 4).ok_or(Stop::NotJson)?;
        let value =
            digits.iter().try_fold(0, |value, &digit| Some(value << 4 | char::from(digit).to_digit(16)?));
        self.at += 4;
        value.ok_or(Stop::NotJson)
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - start
    }

    /// A whole number stays as it is, however long; one with a fraction or an exponent is a 64-bit float.
    fn number(&mut self) -> Result<(), Stop> {
        let start = self.at;
        self.take("-");
        if !self.take("0") && self.digits() == 0 {
            return Err(Stop::NotJson);
        }
        let whole = self.at;
        // What does not go on as a number here ends it, and is then one character too many.
        if self.take(".") && self.digits() == 0 {
            self.at = whole;
        }
        let fraction = self.at;
        if self.take("e") || self.take("E") {
            let _ = self.take("+") || self.take("-");
            if self.digits() == 0 {
                self.at = fraction;
            }
        }
        let number = &self.text[start..self.at];
        if self.at == whole {
            self.out.push_str(if number == "-0" { "0" } else { number });
        } else {
            let value = number.parse::<f64>().map_err(|_| Stop::NotJson)?;
            let infinite = if value > 0.0 { "Infinity" } else { "-Infinity" };
            self.out.push_str(&if value.is_finite() { repr(value) } else { infinite.to_owned() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_those_of_python() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (1e100, "1e+100"),
        ];
        for (value, expected) in cases {
            assert_eq!(repr(value), expected);
        }
    }

    /// The expectations are CPython 3.11's.
    #[test]
    fn json_is_read_and_written_as_in_python() {
        let cases = [
            ("22", Some("22")),
            (
                " [1,2.50, -0,-0.0,1e5,1E400 ,-1e400] ",
                Some("[1, 2.5, 0, -0.0, 100000.0, Infinity, -Infinity]"),
            ),
            ("{\"b\":NaN,\"a\":[],\"b\":{}}", Some("{\"b\": {}, \"a\": []}")),
            ("123456789012345678901234567890", Some("123456789012345678901234567890")),
            ("\"\\u00e9\\ud83d\\ude00\\/\\u0001\\u007f\\n\"", Some("\"é😀/\\u0001\u{7f}\\n\"")),
            ("01", None),
            ("1.", None),
            ("1.e5", None),
            ("-", None),
            ("-NaN", None),
            ("[1,]", None),
            ("{\"a\":1,}", None),
            ("{a:1}", None),
            ("\"a\nb\"", None),
            ("\"\\u00g0\"", None),
            ("\u{feff}1", None),
            ("\u{a0}1", None),
            ("22 °C", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(reformat(text).expect(text).as_deref(), expected, "{text}");
        }
        assert!(reformat("\"\\ud800x\"").expect_err("half a character").contains("half a character"));
        assert!(reformat(&"[".repeat(600)).expect_err("too deep").contains("deeper than 512"));
    }
}

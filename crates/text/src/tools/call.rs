//! One call as it is written: a JSON object with a name and arguments, read character by character.

/// What a character adds to the call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The function is known, and the call is one.
    Name(String),
    /// More of the arguments' JSON.
    Arguments(String),
    /// The object is closed.
    End,
}

/// The text is not a call after all.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotACall;

/// Reads one object, from behind its opening brace.
#[derive(Debug)]
pub(super) struct CallReader {
    place: Place,
    /// The call waits for its arguments to begin before it counts as one.
    wait_for_arguments: bool,
    name: Option<String>,
    /// The name was told.
    told: bool,
    /// Arguments that stand before the name.
    early: String,
    has_arguments: bool,
}

#[derive(Debug)]
enum Place {
    /// Before a key, or the end if the object is empty so far.
    Key {
        first: bool,
    },
    InKey(Text),
    Colon(String),
    Value(String),
    Name(Text),
    /// Arguments that are a string, which holds JSON.
    ArgumentsText(Text),
    /// A value that is taken or passed over as it stands.
    Raw {
        arguments: bool,
        raw: Raw,
    },
    Behind,
}

/// A value of whichever kind, followed to its end.
#[derive(Debug, Default)]
struct Raw {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// It is a number or a word, which only the next character ends.
    bare: bool,
}

impl CallReader {
    pub(super) fn new(wait_for_arguments: bool) -> Self {
        let place = Place::Key { first: true };
        Self {
            place,
            wait_for_arguments,
            name: None,
            told: false,
            early: String::new(),
            has_arguments: false,
        }
    }

    /// Whether the call was told, so that it cannot turn out to be none.
    pub(super) fn is_told(&self) -> bool {
        self.told
    }

    pub(super) fn push(&mut self, c: char, events: &mut Vec<Event>) -> Result<(), NotACall> {
        match &mut self.place {
            Place::Key { .. } | Place::Colon(_) | Place::Value(_) | Place::Behind if is_space(c) => {}
            Place::Key { first: true } | Place::Behind if c == '}' => return self.end(events),
            Place::Key { .. } if c == '"' => self.place = Place::InKey(Text::default()),
            Place::Behind if c == ',' => self.place = Place::Key { first: false },
            Place::InKey(text) => {
                if text.push(c)? {
                    self.place = Place::Colon(text.take());
                }
            }
            Place::Colon(key) if c == ':' => self.place = Place::Value(std::mem::take(key)),
            Place::Value(key) => {
                let key = std::mem::take(key);
                self.begin_value(&key, c, events)?;
            }
            Place::Name(text) => {
                if text.push(c)? {
                    let name = text.take();
                    if name.is_empty() {
                        return Err(NotACall);
                    }
                    self.name = Some(name);
                    self.place = Place::Behind;
                    self.tell(events);
                }
            }
            Place::ArgumentsText(text) => {
                let ended = text.push(c)?;
                let more = text.take();
                if ended {
                    self.place = Place::Behind;
                }
                self.argue(&more, events);
            }
            Place::Raw { .. } => self.raw(c, events)?,
            Place::Key { .. } | Place::Colon(_) | Place::Behind => return Err(NotACall),
        }
        Ok(())
    }

    fn begin_value(&mut self, key: &str, c: char, events: &mut Vec<Event>) -> Result<(), NotACall> {
        let arguments = matches!(key, "arguments" | "parameters") && !self.has_arguments;
        if key == "name" && self.name.is_none() {
            self.place = if c == '"' { Place::Name(Text::default()) } else { return Err(NotACall) };
            return Ok(());
        }
        if arguments {
            self.has_arguments = true;
            self.tell(events);
        }
        if arguments && c == '"' {
            self.place = Place::ArgumentsText(Text::default());
            return Ok(());
        }
        if matches!(c, ',' | ':' | '}' | ']') {
            return Err(NotACall);
        }
        self.place = Place::Raw { arguments, raw: Raw::default() };
        self.raw(c, events)
    }

    fn raw(&mut self, c: char, events: &mut Vec<Event>) -> Result<(), NotACall> {
        let Place::Raw { arguments, raw } = &mut self.place else { return Err(NotACall) };
        let arguments = *arguments;
        let (taken, ended) = raw.push(c);
        if ended {
            self.place = Place::Behind;
        }
        if taken && arguments {
            self.argue(c.encode_utf8(&mut [0; 4]), events);
        }
        if taken { Ok(()) } else { self.push(c, events) }
    }

    /// Tells the name, and what was said of the arguments before it.
    fn tell(&mut self, events: &mut Vec<Event>) {
        if self.told || self.wait_for_arguments && !self.has_arguments {
            return;
        }
        if let Some(name) = self.name.clone() {
            self.told = true;
            events.push(Event::Name(name));
            let early = std::mem::take(&mut self.early);
            self.argue(&early, events);
        }
    }

    fn argue(&mut self, text: &str, events: &mut Vec<Event>) {
        if !self.told {
            self.early.push_str(text);
        } else if !text.is_empty() {
            events.push(Event::Arguments(text.to_owned()));
        }
    }

    fn end(&mut self, events: &mut Vec<Event>) -> Result<(), NotACall> {
        if !self.told {
            return Err(NotACall);
        }
        if !self.has_arguments {
            events.push(Event::Arguments("{}".to_owned()));
        }
        events.push(Event::End);
        Ok(())
    }
}

impl Raw {
    /// Whether `c` belongs to the value, and whether the value ends here.
    fn push(&mut self, c: char) -> (bool, bool) {
        if self.in_string {
            if self.escaped {
                self.escaped = false;
            } else if c == '\\' {
                self.escaped = true;
            } else if c == '"' {
                self.in_string = false;
            }
            return (true, !self.in_string && self.depth == 0);
        }
        match c {
            ',' | '}' | ']' if self.depth == 0 => return (false, true),
            '"' if !self.bare => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => self.depth -= 1,
            _ if is_space(c) && self.depth == 0 => return (false, true),
            _ => self.bare = self.depth == 0,
        }
        (true, self.depth == 0 && !self.bare && !self.in_string)
    }
}

pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// A JSON string from behind its opening quote, its escapes resolved.
#[derive(Debug, Default)]
struct Text {
    text: String,
    escape: Escape,
    /// The first half of a character beyond 16 bits.
    high: Option<u32>,
}

#[derive(Debug, Default)]
enum Escape {
    #[default]
    None,
    Begun,
    /// Digits of `\uXXXX` so far.
    Hex {
        digits: u32,
        value: u32,
    },
}

impl Text {
    /// What was read since it was last taken.
    fn take(&mut self) -> String {
        std::mem::take(&mut self.text)
    }

    /// Takes the next character; true when it was the closing quote.
    fn push(&mut self, c: char) -> Result<bool, NotACall> {
        match self.escape {
            Escape::None if c == '\\' => self.escape = Escape::Begun,
            Escape::None => {
                self.lone_half();
                if c == '"' {
                    return Ok(true);
                }
                self.text.push(c);
            }
            Escape::Begun if c == 'u' => self.escape = Escape::Hex { digits: 0, value: 0 },
            Escape::Begun => {
                self.lone_half();
                self.text.push(match c {
                    '"' | '\\' | '/' => c,
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    _ => return Err(NotACall),
                });
                self.escape = Escape::None;
            }
            Escape::Hex { digits, value } => {
                let value = value << 4 | c.to_digit(16).ok_or(NotACall)?;
                self.escape = Escape::Hex { digits: digits + 1, value };
                if digits == 3 {
                    self.escape = Escape::None;
                    self.unit(value);
                }
            }
        }
        Ok(false)
    }

    /// One unit of UTF-16.
    fn unit(&mut self, unit: u32) {
        if let Some(high) = self.high.take() {
            if (0xdc00..0xe000).contains(&unit) {
                let code = 0x1_0000 + ((high - 0xd800) << 10) + (unit - 0xdc00);
                self.text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                return;
            }
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        if (0xd800..0xdc00).contains(&unit) {
            self.high = Some(unit);
        } else {
            self.text.push(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
    }

    fn lone_half(&mut self) {
        if self.high.take().is_some() {
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

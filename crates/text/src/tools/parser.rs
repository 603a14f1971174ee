//! Parts calls of tools from the text around them, while it streams.

use super::call::{CallReader, Event, is_space};
use super::{Mark, Style, ToolFormat};

/// A part of an answer, in the order in which the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text for the user.
    Content(String),
    /// A call begins; comes once for each index, from 0.
    Call {
        /// Place of the call in the answer.
        index: usize,
        /// What its result will refer to.
        id: String,
        /// The function.
        name: String,
    },
    /// More of a call's arguments; the texts of one index make up one JSON text, as the model wrote it.
    Arguments {
        /// The call.
        index: usize,
        /// Some of its JSON.
        text: String,
    },
}

/// Takes an answer's text as it comes and parts the calls of tools from what is for the user.
///
/// However the text is cut into pieces, the parts put together are the same. No beginning of a mark is ever content,
/// a call is told as soon as its name is known, and text that turns out to be no call is content, marks included. White
/// space between content and a call is dropped.
pub struct ToolParser {
    style: Style,
    open: &'static str,
    close: &'static str,
    new_id: Box<dyn FnMut() -> String + Send>,
    place: Place,
    /// Text of which it is not certain yet whether it is content: since the mark, or since the last call.
    held: String,
    /// Calls told so far.
    calls: usize,
    /// No content has come since the last call.
    behind_call: bool,
    parts: Vec<Part>,
}

enum Place {
    /// In content; so many bytes of the opening mark stand at its end, behind white space.
    Content {
        matched: usize,
    },
    /// Behind the mark of Mistral's style: a list, or a single call.
    Begin,
    /// Llama's style, where a call may begin: so many bytes of the mark are there.
    Start {
        matched: usize,
    },
    /// Before a call; in a list or not.
    Before {
        listed: bool,
    },
    Within {
        listed: bool,
        call: CallReader,
    },
    /// Behind a call; so many bytes of the closing mark are there.
    Behind {
        listed: bool,
        matched: usize,
    },
    /// No call can come any more.
    Rest,
}

impl ToolParser {
    /// `new_id` names the calls.
    pub fn new(format: &ToolFormat, new_id: impl FnMut() -> String + Send + 'static) -> Self {
        Self {
            style: format.style,
            open: format.open.text,
            close: format.close.as_ref().map_or("", |close| close.text),
            new_id: Box::new(new_id),
            place: between(format.style),
            held: String::new(),
            calls: 0,
            behind_call: false,
            parts: Vec::new(),
        }
    }

    /// For an answer that is a list of calls as Mistral's models write it, but without their mark.
    pub fn of_list(new_id: impl FnMut() -> String + Send + 'static) -> Self {
        let format = ToolFormat::new(Style::Mistral, Mark { text: "", special: None }, None);
        Self { place: Place::Begin, ..Self::new(&format, new_id) }
    }

    /// Takes the next text; marks are spelled out in it.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        for c in text.chars() {
            self.take(c);
        }
        std::mem::take(&mut self.parts)
    }

    /// The answer ends here: what was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let whole = match std::mem::replace(&mut self.place, Place::Rest) {
            // Closing brackets that did not come are no loss.
            Place::Behind { .. } => true,
            Place::Within { call, .. } => call.is_told(),
            // White space, and between Llama's calls a separator.
            Place::Content { matched: 0 } | Place::Start { matched: 0 } => self.behind_call,
            _ => false,
        };
        if !whole {
            self.content(&held);
        }
        std::mem::take(&mut self.parts)
    }

    /// Takes a character in the place where it stands. `held` has it once it is taken.
    fn take(&mut self, c: char) {
        match std::mem::replace(&mut self.place, Place::Rest) {
            Place::Rest => self.content(c.encode_utf8(&mut [0; 4])),
            Place::Content { matched } => self.take_content(c, matched),
            Place::Within { listed, call } => self.take_within(c, listed, call),
            place @ (Place::Begin
            | Place::Before { .. }
            | Place::Behind { matched: 0, .. }
            | Place::Start { matched: 0 })
                if is_space(c) =>
            {
                self.go_on(c, place);
            }
            Place::Begin if c == '[' => self.go_on(c, Place::Before { listed: true }),
            Place::Begin if c == '{' => self.begin_call(c, false),
            Place::Before { listed } if c == '{' => self.begin_call(c, listed),
            Place::Start { matched: 0 } if c == '{' => self.begin_call(c, false),
            Place::Start { matched: 0 } if self.calls > 0 && matches!(c, ';' | ',') => {
                self.go_on(c, Place::Start { matched: 0 });
            }
            Place::Start { matched } if goes_on(self.open, matched, c) => {
                let whole = matched + 1 == self.open.len();
                self.go_on(
                    c,
                    if whole {
                        Place::Before { listed: false }
                    } else {
                        Place::Start { matched: matched + 1 }
                    },
                );
            }
            Place::Behind { listed: true, .. } if c == ',' => self.go_on(c, Place::Before { listed: true }),
            Place::Behind { listed: true, .. } if c == ']' => self.leave(),
            Place::Behind { listed: false, matched } if goes_on(self.close, matched, c) => {
                if matched + 1 == self.close.len() {
                    self.leave();
                } else {
                    self.go_on(c, Place::Behind { listed: false, matched: matched + 1 });
                }
            }
            Place::Behind { listed: false, .. } => {
                // Without the closing mark; what looked like its beginning may be that of the next opening one.
                self.place = between(self.style);
                for held in std::mem::take(&mut self.held).chars() {
                    self.take(held);
                }
                self.take(c);
            }
            _ => self.give_up(c),
        }
    }

    fn take_content(&mut self, c: char, mut matched: usize) {
        // A mark begins with a character that it does not have again, so after a match that fails one begins anew.
        if matched > 0 && !goes_on(self.open, matched, c) {
            self.release();
            matched = 0;
        }
        self.held.push(c);
        if goes_on(self.open, matched, c) {
            matched += 1;
            self.place = match self.style {
                _ if matched < self.open.len() => Place::Content { matched },
                Style::Mistral => Place::Begin,
                Style::Hermes | Style::Llama => Place::Before { listed: false },
            };
            return;
        }
        if !is_space(c) {
            self.release();
        }
        self.place = Place::Content { matched };
    }

    fn take_within(&mut self, c: char, listed: bool, mut call: CallReader) {
        let mut events = Vec::new();
        if call.push(c, &mut events).is_err() {
            return self.give_up(c);
        }
        self.held.push(c);
        let mut ended = false;
        for event in events {
            self.held.clear();
            match event {
                Event::Name(name) => {
                    let id = (self.new_id)();
                    self.parts.push(Part::Call { index: self.calls, id, name });
                    self.calls += 1;
                }
                Event::Arguments(text) => self.arguments(&text),
                Event::End => (ended, self.behind_call) = (true, true),
            }
        }
        self.place = match (ended, self.style) {
            (false, _) => Place::Within { listed, call },
            (true, Style::Llama) => between(self.style),
            (true, _) if !listed && self.close.is_empty() => between(self.style),
            (true, _) => Place::Behind { listed, matched: 0 },
        };
    }

    fn begin_call(&mut self, c: char, listed: bool) {
        // Any JSON can be an answer where no mark tells a call.
        let call = CallReader::new(self.style == Style::Llama);
        self.go_on(c, Place::Within { listed, call });
    }

    fn go_on(&mut self, c: char, place: Place) {
        self.held.push(c);
        self.place = place;
    }

    /// All calls that the mark announced are there.
    fn leave(&mut self) {
        self.held.clear();
        self.place = between(self.style);
    }

    /// What was held is content after all, and `c` is looked at anew.
    fn give_up(&mut self, c: char) {
        self.release();
        self.place = if self.style == Style::Llama { Place::Rest } else { Place::Content { matched: 0 } };
        self.take(c);
    }

    fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.content(&held);
    }

    fn content(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.behind_call = false;
        match self.parts.last_mut() {
            Some(Part::Content(content)) => content.push_str(text),
            _ => self.parts.push(Part::Content(text.to_owned())),
        }
    }

    fn arguments(&mut self, text: &str) {
        match self.parts.last_mut() {
            Some(Part::Arguments { text: arguments, .. }) => arguments.push_str(text),
            _ => self.parts.push(Part::Arguments { index: self.calls - 1, text: text.to_owned() }),
        }
    }
}

/// Where text stands that belongs to no call.
fn between(style: Style) -> Place {
    match style {
        // Its calls need no mark, but no content may stand before them.
        Style::Llama => Place::Start { matched: 0 },
        Style::Mistral | Style::Hermes => Place::Content { matched: 0 },
    }
}

/// Whether `c` is the next character of a mark; marks are ASCII.
fn goes_on(mark: &str, matched: usize, c: char) -> bool {
    mark.as_bytes().get(matched).is_some_and(|&next| char::from(next) == c)
}

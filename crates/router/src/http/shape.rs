//! What the text of one choice is: words for the user, or calls of tools.

use compact_str::CompactString;
use galerne_text::{Part, ToolFormat, ToolParser};
use galerne_types::{FinishReason, TokenOut};

use crate::answer::{Delta, Stopped};
use crate::ask::random_seed;
use crate::failure::Failure;

/// How calls of tools stand in an answer's text.
#[derive(Clone, Debug)]
pub(super) enum Calls {
    /// There are none.
    Never,
    /// As the model was taught to write them.
    Taught {
        format: ToolFormat,
        /// More than one is welcome; otherwise what follows the first is not shown.
        parallel: bool,
    },
    /// The whole answer is the arguments of one call of this function.
    Arguments(String),
    /// The whole answer is a JSON list of objects with `name` and `arguments`.
    List,
}

/// How calls are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ids {
    /// As Mistral's models and clients have it: nine letters and digits.
    Mistral,
    /// As OpenAI names them: `call_` and 24 letters and digits.
    OpenAi,
}

/// Takes one choice's deltas and tells what their text is.
pub(super) struct Shaper {
    state: State,
    ids: Ids,
    /// A call has begun.
    called: bool,
}

enum State {
    Words,
    Taught { parser: Box<ToolParser>, parallel: bool },
    Arguments { name: String, begun: bool },
}

/// What one delta adds to a choice.
#[derive(Debug, Default)]
pub(super) struct Shaped {
    /// Words for the user; may be empty.
    pub(super) text: CompactString,
    /// Calls that begin, and more of their arguments.
    pub(super) calls: Vec<Part>,
    pub(super) token: Option<TokenOut>,
    /// Set in the last one.
    pub(super) finish: Option<Finish>,
    /// As in a [`Delta`].
    pub(super) stopped: Option<Stopped>,
}

/// Why a choice ended, as its client may know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    ToolCalls,
    Error,
}

impl Shaper {
    pub(super) fn new(calls: &Calls, ids: Ids) -> Result<Self, Failure> {
        let state = match calls {
            Calls::Never => State::Words,
            Calls::Taught { format, parallel } => State::Taught {
                parser: Box::new(ToolParser::new(format, ids.new_ones()?)),
                parallel: *parallel,
            },
            Calls::Arguments(name) => State::Arguments { name: name.clone(), begun: false },
            Calls::List => {
                State::Taught { parser: Box::new(ToolParser::of_list(ids.new_ones()?)), parallel: true }
            }
        };
        Ok(Self { state, ids, called: false })
    }

    /// Takes the next delta.
    pub(super) fn push(&mut self, delta: Delta) -> Result<Shaped, Failure> {
        let Delta { text, token, finish, stopped } = delta;
        let mut shaped =
            Shaped { text: CompactString::default(), calls: Vec::new(), token, finish: None, stopped };
        match &mut self.state {
            State::Words => shaped.text = text,
            State::Taught { parser, parallel } => {
                shaped.take(parser.push(&text), *parallel);
                if finish.is_some() {
                    shaped.take(parser.finish(), *parallel);
                }
            }
            State::Arguments { name, begun } => {
                if !text.is_empty() && !std::mem::replace(begun, true) {
                    shaped.calls.push(Part::Call {
                        index: 0,
                        id: self.ids.new_ones()?(),
                        name: name.clone(),
                    });
                }
                if !text.is_empty() {
                    shaped.calls.push(Part::Arguments { index: 0, text: text.into() });
                }
            }
        }
        self.called |= !shaped.calls.is_empty();
        shaped.finish = finish.map(|reason| Finish::of(reason, self.called));
        Ok(shaped)
    }
}

impl Shaped {
    fn take(&mut self, parts: Vec<Part>, parallel: bool) {
        for part in parts {
            match part {
                Part::Content(text) if self.text.is_empty() => self.text = text.into(),
                Part::Content(text) => self.text.push_str(&text),
                Part::Call { index, .. } | Part::Arguments { index, .. } if index > 0 && !parallel => {}
                call => self.calls.push(call),
            }
        }
    }
}

impl Finish {
    fn of(reason: FinishReason, called: bool) -> Self {
        match reason {
            FinishReason::Stop if called => Self::ToolCalls,
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Cancelled | FinishReason::Error => Self::Error,
        }
    }

    /// OpenAI's word for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::Error => "error",
        }
    }
}

impl Ids {
    /// What clients of OpenAI's API see: templates of Mistral's models refuse ids that are not Mistral's.
    pub(super) fn of(calls: &Calls) -> Self {
        match calls {
            Calls::Taught { format, .. } if format.is_mistral() => Self::Mistral,
            _ => Self::OpenAi,
        }
    }

    /// Gives calls their ids, from the system's random numbers.
    fn new_ones(self) -> Result<impl FnMut() -> String + Send + 'static, Failure> {
        let mut state = random_seed();
        let (prefix, chars) = match self {
            Self::Mistral => ("", 9),
            Self::OpenAi => ("call_", 24),
        };
        Ok(move || {
            let letter = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                char::from(LETTERS[(state >> 33) as usize % LETTERS.len()])
            };
            prefix.chars().chain((0..chars).map(letter)).collect()
        })
    }
}

const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(calls: &Calls, texts: &[&str]) -> (String, Vec<(usize, String)>, Finish) {
        let mut shaper = Shaper::new(calls, Ids::of(calls)).unwrap();
        let (mut text, mut found, mut end) = (String::new(), Vec::new(), None);
        for (at, piece) in texts.iter().enumerate() {
            let finish = (at + 1 == texts.len()).then_some(FinishReason::Stop);
            let shaped =
                shaper.push(Delta { text: (*piece).into(), token: None, finish, stopped: None }).unwrap();
            text.push_str(&shaped.text);
            for part in shaped.calls {
                match part {
                    Part::Call { index, id, name } => {
                        let own = id.strip_prefix("call_").expect("OpenAI's prefix");
                        assert!(own.len() == 24 && own.bytes().all(|b| b.is_ascii_alphanumeric()), "{id}");
                        found.push((index, format!("{name}:")));
                    }
                    Part::Arguments { index, text } => found[index].1.push_str(&text),
                    Part::Content(_) => unreachable!(),
                }
            }
            end = shaped.finish;
        }
        (text, found, end.unwrap())
    }

    #[test]
    fn mistrals_ids_have_nine_characters() {
        let mut new_id = Ids::Mistral.new_ones().unwrap();
        let (one, other) = (new_id(), new_id());
        assert!(one.len() == 9 && one.bytes().all(|b| b.is_ascii_alphanumeric()) && one != other, "{one}");
    }

    #[test]
    fn an_answer_that_is_all_arguments() {
        let calls = Calls::Arguments("add".to_owned());
        let (text, found, finish) = shape(&calls, &["", "{\"a\"", ": 1}", ""]);
        assert_eq!((text.as_str(), finish), ("", Finish::ToolCalls));
        assert_eq!(found, [(0, "add:{\"a\": 1}".to_owned())]);
    }

    #[test]
    fn an_answer_that_is_a_list_of_calls() {
        let list = r#"[{"name": "a", "arguments": {"x": [1, 2]}}, {"name": "b", "arguments": {}}]"#;
        for cut in 0..list.len() {
            let (text, found, finish) = shape(&Calls::List, &[&list[..cut], &list[cut..]]);
            assert_eq!((text.as_str(), finish), ("", Finish::ToolCalls));
            assert_eq!(found, [(0, "a:{\"x\": [1, 2]}".to_owned()), (1, "b:{}".to_owned())]);
        }
        let (text, found, finish) = shape(&Calls::List, &[&list[..9]]);
        assert_eq!((text.as_str(), found.len(), finish), (&list[..9], 0, Finish::Stop));
    }
}

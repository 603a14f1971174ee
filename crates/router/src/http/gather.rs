//! Choices put together, for a client that wants them whole.

use galerne_text::Part;
use galerne_types::TokenOut;

use super::shape::{Calls, Finish, Ids, Shaped, Shaper};
use crate::answer::Stopped;
use crate::choices::Choices;
use crate::failure::Failure;

/// All of one choice.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) text: String,
    pub(super) calls: Vec<Call>,
    pub(super) tokens: Vec<TokenOut>,
    pub(super) finish: Option<Finish>,
    pub(super) stopped: Option<Stopped>,
}

/// A call of a tool.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    /// JSON.
    pub(super) arguments: String,
}

impl Call {
    /// Adds what a part says to the calls so far.
    pub(super) fn add(calls: &mut Vec<Self>, part: Part) {
        match part {
            Part::Call { index: _, id, name } => calls.push(Self { id, name, arguments: String::new() }),
            Part::Arguments { index, text } => {
                if let Some(call) = calls.get_mut(index) {
                    call.arguments.push_str(&text);
                }
            }
            Part::Content(_) => {} // words are told apart from calls before
        }
    }
}

/// Waits for the end of all choices.
pub(super) async fn gather(choices: &mut Choices, calls: &Calls, ids: Ids) -> Result<Vec<Gathered>, Failure> {
    let mut all: Vec<_> = (0..choices.len()).map(|_| Gathered::default()).collect();
    let mut shapers = (0..choices.len()).map(|_| Shaper::new(calls, ids)).collect::<Result<Vec<_>, _>>()?;
    choices.hold();
    while let Some(news) = choices.next().await {
        let (at, delta) = news?;
        all[at].add(shapers[at].push(delta)?);
    }
    Ok(all)
}

impl Gathered {
    fn add(&mut self, shaped: Shaped) {
        let Shaped { text, calls, token, finish, stopped } = shaped;
        self.text.push_str(&text);
        self.tokens.extend(token);
        (self.finish, self.stopped) = (finish, stopped);
        calls.into_iter().for_each(|part| Call::add(&mut self.calls, part));
    }

    /// The mean log probability of its tokens; of none, the lowest there is.
    pub(super) fn mean_logprob(&self) -> f64 {
        let sum: f64 = self.tokens.iter().map(|token| f64::from(token.logprob)).sum();
        if self.tokens.is_empty() { f64::NEG_INFINITY } else { sum / self.tokens.len() as f64 }
    }
}

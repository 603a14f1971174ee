//! News of a router's requests: how tokens become columns, and events again.

use crate::v1::run_event::Event;
use crate::{WireError, v1};

/// Consecutive tokens of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRun<'a> {
    /// The request's id.
    pub request: u32,
    /// Index of the first token.
    pub index: u32,
    /// The tokens; at least one.
    pub tokens: &'a [u32],
}

impl v1::Tokens {
    /// Adds a request's next token: right behind its others, if there are any.
    pub fn push(&mut self, request: u32, index: u32, token: u32) {
        match (self.requests.last(), self.counts.last_mut()) {
            (Some(last), Some(count)) if *last == request => *count += 1,
            _ => {
                self.requests.push(request);
                self.indices.push(index);
                self.counts.push(1);
            }
        }
        self.tokens.push(token);
    }

    /// The tokens, request by request.
    ///
    /// # Errors
    ///
    /// When the columns do not fit together.
    pub fn runs(&self) -> Result<impl Iterator<Item = TokenRun<'_>>, WireError> {
        let count = self.counts.iter().map(|&count| u64::from(count)).sum::<u64>();
        let (runs, tokens) = (self.requests.len(), self.tokens.len());
        if (self.indices.len(), self.counts.len()) != (runs, runs) || count != tokens as u64 {
            return Err(WireError::Range {
                field: "tokens",
                expected: format!("{count} tokens of {runs} requests"),
                found: format!("{tokens} of {} indices and {} counts", self.indices.len(), self.counts.len()),
            });
        }
        let mut rest = &self.tokens[..];
        let columns = self.requests.iter().zip(&self.indices).zip(&self.counts);
        Ok(columns.filter(|&(_, &count)| count > 0).map(move |((&request, &index), &count)| {
            let (tokens, behind) = rest.split_at(count as usize);
            rest = behind;
            TokenRun { request, index, tokens }
        }))
    }
}

impl v1::RunToken {
    /// The token, if nothing is told of it but which it is.
    pub fn bare(&self) -> Option<u32> {
        match (&self.timing, &self.token) {
            (None, Some(v1::Token { id, logprob: 0.0, top, rank: 0 })) if top.is_empty() => Some(*id),
            _ => None,
        }
    }
}

impl v1::News {
    /// All of it as events, in order.
    ///
    /// # Errors
    ///
    /// When the columns of its tokens do not fit together.
    pub fn into_events(self) -> Result<Vec<v1::RunEvent>, WireError> {
        let Self { mut events, tokens, ends } = self;
        for TokenRun { request, index, tokens } in tokens.unwrap_or_default().runs()? {
            events.extend((index..).zip(tokens).map(|(index, &id)| {
                let token = Some(v1::Token { id, ..Default::default() });
                v1::RunEvent {
                    id: request,
                    event: Some(Event::Token(v1::RunToken { index, token, timing: None })),
                }
            }));
        }
        events.extend(ends);
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_read_as_they_were_written() {
        let mut tokens = v1::Tokens::default();
        for (request, index, token) in [(7, 3, 30), (7, 4, 31), (2, 0, 9), (9, 1, 8), (9, 2, 0)] {
            tokens.push(request, index, token);
        }
        let run = |request, index, tokens| TokenRun { request, index, tokens };
        let runs: Vec<_> = tokens.runs().unwrap().collect();
        assert_eq!(runs, [run(7, 3, &[30, 31][..]), run(2, 0, &[9]), run(9, 1, &[8, 0])]);
        let events = v1::News { tokens: Some(tokens), ..Default::default() }.into_events().unwrap();
        let bare = events.iter().map(|event| match &event.event {
            Some(Event::Token(token)) => (event.id, token.index, token.bare().unwrap()),
            other => panic!("{other:?}"),
        });
        assert_eq!(bare.collect::<Vec<_>>(), [(7, 3, 30), (7, 4, 31), (2, 0, 9), (9, 1, 8), (9, 2, 0)]);
    }

    #[test]
    fn columns_that_do_not_fit_together_are_refused() {
        let good = v1::Tokens {
            requests: vec![1, 2],
            indices: vec![0, 0],
            counts: vec![1, 2],
            tokens: vec![5, 6, 7],
        };
        assert!(good.runs().is_ok());
        let short = |shorten: fn(&mut v1::Tokens)| {
            let mut bad = good.clone();
            shorten(&mut bad);
            bad.runs().err()
        };
        let cut: [fn(&mut v1::Tokens); 5] = [
            |bad| bad.requests.truncate(1),
            |bad| bad.indices.truncate(1),
            |bad| bad.counts.truncate(1),
            |bad| bad.tokens.truncate(2),
            |bad| bad.counts = vec![u32::MAX, u32::MAX],
        ];
        for cut in cut {
            assert!(short(cut).unwrap().to_string().starts_with("tokens must be"));
        }
    }
}

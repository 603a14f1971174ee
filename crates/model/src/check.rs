//! Whether a step can be run: steps come over the wire, and a rank must survive any of them.

use galerne_types::limits::{DRAFT_TOKENS_MAX, KV_BLOCK_TOKENS, TOP_LOGPROBS_MAX};
use galerne_types::{BlockId, Input, Score, Slice, Step, TokenId};

use crate::error::ModelError;
use crate::head::ROUND_MAX;

/// What a rank has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) vocab: usize,
    pub(crate) kv_blocks: usize,
    pub(crate) sequences_max: usize,
    pub(crate) step_tokens_max: usize,
    /// Positions of one sequence.
    pub(crate) positions_max: usize,
    /// Positions that a query sees, its own included; all before it without a window.
    pub(crate) window: Option<usize>,
}

impl Bounds {
    /// Positions whose logits are held at once.
    pub(crate) fn round_max(&self) -> usize {
        self.step_tokens_max.min(ROUND_MAX)
    }

    /// The first position that a query sees.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Behind the id of this come those of slots, whose last token a step that was begun is about to draw (`cuda/rows.cu`).
pub(crate) const DRAWN: TokenId = 1 << 31;

/// A token of a step and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) token: TokenId,
    pub(crate) position: usize,
    /// Index of its slice in the step.
    pub(crate) slice: usize,
    /// Its logits are to be drawn from: for the token that stands so many behind the slice's first draw.
    pub(crate) draw: Option<u32>,
}

/// The tokens of a step in order, and room that is used again for working them out.
#[derive(Debug, Default)]
pub(crate) struct Places {
    pub(crate) all: Vec<Place>,
    /// Slots that stand in the step.
    seen: Vec<bool>,
    /// Blocks that it writes.
    written: Vec<BlockId>,
}

/// Puts the tokens of a step in `places`; `last` holds each slot's last drawn token.
///
/// # Errors
/// [`ModelError::Step`] for whatever does not fit `bounds`; nothing was changed but `places`.
pub(crate) fn place(
    step: &Step,
    bounds: &Bounds,
    last: &[Option<TokenId>],
    Places { all: places, seen, written }: &mut Places,
) -> Result<(), ModelError> {
    places.clear();
    written.clear();
    seen.clear();
    seen.resize(bounds.sequences_max, false);
    let refuse = |what: String| ModelError::Step { number: step.number, what };
    let tokens = step.tokens();
    if tokens > bounds.step_tokens_max {
        return Err(refuse(format!(
            "{tokens} tokens, but at most {} are run at once",
            bounds.step_tokens_max
        )));
    }
    for (index, slice) in step.slices.iter().enumerate() {
        let in_slice = |what: String| refuse(format!("slice {index}: {what}"));
        check_slot(slice, bounds, seen).map_err(in_slice)?;
        check_blocks(slice, bounds).map_err(in_slice)?;
        let first = slice.start as usize / KV_BLOCK_TOKENS - slice.first_block as usize;
        written.extend_from_slice(&slice.blocks[first..]);
        let drawn;
        let tokens = match &slice.input {
            Input::Tokens(tokens) => tokens.as_slice(),
            Input::Last => {
                drawn = [last[slice.slot as usize]
                    .ok_or_else(|| in_slice(format!("no token was drawn for slot {} yet", slice.slot)))?];
                &drawn
            }
        };
        let all = tokens.iter().chain(slice.draft());
        let told = if slice.input == Input::Last { &[] } else { tokens };
        if let Some(token) = told.iter().chain(slice.draft()).find(|token| **token as usize >= bounds.vocab) {
            return Err(in_slice(format!("token {token} is beyond the vocabulary of {}", bounds.vocab)));
        }
        check_draft(slice).map_err(in_slice)?;
        check_history(slice, bounds).map_err(in_slice)?;
        check_score(slice, bounds).map_err(in_slice)?;
        places.extend(all.enumerate().map(|(offset, token)| Place {
            token: *token,
            position: slice.start as usize + offset,
            slice: index,
            draw: slice.draw.as_ref().and((offset + 1).checked_sub(tokens.len())).map(|ahead| ahead as u32),
        }));
    }
    written.sort_unstable();
    match written.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(refuse(format!("KV block {} would be written by two sequences at once", pair[0]))),
        None => Ok(()),
    }
}

fn check_slot(slice: &Slice, bounds: &Bounds, seen: &mut [bool]) -> Result<(), String> {
    match seen.get_mut(slice.slot as usize) {
        None => Err(format!("slot {} is beyond the {} slots", slice.slot, bounds.sequences_max)),
        Some(true) => Err(format!("slot {} stands twice in the step", slice.slot)),
        Some(seen) => {
            *seen = true;
            Ok(())
        }
    }
}

fn check_blocks(slice: &Slice, bounds: &Bounds) -> Result<(), String> {
    let tokens = slice.tokens();
    let end = slice.start as usize + tokens;
    if slice.input.len() == 0 {
        return Err("it has no tokens".to_owned());
    }
    if end > bounds.positions_max {
        return Err(format!(
            "it ends at position {end}, but a sequence has at most {}",
            bounds.positions_max
        ));
    }
    let (first, seen) = (slice.first_block as usize, bounds.first_seen(slice.start as usize));
    if first > seen / KV_BLOCK_TOKENS {
        return Err(format!("its KV blocks begin with block {first}, but it sees position {seen}"));
    }
    let needed = end.div_ceil(KV_BLOCK_TOKENS) - first;
    if slice.blocks.len() != needed {
        return Err(format!("{end} positions need {needed} KV blocks, not {}", slice.blocks.len()));
    }
    let foreign = |block: &&BlockId| **block as usize >= bounds.kv_blocks;
    match slice.blocks.iter().find(foreign) {
        Some(block) => Err(format!("KV block {block} is beyond the {} blocks", bounds.kv_blocks)),
        None => Ok(()),
    }
}

/// Whether its draft comes true is seen from its logits alone.
fn check_draft(slice: &Slice) -> Result<(), String> {
    let Some(draw) = slice.draw.as_ref().filter(|draw| !draw.draft.is_empty()) else { return Ok(()) };
    if draw.draft.len() > DRAFT_TOKENS_MAX {
        let tokens = draw.draft.len();
        return Err(format!("a draft of {tokens} tokens, but at most {DRAFT_TOKENS_MAX} are run ahead"));
    }
    match draw.sampling.looks_back() || !draw.banned.is_empty() || draw.grammar.is_some() {
        true => Err("a draft, but what may be drawn depends on the tokens before".to_owned()),
        false => Ok(()),
    }
}

/// What penalties look back on costs memory and time.
fn check_history(slice: &Slice, bounds: &Bounds) -> Result<(), String> {
    let Some(history) = slice.draw.as_ref().and_then(|draw| draw.history.as_ref()) else { return Ok(()) };
    let tokens = history.prompt.len().saturating_add(history.answer.len());
    if tokens > bounds.positions_max {
        return Err(format!(
            "a history of {tokens} tokens, but a sequence has at most {}",
            bounds.positions_max
        ));
    }
    match history.prompt.iter().chain(&history.answer).find(|token| **token as usize >= bounds.vocab) {
        Some(token) => {
            Err(format!("token {token} of its history is beyond the vocabulary of {}", bounds.vocab))
        }
        None => Ok(()),
    }
}

/// Each target follows one of the slice's positions.
fn check_score(slice: &Slice, bounds: &Bounds) -> Result<(), String> {
    let Some(Score { top, targets }) = &slice.score else { return Ok(()) };
    if targets.len() > slice.input.len() {
        let positions = slice.input.len();
        return Err(format!("{} tokens to score, but it has {positions} positions", targets.len()));
    }
    if *top > TOP_LOGPROBS_MAX {
        return Err(format!(
            "{top} likely tokens beside each score, but at most {TOP_LOGPROBS_MAX} are told"
        ));
    }
    match targets.iter().find(|token| **token as usize >= bounds.vocab) {
        Some(token) => Err(format!("token {token} to score is beyond the vocabulary of {}", bounds.vocab)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::{Draw, Epoch, History, RequestId, Sampling};

    use super::*;

    const BOUNDS: Bounds = Bounds {
        vocab: 100,
        kv_blocks: 8,
        sequences_max: 4,
        step_tokens_max: 64,
        positions_max: 128,
        window: Some(40),
    };

    fn slice(slot: u32, start: u32, tokens: usize, blocks: &[BlockId]) -> Slice {
        let input = Input::Tokens((0..tokens as u32).collect());
        Slice { slot, start, input, first_block: 0, blocks: blocks.to_vec(), draw: None, score: None }
    }

    fn run(slices: Vec<Slice>) -> Result<Vec<Place>, String> {
        let last = [None, Some(7), None, None];
        let mut places = Places::default();
        match place(
            &Step { epoch: Epoch(1), number: 5, slices, traces: Vec::new() },
            &BOUNDS,
            &last,
            &mut places,
        ) {
            Ok(()) => Ok(places.all),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn tokens_get_their_places() {
        let draw = Draw::new(Sampling::greedy(), 0);
        let drawing = Slice { draw: Some(draw), ..slice(0, 31, 2, &[3, 4]) };
        let last = Slice { input: Input::Last, ..slice(1, 0, 1, &[7]) };
        let at = |token, position, slice, draw| Place { token, position, slice, draw };
        let drafting = Draw { draft: vec![8, 9], ..Draw::new(Sampling::greedy(), 4) };
        assert_eq!(
            run(vec![drawing, last]),
            Ok(vec![at(0, 31, 0, None), at(1, 32, 0, Some(0)), at(7, 0, 1, None)])
        );
        let last = Slice { input: Input::Last, draw: Some(drafting), ..slice(1, 5, 1, &[7]) };
        assert_eq!(
            run(vec![last]),
            Ok(vec![at(7, 5, 0, Some(0)), at(8, 6, 0, Some(1)), at(9, 7, 0, Some(2))])
        );
    }

    #[test]
    fn full_blocks_can_be_shared() {
        assert!(run(vec![slice(0, 32, 1, &[3, 4]), slice(1, 32, 1, &[3, 5])]).is_ok());
    }

    #[test]
    fn blocks_that_left_the_window_need_not_be_there() {
        // The first position of the slice, 71, sees itself and 39 before it; 72 sees the second block alone.
        let behind = |start, blocks: &[BlockId]| Slice { first_block: 1, ..slice(0, start, 1, blocks) };
        assert!(run(vec![behind(71, &[3, 4])]).is_ok());
        assert!(run(vec![slice(0, 71, 1, &[2, 3, 4])]).is_ok());
        let refusal = run(vec![behind(70, &[3, 4])]).unwrap_err();
        assert!(refusal.contains("begin with block 1, but it sees position 31"), "{refusal}");
        assert!(run(vec![behind(71, &[2, 3, 4])]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_a_sentence() {
        let last = |slot| Slice { input: Input::Last, ..slice(slot, 0, 1, &[0]) };
        let looking_back = |tokens, token| {
            let history = Some(History { prompt: vec![token; tokens], answer: Vec::new() });
            let draw = Some(Draw { history, ..Draw::new(Sampling::greedy(), 0) });
            Slice { draw, ..slice(0, 0, 1, &[0]) }
        };
        let scoring = |top, targets: &[TokenId]| {
            let score = Some(Score { top, targets: targets.to_vec() });
            Slice { score, ..slice(0, 0, 2, &[0]) }
        };
        let drafting = |token, tokens, draw| {
            let draw = Some(Draw { draft: vec![token; tokens], ..draw });
            Slice { draw, ..slice(0, 0, 1, &[0]) }
        };
        let greedy = || Draw::new(Sampling::greedy(), 0);
        let foreign = Slice { input: Input::Tokens(vec![100]), ..slice(0, 0, 1, &[0]) };
        for (slices, expected) in [
            (vec![slice(0, 0, 65, &[0, 1, 2])], "65 tokens"),
            (vec![slice(4, 0, 1, &[0])], "slot 4 is beyond"),
            (vec![slice(2, 0, 1, &[0]), slice(2, 1, 1, &[0])], "slice 1: slot 2 stands twice"),
            (vec![slice(0, 0, 0, &[])], "no tokens"),
            (vec![slice(0, 128, 1, &[0; 5])], "at most 128"),
            (vec![slice(0, u32::MAX, 1, &[0])], "at most 128"),
            (vec![slice(0, 0, 33, &[0])], "need 2 KV blocks, not 1"),
            (vec![slice(0, 0, 1, &[0, 1])], "need 1 KV blocks, not 2"),
            (vec![slice(0, 0, 1, &[8])], "KV block 8 is beyond"),
            (vec![slice(0, 0, 1, &[3]), slice(1, 32, 1, &[4, 3])], "KV block 3 would be written by two"),
            (vec![slice(0, 0, 64, &[2, 2])], "KV block 2 would be written"),
            (vec![foreign], "token 100 is beyond"),
            (vec![last(0)], "no token was drawn for slot 0"),
            (vec![looking_back(129, 1)], "history of 129 tokens"),
            (vec![scoring(0, &[1; 3])], "3 tokens to score, but it has 2 positions"),
            (vec![scoring(21, &[1])], "21 likely tokens"),
            (vec![scoring(0, &[100])], "token 100 to score"),
            (vec![drafting(1, 16, greedy())], "a draft of 16 tokens, but at most 15"),
            (vec![Slice { start: 30, ..drafting(1, 2, greedy()) }], "33 positions need 2 KV blocks, not 1"),
            (vec![drafting(100, 1, greedy())], "token 100 is beyond"),
            (vec![drafting(1, 2, Draw { banned: vec![1], ..greedy() })], "depends on the tokens before"),
            (
                vec![drafting(1, 2, Draw { grammar: Some(RequestId(1)), ..greedy() })],
                "depends on the tokens before",
            ),
            (vec![looking_back(3, 100)], "token 100 of its history"),
        ] {
            let refusal = run(slices).unwrap_err();
            assert!(refusal.starts_with("step 5 is refused: ") && refusal.contains(expected), "{refusal}");
        }
    }
}

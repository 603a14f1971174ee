//! What runs a step at a rank: the model, or a rehearsal that only takes its time.

use std::time::{Duration, Instant};

use galerne_collective::Collective;
use galerne_model::{Masks, ModelError, Rank};
use galerne_sched::Cost;
use galerne_types::{Draw, Sampled, Slice, Step, TokenId, TokenOut, TopToken};

use super::error::EpochError;

/// One rank's part of a step. Every rank returns the same token ids.
pub(crate) trait Execute {
    /// May give a device a step's work before the step is run, and while the one before is: whether it did, or had. What was begun is
    /// run next, in order.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn begin(&mut self, _step: &Step) -> Result<bool, EpochError> {
        Ok(false)
    }

    /// Whether a device still works on the oldest step that was begun.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn is_busy(&self) -> Result<bool, EpochError> {
        Ok(false)
    }

    /// Runs `step`. Before a draw under a grammar, rank 0 asks `masks` what may be drawn.
    ///
    /// # Errors
    /// Whatever ends the epoch at this rank.
    fn run(&mut self, step: &Step, masks: &mut Masks<'_>) -> Result<Sampled, EpochError>;

    /// Meets the other ranks, and does nothing else.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn meet(&mut self) -> Result<(), EpochError>;

    /// Leaves the other ranks, when the epoch is over.
    ///
    /// # Errors
    /// What only the end of this process helps against.
    fn close(self: Box<Self>) -> Result<(), EpochError>;
}

impl Execute for Rank {
    fn begin(&mut self, step: &Step) -> Result<bool, EpochError> {
        Self::begin(self, step).map_err(EpochError::Step)
    }

    fn is_busy(&self) -> Result<bool, EpochError> {
        Self::is_busy(self).map_err(EpochError::Step)
    }

    fn run(&mut self, step: &Step, masks: &mut Masks<'_>) -> Result<Sampled, EpochError> {
        self.step(step, masks).map_err(EpochError::Step)
    }

    fn meet(&mut self) -> Result<(), EpochError> {
        Self::meet(self).map_err(EpochError::Step)
    }

    fn close(self: Box<Self>) -> Result<(), EpochError> {
        Self::close(*self).map_err(EpochError::Step)
    }
}

/// A rank without weights, KV memory or arithmetic: a step takes what a law says, and tokens are drawn by lot from
/// (seed, index) alone. Everything around it is real, so routers, groups and operators can be tried at scale on
/// machines that could not run one model.
pub(crate) struct Rehearsal {
    cost: Cost,
    vocab: u32,
    /// Never drawn: an answer has the length that was asked for.
    ends: Vec<TokenId>,
    collective: Box<dyn Collective>,
    /// When the last step was over; the next one cannot begin before.
    over: Instant,
}

impl Rehearsal {
    pub(crate) fn new(cost: Cost, vocab: u32, ends: Vec<TokenId>, collective: Box<dyn Collective>) -> Self {
        Self { cost, vocab, ends, collective, over: Instant::now() }
    }

    /// The token of a draw: some id from (seed, index) on that may be drawn.
    fn draw(&self, draw: &Draw, masks: &mut Masks<'_>) -> Result<TokenOut, EpochError> {
        let mask = match draw.grammar {
            None => None,
            Some(request) => Some(masks(request).ok_or(EpochError::Step(ModelError::Mask { request }))?),
        };
        let masked =
            |id: TokenId| mask.as_ref().is_some_and(|mask| mask[id as usize / 32] >> (id % 32) & 1 == 0);
        let free = |id: &TokenId| !draw.banned.contains(id) && (mask.is_some() || !self.ends.contains(id));
        // A greedy answer depends on no seed.
        let seed = if draw.sampling.temperature > 0.0 { draw.sampling.seed } else { 0 };
        let start = (lot(seed, draw.index) % u64::from(self.vocab)) as u32;
        let all = || (start..self.vocab).chain(0..start).filter(|id| !masked(*id));
        let id = all().find(free).or_else(|| all().next()).unwrap_or(start);
        Ok(self.shown(id, draw.sampling.logprobs))
    }

    /// The tokens behind a slice's first one, as far as its draft comes true.
    fn further(&self, slice: &Slice, first: Option<&TokenOut>) -> Result<Vec<TokenOut>, EpochError> {
        let (Some(draw), Some(mut last)) = (&slice.draw, first.map(|token| token.id)) else {
            return Ok(Vec::new());
        };
        let mut further = Vec::new();
        for (by, believed) in (1..).zip(&draw.draft) {
            if last != *believed {
                break;
            }
            let token = self.draw(&draw.ahead(by), &mut |_| None)?;
            last = token.id;
            further.push(token);
        }
        Ok(further)
    }

    /// A token and its alternatives, all equally likely.
    fn shown(&self, id: TokenId, logprobs: Option<u32>) -> TokenOut {
        let logprob = -(self.vocab as f32).ln();
        match logprobs {
            None => TokenOut::unreported(id),
            Some(count) => {
                let top = (0..count.min(self.vocab)).map(|id| TopToken { id, logprob });
                TokenOut { id, logprob, rank: id + 1, top: top.collect() }
            }
        }
    }

    fn scores(&self, slice: &Slice) -> Option<Vec<TokenOut>> {
        let score = slice.score.as_ref()?;
        Some(score.targets.iter().map(|&id| self.shown(id, Some(score.top))).collect())
    }

    /// Tells every rank the ids that rank 0 has drawn: it alone knows the masks.
    fn share(&mut self, tokens: &mut [Option<TokenOut>]) -> Result<(), EpochError> {
        let mut ids: Vec<u8> = tokens.iter().flatten().flat_map(|token| token.id.to_le_bytes()).collect();
        if ids.is_empty() {
            return Ok(());
        }
        self.collective.broadcast(0, &mut ids)?;
        let (ids, _) = ids.as_chunks();
        for (token, id) in tokens.iter_mut().flatten().zip(ids) {
            token.id = TokenId::from_le_bytes(*id);
        }
        Ok(())
    }
}

impl Execute for Rehearsal {
    fn run(&mut self, step: &Step, masks: &mut Masks<'_>) -> Result<Sampled, EpochError> {
        self.over = self.over.max(Instant::now()) + self.cost.predict(step);
        let left = self.over.saturating_duration_since(Instant::now());
        if left > Duration::ZERO {
            std::thread::sleep(left);
        }
        let leads = self.collective.rank() == 0;
        let draw = |slice: &Slice| match &slice.draw {
            None => Ok(None),
            Some(draw) if leads => self.draw(draw, masks).map(Some),
            Some(_) => Ok(Some(self.shown(0, None))),
        };
        let mut tokens = step.slices.iter().map(draw).collect::<Result<Vec<_>, _>>()?;
        self.share(&mut tokens)?;
        let drafts = step.slices.iter().zip(&tokens).filter(|(slice, _)| !slice.draft().is_empty());
        let further = drafts.map(|(slice, token)| self.further(slice, token.as_ref()));
        let further = further.collect::<Result<_, _>>()?;
        let scores = if leads {
            step.slices.iter().filter_map(|slice| self.scores(slice)).collect()
        } else {
            Vec::new()
        };
        Ok(Sampled { tokens, further, scores })
    }

    fn meet(&mut self) -> Result<(), EpochError> {
        Ok(self.collective.barrier()?)
    }

    fn close(self: Box<Self>) -> Result<(), EpochError> {
        Ok(())
    }
}

/// A number that looks random (SplitMix64: Steele, Lea, Flood, OOPSLA 2014).
fn lot(seed: u64, index: u32) -> u64 {
    let mut x = seed.wrapping_add(u64::from(index).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use galerne_collective::Solo;
    use galerne_types::{Epoch, Input, RequestId, Sampling, Score};

    use super::*;

    const VOCAB: u32 = 100;

    fn rehearsal() -> Rehearsal {
        Rehearsal::new(Cost::default(), VOCAB, vec![2], Box::new(Solo::new(1)))
    }

    fn drawn(draw: Draw) -> TokenId {
        run(draw).tokens[0].as_ref().unwrap().id
    }

    fn run(draw: Draw) -> Sampled {
        let slice = Slice {
            slot: 0,
            start: 0,
            input: Input::Last,
            first_block: 0,
            blocks: vec![0],
            draw: Some(draw),
            score: None,
        };
        let step = Step { epoch: Epoch(1), number: 1, slices: vec![slice], traces: Vec::new() };
        // Of all tokens 64 alone may be drawn under a grammar.
        let mask = |request: RequestId| (request.0 == 7).then(|| vec![0, 0, 1, 0].into());
        rehearsal().run(&step, &mut { mask }).unwrap()
    }

    #[test]
    fn tokens_follow_from_seed_and_index_and_never_end_an_answer() {
        let draw = |seed, index| Draw::new(Sampling { seed, temperature: 1.0, ..Sampling::greedy() }, index);
        let answer: Vec<TokenId> = (0..500).map(|index| drawn(draw(1, index))).collect();
        assert_eq!(answer, (0..500).map(|index| drawn(draw(1, index))).collect::<Vec<_>>());
        assert_ne!(answer, (0..500).map(|index| drawn(draw(2, index))).collect::<Vec<_>>());
        let draft = [&answer[10..13], &[VOCAB - 1, 1]].concat();
        let sampled = run(Draw { draft, ..draw(1, 10) });
        let further: Vec<TokenId> = sampled.further[0].iter().map(|token| token.id).collect();
        assert_eq!(further, answer[11..14]);
        assert!(answer.iter().all(|id| *id < VOCAB && *id != 2));
        assert_eq!(drawn(Draw { grammar: Some(RequestId(7)), ..draw(1, 0) }), 64);
        let banned = (1..VOCAB).collect();
        assert_eq!(drawn(Draw { banned, ..draw(1, 0) }), 0);
    }

    #[test]
    fn scores_have_one_entry_a_target() {
        let score = Some(Score { top: 3, targets: vec![5, 6] });
        let slice = Slice {
            slot: 0,
            start: 0,
            input: Input::Tokens(vec![4, 5, 6]),
            first_block: 0,
            blocks: vec![0],
            draw: None,
            score,
        };
        let step = Step { epoch: Epoch(1), number: 1, slices: vec![slice], traces: Vec::new() };
        let sampled = rehearsal().run(&step, &mut |_| None).unwrap();
        let shown: Vec<_> = sampled.scores[0].iter().map(|score| (score.id, score.top.len())).collect();
        assert_eq!((sampled.tokens.len(), shown), (1, vec![(5, 3), (6, 3)]));
    }
}

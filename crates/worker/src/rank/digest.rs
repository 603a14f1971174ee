//! The hash by which ranks notice that they have parted ways.

use galerne_types::{Input, Sampled, Step};

/// FNV-1a's constants for 64 bits (Fowler, Noll, Vo), applied to whole words here.
const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0100_0000_01b3;

/// Hash over a step and the token ids that it drew: equal at all ranks that ran the same step with the same
/// result. It finds accidents; an attacker is kept out by the epoch's secret.
pub(crate) fn digest(step: &Step, sampled: &Sampled) -> u64 {
    let mut hash = OFFSET;
    let mut word = |word: u64| hash = (hash ^ word).wrapping_mul(PRIME);
    word(step.epoch.0);
    word(step.number);
    for slice in &step.slices {
        word(slice.slot.into());
        word(slice.start.into());
        match &slice.input {
            Input::Last => word(u64::MAX),
            Input::Tokens(tokens) => tokens.iter().for_each(|&token| word(token.into())),
        }
        word(slice.draft().len() as u64);
        slice.draft().iter().for_each(|&token| word(token.into()));
        word(slice.first_block.into());
        word(slice.blocks.len() as u64);
        slice.blocks.iter().for_each(|&block| word(block.into()));
        word(slice.score.as_ref().map_or(u64::MAX, |score| score.targets.len() as u64));
    }
    for token in &sampled.tokens {
        word(token.as_ref().map_or(u64::MAX, |token| token.id.into()));
    }
    for further in &sampled.further {
        word(further.len() as u64);
        further.iter().for_each(|token| word(token.id.into()));
    }
    hash
}

#[cfg(test)]
mod tests {
    use galerne_types::{Draw, Epoch, Sampling, Score, Slice, TokenOut};

    use super::*;

    #[test]
    fn every_part_counts() {
        let slice = Slice {
            slot: 1,
            start: 2,
            input: Input::Tokens(vec![3, 4]),
            first_block: 0,
            blocks: vec![5],
            draw: Some(Draw::new(Sampling::greedy(), 3)),
            score: None,
        };
        let step = Step { epoch: Epoch(6), number: 7, slices: vec![slice], traces: Vec::new() };
        let sampled = |id| Sampled { tokens: vec![Some(TokenOut::unreported(id))], ..Sampled::default() };
        let base = digest(&step, &sampled(8));
        assert_eq!(base, digest(&step, &sampled(8)));
        let changes: [fn(&mut Step); 10] = [
            |step| step.epoch = Epoch(0),
            |step| step.number = 0,
            |step| step.slices[0].slot = 0,
            |step| step.slices[0].start = 0,
            |step| step.slices[0].input = Input::Last,
            |step| step.slices[0].first_block = 1,
            |step| step.slices[0].blocks.push(0),
            |step| step.slices[0].score = Some(Score { top: 0, targets: vec![1] }),
            |step| step.slices[0].draw.as_mut().unwrap().draft.push(5),
            |step| step.slices.clear(),
        ];
        for change in changes {
            let mut other = step.clone();
            change(&mut other);
            assert_ne!(base, digest(&other, &sampled(8)), "{other:?}");
        }
        assert_ne!(base, digest(&step, &sampled(9)));
        assert_ne!(base, digest(&step, &Sampled { tokens: vec![None], ..Sampled::default() }));
        let further = vec![vec![TokenOut::unreported(1)]];
        assert_ne!(base, digest(&step, &Sampled { further, ..sampled(8) }));
    }
}

//! Speculation by lookup: an answer that repeats what it has read or said is run some tokens ahead.
//!
//! Where the end of a text has stood before, it may go on as it did then. A draft of such tokens is run with the next step,
//! and costs less than steps of its own would while weights are read once for all of a step's tokens. Whether it comes true is
//! seen from what is drawn, so a draft changes no token; it is only ever worth its time or not. Both sides of that are
//! measured: how often a proposal was right, by the length of its match, and what a step with drafts took more.

use std::time::Duration;

use galerne_types::limits::DRAFT_TOKENS_MAX;
use galerne_types::{Step, TokenId};

/// With more answers under way than these nothing is looked up: a step's weights are shared by many tokens already.
pub(crate) const ANSWERS_MAX: usize = 16;

/// Tokens at the end of a text that must have stood before; more than the most count as that.
const MATCH_TOKENS: (usize, usize) = (2, 16);
/// Tokens of a text that are looked at, from its end.
const LOOKED_AT_TOKENS_MAX: usize = 8192;

/// A measurement counts by this part; one of a proposal, of which there are many, by that.
const TIME_PART: f64 = 1.0 / 4.0;
const RIGHT_PART: f64 = 1.0 / 16.0;
/// Until it is measured, so many tokens of drafts are believed to take as long as the step without.
const BELIEVED_TOKENS: f64 = 64.0;
/// After each step in which drafts were proposed and none was worth it, a token of one is believed to take a little less than
/// was measured: so it is tried again after some hundred, with so many tokens.
const FADES: f64 = 1.0 - 1.0 / 1024.0;
const TRIED_TOKENS: usize = 2;

/// How a text may go on: the tokens that followed when its last `matched` stood before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    matched: usize,
    tokens: Vec<TokenId>,
}

impl Proposal {
    /// The longest match counts, of these the latest. Where the text ends sooner than the proposal, it goes round: it may be
    /// about to repeat itself.
    pub(crate) fn look_up(prompt: &[TokenId], answer: &[TokenId], tokens: usize) -> Option<Self> {
        let prompt =
            &prompt[(prompt.len() + answer.len()).saturating_sub(LOOKED_AT_TOKENS_MAX).min(prompt.len())..];
        let text = [prompt, answer].concat();
        let (least, most) = MATCH_TOKENS;
        let (mut matched, mut end) = (least - 1, 0);
        let last = *text.last()?;
        for at in (least..text.len()).rev().filter(|&at| text[at - 1] == last) {
            let pairs = text[..at].iter().rev().zip(text.iter().rev());
            let equal = pairs.take(most).take_while(|(before, now)| before == now).count();
            if equal > matched {
                (matched, end) = (equal, at);
            }
            if matched == most {
                break;
            }
        }
        let follows = text.get(end..).filter(|_| matched >= least)?;
        Some(Self { matched, tokens: follows.iter().copied().cycle().take(tokens).collect() })
    }

    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }
}

/// A proposal for an answer, some of whose first tokens are being drawn already.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer<'a> {
    pub(crate) proposal: &'a Proposal,
    /// Tokens of it that are under way.
    pub(crate) under_way: usize,
}

/// What drafts are worth.
#[derive(Debug)]
pub(crate) struct Worth {
    /// How often a token was the proposed one, by how many before it were known to match.
    right: [f64; MATCH_TOKENS.1 + 1],
    /// Nanoseconds that a step of so many answers takes without drafts; 0 where none was measured.
    answers_ns: [f64; ANSWERS_MAX + 1],
    /// And more for each token of a draft; 0 until it was measured.
    draft_token_ns: f64,
    /// By what that is multiplied, since drafts have not been worth it for a while.
    doubt: f64,
}

impl Default for Worth {
    fn default() -> Self {
        let right = std::array::from_fn(|matched| matched as f64 / (matched + 2) as f64);
        Self { right, answers_ns: [0.0; ANSWERS_MAX + 1], draft_token_ns: 0.0, doubt: FADES }
    }
}

impl Worth {
    /// A proposal's token number `at`, all before which were right, was right or was not.
    pub(crate) fn learn(&mut self, proposal: &Proposal, at: usize, right: bool) {
        let believed = &mut self.right[level(proposal, at)];
        *believed += (f64::from(u8::from(right)) - *believed) * RIGHT_PART;
    }

    /// A step of answers alone has taken so long.
    pub(crate) fn took(&mut self, step: &Step, time: Duration) {
        let answers = step.slices.len();
        let Some(alone_ns) = self.answers_ns.get_mut(answers) else { return };
        let (drafted, time_ns) = (step.tokens() - answers, time.as_nanos() as f64);
        if drafted == 0 {
            *alone_ns = follow(*alone_ns, time_ns);
        } else if *alone_ns > 0.0 {
            let each_ns = (time_ns - *alone_ns).max(1.0) / drafted as f64;
            (self.draft_token_ns, self.doubt) = (follow(self.draft_token_ns, each_ns), 1.0);
        }
    }

    /// How many tokens of each answer's offer to run, `room` at most in all, one entry an answer; empty for none.
    ///
    /// They make the product of all answers' speeds as large as they can, so that no answer is slowed down more than
    /// others gain (proportional fairness: Kelly, European Transactions on Telecommunications 8, 1997). A token that comes true
    /// with probability q, behind others of which e are expected to, is worth it while q / (1 + e) > n · t / T, for n answers
    /// in a step that takes T so far, and t more with it.
    pub(crate) fn choose(
        &mut self,
        offers: &[Option<Offer<'_>>],
        room: usize,
        target: Option<Duration>,
    ) -> Vec<usize> {
        let answers = offers.len();
        let mut step_ns = self.answers_ns.get(answers).copied().unwrap_or(0.0);
        if step_ns == 0.0 || offers.iter().all(Option::is_none) {
            return Vec::new();
        }
        let target_ns = target.map_or(f64::INFINITY, |target| target.as_nanos() as f64);
        let token_ns = match self.draft_token_ns > 0.0 {
            true => self.draft_token_ns * self.doubt,
            false => step_ns / BELIEVED_TOKENS,
        };
        let room = if self.doubt < 1.0 { room.min(TRIED_TOKENS) } else { room };
        let mut drafts = vec![Draft::default(); offers.len()];
        for _ in 0..room {
            let next = |at: usize| {
                let (draft, offer) = (&drafts[at], offers[at].as_ref()?);
                let likely = self.likely(offer, draft.tokens)?;
                Some((at, likely, likely / (1.0 + draft.expected)))
            };
            let best = (0..answers).filter_map(next).max_by(|a, b| a.2.total_cmp(&b.2));
            let worth =
                |gain: f64| gain * step_ns > answers as f64 * token_ns && step_ns + token_ns <= target_ns;
            let Some((at, likely, _)) = best.filter(|&(.., gain)| worth(gain)) else { break };
            drafts[at].tokens += 1;
            drafts[at].expected += likely;
            step_ns += token_ns;
        }
        if drafts.iter().all(|draft| draft.tokens == 0) {
            self.doubt *= FADES;
            return Vec::new();
        }
        drafts.iter().map(|draft| draft.tokens).collect()
    }

    /// How likely token number `at` of a draft from this offer comes true, if there is one.
    fn likely(&self, offer: &Offer<'_>, at: usize) -> Option<f64> {
        let last = offer.under_way + at;
        (at < DRAFT_TOKENS_MAX && last < offer.proposal.tokens.len())
            .then(|| (0..=last).map(|at| self.right[level(offer.proposal, at)]).product())
    }
}

/// A draft that is being chosen.
#[derive(Clone, Copy, Debug, Default)]
struct Draft {
    tokens: usize,
    /// Those of them that will come true, in the mean.
    expected: f64,
}

/// Tokens that are known to match before token number `at` of a proposal, as far as they are told apart.
fn level(proposal: &Proposal, at: usize) -> usize {
    (proposal.matched + at).min(MATCH_TOKENS.1)
}

/// What is believed after a measurement; one that is far off, because something else had the machine, counts as twice as long.
fn follow(believed: f64, measured: f64) -> f64 {
    match believed > 0.0 {
        true => believed + (measured.min(2.0 * believed) - believed) * TIME_PART,
        false => measured,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(prompt: &[TokenId], answer: &[TokenId]) -> Option<(usize, Vec<TokenId>)> {
        let proposal = Proposal::look_up(prompt, answer, 4)?;
        Some((proposal.matched, proposal.tokens))
    }

    #[test]
    fn what_followed_the_longest_and_latest_match_is_proposed() {
        for (prompt, answer, expected) in [
            (&[][..], &[][..], None),
            (&[1], &[], None),
            (&[1, 2, 3, 4, 5, 2], &[], None), // a single token is no match
            (&[1, 2, 3, 4, 5, 1], &[2], Some((2, vec![3, 4, 5, 1]))),
            (&[1, 2, 3, 9, 2, 4, 1, 2], &[], Some((2, vec![3, 9, 2, 4]))),
            (&[1, 2, 3, 6, 1, 2, 4, 7, 1], &[2], Some((2, vec![4, 7, 1, 2]))), // the latest of two
            (&[8, 1, 2, 3, 7, 1, 2, 4, 8, 1], &[2], Some((3, vec![3, 7, 1, 2]))), // the longer one
            (&[5, 6, 7], &[6, 7], Some((2, vec![6, 7, 6, 7]))),                // it goes round
            (&[4, 4, 4], &[], Some((2, vec![4, 4, 4, 4]))),
        ] {
            assert_eq!(look_up(prompt, answer), expected, "{prompt:?} {answer:?}");
        }
        let long = [9; 100];
        assert_eq!(
            look_up(&long, &[]).map(|(matched, _)| matched),
            Some(16),
            "longer ones are not told apart"
        );
    }

    #[test]
    fn a_long_text_is_looked_at_from_its_end() {
        let far: Vec<TokenId> = (0..LOOKED_AT_TOKENS_MAX as u32 + 10).collect();
        assert_eq!(look_up(&far, &[4, 5]), None);
        assert_eq!(look_up(&far, &[24, 25]), Some((2, vec![26, 27, 28, 29])));
        assert_eq!(look_up(&[4, 5], &[&far[6..], &[4, 5]].concat()), None);
    }

    #[test]
    fn what_was_right_is_believed_more() {
        let mut worth = Worth::default();
        let proposal = Proposal::look_up(&[1, 2, 3, 4, 5, 1, 2], &[], 4).unwrap();
        let offer = Offer { proposal: &proposal, under_way: 1 };
        let likely = |worth: &Worth| [0, 2].map(|at| worth.likely(&offer, at).unwrap());
        let before = likely(&worth);
        assert!(before[0] > before[1] && worth.likely(&offer, 3).is_none());
        (0..20).for_each(|_| worth.learn(&proposal, 1, false));
        let after = likely(&worth);
        assert!(after[0] < 0.5 * before[0] && after[1] < 0.5 * before[1]);
        (0..99).for_each(|_| (0..4).for_each(|at| worth.learn(&proposal, at, true)));
        assert!(likely(&worth)[1] > 0.95);
    }
}

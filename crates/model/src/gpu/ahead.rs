//! Steps that a GPU is given before the one before is over: the token that that one draws is on the device when it is looked up, and
//! what the host does in between hides behind the device's work.

use std::collections::VecDeque;
use std::sync::Arc;

use galerne_collective::Collective;
use galerne_types::{Slice, TokenOut};

use super::device::{Device, DeviceError, Stage};
use super::forward::Forward;
use super::head::asks;
use super::sampler::{Asked, ROW_BYTES};
use crate::check::Place;
use crate::error::ModelError;
use crate::head::{ROUND_MAX, Wanted};
use crate::sampler::Past;

/// Steps that may be under way.
const AHEAD_MAX: usize = 2;

/// What was begun, and where it comes to.
pub(super) struct Ahead {
    /// Each with its rounds.
    begun: VecDeque<(Inbox, Vec<Asked>)>,
    free: Vec<Inbox>,
}

type Inbox = Box<dyn Stage>;

impl Ahead {
    /// Room for steps that draw so many tokens.
    pub(super) fn new(device: &Arc<dyn Device>, rows_max: usize) -> Result<Self, DeviceError> {
        let free = (0..AHEAD_MAX).map(|_| Arc::clone(device).stage(rows_max * ROW_BYTES));
        Ok(Self { begun: VecDeque::new(), free: free.collect::<Result<_, _>>()? })
    }
}

impl Forward {
    /// Whether steps can be begun: tokens that a device draws come to all devices.
    pub(crate) fn begins(&self) -> bool {
        self.core.draws()
    }

    /// Gives the device all work of a step that is one tile, and whose wanted rows are one slot's first draw each. `false`, and nothing
    /// was done, if one is left to the host, or too many steps are under way. All ranks come to the same, but for the latter, which they
    /// find out at no step that [`finish`](Self::finish) was called before.
    ///
    /// # Errors
    /// As [`Forward::tile`].
    pub(crate) fn begin(
        &mut self,
        (slices, places): (&[Slice], &[Place]),
        wanted: &[Wanted],
        pasts: &[Option<Past>],
        collective: &mut dyn Collective,
    ) -> Result<bool, ModelError> {
        let slots =
            |round: &[Wanted]| round.iter().map(|wanted| slices[wanted.slice].slot).collect::<Vec<_>>();
        let rounds: Vec<_> = wanted.chunks(ROUND_MAX).map(|round| (round, slots(round))).collect();
        let Some(asked) = self.asked(slices, &rounds, pasts) else { return Ok(false) };
        let Some(mut inbox) = self.ahead.free.pop() else { return Ok(false) };
        self.lay(slices, places)?;
        // One round is drawn from at once.
        let at_once = if rounds.len() == 1 { wanted.len() } else { 0 };
        for (number, ((round, slots), asked)) in rounds.iter().zip(&asked).enumerate() {
            self.core.ask(round, slots, asked)?;
            if number == 0 {
                self.launch(at_once, collective, &mut None)?;
            }
            if at_once == 0 {
                self.core.draw(round.len(), &mut self.link, collective)?;
            }
            self.core.work.sampler.give(&mut *inbox, number * ROUND_MAX, asked)?;
        }
        self.ahead.begun.push_back((inbox, asked));
        Ok(true)
    }

    /// What each round's rows are asked for, if none is left to the host.
    fn asked(
        &self,
        slices: &[Slice],
        rounds: &[(&[Wanted], Vec<u32>)],
        pasts: &[Option<Past>],
    ) -> Option<Vec<Asked>> {
        let of = |(round, slots): &(&[Wanted], Vec<u32>)| {
            if self.core.ranks.rank() > 0 {
                return Some(Asked::elsewhere(round.len()));
            }
            let mut asked = self.core.work.sampler.asked(&asks(slices, round, pasts));
            asked.keep(slots.iter().copied());
            Some(asked).filter(|asked| asked.len() == round.len())
        };
        rounds.iter().map(of).collect()
    }

    /// Whether the oldest step that was begun is still under way.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn is_busy(&self) -> Result<bool, ModelError> {
        match self.ahead.begun.front() {
            Some((inbox, _)) => Ok(!inbox.is_done()?),
            None => Ok(false),
        }
    }

    /// Waits for the oldest step that was begun; what was drawn, in order.
    ///
    /// # Errors
    /// [`ModelError::Device`]; [`ModelError::Collective`] if the other ranks are lost meanwhile.
    pub(crate) fn finish(&mut self) -> Result<Vec<TokenOut>, ModelError> {
        let Some((mut inbox, rounds)) = self.ahead.begun.pop_front() else { return Ok(Vec::new()) };
        self.link.wait_until(|| inbox.is_done())?;
        inbox.wait()?;
        let drawn = self.core.work.sampler.drawn(&mut *inbox, &rounds);
        self.ahead.free.push(inbox);
        Ok(drawn)
    }
}

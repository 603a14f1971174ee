//! Steps that a GPU is given before the one before is over: the token that that one draws is on the device when it is looked up, and
//! what the host does in between hides behind the device's work.

use std::collections::VecDeque;
use std::sync::Arc;

use galerne_collective::Collective;
use galerne_types::{Slice, TokenOut};

use super::device::{Device, DeviceError, Stage};
use super::forward::{Forward, asks};
use super::sampler::{Asked, ROW_BYTES};
use crate::check::Place;
use crate::error::ModelError;
use crate::head::{ROUND_MAX, Want, Wanted};
use crate::sampler::Past;

/// Steps that may be under way.
pub(crate) const AHEAD_MAX: usize = 2;

/// What was begun, and where it comes to.
pub(super) struct Ahead {
    /// Each with its rounds.
    begun: VecDeque<(Inbox, Vec<Asked>)>,
    free: Vec<Inbox>,
    rows_max: usize,
}

type Inbox = Box<dyn Stage>;

impl Ahead {
    /// Room for steps that draw so many tokens; none are begun if that is 0.
    pub(super) fn new(device: &Arc<dyn Device>, rows_max: usize) -> Result<Self, DeviceError> {
        let inboxes = if rows_max == 0 { 0 } else { AHEAD_MAX };
        let free = (0..inboxes).map(|_| Arc::clone(device).stage(rows_max * ROW_BYTES));
        Ok(Self { begun: VecDeque::new(), free: free.collect::<Result<_, _>>()?, rows_max })
    }
}

impl Forward {
    /// Gives the device all work of a step that is one tile, of which every wanted row is drawn from. `false`, and nothing was done, if
    /// it needs the host in between, or too many steps are under way.
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
        let draws = wanted.iter().all(|wanted| wanted.want == Want::Draw(0));
        if wanted.is_empty() || !draws || wanted.len() > self.ahead.rows_max {
            return Ok(false);
        }
        let Some(mut inbox) = self.ahead.free.pop() else { return Ok(false) };
        let slots =
            |round: &[Wanted]| round.iter().map(|wanted| slices[wanted.slice].slot).collect::<Vec<_>>();
        let mut rounds = Vec::new();
        for round in wanted.chunks(ROUND_MAX) {
            let mut asked = self.core.work.sampler.asked(&asks(slices, round, pasts));
            if asked.len() < round.len() {
                self.ahead.free.push(inbox);
                return Ok(false);
            }
            asked.keep(slots(round).into_iter());
            rounds.push(asked);
        }
        self.tile(slices, places, collective, &mut None)?;
        let core = &mut self.core;
        for (number, (round, asked)) in wanted.chunks(ROUND_MAX).zip(&rounds).enumerate() {
            core.logits(round, core.width())?;
            core.work.sampler.draw_to(&mut *inbox, number * ROUND_MAX, &core.work.logits, asked)?;
        }
        self.ahead.begun.push_back((inbox, rounds));
        Ok(true)
    }

    /// Whether the oldest step that was begun is still under way.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn is_busy(&self) -> Result<bool, ModelError> {
        Ok(self.ahead.begun.front().map_or(Ok(true), |(inbox, _)| inbox.is_done()).map(|done| !done)?)
    }

    /// Waits for the oldest step that was begun; what was drawn, in order.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn finish(&mut self) -> Result<Vec<TokenOut>, ModelError> {
        let Some((mut inbox, rounds)) = self.ahead.begun.pop_front() else { return Ok(Vec::new()) };
        inbox.wait()?;
        let drawn = self.core.work.sampler.drawn(&mut *inbox, &rounds);
        self.ahead.free.push(inbox);
        Ok(drawn)
    }
}

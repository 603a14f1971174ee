//! A rule on a trace, and what came of it.

use crate::group::Ask;
use crate::rules::Rule;
use crate::trace::Trace;
use crate::world::{COLD_START_S, World};

/// Before that, in seconds, no rule is obeyed: the fleet is empty as a trace begins, which none of them is made for.
const SETTLE_S: f64 = 60.0;

/// What came of it.
pub(crate) struct Report {
    pub(crate) world: World,
    /// When the fleet moved, and to how many groups.
    pub(crate) moves: Vec<(f64, u32)>,
}

impl Report {
    /// When the fleet moved another way than the time before.
    fn turns(&self) -> Vec<f64> {
        let ways: Vec<(f64, bool)> =
            self.moves.windows(2).map(|pair| (pair[1].0, pair[1].1 > pair[0].1)).collect();
        ways.windows(2).filter(|pair| pair[0].1 != pair[1].1).map(|pair| pair[1].0).collect()
    }

    /// The most turns in any hour.
    pub(crate) fn turns_per_hour(&self) -> usize {
        let turns = self.turns();
        turns
            .iter()
            .map(|at| turns.iter().filter(|other| (0.0..3600.0).contains(&(*other - at))).count())
            .max()
            .unwrap_or(0)
    }
}

/// Lets a rule scale a fleet of `groups` at the start.
pub(crate) fn play(trace: &Trace, asks: &[Ask], rule: &mut Rule, groups: u32) -> Report {
    let mut world = World::new(groups, COLD_START_S);
    let (mut moves, mut coming) = (vec![(0.0, groups)], asks.iter().peekable());
    let ticks = (trace.length_s() / rule.interval_s()) as u32;
    for tick in 1..=ticks {
        let at_s = f64::from(tick) * rule.interval_s();
        while let Some(ask) = coming.next_if(|ask| ask.due_s < at_s) {
            world.ask(*ask);
        }
        world.advance(at_s);
        let wanted = rule.ask(&mut world);
        if at_s >= SETTLE_S {
            world.scale(wanted);
        }
        let counts = world.groups();
        let stands = counts.ready + counts.starting;
        if moves.last().is_none_or(|(_, groups)| *groups != stands) {
            moves.push((at_s, stands));
        }
    }
    coming.for_each(|ask| world.ask(*ask));
    world.finish();
    Report { world, moves }
}

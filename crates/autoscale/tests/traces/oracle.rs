//! What can be reached at all.
//!
//! **The oracle** knows every request of the future, and its groups serve at once. At each full minute it takes the fewest
//! groups with which 97% of the requests due in that minute keep what is promised, found by trying: a copy of the world
//! runs the minute and all that is under way then to its end. For whoever holds the service level in every minute that is a
//! lower bound, but for what a minute leaves to the next: groups that have to be started, or the next minute not known,
//! only cost more. Groups that finish what they have are paid for, by it too; groups that start are not.
//!
//! **The surprised oracle** knows everything but the first minute of a burst, in which it has what it had before: whoever
//! is not told of a burst and starts groups in a minute can do no better, unless he keeps the groups for it all the time.
//! From then on it has as many as it takes to hold the service level in each minute again, with all that the burst has left
//! behind.

use std::ops::Range;

use crate::group::Ask;
use crate::trace::Trace;
use crate::world::World;

/// Of the requests of a minute, in percent.
pub(crate) const ATTAINED: f64 = 97.0;

/// The groups that it takes in each minute, and the world at its end. It knows nothing of the minutes in `surprises`.
pub(crate) fn oracle(trace: &Trace, asks: &[Ask], surprises: &[usize]) -> (Vec<u32>, World) {
    let mut world = World::new(0, 0.0);
    let mut groups: Vec<u32> = Vec::new();
    let mut rest = asks;
    for minute in 0..(trace.length_s() / 60.0).ceil() as usize {
        let end_s = (minute + 1) as f64 * 60.0;
        let (coming, later) = rest.split_at(rest.partition_point(|ask| ask.due_s < end_s));
        rest = later;
        let mut chosen = groups.last().copied().unwrap_or(0);
        if surprises.contains(&minute) {
            run(&mut world, coming, chosen, end_s);
            groups.push(chosen);
            continue;
        }
        let holds = |groups: u32| holds(&world, coming, groups, minute..minute + 1);
        let mut found = holds(chosen);
        while let Some(fewer) = chosen.checked_sub(1).filter(|_| found.is_some()).and_then(holds) {
            (found, chosen) = (Some(fewer), chosen - 1);
        }
        while found.is_none() {
            chosen += 1;
            found = holds(chosen);
        }
        groups.push(chosen);
        world = found.expect("the loop found it");
    }
    world.finish();
    (groups, world)
}

/// The world at the minute's end, if so many groups hold the service level in it.
fn holds(world: &World, asks: &[Ask], groups: u32, minute: Range<usize>) -> Option<World> {
    let mut world = world.clone();
    run(&mut world, asks, groups, minute.end as f64 * 60.0);
    let at_end = world.clone();
    world.finish();
    let tally = world.tally(minute);
    (tally.requests == 0 || tally.attained() >= ATTAINED).then_some(at_end)
}

fn run(world: &mut World, asks: &[Ask], groups: u32, end_s: f64) {
    world.scale(groups);
    asks.iter().for_each(|ask| world.ask(*ask));
    world.advance(end_s);
}

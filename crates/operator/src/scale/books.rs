//! From what routers have counted since they began to what has happened since they were last looked at.

use std::collections::BTreeMap;
use std::time::Duration;

use galerne_autoscale::{GroupWindow, Moments, Steps, Window};
use galerne_types::{GroupId, GroupLoad, RouterRecord};

/// A router tells of changes once in so long, at most.
const TOLD_AFTER: Duration = Duration::from_millis(2_500);

/// A router that is gone is remembered for so long: if only its lease was lost, it goes on counting where it was.
const GONE_AFTER: Duration = Duration::from_secs(600);

/// What was counted when it was last looked at.
#[derive(Clone, Debug, Default)]
pub struct Books {
    closed: Option<Duration>,
    /// When each router was there last, and what it had counted.
    routers: BTreeMap<String, (Duration, RouterRecord)>,
    groups: BTreeMap<GroupId, GroupLoad>,
}

impl Books {
    /// What has happened until `now`. The first time that is all that was ever counted, in no time: so whoever begins anew
    /// knows at once what steps cost and how long prompts and answers are, and nothing of how often they come.
    pub fn close(&mut self, now: Duration, records: &BTreeMap<String, RouterRecord>) -> Window {
        let first = self.closed.is_none();
        let length = now.saturating_sub(self.closed.replace(now).unwrap_or(now));
        let mut window = Window { length, ..Window::default() };
        let mut arrivals = 0.0;
        for (name, record) in records {
            let known = self.routers.insert(name.clone(), (now, record.clone())).map(|(_, before)| before);
            let before = known.filter(|before| before.uptime_ms <= record.uptime_ms).unwrap_or_default();
            add(&mut window.prompts, before.prompts, record.prompts);
            add(&mut window.answers, before.answers, record.answers);
            window.held = window.held.saturating_add(record.held);
            let counted = Duration::from_millis(record.uptime_ms - before.uptime_ms);
            arrivals += per_window(record.arrivals.saturating_sub(before.arrivals), counted, length);
        }
        window.arrivals = if first { 0 } else { arrivals.round() as u64 };
        self.routers.retain(|_, (there, _)| *there + GONE_AFTER >= now);
        let latest = latest(records);
        window.groups = latest.iter().map(|(group, load)| self.group(group, load)).collect();
        self.groups.extend(latest);
        window
    }

    fn group(&self, group: &GroupId, now: &GroupLoad) -> GroupWindow {
        let before = self.groups.get(group).filter(|before| before.epoch == now.epoch);
        let before = before.copied().unwrap_or_default();
        let since = |of: fn(&GroupLoad) -> u64| of(now).saturating_sub(of(&before));
        GroupWindow {
            running: now.running,
            waiting: now.waiting,
            kv_blocks: now.kv_blocks,
            kv_blocks_free: now.kv_blocks_free,
            steps: Steps {
                count: since(|load| load.steps),
                tokens: since(|load| load.tokens),
                keys: since(|load| load.keys),
                busy: Duration::from_micros(since(|load| load.busy_us)),
            },
        }
    }
}

/// A router tells now and then, so what it has told since was counted in a little less than the window, or in a little more.
/// One that had nothing to tell for long has counted in the window whatever it tells now.
fn per_window(arrivals: u64, counted: Duration, length: Duration) -> f64 {
    let arrivals = arrivals as f64;
    if counted.is_zero() || counted.abs_diff(length) > TOLD_AFTER {
        return arrivals;
    }
    arrivals * length.as_secs_f64() / counted.as_secs_f64()
}

fn add(sum: &mut Moments, before: galerne_types::Moments, now: galerne_types::Moments) {
    sum.count += now.count.saturating_sub(before.count);
    sum.sum += now.sum.saturating_sub(before.sum);
    sum.squares = sum.squares.saturating_add(now.squares.saturating_sub(before.squares));
}

/// Every router hears of every group; whoever has heard last is right.
fn latest(records: &BTreeMap<String, RouterRecord>) -> BTreeMap<GroupId, GroupLoad> {
    let mut latest: BTreeMap<GroupId, GroupLoad> = BTreeMap::new();
    for (group, load) in records.values().flat_map(|record| &record.groups) {
        let known = latest.entry(group.clone()).or_insert(*load);
        if (known.epoch, known.steps) <= (load.epoch, load.steps) {
            *known = *load;
        }
    }
    latest
}

#[cfg(test)]
mod tests {
    use galerne_types::Epoch;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn record(uptime_s: u64, arrivals: u64) -> RouterRecord {
        let lengths = galerne_types::Moments { count: arrivals, sum: 10 * arrivals, squares: 100 * arrivals };
        let uptime_ms = uptime_s * 1000;
        RouterRecord { uptime_ms, arrivals, prompts: lengths, answers: lengths, ..RouterRecord::default() }
    }

    fn with_group(epoch: u64, steps: u64) -> RouterRecord {
        let load = GroupLoad {
            epoch: Epoch(epoch),
            running: 3,
            steps,
            tokens: 5 * steps,
            keys: 50 * steps,
            busy_us: 2_000 * steps,
            ..GroupLoad::default()
        };
        RouterRecord { groups: [(GroupId("g0".into()), load)].into(), ..record(100, 0) }
    }

    fn of<const N: usize>(records: [(&str, RouterRecord); N]) -> BTreeMap<String, RouterRecord> {
        records.map(|(name, record)| (name.to_owned(), record)).into()
    }

    #[test]
    fn what_was_counted_before_anybody_looked_is_known_but_did_not_come_now() {
        let mut books = Books::default();
        let window = books.close(S(0), &of([("a", record(900, 90))]));
        assert_eq!((window.length, window.arrivals), (S(0), 0));
        assert_eq!(window.prompts, Moments { count: 90, sum: 900, squares: 9000 });
        let window = books.close(S(5), &of([("a", record(905, 100)), ("new", record(4, 3))]));
        assert_eq!(
            (window.length, window.arrivals),
            (S(5), 10 + 4),
            "the new one was there for four seconds"
        );
        assert_eq!(window.answers.count, 13);
    }

    #[test]
    fn what_was_counted_in_a_little_more_or_less_than_a_window_is_brought_to_it() {
        let mut books = Books::default();
        books.close(S(0), &of([("a", record(900, 0))]));
        let counted = |books: &mut Books, now, uptime, arrivals| {
            books.close(S(now), &of([("a", record(uptime, arrivals))])).arrivals
        };
        assert_eq!(counted(&mut books, 5, 906, 600), 500);
        assert_eq!(counted(&mut books, 10, 910, 1000), 500);
        assert_eq!(counted(&mut books, 15, 910, 1000), 0, "it has nothing new to tell");
        assert_eq!(counted(&mut books, 20, 912, 1050), 50, "and then it was quiet again");
        assert_eq!(counted(&mut books, 60, 952, 1070), 20, "it was quiet until now");
    }

    #[test]
    fn a_router_whose_lease_was_lost_does_not_count_twice_and_one_that_began_anew_counts_from_zero() {
        let mut books = Books::default();
        books.close(S(0), &of([("a", record(900, 70))]));
        assert_eq!(books.close(S(5), &of([])).arrivals, 0);
        assert_eq!(books.close(S(10), &of([("a", record(910, 80))])).arrivals, 10);
        assert_eq!(books.close(S(15), &of([("a", record(5, 7))])).arrivals, 7);
        books.close(S(900), &of([]));
        assert!(books.routers.is_empty(), "who is gone for long is forgotten");
    }

    #[test]
    fn steps_are_those_since_the_last_look_by_whoever_heard_of_them_last() {
        let mut books = Books::default();
        let steps = |books: &mut Books, now, records| {
            let groups = books.close(S(now), &records).groups;
            assert_eq!(groups.len(), 1);
            groups[0].steps
        };
        let all = |count| Steps {
            count,
            tokens: 5 * count,
            keys: 50 * count,
            busy: Duration::from_millis(2 * count),
        };
        assert_eq!(steps(&mut books, 0, of([("a", with_group(7, 100)), ("b", with_group(7, 90))])), all(100));
        assert_eq!(steps(&mut books, 5, of([("a", with_group(7, 120)), ("b", with_group(7, 130))])), all(30));
        assert_eq!(steps(&mut books, 10, of([("a", with_group(8, 4)), ("b", with_group(7, 140))])), all(4));
        assert_eq!(books.close(S(15), &of([("a", record(100, 0))])).groups, []);
        assert_eq!(steps(&mut books, 20, of([("a", with_group(8, 5))])), all(1), "it was out of sight");
    }
}

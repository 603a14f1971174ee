//! The fleet in a terminal: progress bars while groups form, and a table.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use galerne_types::{Fleet, GroupId, RankId, RankState};
use galerne_wire::v1::{FleetResponse, GroupStatus, PastEpoch, RankStatus};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::watch;

/// Ended epochs of a group that are shown.
const SHOWN_EPOCHS: usize = 5;

/// Shows how the groups come up, until `groups` of them serve. Never returns otherwise: the caller decides how
/// long to wait.
pub(crate) async fn until_ready(fleet: &mut watch::Receiver<Fleet>, groups: usize) {
    let mut display = Display::default();
    loop {
        {
            let fleet = fleet.borrow_and_update();
            display.show(&fleet);
            if fleet.groups.values().filter(|group| group.serving().is_some()).count() >= groups {
                break;
            }
        }
        if fleet.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
    display.clear();
}

/// One bar a rank on a terminal; one line a change elsewhere.
#[derive(Default)]
struct Display {
    all: MultiProgress,
    ranks: BTreeMap<(GroupId, RankId), (ProgressBar, String)>,
}

impl Display {
    fn show(&mut self, fleet: &Fleet) {
        for (group_id, group) in &fleet.groups {
            for (rank_id, rank) in &group.ranks {
                let key = (group_id.clone(), rank_id.clone());
                let (bar, shown) =
                    self.ranks.entry(key).or_insert_with(|| (self.all.add(new_bar()), String::new()));
                let (state, percent) = describe(rank.state);
                bar.set_prefix(format!("{group_id} {rank_id}"));
                bar.set_message(state);
                bar.set_position(percent);
                if !std::io::stdout().is_terminal() && *shown != state {
                    println!("{group_id} {rank_id}: {state}");
                    state.clone_into(shown);
                }
            }
        }
    }

    fn clear(&self) {
        // A terminal that cannot be cleared is no reason to stop.
        self.all.clear().ok();
    }
}

fn new_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:24} [{bar:30}] {msg}").expect("a valid template");
    ProgressBar::new(100).with_style(style.progress_chars("=> "))
}

fn describe(state: RankState) -> (&'static str, u64) {
    match state {
        RankState::Waiting => ("waits for the group", 0),
        RankState::Loading { percent } => ("loads weights", percent.into()),
        RankState::Joining => ("joins the collective", 100),
        RankState::Ready => ("ready", 100),
        RankState::Dead => ("dead", 0),
    }
}

/// Groups and ranks as a table.
pub(crate) fn table(fleet: &FleetResponse) -> String {
    let header =
        ["GROUP", "STATE", "EPOCH", "RANK", "PID", "SHARDS", "MEMORY", "DEVICE", "RANK STATE", "ADDRESS"];
    let mut rows = vec![header.map(str::to_owned)];
    for group in &fleet.groups {
        let GroupStatus { name, state, epoch, ranks, .. } = group;
        for (place, rank) in ranks.iter().enumerate() {
            rows.push(row(name, state, *epoch, place, group.virtual_shards, rank));
        }
        if ranks.is_empty() {
            let rest = || "-".to_owned();
            let [a, b, c] = [name.clone(), state.clone(), epoch.to_string()];
            rows.push([a, b, c, rest(), rest(), rest(), rest(), rest(), rest(), rest()]);
        }
    }
    let past = fleet.groups.iter().flat_map(history);
    lines(&rows).into_iter().chain(past).collect::<Vec<_>>().join("\n")
}

/// Rows as lines whose columns stand below each other.
pub(crate) fn lines<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..COLUMNS).map(width).collect();
    let line = |row: &[String; COLUMNS]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// The last epochs of a group that are over, the latest first.
fn history(group: &GroupStatus) -> impl Iterator<Item = String> {
    group.past.iter().rev().take(SHOWN_EPOCHS).map(|past| {
        let PastEpoch { epoch, ranks, began_ms, ended_ms, reason, rank } = past;
        let seconds = ended_ms.saturating_sub(*began_ms) as f64 / 1e3;
        let whose = if rank.is_empty() { String::new() } else { format!(" ({rank})") };
        format!(
            "{}: epoch {epoch} of {ranks} rank(s) ended after {seconds:.1} s: {reason}{whose}",
            group.name
        )
    })
}

fn row(group: &str, state: &str, epoch: u64, place: usize, all: u32, rank: &RankStatus) -> [String; 10] {
    let RankStatus { id, address, pid, device, state: rank_state, first_shard, shards, memory_bytes } = rank;
    let held = match shards {
        0 => "-".to_owned(),
        1 => format!("{first_shard} of {all}"),
        _ => format!("{first_shard}-{} of {all}", first_shard + shards - 1),
    };
    [
        group.to_owned(),
        state.to_owned(),
        epoch.to_string(),
        format!("{place} {id}"),
        pid.to_string(),
        held,
        format!("{:.0} MB", *memory_bytes as f64 / 1e6),
        device.clone(),
        rank_state.clone(),
        address.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_two_ranks_and_an_empty_group() {
        let rank = |id: &str, first_shard| RankStatus {
            id: id.into(),
            address: "127.0.0.1:9".into(),
            pid: 7,
            device: "cpu x2".into(),
            state: "ready".into(),
            first_shard,
            shards: 2,
            memory_bytes: 5_000_000,
        };
        let ranks = vec![rank("h/0", 0), rank("h/1", 2)];
        let g0 = GroupStatus {
            name: "g0".into(),
            state: "ready".into(),
            epoch: 12,
            virtual_shards: 4,
            ranks,
            past: vec![PastEpoch {
                epoch: 7,
                ranks: 2,
                began_ms: 1_000,
                ended_ms: 3_500,
                reason: "died".into(),
                rank: "h/1".into(),
            }],
            ..Default::default()
        };
        let g1 = GroupStatus { name: "g1".into(), state: "forming".into(), ..Default::default() };
        let table = table(&FleetResponse { groups: vec![g0, g1] });
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 5, "{table}");
        assert_eq!(lines[4], "g0: epoch 7 of 2 rank(s) ended after 2.5 s: died (h/1)");
        assert!(
            lines[2].contains("1 h/1") && lines[2].contains("2-3 of 4") && lines[2].contains("5 MB"),
            "{table}"
        );
        assert!(lines[3].starts_with("g1     forming"), "{table}");
    }
}

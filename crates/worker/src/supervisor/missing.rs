//! Says in a sentence what a group that is not ready waits for.

use galerne_types::{Group, RankId, RankState};

use crate::options::SupervisorOptions;

/// Who is missing: this host's ranks by name, those of other hosts by number.
pub(crate) fn missing(options: &SupervisorOptions, group: Option<&Group>) -> String {
    let ranks = group.map(|group| &group.ranks);
    let here: Vec<RankId> =
        options.indices().map(|index| RankId(format!("{}/{index}", options.first.host))).collect();
    let mut said: Vec<String> = Vec::new();
    for id in &here {
        match ranks.and_then(|ranks| ranks.get(id)) {
            None => said.push(format!("rank {id} is not registered")),
            Some(rank) if rank.state == RankState::Dead => said.push(format!("rank {id} is starting again")),
            Some(rank) if rank.state == RankState::Ready => {}
            Some(rank) => said.push(format!("rank {id} is {}", doing(rank.state))),
        }
    }
    let elsewhere = options.first.world_size.saturating_sub(here.len());
    let seen = ranks.map_or(0, |ranks| ranks.keys().filter(|id| !here.contains(id)).count());
    if seen < elsewhere {
        said.push(format!("{} of {elsewhere} ranks of other hosts are not registered", elsewhere - seen));
    }
    if said.is_empty() { "all ranks are ready, but no leader serves".into() } else { said.join(", ") }
}

fn doing(state: RankState) -> String {
    match state {
        RankState::Waiting => "waiting for the group to form".into(),
        RankState::Loading { percent } => format!("loading its weights ({percent} %)"),
        RankState::Joining => "waiting for the others in the collective".into(),
        RankState::Ready => "ready".into(),
        RankState::Dead => "dead".into(),
    }
}

#[cfg(test)]
mod tests {
    use galerne_types::{Compute, GroupId, KvDtype, ModelCard, RankRecord, Shards};

    use super::*;
    use crate::options::tests::options;

    fn record(id: &str, state: RankState) -> RankRecord {
        let shards = Shards::new(2, 2).unwrap();
        let model = ModelCard {
            name: "m".into(),
            digest: "d".into(),
            context_tokens_max: 9,
            vocab: 9,
            shards,
            quantize: None,
            compute: Compute::F32,
            kv: KvDtype::F32,
        };
        RankRecord {
            id: RankId(id.into()),
            group: GroupId("g".into()),
            host: "h".into(),
            index: 0,
            address: String::new(),
            collective: String::new(),
            pid: 1,
            device: String::new(),
            build: String::new(),
            model,
            state,
            memory_bytes: 0,
            ranks_min: 1,
            left: galerne_types::Epoch::default(),
            loss: None,
        }
    }

    #[test]
    fn it_names_who_is_missing() {
        let mut options = options();
        options.first.world_size = 4;
        let group = |records: &[RankRecord]| Group {
            ranks: records.iter().map(|rank| (rank.id.clone(), rank.clone())).collect(),
            ..Group::default()
        };
        assert_eq!(
            missing(&options, None),
            "rank h/0 is not registered, rank h/1 is not registered, 2 of 2 ranks of other hosts are not registered"
        );
        let loading = record("h/1", RankState::Loading { percent: 40 });
        let some = group(&[loading, record("h/0", RankState::Ready), record("x/0", RankState::Ready)]);
        assert_eq!(
            missing(&options, Some(&some)),
            "rank h/1 is loading its weights (40 %), 1 of 2 ranks of other hosts are not registered"
        );
    }
}

//! `galerne drain`: ends a group without losing a stream.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use galerne_types::{Fleet, Group, GroupId, RankState};
use tokio::sync::watch;

use crate::args::{self, EtcdArgs};

/// Ends a group without losing a stream: it takes nothing new, what runs may finish, and what has not finished then goes
/// on at another group. Its ranks and workers exit; this returns when the last rank has.
#[derive(Args)]
pub(crate) struct Drain {
    /// The group.
    #[arg(value_name = "GROUP", value_parser = args::name)]
    group: String,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// How long running answers may take to finish before other groups take them over, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace_s: u64,
    /// How long the ranks may take to end after that, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    end_timeout_s: u64,
}

impl Drain {
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let Self { group, etcd, grace_s, end_timeout_s } = self;
        let coord = args::connect(&etcd.etcd, &etcd.access.access(), &etcd.cluster).await?;
        let fleet = coord.fleet().await?;
        let group = GroupId(group);
        if fleet.groups.get(&group).is_none_or(|group| living(group).is_empty()) {
            let names: Vec<&str> = fleet.groups.keys().map(|group| group.0.as_str()).collect();
            anyhow::bail!(
                "no rank of group {group} is there to be drained; the groups are: {}",
                names.join(", ")
            );
        }
        let grace = Duration::from_secs(grace_s);
        coord.drain(&group, grace).await?;
        let mut fleet = coord.watch_fleet();
        let all = grace + Duration::from_secs(end_timeout_s);
        let ended = tokio::time::timeout(all, until_ended(&mut fleet, &group)).await;
        coord.drained(&group).await?;
        let left = fleet.borrow().groups.get(&group).map(living).unwrap_or_default();
        anyhow::ensure!(ended.is_ok(), "these ranks of group {group} have not ended: {}", listed(&left));
        println!("group {group} is drained");
        Ok(())
    }
}

/// Tells who is left, until nobody is.
async fn until_ended(fleet: &mut watch::Receiver<Fleet>, group: &GroupId) {
    let mut told = BTreeSet::new();
    loop {
        let left = fleet.borrow_and_update().groups.get(group).map(living);
        match left {
            Some(left) if left.is_empty() => return,
            Some(left) if left != told => {
                println!("group {group} still has {}", listed(&left));
                told = left;
            }
            Some(_) => {}
            None if told.is_empty() => {} // the first listing is still to come
            None => return,
        }
        if fleet.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

fn living(group: &Group) -> BTreeSet<String> {
    let living = group.ranks.values().filter(|rank| rank.state != RankState::Dead);
    living.map(|rank| rank.id.0.clone()).collect()
}

fn listed(ranks: &BTreeSet<String>) -> String {
    let names: Vec<&str> = ranks.iter().map(String::as_str).collect();
    if names.is_empty() { "no rank".into() } else { format!("rank {}", names.join(", ")) }
}

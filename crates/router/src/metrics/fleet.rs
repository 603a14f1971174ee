//! What the groups are doing: the fleet's view, and the leaders' own reports.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use galerne_dispatch::BreakerState;
use galerne_types::limits::KV_BLOCK_TOKENS;
use galerne_types::{Epoch, GroupId, GroupLoad, LossKind, RankState};
use galerne_wire::v1::LoadReport;

use super::page::Page;
use crate::groups::Listed;
use crate::standing::Standing;

/// Bounds of vLLM's histogram of tokens in a step.
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// The leaders' latest reports, and what all of them have done since this router began to listen.
#[derive(Debug, Default)]
pub(crate) struct Loads(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    latest: BTreeMap<GroupId, (Epoch, LoadReport)>,
    /// By the model's name.
    done: BTreeMap<String, Done>,
}

/// What was done, over all epochs of all groups of a model.
#[derive(Clone, Debug, Default)]
struct Done {
    preemptions: u64,
    grammar_hits: u64,
    grammar_misses: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    drafts: u64,
    draft_tokens: u64,
    draft_tokens_accepted: u64,
    step_tokens: u64,
    /// Steps by their number of tokens, between the bounds of [`STEP_TOKENS`] and beyond the last.
    steps: [u64; STEP_TOKENS.len() + 1],
}

impl Loads {
    /// Takes in a report. Counts begin anew with every epoch.
    pub(crate) fn record(&self, group: &GroupId, model: &str, epoch: Epoch, report: LoadReport) {
        let State { latest, done } = &mut *self.lock();
        let before = latest.get(group).filter(|(known, _)| *known == epoch);
        let before = before.map(|(_, report)| report.clone()).unwrap_or_default();
        let done = done.entry(model.to_owned()).or_default();
        done.preemptions += report.preemptions.saturating_sub(before.preemptions);
        done.grammar_hits += report.grammar_hits.saturating_sub(before.grammar_hits);
        done.grammar_misses += report.grammar_misses.saturating_sub(before.grammar_misses);
        done.prefix_queries += report.prefix_cache_queries.saturating_sub(before.prefix_cache_queries);
        done.prefix_hits += report.prefix_cache_hits.saturating_sub(before.prefix_cache_hits);
        done.drafts += report.drafts.saturating_sub(before.drafts);
        done.draft_tokens += report.draft_tokens.saturating_sub(before.draft_tokens);
        done.draft_tokens_accepted +=
            report.draft_tokens_accepted.saturating_sub(before.draft_tokens_accepted);
        done.step_tokens += report.step_tokens.saturating_sub(before.step_tokens);
        for (power, now) in report.steps_by_tokens.iter().enumerate() {
            let was = before.steps_by_tokens.get(power).copied().unwrap_or(0);
            let tokens = 2f64.powi(i32::try_from(power).unwrap_or(i32::MAX));
            let bucket = STEP_TOKENS.partition_point(|bound| *bound < tokens);
            done.steps[bucket] += now.saturating_sub(was);
        }
        latest.insert(group.clone(), (epoch, report));
    }

    /// The latest reports, in the words of [`galerne_types::RouterRecord`].
    pub(crate) fn told(&self) -> BTreeMap<GroupId, GroupLoad> {
        let told = |(epoch, report): &(Epoch, LoadReport)| GroupLoad {
            epoch: *epoch,
            running: report.running,
            waiting: report.waiting,
            kv_blocks: report.kv_blocks,
            kv_blocks_free: report.kv_blocks_free,
            steps: report.steps,
            tokens: report.step_tokens,
            keys: report.step_keys,
            busy_us: report.step_busy_us,
        };
        self.lock().latest.iter().map(|(group, latest)| (group.clone(), told(latest))).collect()
    }

    /// Forgets the groups that `keep` does not know.
    pub(crate) fn retain(&self, keep: impl Fn(&GroupId, Epoch) -> bool) {
        self.lock().latest.retain(|group, (epoch, _)| keep(group, *epoch));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ready group and what is known of its load.
struct Ready<'a> {
    group: &'a str,
    model: &'a str,
    epoch: u64,
    load: LoadReport,
}

/// Writes everything that is said of groups.
pub(super) fn write(page: &mut Page, models: &[&str], listed: &[Listed], loads: &Loads) {
    let (latest, done) = {
        let state = loads.lock();
        (state.latest.clone(), state.done.clone())
    };
    let ready: Vec<Ready<'_>> = listed.iter().filter_map(|listed| ready(listed, &latest)).collect();
    write_models(page, models, &ready, &done);
    page.family("vllm:cache_config_info", "gauge", "What KV memory each group has; always 1.");
    for Ready { group, model, load, .. } in &ready {
        let (size, blocks) = (KV_BLOCK_TOKENS.to_string(), load.kv_blocks.to_string());
        let labels = [
            ("model_name", *model),
            ("group", *group),
            ("block_size", &size),
            ("num_gpu_blocks", &blocks),
            ("enable_prefix_caching", if load.prefix_cache { "True" } else { "False" }),
        ];
        page.sample(&labels, 1);
    }
    type Value = fn(&Ready<'_>) -> u64;
    let gauges: [(&'static str, &str, Value); 6] = [
        ("galerne_group_epoch", "The epoch that a ready group serves.", |ready| ready.epoch),
        ("galerne_group_requests_running", "Requests that hold a slot.", |ready| ready.load.running.into()),
        ("galerne_group_requests_waiting", "Requests in the leader's queue.", |ready| {
            ready.load.waiting.into()
        }),
        ("galerne_group_tenants", "Tenants that have a request at a group.", |ready| {
            ready.load.tenants.into()
        }),
        ("galerne_group_kv_blocks", "KV blocks of a group.", |ready| ready.load.kv_blocks.into()),
        ("galerne_group_kv_blocks_free", "KV blocks that no request holds.", |ready| {
            ready.load.kv_blocks_free.into()
        }),
    ];
    for (name, help, value) in gauges {
        page.family(name, "gauge", help);
        for ready in &ready {
            page.sample(&[("model_name", ready.model), ("group", ready.group)], value(ready));
        }
    }
    page.family("galerne_router_requests_in_flight", "gauge", "Requests of this router at each group.");
    for Listed { id, in_flight, .. } in listed {
        page.sample(&[("group", &id.0)], in_flight);
    }
    write_troubles(page, listed);
    page.family("galerne_groups", "gauge", "Groups of the fleet, by state.");
    for state in [Standing::Forming, Standing::Ready, Standing::Held, Standing::Draining, Standing::Lost] {
        page.sample(&[("state", state.name())], listed.iter().filter(|l| l.standing == state).count());
    }
    page.family("galerne_ranks", "gauge", "Live ranks of the fleet, by state.");
    for state in ["waiting", "loading", "joining", "ready", "dead"] {
        let ranks = listed.iter().flat_map(|listed| listed.group.ranks.values());
        page.sample(&[("state", state)], ranks.filter(|rank| rank_state(rank.state) == state).count());
    }
}

/// Writes what went wrong with groups.
fn write_troubles(page: &mut Page, listed: &[Listed]) {
    let help = "How often a group was formed anew, by why the epoch before ended.";
    page.family("galerne_group_reformations_total", "counter", help);
    for Listed { id, group, .. } in listed {
        for kind in LossKind::ALL {
            let counts = group.epoch.as_ref().map(|(_, record)| &record.reformations);
            let count = counts.and_then(|counts| counts.get(&kind)).copied().unwrap_or(0);
            page.sample(&[("group", &id.0), ("reason", kind.name())], count);
        }
    }
    let help = "Whether failures keep new requests from a group: 0 no, 1 yes, 2 one of them tries it.";
    page.family("galerne_router_breaker_state", "gauge", help);
    for Listed { id, breaker, .. } in listed {
        let state = match breaker {
            BreakerState::Closed => 0,
            BreakerState::Open => 1,
            BreakerState::Probing => 2,
        };
        page.sample(&[("group", &id.0)], state);
    }
}

/// Writes what vLLM says of an engine, added up over the model's ready groups.
fn write_models(page: &mut Page, models: &[&str], ready: &[Ready<'_>], done: &BTreeMap<String, Done>) {
    let sum = |model: &str, of: fn(&LoadReport) -> u32| -> u64 {
        ready.iter().filter(|ready| ready.model == model).map(|ready| u64::from(of(&ready.load))).sum()
    };
    let done = |model: &str| done.get(model).cloned().unwrap_or_default();
    page.family("vllm:num_requests_running", "gauge", "Requests that groups run.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], sum(m, |load| load.running)));
    page.family("vllm:num_requests_waiting", "gauge", "Requests that wait at groups.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], sum(m, |load| load.waiting)));
    page.family("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use; 1 is all.");
    for m in models {
        let (all, free) = (sum(m, |load| load.kv_blocks), sum(m, |load| load.kv_blocks_free));
        page.sample(&[("model_name", m)], all.saturating_sub(free) as f64 / all.max(1) as f64);
    }
    page.family("vllm:lora_requests_info", "gauge", "Adapters that requests ask for: there are none.");
    for m in models {
        let none = [("max_lora", "0"), ("running_lora_adapters", ""), ("waiting_lora_adapters", "")];
        page.sample(&[&[("model_name", *m)], &none[..]].concat(), 0);
    }
    page.family("vllm:num_preemptions_total", "counter", "Requests that lost their slot and began again.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).preemptions));
    let help = "Tokens of prompts that were looked up among the KV blocks that groups keep.";
    page.family("vllm:prefix_cache_queries_total", "counter", help);
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).prefix_queries));
    page.family("vllm:prefix_cache_hits_total", "counter", "Those of them that were found.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).prefix_hits));
    page.family("vllm:spec_decode_num_drafts_total", "counter", "Times that an answer was run ahead.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).drafts));
    page.family("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens that answers were run ahead.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).draft_tokens));
    page.family("vllm:spec_decode_num_accepted_tokens_total", "counter", "Those of them that came true.");
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).draft_tokens_accepted));
    page.family(
        "galerne_grammar_cache_hits_total",
        "counter",
        "Requests whose grammar had been compiled for another one.",
    );
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).grammar_hits));
    page.family(
        "galerne_grammar_cache_misses_total",
        "counter",
        "Requests whose grammar had to be compiled.",
    );
    models.iter().for_each(|m| page.sample(&[("model_name", m)], done(m).grammar_misses));
    page.family("vllm:iteration_tokens_total", "histogram", "Tokens in a step.");
    for m in models {
        let done = done(m);
        page.buckets(&[("model_name", m)], &STEP_TOKENS, &done.steps, done.step_tokens as f64);
    }
}

/// A group that takes requests. Until its leader reports, what this router knows by itself stands for it.
fn ready<'a>(listed: &'a Listed, latest: &BTreeMap<GroupId, (Epoch, LoadReport)>) -> Option<Ready<'a>> {
    let health = listed.group.serving().filter(|_| listed.standing == Standing::Ready)?;
    let reported = latest.get(&listed.id).filter(|(epoch, _)| *epoch == health.epoch);
    let load = reported.map(|(_, report)| report.clone()).unwrap_or_else(|| LoadReport {
        running: listed.in_flight,
        kv_blocks: health.kv_blocks,
        kv_blocks_free: health.kv_blocks,
        ..LoadReport::default()
    });
    Some(Ready { group: &listed.id.0, model: &health.model.name, epoch: health.epoch.0, load })
}

fn rank_state(state: RankState) -> &'static str {
    match state {
        RankState::Waiting => "waiting",
        RankState::Loading { .. } => "loading",
        RankState::Joining => "joining",
        RankState::Dead => "dead",
        RankState::Ready => "ready",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(steps: u64) -> LoadReport {
        // `steps` steps of one token, and as many of 257 to 512.
        let mut steps_by_tokens = vec![0; 16];
        (steps_by_tokens[0], steps_by_tokens[9]) = (steps, steps);
        LoadReport {
            preemptions: steps,
            steps: 2 * steps,
            grammar_hits: 2 * steps,
            prefix_cache_queries: 100 * steps,
            prefix_cache_hits: 64 * steps,
            drafts: 3 * steps,
            draft_tokens: 12 * steps,
            draft_tokens_accepted: 7 * steps,
            step_tokens: steps * 301,
            step_keys: steps * 9_000,
            step_busy_us: steps * 2_500,
            steps_by_tokens,
            ..LoadReport::default()
        }
    }

    #[test]
    fn counts_grow_from_epoch_to_epoch() {
        let (loads, group) = (Loads::default(), GroupId("g".into()));
        loads.record(&group, "m", Epoch(1), report(2));
        loads.record(&group, "m", Epoch(1), report(5));
        loads.record(&group, "m", Epoch(2), report(1));
        let done = loads.lock().done["m"].clone();
        assert_eq!((done.preemptions, done.grammar_hits, done.step_tokens), (6, 12, 6 * 301));
        assert_eq!((done.prefix_queries, done.prefix_hits), (600, 6 * 64));
        assert_eq!((done.drafts, done.draft_tokens, done.draft_tokens_accepted), (18, 72, 42));
        assert_eq!((done.steps[0], done.steps[7], done.steps.iter().sum::<u64>()), (6, 6, 12));
        let told = loads.told()[&group];
        assert_eq!((told.epoch, told.steps, told.tokens), (Epoch(2), 2, 301));
        assert_eq!((told.keys, told.busy_us), (9_000, 2_500));
        loads.retain(|_, epoch| epoch == Epoch(1));
        assert!(loads.lock().latest.is_empty());
    }
}

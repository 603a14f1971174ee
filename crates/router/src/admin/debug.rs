//! What goes on inside this process. No prompt, no answer and no secret is shown.
//!
//! The profile is what the kernel counts for each thread. Unwinding stacks from a signal handler, as profilers of
//! whole programs do, can deadlock the process that it looks at: `perf record -p` does that from outside.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::ApiError;
use crate::serve::Router;
use crate::traffic::Progress;

/// Time that a profile may take.
const PROFILE_S_MAX: u64 = 60;

/// Requests that the state lists: the oldest ones.
const LISTED_MAX: usize = 1000;

/// `GET /debug/state`: connections, tasks and requests, the oldest first.
pub(super) async fn state(State(router): State<Arc<Router>>) -> Json<Value> {
    let requests = router.traffic.list();
    let listed: Vec<_> = requests.iter().take(LISTED_MAX).map(|request| described(request)).collect();
    let runtime = tokio::runtime::Handle::current().metrics();
    Json(json!({
        "uptime_s": router.began.elapsed().as_secs_f64(),
        "draining": router.traffic.draining(),
        "connections": { "http": router.http_places.taken(), "grpc": router.grpc_places.taken() },
        "runtime": {
            "threads": runtime.num_workers(),
            "tasks": runtime.num_alive_tasks(),
            "queued": runtime.global_queue_depth(),
        },
        "bodies": { "bytes": router.bodies.bytes() },
        "tokenizing": router.tokenizing(),
        "requests": { "running": requests.len(), "oldest": listed },
    }))
}

fn described(request: &Progress) -> Value {
    let (group, tokens) = (request.group().clone(), request.tokens.load(Relaxed));
    let state = match (&group, tokens) {
        (None, _) => "queued",
        (Some(_), 0) => "placed",
        (Some(_), _) => "answering",
    };
    json!({
        "age_s": request.began.elapsed().as_secs_f64(),
        "model": request.model,
        "state": state,
        "group": group,
        "prompt_tokens": request.prompt_tokens.load(Relaxed),
        "tokens": tokens,
    })
}

/// `GET /debug/memory`: what the kernel counts for this process.
pub(super) async fn memory() -> Json<Value> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = |name| field(name).map(|kib| kib << 10);
    Json(json!({
        "rss_bytes": bytes("VmRSS"),
        "rss_bytes_peak": bytes("VmHWM"),
        "virtual_bytes": bytes("VmSize"),
        "threads": field("Threads"),
        "files": fs::read_dir("/proc/self/fd").map(Iterator::count).ok(),
    }))
}

/// How long to look.
#[derive(Deserialize)]
pub(super) struct ProfileQuery {
    seconds: Option<u64>,
}

/// `GET /debug/profile?seconds=N`: CPU time of each thread.
pub(super) async fn profile(
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let seconds = query.ok().map(|Query(query)| query.seconds.unwrap_or(1));
    let Some(seconds) = seconds.filter(|seconds| (1..=PROFILE_S_MAX).contains(seconds)) else {
        return Err(ApiError::invalid(Some("seconds"), format!("seconds must be from 1 to {PROFILE_S_MAX}")));
    };
    let before = threads();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let mut used: Vec<_> = threads()
        .into_iter()
        .map(|(thread, (name, ns))| {
            let ns = ns.saturating_sub(before.get(&thread).map_or(0, |(_, ns)| *ns));
            (ns, thread, name)
        })
        .collect();
    used.sort_unstable_by(|a, b| b.cmp(a));
    let threads = used
        .into_iter()
        .map(|(ns, thread, name)| json!({ "thread": thread, "name": name, "cpu_ms": ns as f64 / 1e6 }));
    Ok(Json(json!({ "seconds": seconds, "threads": threads.collect::<Vec<_>>() })))
}

/// Name and CPU time in nanoseconds of each thread of this process.
fn threads() -> BTreeMap<u32, (String, u64)> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let read = |task: fs::DirEntry| {
        let thread = task.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let ns = times.split_whitespace().next()?.parse().ok()?;
        Some((thread, (name.trim().to_owned(), ns)))
    };
    tasks.filter_map(read).collect()
}

//! Metrics of a running cluster, as Prometheus' own programs read them.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::process::{self, Process};
use crate::setup::{self, Cluster};
use crate::traces::{get, post};

/// Names that dashboards expect, and the labels by which they ask.
const EXPECTED: &[&str] = &[
    r#"vllm:num_requests_running{model_name="bard-1m"}"#,
    r#"vllm:num_requests_waiting{model_name="bard-1m"}"#,
    r#"vllm:kv_cache_usage_perc{model_name="bard-1m"}"#,
    r#"vllm:cache_config_info{model_name="bard-1m",group="g0",block_size="32""#,
    r#"vllm:lora_requests_info{model_name="bard-1m",max_lora="0""#,
    r#"vllm:prefix_cache_queries_total{model_name="bard-1m"}"#,
    r#"vllm:prefix_cache_hits_total{model_name="bard-1m"}"#,
    r#"vllm:num_preemptions_total{model_name="bard-1m"}"#,
    r#"vllm:prompt_tokens_total{model_name="bard-1m"} 6"#,
    r#"vllm:generation_tokens_total{model_name="bard-1m"} 10"#,
    r#"vllm:request_success_total{model_name="bard-1m",finished_reason="length"} 2"#,
    r#"vllm:time_to_first_token_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:inter_token_latency_seconds_count{model_name="bard-1m"} 8"#,
    r#"vllm:request_time_per_output_token_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:e2e_request_latency_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_params_n_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_max_num_generation_tokens_sum{model_name="bard-1m"} 10"#,
    r#"vllm:request_queue_time_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_prefill_time_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_decode_time_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_inference_time_seconds_count{model_name="bard-1m"} 2"#,
    r#"vllm:request_prompt_tokens_sum{model_name="bard-1m"} 6"#,
    r#"vllm:request_generation_tokens_sum{model_name="bard-1m"} 10"#,
    r#"vllm:iteration_tokens_total_bucket{model_name="bard-1m",le="1"}"#,
    "gen_ai_server_request_duration_seconds_count{",
    "gen_ai_server_time_to_first_token_seconds_count{",
    "gen_ai_server_time_per_output_token_seconds_count{",
    "gen_ai_client_token_usage_count{",
    "gen_ai_client_operation_duration_seconds_count{",
    r#"galerne_router_errors_total{model_name="bard-1m",reason="invalid"} 1"#,
    r#"galerne_groups{state="ready"} 1"#,
    r#"galerne_ranks{state="ready"} 2"#,
    "process_resident_memory_bytes ",
    "process_cpu_seconds_total ",
    "process_open_fds ",
];

fn ask(cluster: &Cluster, max_tokens: u32) -> String {
    let body = json!({ "prompt": [1, 40, 50], "max_tokens": max_tokens, "ignore_eos": true }).to_string();
    post(&cluster.http, "/v1/completions", "", &body)
}

fn scrape(cluster: &Cluster) -> String {
    let answer = get(&cluster.admin, "/metrics");
    let (head, page) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    page.to_owned()
}

#[test]
fn a_live_scrape_has_the_names_that_dashboards_expect_and_passes_promtool() {
    let cluster = Cluster::up(&setup::bard(), &["--tp", "2", "--threads", "1"]);
    for (tokens, status) in [(5, 200), (5, 200), (1 << 20, 400)] {
        let answer = ask(&cluster, tokens);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let page = process::eventually("the leader's reports", || {
        let page = scrape(&cluster);
        let steps = page.lines().find(|line| line.starts_with("vllm:iteration_tokens_total_count"))?;
        (!steps.ends_with(" 0")).then_some(page)
    });
    for start in EXPECTED {
        assert!(page.lines().any(|line| line.starts_with(start)), "{start} is not in\n{page}");
    }
    let mut promtool = Command::new(setup::cache("bin/promtool"));
    let mut promtool = promtool
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs");
    promtool.stdin.take().expect("a pipe").write_all(page.as_bytes()).expect("read");
    let output = promtool.wait_with_output().expect("an end");
    let said = String::from_utf8([output.stdout, output.stderr].concat()).expect("UTF-8");
    // vLLM's names are what they are; there is nothing else to complain of.
    let vllms = |line: &&str| {
        line.starts_with("vllm:") && line.ends_with("metric names should not contain ':'")
            || *line == r#"vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix"#
    };
    let complaints: Vec<_> = said.lines().filter(|line| !vllms(line)).collect();
    assert!(complaints.is_empty() && said.contains("vllm:"), "{said}");
}

/// A Prometheus that scrapes a cluster.
struct Prometheus {
    url: String,
    _process: Process,
    _data: tempfile::TempDir,
}

impl Prometheus {
    fn start(target: &str) -> Self {
        let data = tempfile::tempdir().expect("a temporary folder");
        let config = data.path().join("prometheus.yml");
        let text = format!(
            "global: {{ scrape_interval: 250ms, scrape_timeout: 250ms }}\n\
             scrape_configs: [{{ job_name: galerne, static_configs: [{{ targets: ['{target}'] }}] }}]\n"
        );
        std::fs::write(&config, text).expect("written");
        let address = format!("127.0.0.1:{}", setup::free_port());
        let mut command = Command::new(setup::cache("bin/prometheus"));
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", data.path().join("data").display()));
        command.arg(format!("--web.listen-address={address}"));
        let process = Process::start(&mut command);
        process.line_with("Server is ready to receive web requests");
        Self { url: format!("http://{address}"), _process: process, _data: data }
    }

    /// The values of a query's series now.
    fn query(&self, query: &str) -> Vec<f64> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let answer = get(&self.url, &format!("/api/v1/query?query={encoded}"));
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{query}: {answer}"));
        assert_eq!(body["status"], "success", "{query}: {body}");
        let series = body["data"]["result"].as_array().expect("series").iter();
        series
            .map(|series| series["value"][1].as_str().expect("a value").parse().expect("a number"))
            .collect()
    }
}

#[test]
fn every_query_of_the_dashboard_finds_its_series() {
    let text =
        std::fs::read_to_string(setup::root().join("k8s/grafana/galerne.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let mut queries = BTreeSet::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().into_iter().flatten() {
            queries.insert(target["expr"].as_str().expect("a query").to_owned());
        }
    }
    for variable in dashboard["templating"]["list"].as_array().expect("variables") {
        if let Some(values) = variable["query"]["query"].as_str() {
            let inner = values.trim_start_matches("label_values(").trim_end_matches(')');
            let (metric, label) = inner.split_once(", ").expect("a metric and a label");
            queries.insert(format!("count by ({label}) ({metric}{{{label}!=\"\"}})"));
        }
    }
    assert!(queries.len() > 40, "{queries:?}");
    let cluster = Cluster::up(&setup::bard(), &["--tp", "2", "--threads", "1"]);
    let prometheus = Prometheus::start(cluster.admin.trim_start_matches("http://"));
    for query in &queries {
        let filled = query.replace("$__rate_interval", "10s").replace("$model", ".*").replace("$job", ".*");
        assert!(!filled.contains('$'), "an unknown variable in {query}");
        process::eventually(query, || {
            let values = prometheus.query(&filled);
            let found = !values.is_empty() && values.iter().all(|value| value.is_finite());
            if !found {
                ask(&cluster, 5); // so that there is something to count
            }
            found.then_some(())
        });
    }
}

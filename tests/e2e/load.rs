//! `galerne load` against a cluster that runs no model, so that it is known how long a token takes.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::authority::Authority;
use crate::process::{PATIENCE, Process, eventually};
use crate::setup::{self, Cluster};

/// Of a step, in milliseconds: a token of each stream.
const STEP_MS: f64 = 20.0;
const LAW: &str = "step_ns=20000000,token_ns=0";

/// `galerne load ARGUMENTS --json FILE` to its end; whether it succeeded, what it said, and the file.
fn load(folder: &Path, arguments: &[&str]) -> (bool, String, Value) {
    let file = folder.join("report.json");
    let mut process = Process::start(setup::galerne().arg("load").args(arguments).arg("--json").arg(&file));
    let status = process.exit_within(PATIENCE);
    let output = process.output();
    let json = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{error}: {output}"));
    (status.success(), output, serde_json::from_str(&json).expect("JSON"))
}

/// All that a program may rely on.
fn has_its_schema(document: &Value) {
    let names = |value: &Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(document), ["schema", "version", "run", "arguments", "report"]);
    assert_eq!(document["schema"], "galerne.load/1");
    let report = &document["report"];
    let fields = "valid problems requests errors window_s requests_per_s prompt_tokens output_tokens \
                  prompt_tokens_per_s output_tokens_per_s goodput ttft_ms tpot_ms itl_ms e2e_ms send_lag_ms generator";
    assert_eq!(names(report), fields.split_whitespace().collect::<Vec<_>>());
    assert_eq!(names(&report["requests"]), ["warm_up", "counted", "answered", "failed", "unfinished"]);
    for name in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"] {
        assert_eq!(names(&report[name]), ["count", "mean", "min", "p50", "p90", "p95", "p99", "max"]);
        let figure = |name: &str, of: &str| report[name][of].as_f64().expect("a number");
        let rising = ["min", "p50", "p90", "p95", "p99", "max"].map(|of| figure(name, of));
        assert!(rising.is_sorted(), "{name}: {rising:?}");
    }
    assert_eq!(names(&report["generator"]), ["cpu_s", "cpu_us_per_token", "in_flight_peak", "in_flight_max"]);
}

#[test]
fn a_load_on_every_face_is_counted_to_the_token() {
    let cluster = Cluster::up(&setup::demo_model(), &["--rehearse", LAW, "--sequences-max", "64"]);
    let folder = tempfile::tempdir().expect("a folder");
    let grpc = format!("grpc://{}", cluster.grpc);
    let open = ["--rate", "40", "--arrivals", "constant", "--lag-ms-max", "60000"];
    let closed = ["--concurrency", "5"];
    for (face, loop_) in [
        (&["--url", &grpc][..], &open[..]),
        (&["--url", &cluster.http, "--api", "completions"], &closed),
        (&["--url", &cluster.http], &open),
    ] {
        let common =
            ["--requests", "20", "--prompt-tokens", "50-60", "--output-tokens", "11", "--slo", "e2e=3600s"];
        let (ok, says, document) = load(folder.path(), &[face, loop_, &common, &["--check"]].concat());
        assert!(ok, "{says}");
        assert!(says.contains("20 answered, 0 failed") && says.contains("TPOT"), "{says}");
        has_its_schema(&document);
        let report = &document["report"];
        assert_eq!(report["valid"], true);
        let requests = &report["requests"];
        assert_eq!(
            (&requests["answered"], &requests["failed"], &report["output_tokens"]),
            (&20.into(), &0.into(), &220.into())
        );
        let prompts = report["prompt_tokens"].as_u64().expect("a number");
        // As text, a chat's format comes to it, and a word may have two tokens.
        let chat = face.len() == 2 && face[1] == cluster.http;
        assert!(if chat { prompts >= 1000 } else { (1000..=1200).contains(&prompts) }, "{prompts}");
        assert_eq!(report["goodput"]["share"], 1.0);
        assert_eq!(report["send_lag_ms"].is_null(), loop_ == closed);
        let tpot = report["tpot_ms"]["p50"].as_f64().expect("a number");
        assert!(
            (STEP_MS / 2.0..STEP_MS * 20.0).contains(&tpot),
            "{tpot} ms a token, and a step takes {STEP_MS}"
        );
        let (first, whole) = (&report["ttft_ms"]["p50"], &report["e2e_ms"]["p50"]);
        assert!(whole.as_f64() > first.as_f64(), "{first} {whole}");
    }

    let missed = ["--url", &grpc, "--concurrency", "1", "--requests", "2", "--output-tokens", "3", "--check"];
    let (ok, says, _) = load(folder.path(), &[&missed[..], &["--slo", "tpot=1ms"]].concat());
    assert!(!ok && says.contains("0.0% of the requests kept tpot=1ms: 99% must"), "{says}");
    trace(&cluster, folder.path());
}

/// A recorded load, whose second request has the first one's beginning.
fn trace(cluster: &Cluster, folder: &Path) {
    let file = folder.join("trace.jsonl");
    let lines = "{\"timestamp\": 5000, \"input_length\": 600, \"output_length\": 3, \"hash_ids\": [1, 2]}\n\
                 {\"timestamp\": 5100, \"input_length\": 520, \"output_length\": 4, \"hash_ids\": [1, 3]}\n\
                 {\"timestamp\": 5200, \"prompt\": \"Why?\", \"output_tokens\": 5}\n";
    std::fs::write(&file, lines).expect("written");
    let file = file.to_str().expect("UTF-8");
    let (ok, says, document) = load(
        folder,
        &["--url", &cluster.http, "--api", "completions", "--trace", file, "--lag-ms-max", "60000"],
    );
    assert!(ok && says.contains("3 answered, 0 failed"), "{says}");
    assert_eq!(document["report"]["output_tokens"], 12);
}

#[test]
fn a_load_goes_through_tls_with_a_key_and_ends_with_ctrl_c() {
    let authority = Authority::new();
    let (cert, key) = authority.issue(&["127.0.0.1"]);
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("keys.toml");
    let made = setup::galerne()
        .args(["key", "new", "--tenant", "acme", "--file"])
        .arg(&keys)
        .output()
        .expect("a key");
    let secret = String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned();
    let [ca, cert, key, keys] =
        [&authority.ca(), &cert, &key, &keys].map(|path| path.to_str().expect("UTF-8").to_owned());
    let faces = ["--tls-cert", &cert, "--tls-key", &key, "--api-keys", &keys];
    let cluster = Cluster::up(&setup::demo_model(), &[&["--rehearse", LAW][..], &faces].concat());
    let urls = [cluster.http.clone(), format!("grpcs://{}", cluster.grpc)];
    for url in &urls {
        let few =
            ["--url", url, "--tls-ca", &ca, "--concurrency", "2", "--requests", "4", "--output-tokens", "3"];
        let (ok, says, document) =
            load(folder.path(), &[&few[..], &["--check", "--api-key", &secret]].concat());
        assert!(ok && says.contains("4 answered, 0 failed"), "{says}");
        assert!(!document.to_string().contains(&secret), "the key is not written down");
        let (ok, says, _) = load(folder.path(), &[&few[..], &["--check"]].concat());
        assert!(!ok && says.contains("NOT VALID") && says.contains("API key"), "{says}");
    }

    let endless = ["--tls-ca", &ca, "--api-key", &secret, "--concurrency", "3", "--output-tokens", "7000"];
    let mut command: Command = setup::galerne();
    command.args(["load", "--url", &urls[1], "--prompt-tokens", "5"]).args(endless);
    let mut process = Process::start(&mut command);
    eventually("three requests run", || {
        let page = crate::traces::get(&cluster.admin, "/metrics");
        let line = page.lines().find(|line| line.starts_with("galerne_group_requests_running{"))?;
        line.ends_with(" 3").then_some(())
    });
    process.signal(libc::SIGINT);
    let status = process.exit_within(PATIENCE);
    let says = process.output();
    assert!(status.success() && says.contains("0 answered, 0 failed, 3 given up unfinished"), "{says}");
}

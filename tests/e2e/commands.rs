//! The commands that serve nothing: model files, configuration, a terminal chat, status.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::hub::Hub;
use crate::process::{PATIENCE, Process};
use crate::setup::{self, Cluster};

/// Runs to the end; whether it succeeded, and all that it said.
fn run(command: &mut Command) -> (bool, String) {
    let mut process = Process::start(command);
    let status = process.exit_within(PATIENCE);
    let output = process.output();
    assert!(!output.contains("panicked"), "{output}");
    (status.success(), output)
}

fn galerne(arguments: &[&str], path: &Path) -> (bool, String) {
    run(setup::galerne().args(arguments).arg(path))
}

/// A copy of bard-1m's files.
fn bard_in(folder: &Path) -> PathBuf {
    for file in fs::read_dir(setup::bard()).expect("bard-1m") {
        let file = file.expect("an entry");
        fs::copy(file.path(), folder.join(file.file_name())).expect("copied");
    }
    folder.to_owned()
}

#[test]
fn a_checkpoint_is_described() {
    let (ok, json) = galerne(&["model", "inspect", "--json"], &setup::bard());
    assert!(ok, "{json}");
    let report: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(report["parameters"], 1_049_728);
    assert_eq!(report["kv_heads"], 4);
    let sizes: Vec<_> =
        report["cuts"].as_array().expect("cuts").iter().map(|cut| &cut["world_size"]).collect();
    assert_eq!(sizes, [1, 2, 3, 4, 6, 8, 12, 16]);
    assert_eq!(report["cuts"][2]["virtual_shards"], 6, "the smallest multiple of 3 with a shard a KV head");
    // Keys of 16 and values of 16, padded to 32, of 4 layers and 4 heads, in bf16.
    assert_eq!(report["cuts"][0]["kv_bytes_per_token"], 4 * 4 * (16 + 32) * 2);
    let weights = |cut: usize| report["cuts"][cut]["weight_bytes"].as_u64().expect("bytes");
    assert!(weights(1) < weights(0) && weights(0) < 3_000_000);

    let (ok, text) = galerne(&["model", "inspect"], &setup::demo_model());
    assert!(ok && text.contains("134.52 M") && text.contains("Q4_1"), "{text}");
    let (ok, refused) = galerne(&["model", "inspect", "--virtual-shards", "2"], &setup::bard());
    assert!(!ok && refused.contains("suit no number of ranks"), "{refused}");
}

#[test]
fn files_are_held_against_their_manifest() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = bard_in(folder.path());
    let (ok, says) = galerne(&["model", "verify"], &model);
    assert!(!ok && says.contains("galerne model verify --write"), "{says}");
    let (ok, says) = galerne(&["model", "verify", "--write"], &model);
    assert!(ok && says.contains("lists 5 file(s)"), "{says}");
    let (ok, says) = galerne(&["model", "verify"], &model);
    assert!(ok && says.contains("model.safetensors: ok"), "{says}");
    let mut weights = fs::read(model.join("model.safetensors")).expect("read");
    *weights.last_mut().expect("bytes") ^= 1;
    fs::write(model.join("model.safetensors"), weights).expect("written");
    fs::remove_file(model.join("generation_config.json")).expect("removed");
    let (ok, says) = galerne(&["model", "verify"], &model);
    assert!(!ok, "{says}");
    for line in
        ["model.safetensors: CHANGED", "generation_config.json: MISSING", "config.json: ok", "2 file(s)"]
    {
        assert!(says.contains(line), "{line} in {says}");
    }
    fs::write(model.join("SHA256SUMS"), "torn").expect("written");
    let (ok, says) = galerne(&["model", "verify"], &model);
    assert!(
        !ok && says.contains("SHA256SUMS, line 1, is not `SHA-256  NAME`"),
        "a damaged one is not none: {says}"
    );
}

#[test]
fn a_model_is_fetched_over_a_bad_connection_and_checked() {
    let hub = Hub::start(&setup::bard());
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("bard");
    let fetch = |source: &str| {
        let mut command = setup::galerne();
        command.args(["model", "fetch", source, "--hub", &hub.url, "--to"]).arg(&to);
        run(&mut command)
    };
    let (ok, says) = fetch("muse/bard");
    assert!(ok && says.contains("galerne up --model"), "{says}");
    assert!(hub.cut() > 0, "the connection broke, and the download went on");
    let same =
        |name: &str| fs::read(to.join(name)).expect(name) == fs::read(setup::bard().join(name)).expect(name);
    assert!(same("model.safetensors") && same("tokenizer.json") && !to.join("README.md").exists());
    assert!(galerne(&["model", "verify"], &to).0);

    hub.lie();
    fs::remove_dir_all(&to).expect("removed");
    let (ok, says) = fetch("muse/bard");
    assert!(!ok && says.contains("is not what the hub says"), "{says}");
    for (source, reason) in [
        ("muse", "neither OWNER/NAME nor a URL"),
        ("muse/nothing", "there is no such thing"),
        ("muse/../x", "neither"),
    ] {
        let (ok, says) = fetch(source);
        assert!(!ok && says.contains(reason), "{source}: {says}");
    }
}

#[test]
fn the_configuration_file_gives_way_to_the_environment_and_that_to_flags() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("galerne.toml");
    let bard = setup::bard();
    fs::write(&file, format!("[up]\nmodel = {:?}\nmodel-name = \"from-file\"\ntp = 99\n", bard))
        .expect("written");
    let (ok, says) = galerne(&["config", "check"], &file);
    assert!(!ok && says.contains("up.tp: invalid value '99'"), "{says}");
    fs::write(&file, format!("[up]\nmodel = {:?}\nmodel-name = \"from-file\"\ntp = 3\n", bard))
        .expect("written");
    let (ok, says) = galerne(&["config", "check"], &file);
    assert!(ok && says.contains("3 setting(s)"), "{says}");
    // S = 2 is refused in a sentence that names N: so nothing has to start.
    let told = |arguments: &[&str], environment: &[(&str, &str)]| {
        let mut up = setup::galerne();
        up.args(["up", "--virtual-shards", "7", "--config"]).arg(&file).args(arguments);
        up.envs(environment.iter().copied());
        run(&mut up).1
    };
    assert!(told(&[], &[]).contains("cannot be shared by 3 ranks"));
    assert!(told(&[], &[("GALERNE_TP", "4")]).contains("cannot be shared by 4 ranks"));
    assert!(told(&["--tp", "2"], &[("GALERNE_TP", "4")]).contains("cannot be shared by 2 ranks"));
    fs::write(&file, "[upp]\n").expect("written");
    assert!(told(&[], &[]).contains("[upp] is no command: did you mean up?"));
}

#[test]
fn shells_complete_the_commands() {
    for (shell, has) in
        [("bash", "complete -F"), ("zsh", "#compdef galerne"), ("fish", "complete -c galerne")]
    {
        let (ok, script) = run(setup::galerne().args(["completions", shell]));
        assert!(ok && script.contains(has) && script.contains("inspect"), "{shell}");
        let inner = script.contains(" --index ") || script.contains("s index among those");
        assert!(!inner, "{shell} offers a command that only the program itself gives");
    }
}

#[test]
fn a_person_talks_in_a_terminal_and_looks_at_the_fleet() {
    let cluster = Cluster::up(&setup::demo_model(), &[]);
    let (ok, json) = run(setup::galerne().args(["status", "--json", "--grpc", &cluster.grpc]));
    assert!(ok, "{json}");
    let fleet: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(fleet["groups"][0]["ranks"][0]["state"], "ready");
    let watched =
        Process::start(setup::galerne().args(["status", "--watch", "1", "--json", "--grpc", &cluster.grpc]));
    watched.line_with("\"groups\"");
    watched.signal(libc::SIGINT);

    let state = tempfile::tempdir().expect("a folder");
    let galerne = setup::galerne().get_program().to_owned();
    let mut person = setup::python("chat_terminal.py");
    person.arg(galerne).arg(&cluster.grpc).env("XDG_STATE_HOME", state.path());
    let (ok, says) = run(&mut person);
    assert!(ok, "{says}");
    let remembered = fs::read_to_string(state.path().join("galerne/chat_history")).expect("a history");
    assert!(remembered.contains("Write a very long story"), "{remembered}");
}

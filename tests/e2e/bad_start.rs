//! What cannot work is refused at start: one sentence, a non-zero exit code, within 5 s.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::process::Process;
use crate::setup;

const LIMIT: Duration = Duration::from_secs(5);

/// Runs to the end and returns what it said, in which one line must be the error.
fn refusal(command: &mut Command) -> String {
    let mut process = Process::start(command);
    let status = process.exit_within(LIMIT);
    assert!(!status.success(), "it should be refused: {command:?}\n{}", process.output());
    let output = process.output();
    let errors = output.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "one sentence for {command:?}, not:\n{output}");
    assert!(!output.contains("panicked"), "{output}");
    assert!(output.matches("os error").count() <= 1, "each cause is named once:\n{output}");
    output
}

fn up(arguments: &[&str]) -> Command {
    let mut command = setup::galerne();
    command.args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]).args(arguments);
    command
}

#[test]
fn bad_flags() {
    let bard = setup::bard();
    let model = ["--model", bard.to_str().expect("UTF-8")];
    for (arguments, says) in [
        (vec!["--tp", "0"], "0 is not in 1..=16"),
        (vec!["--tp", "two"], "invalid value 'two'"),
        (vec!["--tp", "3", "--virtual-shards", "4"], "S must be a multiple of N"),
        (vec!["--virtual-shards", "2"], "fewer than the model's 4 KV heads"),
        (vec!["--replicas", "0"], "0 is not in 1..=64"),
        (vec!["--frobnicate"], "unexpected argument '--frobnicate'"),
        (vec!["--cluster", "a/b"], "a name has"),
        (vec!["--log", "[["], "is not a filter"),
        (vec!["--kv-blocks", "1"], "KV"),
    ] {
        let sentence = refusal(&mut up(&[&model[..], &arguments].concat()));
        assert!(sentence.contains(says), "{arguments:?}: {sentence}");
    }
    assert!(refusal(&mut up(&[])).contains("--model"));
}

#[test]
fn bad_model_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("empty.gguf"), b"").expect("written");
    fs::write(path("text.gguf"), b"this is no model at all, just some text").expect("written");
    let whole = fs::read(setup::demo_model()).expect("the demo model");
    fs::write(path("cut.gguf"), &whole[..whole.len() / 2]).expect("written");
    fs::create_dir(path("nothing")).expect("created");
    fs::create_dir(path("half")).expect("created");
    fs::copy(setup::bard().join("config.json"), path("half/config.json")).expect("copied");
    for name in ["absent", "empty.gguf", "text.gguf", "cut.gguf", "nothing", "half"] {
        let model = path(name);
        let sentence = refusal(&mut up(&["--model", model.to_str().expect("UTF-8")]));
        assert!(sentence.contains(name), "it names the file: {sentence}");
    }
}

#[test]
fn occupied_ports() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("a bound address").to_string();
    let bard = setup::bard();
    for (flag, other) in [("--http", "--grpc"), ("--grpc", "--http")] {
        let mut command = setup::galerne();
        command.args(["up", flag, &address, other, "127.0.0.1:0", "--model"]).arg(&bard);
        let sentence = refusal(&mut command);
        assert!(sentence.contains(flag) && sentence.contains(&address), "{sentence}");
    }
}

#[test]
fn unreachable_etcd() {
    let nobody = format!("http://127.0.0.1:{}", setup::free_port());
    let bard = setup::bard();
    for (command, faces) in [("up", true), ("router", true), ("worker", false)] {
        let mut process = setup::galerne();
        process.args([command, "--etcd", &nobody, "--model"]).arg(&bard);
        if faces {
            process.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
        }
        let sentence = refusal(&mut process);
        assert!(sentence.contains("etcd") && sentence.contains(&nobody), "{command}: {sentence}");
    }
}

#[test]
fn nobody_answers_the_clients() {
    let nobody = format!("127.0.0.1:{}", setup::free_port());
    for arguments in [vec!["chat", "hello"], vec!["status"]] {
        let sentence = refusal(setup::galerne().args(&arguments).args(["--grpc", &nobody]));
        assert!(sentence.contains(&nobody), "{sentence}");
    }
}

//! helm, kubectl, promtool and kubernetes-validate, as `make test` fetches them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cache(member: &str) -> PathBuf {
    let path = root().join(".cache").join(member);
    assert!(path.exists(), "{} is missing: run `make test`, which fetches it", path.display());
    path
}

/// A program from `.cache/bin`, in the repository.
pub(crate) fn program(name: &str) -> Command {
    let mut command = Command::new(cache("bin").join(name));
    command.current_dir(root());
    command
}

/// Python with the packages that `make test` fetches, in the repository.
pub(crate) fn python() -> Command {
    let mut command = Command::new("python3");
    command.current_dir(root()).env("PYTHONPATH", cache("python"));
    command
}

/// Runs it; both of its outputs if it has failed.
pub(crate) fn try_run(command: &mut Command) -> Result<String, String> {
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (out, err) = (text(stdout), text(stderr));
    if status.success() { Ok(out) } else { Err(format!("{command:?}\n{out}{err}")) }
}

pub(crate) fn run(command: &mut Command) -> String {
    try_run(command).unwrap_or_else(|said| panic!("{said}"))
}

/// What the chart becomes with these settings.
pub(crate) fn chart(settings: &[&str]) -> Result<String, String> {
    let mut helm = program("helm");
    helm.args(["template", "galerne", "helm/galerne", "--namespace", "galerne-system"]);
    settings.iter().for_each(|setting| {
        helm.args(["--set", setting]);
    });
    try_run(&mut helm)
}

/// The documents of a YAML file.
pub(crate) fn documents(yaml: &str) -> Vec<Value> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), yaml).expect("written");
    let script = "import json, sys, yaml; json.dump(list(yaml.load_all(open(sys.argv[1]), yaml.CSafeLoader)), sys.stdout)";
    let json = run(python().args(["-c", script]).arg(file.path()));
    let documents: Vec<Value> = serde_json::from_str(&json).expect("JSON");
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

/// All manifests below `k8s` that are written out.
pub(crate) fn plain() -> Vec<PathBuf> {
    let folders = ["k8s", "k8s/examples"].map(|folder| root().join(folder));
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten();
    let mut paths: Vec<PathBuf> = files.map(|entry| entry.expect("a readable entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "yaml"));
    paths.sort_unstable();
    paths
}

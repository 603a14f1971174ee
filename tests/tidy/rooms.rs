//! Who may use whom. ARCHITECTURE.md says why.

use std::collections::BTreeMap;

use crate::tree;

/// Each crate and the crates of ours that it may use: nothing depends upwards.
const ROOMS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("telemetry", &[]),
    ("failpoint", &[]),
    ("sched", &["types"]),
    ("dispatch", &["types"]),
    ("autoscale", &[]),
    ("workload", &[]),
    ("collective", &[]),
    ("checkpoint", &["types"]),
    ("model", &["types", "collective", "checkpoint"]),
    ("emulator", &["model"]),
    ("text", &["checkpoint"]),
    ("grammar", &["types"]),
    ("wire", &["types"]),
    ("tls", &[]),
    ("coord", &["types", "failpoint"]),
    (
        "worker",
        &[
            "types",
            "sched",
            "model",
            "collective",
            "checkpoint",
            "coord",
            "wire",
            "tls",
            "telemetry",
            "failpoint",
            "text",
            "grammar",
        ],
    ),
    ("router", &["types", "dispatch", "text", "checkpoint", "wire", "tls", "telemetry", "failpoint"]),
    ("load", &["workload", "wire", "tls"]),
    ("apiserver", &[]),
    ("operator", &["types", "autoscale", "wire", "tls", "coord"]),
    (
        "cli",
        &[
            "types",
            "checkpoint",
            "model",
            "text",
            "coord",
            "wire",
            "tls",
            "worker",
            "router",
            "telemetry",
            "workload",
            "load",
            "operator",
        ],
    ),
];

/// Crates without I/O, clock, thread or unseeded randomness.
const PURE: &[&str] = &["types", "sched", "dispatch", "autoscale", "workload"];

/// What a pure crate may use from outside: arithmetic and hashes that are the same on every machine.
const PURE_DEPENDENCIES: &[&str] = &["libm", "serde", "sha2", "thiserror"];

fn dependencies(name: &str) -> Vec<String> {
    let path = tree::root().join(format!("crates/{name}/Cargo.toml"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let manifest: toml::Table = text.parse().expect("valid TOML");
    let table = manifest.get("dependencies").and_then(|value| value.as_table()).cloned().unwrap_or_default();
    table.keys().cloned().collect()
}

#[test]
fn every_crate_has_its_place_and_looks_only_down() {
    let rooms: BTreeMap<_, _> = ROOMS.iter().copied().collect();
    let folders: Vec<String> = std::fs::read_dir(tree::root().join("crates"))
        .expect("crates/")
        .map(|entry| entry.expect("a readable entry").file_name().into_string().expect("UTF-8"))
        .collect();
    for folder in &folders {
        let may =
            rooms.get(folder.as_str()).unwrap_or_else(|| panic!("crates/{folder} has no place in ROOMS"));
        for dependency in dependencies(folder) {
            if let Some(ours) = dependency.strip_prefix("galerne-") {
                assert!(may.contains(&ours), "crates/{folder} may not use {ours}");
            }
        }
    }
    assert_eq!(folders.len(), ROOMS.len(), "ROOMS names a crate that is gone");
}

#[test]
fn the_order_of_rooms_has_no_cycle() {
    for (place, (name, may)) in ROOMS.iter().enumerate() {
        for used in *may {
            let below = ROOMS[..place].iter().any(|(earlier, _)| earlier == used);
            assert!(below, "{name} uses {used}, which stands above it in ROOMS");
        }
    }
}

#[test]
fn pure_crates_stay_pure() {
    let clippy = |name: &str| {
        std::fs::read_to_string(tree::root().join(format!("crates/{name}/clippy.toml")))
            .expect("a clippy.toml")
    };
    for name in PURE {
        assert_eq!(clippy(name), clippy("types"), "crates/{name}/clippy.toml bans clocks and unordered maps");
        for dependency in dependencies(name) {
            let ours = dependency.starts_with("galerne-");
            let allowed = ours || PURE_DEPENDENCIES.contains(&dependency.as_str());
            assert!(allowed, "crates/{name} is pure and may not use {dependency}");
        }
        for path in tree::files(&format!("crates/{name}/src"), "rs") {
            let text = std::fs::read_to_string(&path).expect("a readable file");
            for banned in
                ["std::fs", "std::net", "std::thread", "std::env", "std::process", "tokio::", "rand::"]
            {
                assert!(!text.contains(banned), "{} is pure and may not use {banned}", path.display());
            }
        }
    }
}

#[test]
fn every_crate_takes_the_workspace_lints() {
    for (name, _) in ROOMS {
        let text = std::fs::read_to_string(tree::root().join(format!("crates/{name}/Cargo.toml")))
            .expect("a manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "crates/{name} does not take [workspace.lints]");
    }
}

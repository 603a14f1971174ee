//! The real NCCL, as far as it goes without a GPU. In a process of its own, where its network is loopback and there is
//! no device, whatever the machine has.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{group, run};
use galerne_collective::nccl::{self, Library, UniqueId, Version};
use galerne_collective::{AbortHandle, Collective, CollectiveError, Config};

/// Says to the process that it is the one of its own.
const ROLE: &str = "GALERNE_COLLECTIVE_TEST_NCCL";

/// What `.ci/setup test` brings.
fn library() -> Arc<Library> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/lib").join(nccl::LIBRARY_FILE);
    Arc::new(Library::open(&file).unwrap_or_else(|error| panic!("run `.ci/setup test` first: {error}")))
}

#[test]
fn a_missing_library_is_one_sentence() {
    let text = Library::open("/nowhere/libnccl.so.2").unwrap_err().to_string();
    assert!(text.starts_with("cannot load NCCL: /nowhere/libnccl.so.2: "), "{text}");
    assert!(text.ends_with("put the folder of libnccl.so.2 on LD_LIBRARY_PATH"), "{text}");
    let text = Library::open("libc.so.6").unwrap_err().to_string();
    assert!(text.starts_with("cannot load NCCL: ") && text.contains("ncclGetVersion"), "{text}");
}

#[test]
fn the_real_library_answers_and_refuses_without_a_device() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nccl::process_without_a_device", "--nocapture", "--test-threads=1"])
        .envs([(ROLE, "1"), ("NCCL_SOCKET_IFNAME", "lo"), ("CUDA_VISIBLE_DEVICES", "")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for rank in 0..2 {
        let told = format!("rank {rank}: ncclCommInitRankConfig failed: unhandled cuda error: Cuda failure");
        assert!(text.contains(&told), "{text}");
    }
}

/// Not a test of its own: the body of the process.
#[test]
fn process_without_a_device() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    assert_eq!(library().version(), Version { major: 2, minor: 30, patch: 3 });
    let (configs, listeners) = group(&["a", "a"], 8);
    let ids = run(&configs, &listeners, |control| {
        let (mut control, library) = (control.unwrap(), library());
        let first = UniqueId::share(&library, 1, &mut control).unwrap();
        let second = UniqueId::share(&library, 2, &mut control).unwrap();
        assert_ne!(first, second);
        control.barrier().unwrap();
        (first, second)
    });
    assert_eq!(ids[0].0, ids[1].0);
    assert_eq!(ids[0].1, ids[1].1);
    let errors = run(&configs, &listeners, |control| {
        let (mut control, library) = (control.unwrap(), library());
        let config = Config { meet_timeout: Duration::from_secs(10), ..configs[control.rank()].clone() };
        let id = UniqueId::share(&library, config.epoch, &mut control).unwrap();
        // Each rank shall find out for itself.
        control.barrier().unwrap();
        let abort = AbortHandle::new();
        nccl::connect(&config, &library, id, &abort, || Ok::<_, CollectiveError>(())).unwrap_err()
    });
    for (rank, error) in errors.iter().enumerate() {
        println!("rank {rank}: {error}");
    }
}

use std::path::Path;

use super::*;

/// A machine of `nodes` nodes of `cores` cores with two hardware threads each, numbered as Linux does: first every core's
/// first, then every core's second.
fn machine(nodes: usize, cores: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |path: String, text: String| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text + "\n").unwrap();
    };
    let firsts = nodes * cores;
    write("cpu/online".into(), format!("0-{}", 2 * firsts - 1));
    write("node/online".into(), CpuList((0..nodes).collect()).to_string());
    for node in 0..nodes {
        let own = node * cores..(node + 1) * cores;
        let cpus = own.clone().chain(own.start + firsts..own.end + firsts).collect();
        write(format!("node/node{node}/cpulist"), CpuList(cpus).to_string());
        for (core, first) in own.enumerate() {
            for cpu in [first, first + firsts] {
                write(format!("cpu/cpu{cpu}/topology/physical_package_id"), node.to_string());
                write(format!("cpu/cpu{cpu}/topology/core_id"), core.to_string());
            }
        }
    }
    folder
}

fn all(machine: &Path) -> Cores {
    Cores::read(machine, &(0..64).collect::<Vec<_>>(), None).unwrap()
}

fn homes(cores: &Cores, threads: usize) -> Vec<(Vec<usize>, usize)> {
    cores.homes(threads).into_iter().map(|home| (home.cpus, home.node)).collect()
}

fn named(list: &str) -> CpuList {
    list.parse().unwrap()
}

#[test]
fn lists_are_read_and_written_as_people_write_them() {
    for (list, written) in [("0", "0"), ("0-3,8", "0-3,8"), ("7,5,6,6", "5-7"), ("2,0", "0,2")] {
        assert_eq!(named(list).to_string(), written);
    }
    for wrong in ["", "a", "3-1", "1,,2", "-1", "0-1024", "0 1"] {
        let error = wrong.parse::<CpuList>().unwrap_err();
        assert!(error.contains("is no list of CPUs below 1024, such as 0-3,8"), "{error}");
    }
}

#[test]
fn two_ranks_of_a_machine_with_two_nodes_have_one_each() {
    let machine = machine(2, 4);
    let cores = all(machine.path());
    let (node_0, node_1) = (vec![0, 1, 2, 3, 8, 9, 10, 11], vec![4, 5, 6, 7, 12, 13, 14, 15]);
    let sorted = |mut homes: Vec<(Vec<usize>, usize)>| {
        homes.iter_mut().for_each(|(cpus, _)| cpus.sort_unstable());
        homes
    };
    assert_eq!(sorted(homes(&cores.share(0, 2), 2)), [(node_0.clone(), 0), (node_0, 0)]);
    assert_eq!(sorted(homes(&cores.share(1, 2), 1)), [(node_1, 1)]);
    let of_all = cores.homes(8);
    assert_eq!(
        nodes(&of_all),
        [(0, 0..4), (1, 4..8)],
        "half of the threads, and of the weights, are in each"
    );
}

#[test]
fn threads_stay_on_cores_that_are_their_own_and_every_core_has_one_first() {
    let machine = machine(2, 2);
    let everything: Vec<usize> = (0..64).collect();
    let of = |list: &str| Cores::read(machine.path(), &everything, Some(&named(list))).unwrap();
    let single = |homes: Vec<(Vec<usize>, usize)>| -> Vec<usize> {
        homes.into_iter().flat_map(|home| home.0).collect()
    };
    assert_eq!(single(homes(&of("0-7"), 4)), [0, 1, 2, 3]);
    assert_eq!(single(homes(&of("0-7"), 8)), [0, 4, 1, 5, 2, 6, 3, 7]);
    assert_eq!(single(homes(&of("0-7"), 5)), [0, 4, 1, 2, 3]);
    assert_eq!(
        single(homes(&of("0,1,4,5").share(1, 2), 2)),
        [1, 5],
        "a core is not cut while there are enough"
    );
    assert_eq!(single(homes(&of("0,4").share(1, 2), 1)), [4]);

    // A process that the system lets run on some cores only has them for itself.
    let some = Cores::read(machine.path(), &[1, 2], None).unwrap();
    assert_eq!(single(homes(&some, 2)), [1, 2]);
    assert_eq!(some.to_string(), "1-2 (a thread each)");
}

#[test]
fn nobody_is_nailed_down_where_cores_are_too_few_or_not_there() {
    let machine = machine(1, 2);
    let cores = Cores::read(machine.path(), &[0, 1, 2, 3], Some(&named("0-1"))).unwrap();
    let anywhere = (vec![0, 1], 0);
    assert_eq!(
        homes(&cores, 3),
        [anywhere.clone(), anywhere.clone(), anywhere.clone()],
        "three threads, two cores"
    );
    assert_eq!(homes(&cores.share(2, 3), 1), [anywhere], "three ranks, two cores");
    assert_eq!(Cores::read(machine.path(), &[0, 1], Some(&named("9"))), None);
    assert_eq!(Cores::read(Path::new("/nonexistent"), &[0, 1], None), None);
    let shared = all(machine.path());
    assert_eq!((shared.count(), shared.to_string()), (4, "0-3 (shared with others)".into()));
}

#[test]
fn threads_are_crowded_where_all_ranks_together_have_more_than_cores() {
    let machine = machine(1, 2);
    let cores = all(machine.path());
    for (threads, ranks, crowded) in
        [(4, 1, false), (5, 1, true), (2, 2, false), (3, 2, true), (1, 4, false), (1, 5, true)]
    {
        assert_eq!(cores.share(0, ranks).are_crowded_by(threads), crowded, "{ranks} ranks of {threads} on 4");
    }
    assert!(cores.share(0, 5).share(0, 1).are_crowded_by(1), "a group of one among five");
}

#[test]
#[cfg(target_os = "linux")]
fn a_thread_stays_where_it_is_bound() {
    let Some(cores) = Cores::of_machine(None) else { panic!("the system tells its cores") };
    let before = allowed().unwrap();
    std::thread::spawn(move || {
        let home = Home { cpus: vec![cores.all[0].id], node: cores.all[0].node };
        home.bind();
        // SAFETY: no arguments, no effects.
        assert_eq!(unsafe { libc::sched_getcpu() }, home.cpus[0] as i32);
        assert_eq!(allowed().unwrap(), before, "the process may run where it could");
    })
    .join()
    .unwrap();
}

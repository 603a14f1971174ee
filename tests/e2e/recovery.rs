//! Streams that outlive what serves them.

use std::process::Command;
use std::time::Duration;

use galerne_failpoint::Point;
use galerne_wire::v1::{FleetResponse, GroupStatus};

use crate::hosts::{ADDRESSES, Network};
use crate::loss::stream_in_the_background;
use crate::process::{self, Process};
use crate::setup::{self, Cluster, Etcd};

fn whole(grpc: &str) -> Vec<u32> {
    stream_in_the_background(grpc).join().expect("no panic").expect("an undisturbed answer")
}

/// Waits until the group serves with so many ranks, and as many more stand by.
fn until_ranks(grpc: &str, serving: usize, standing_by: usize) -> FleetResponse {
    process::eventually("a group of that size", || {
        let fleet = setup::fleet(grpc).ok()?;
        let group = fleet.groups.first().filter(|group| group.state == "ready")?;
        let count = |state: &str| group.ranks.iter().filter(|rank| rank.state == state).count();
        (count("ready") == serving && count("waiting") == standing_by).then_some(fleet)
    })
}

#[test]
fn a_spare_takes_the_place_of_a_rank_that_dies_or_hangs() {
    let cluster = Cluster::up(&setup::bard(), &["--tp", "2", "--spares", "1"]);
    let expected = whole(&cluster.grpc);
    let faults = [(0, libc::SIGKILL), (1, libc::SIGKILL), (0, libc::SIGSTOP), (1, libc::SIGSTOP)];
    for (victim, signal) in faults {
        until_ranks(&cluster.grpc, 2, 1);
        let open = stream_in_the_background(&cluster.grpc);
        process::send(cluster.rank_pids()[victim], signal);
        let answer = open.join().expect("no panic").expect("all of it");
        assert_eq!(answer, expected, "rank {victim}, signal {signal}");
    }
    // What hung was killed and started again; what happened is told.
    let group = until_ranks(&cluster.grpc, 2, 1).groups.remove(0);
    let reasons: Vec<&str> = group.past.iter().map(|past| past.reason.as_str()).collect();
    assert_eq!(reasons, ["died", "died", "hung", "hung"]);
}

#[test]
fn survivors_of_a_lost_host_go_on_alone_and_the_group_grows_again() {
    let etcd = Etcd::start();
    let worker = |host: &str| {
        let mut command = setup::galerne();
        command.args([
            "worker",
            "--tp",
            "2",
            "--ranks",
            "1",
            "--host",
            host,
            "--etcd",
            &etcd.endpoint,
            "--model",
        ]);
        Process::start(command.arg(setup::bard()))
    };
    let (_a, b) = (worker("a"), worker("b"));
    let (_router, grpc) = router(setup::galerne(), &etcd);
    until_ranks(&grpc, 2, 0);
    let expected = whole(&grpc);

    let open = stream_in_the_background(&grpc);
    b.signal(libc::SIGKILL); // its rank dies with it
    assert_eq!(open.join().expect("no panic").expect("all of it"), expected);
    until_ranks(&grpc, 1, 0);
    assert_eq!(whole(&grpc), expected, "fewer ranks, the same tokens");

    let _b = worker("b");
    until_ranks(&grpc, 1, 1);
    let open = stream_in_the_background(&grpc);
    let group = until_ranks(&grpc, 2, 0).groups.remove(0);
    assert_eq!(open.join().expect("no panic").expect("all of it"), expected);
    let reasons: Vec<&str> = group.past.iter().map(|past| past.reason.as_str()).collect();
    assert_eq!(reasons, ["died", "grown"]);
}

#[test]
fn a_drained_group_passes_its_streams_on_and_ends() {
    let mut cluster = Cluster::up(&setup::bard(), &["--tp", "1", "--replicas", "2"]);
    let line = cluster.process.line_with("coordination: embedded store on ");
    let store = line
        .split_whitespace()
        .find(|word| word.starts_with("127."))
        .expect("an address")
        .trim_end_matches(',')
        .to_owned();
    let expected = whole(&cluster.grpc);
    let open = [(); 4].map(|()| stream_in_the_background(&cluster.grpc));
    let drain = |group: &str, grace: &str| {
        let mut command = setup::galerne();
        Process::start(command.args(["drain", group, "--grace-s", grace, "--etcd", &store]))
    };
    let mut drained = drain("g0", "0");
    assert!(drained.exit_within(process::PATIENCE).success(), "{}", drained.output());
    for stream in open {
        assert_eq!(stream.join().expect("no panic").expect("all of it"), expected);
    }
    let left: Vec<String> = cluster.fleet().groups.into_iter().map(|group| group.name).collect();
    assert_eq!(left, ["g1"]);

    // The last one finishes what it has.
    let open = stream_in_the_background(&cluster.grpc);
    let mut drained = drain("g1", "60");
    assert_eq!(open.join().expect("no panic").expect("all of it"), expected);
    assert!(drained.exit_within(process::PATIENCE).success());
    let mut stranger = drain("g2", "0");
    assert!(!stranger.exit_within(process::PATIENCE).success());
    assert!(stranger.output().contains("no rank of group g2"), "{}", stranger.output());
    cluster.process.signal(libc::SIGINT);
    assert!(cluster.process.exit_within(process::PATIENCE).success());
}

#[test]
fn a_rank_that_dies_while_its_group_is_drained_does_not_bring_it_back() {
    let etcd = Etcd::start();
    let worker = |group: &str| {
        let mut command = setup::galerne();
        command.args(["worker", "--tp", "2", "--group", group, "--etcd", &etcd.endpoint, "--model"]);
        Process::start(command.arg(setup::bard()))
    };
    let (mut first, _second) = (worker("g0"), worker("g1"));
    let (_router, grpc) = router(setup::galerne(), &etcd);
    let rank = process::eventually("two groups that serve", || {
        let fleet = setup::fleet(&grpc).ok()?;
        let ready = fleet.groups.iter().filter(|group| group.state == "ready").count() == 2;
        ready.then(|| fleet.groups.iter().find(|group| group.name == "g0").map(|group| group.ranks[1].pid))?
    });
    let expected = whole(&grpc);
    let open = [(); 4].map(|()| stream_in_the_background(&grpc));
    let mut command = setup::galerne();
    let mut drained = Process::start(command.args(["drain", "g0", "--etcd", &etcd.endpoint]));
    drained.line_with("group g0 still has");
    process::send(rank, libc::SIGKILL);
    for stream in open {
        assert_eq!(stream.join().expect("no panic").expect("all of it"), expected);
    }
    assert!(drained.exit_within(process::PATIENCE).success(), "{}", drained.output());
    assert!(first.exit_within(process::PATIENCE).success(), "{}", first.output());
    // What is known of the dead is shown for a while.
    let left = setup::fleet(&grpc).expect("a fleet").groups;
    let over = |group: &GroupStatus| group.ranks.iter().all(|rank| rank.state == "dead");
    assert!(left.iter().all(|group| group.name == "g1" || over(group)), "{left:?}");
}

#[test]
fn streams_go_on_while_etcd_is_away_and_its_leases_are_lost() {
    let etcd = Etcd::start();
    let mut command = setup::galerne();
    command.args(["worker", "--tp", "2", "--spares", "1", "--etcd", &etcd.endpoint, "--model"]);
    let _worker = Process::start(command.arg(setup::bard()));
    let (_router, grpc) = router(setup::galerne(), &etcd);
    let epoch = until_ranks(&grpc, 2, 1).groups[0].epoch;
    let expected = whole(&grpc);
    etcd.process.signal(libc::SIGSTOP);
    // Longer than a lease lives.
    let away = std::time::Instant::now();
    while away.elapsed() < Duration::from_secs(5) {
        assert_eq!(whole(&grpc), expected);
    }
    let open = stream_in_the_background(&grpc);
    etcd.process.signal(libc::SIGCONT);
    assert_eq!(open.join().expect("no panic").expect("all of it"), expected);
    let fleet = until_ranks(&grpc, 2, 1);
    assert_eq!(fleet.groups[0].epoch, epoch, "nobody died");
    let open = stream_in_the_background(&grpc);
    process::send(fleet.groups[0].ranks[0].pid, libc::SIGKILL);
    assert_eq!(open.join().expect("no panic").expect("all of it"), expected);
}

#[test]
fn a_host_that_is_cut_off_is_replaced_and_comes_back_as_a_spare() {
    let network = Network::new('r');
    let program = || setup::galerne().get_program().into();
    let etcd = Etcd::start_with(network.on(0, Etcd::program()), ADDRESSES[0]);
    let worker = |place: usize, index: &str| {
        let mut command = network.on(place, program());
        command.args([
            "worker",
            "--tp",
            "2",
            "--ranks",
            "1",
            "--first-index",
            index,
            "--bind",
            ADDRESSES[place],
        ]);
        Process::start(command.args(["--etcd", &etcd.endpoint, "--model"]).arg(setup::bard()))
    };
    let _group = [worker(1, "0"), worker(2, "0")];
    let (_router, grpc) = router(network.on(0, program()), &etcd);
    network.inside(0, || {
        until_ranks(&grpc, 2, 0);
        let _spare = worker(1, "1");
        until_ranks(&grpc, 2, 1);
        let expected = whole(&grpc);
        // First a follower and its host; then, since the spare was on the first host, the whole group.
        for (place, leaders_epochs) in [(2, 1), (1, 0)] {
            let before = setup::fleet(&grpc).expect("a router that answers").groups[0].past.len();
            let open = stream_in_the_background(&grpc);
            network.cut(place, true);
            let cut = std::time::Instant::now();
            while cut.elapsed() < Duration::from_secs(4) {
                std::thread::park_timeout(Duration::from_millis(100)); // longer than a lease lives
            }
            network.cut(place, false);
            assert_eq!(open.join().expect("no panic").expect("all of it"), expected, "host {place}");
            let group = until_ranks(&grpc, 2, 1).groups.remove(0);
            assert_eq!(whole(&grpc), expected);
            assert_eq!(group.past.len() - before, leaders_epochs, "host {place}: {:?}", group.past);
        }
    });
}

/// One router finds out that ranks die on a request. Whoever sends it again may reach another one.
#[test]
fn a_request_on_which_ranks_die_is_refused_at_every_router() {
    let (etcd, points) = (Etcd::start(), tempfile::tempdir().expect("a temporary folder"));
    let mut command = setup::galerne();
    command.env(galerne_failpoint::VARIABLE, points.path());
    command.args(["worker", "--tp", "2", "--spares", "1", "--etcd", &etcd.endpoint, "--model"]);
    let _worker = Process::start(command.arg(setup::bard()));
    let ((_router, grpc), (_other, elsewhere)) =
        (router(setup::galerne(), &etcd), router(setup::galerne(), &etcd));
    until_ranks(&grpc, 2, 1);
    until_ranks(&elsewhere, 2, 1);
    let point = Point::Prefill(1).to_string();
    let stops_next = || std::fs::write(points.path().join(&point), "").expect("a file of that name");
    let (deadly, harmless) = ([1, 2, 3], [4, 5, 6]);
    stops_next();
    let asked = std::thread::spawn(move || setup::greedy(&grpc, &deadly, 5));
    for kill in 0..2 {
        let stopped = process::eventually("a rank that is to run the prompt", || {
            let mut files = std::fs::read_dir(points.path())
                .ok()?
                .filter_map(|file| file.ok()?.file_name().into_string().ok());
            files.find_map(|name| Some((name.strip_prefix(&point)?.strip_prefix('.')?.parse().ok()?, name)))
        });
        let (pid, name) = stopped;
        std::fs::remove_file(points.path().join(name)).expect("it is there");
        if kill == 0 {
            stops_next();
        }
        process::send(pid, libc::SIGKILL);
    }
    let says = "groups were lost one after the other while they worked on this request";
    let convicted = asked.join().expect("no panic").expect_err("it is taken for the reason");
    assert!(convicted.message().contains(says), "{convicted}");
    process::eventually("the other router refuses it", || {
        setup::greedy(&elsewhere, &deadly, 5).err().filter(|refused| refused.message().contains(says))
    });
    assert!(setup::greedy(&elsewhere, &harmless, 5).is_ok());
}

/// A router by way of `command`, and its gRPC address.
fn router(mut command: Command, etcd: &Etcd) -> (Process, String) {
    command.args(["router", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--etcd", &etcd.endpoint]);
    let router = Process::start(command.arg("--model").arg(setup::bard()));
    let line = router.line_with("gRPC on ");
    let grpc = line.rsplit(' ').next().expect("an address").to_owned();
    (router, grpc)
}

//! Threads as ranks: what the calls compute, over shared memory, TCP and both.

use crate::common::{group, leaf_value, run};
use galerne_collective::{Collective, CollectiveError, MESSAGE_BYTES_MAX, Solo, tree};

const ONE_HOST: [&str; 4] = ["a", "a", "a", "a"];
const TWO_HOSTS: [&str; 4] = ["a", "a", "b", "b"];
const FOUR_HOSTS: [&str; 4] = ["a", "b", "c", "d"];

/// A rank's pieces as the model would form them from its leaves.
fn partials(leaves: usize, own: std::ops::Range<usize>, len: usize) -> Vec<f32> {
    let values: Vec<Vec<f32>> =
        (0..leaves).map(|leaf| (0..len).map(|index| leaf_value(leaf, index)).collect()).collect();
    let mut partials = Vec::new();
    for piece in tree::pieces(leaves, own) {
        let singles: Vec<_> = piece.clone().map(|leaf| leaf..leaf + 1).collect();
        let mut sum = vec![0.0; len];
        tree::sum_into(&singles, |leaf| &values[piece.start + leaf], &mut sum);
        partials.extend(sum);
    }
    partials
}

/// The sum that a group of one rank computes.
fn expected(leaves: usize, len: usize) -> Vec<u32> {
    let mut out = vec![0.0; len];
    Solo::new(leaves).all_reduce(&partials(leaves, 0..leaves, len), &mut out).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

/// All ranks get the bits of `expected`, for each length, in calls one after another.
fn check_all_reduce(hosts: &[&str], leaves: usize, lens: &[usize]) {
    let (configs, listeners) = group(hosts, leaves);
    let expected: Vec<_> = lens.iter().map(|len| expected(leaves, *len)).collect();
    run(&configs, &listeners, |collective| {
        let mut collective = collective.unwrap();
        let own = configs[0].peers[collective.rank()].leaves.clone();
        for (len, expected) in lens.iter().zip(&expected) {
            let mut out = vec![0.0; *len];
            collective.all_reduce(&partials(leaves, own.clone(), *len), &mut out).unwrap();
            let out: Vec<u32> = out.into_iter().map(f32::to_bits).collect();
            assert!(out == *expected, "{hosts:?}, S = {leaves}, length {len}, rank {}", collective.rank());
        }
        collective.barrier().unwrap();
    });
}

#[test]
fn the_sum_does_not_depend_on_ranks_or_their_places() {
    for leaves in [4, 8, 12] {
        check_all_reduce(&ONE_HOST[..1], leaves, &[0, 1, 1000]);
        check_all_reduce(&ONE_HOST[..2], leaves, &[0, 1, 1000]);
        for hosts in [ONE_HOST, TWO_HOSTS, FOUR_HOSTS, ["a", "b", "a", "b"]] {
            check_all_reduce(&hosts, leaves, &[1, 2, 0, 1000, 40_000]);
        }
    }
    check_all_reduce(&["a", "a", "b"], 3, &[5, 777]);
    check_all_reduce(&["a", "b", "a"], 9, &[5, 777]);
}

#[test]
fn messages_longer_than_a_slot_stream_through() {
    for hosts in [ONE_HOST, TWO_HOSTS, FOUR_HOSTS] {
        check_all_reduce(&hosts, 12, &[700_001]);
    }
    check_all_reduce(&["a", "b"], 2, &[1 << 20, 3]);
}

#[test]
fn gathers_and_broadcasts() {
    for hosts in [ONE_HOST, TWO_HOSTS, FOUR_HOSTS] {
        let (configs, listeners) = group(&hosts, 4);
        run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            let rank = collective.rank();
            for counts in [[3, 0, 5, 1], [600_000, 1, 0, 300_000], [0; 4]] {
                let mine: Vec<f32> = (0..counts[rank]).map(|index| leaf_value(rank, index)).collect();
                let all: Vec<f32> = (0..4)
                    .flat_map(|rank| (0..counts[rank]).map(move |index| leaf_value(rank, index)))
                    .collect();
                let mut out = vec![0.0; all.len()];
                collective.all_gather(&mine, &counts, &mut out).unwrap();
                assert!(out == all, "all_gather {counts:?} at rank {rank} of {hosts:?}");
                for root in 0..4 {
                    let mut out = vec![0.0; if rank == root { all.len() } else { 0 }];
                    collective.gather(root, &mine, &counts, &mut out).unwrap();
                    assert!(rank != root || out == all, "gather {counts:?} at rank {rank} of {hosts:?}");
                }
            }
            for (root, len) in [(0, 5), (3, 2_500_001), (1, 0), (2, 1)] {
                let sent: Vec<u8> = (0..len).map(|index| (index * 31 + root) as u8).collect();
                let mut data = if rank == root { sent.clone() } else { vec![0; len] };
                collective.broadcast(root, &mut data).unwrap();
                assert!(data == sent, "broadcast from {root} at rank {rank} of {hosts:?}");
            }
            collective.barrier().unwrap();
        });
    }
}

#[test]
fn roots_that_do_not_wait_are_not_overrun() {
    for hosts in [ONE_HOST, TWO_HOSTS, FOUR_HOSTS] {
        let (configs, listeners) = group(&hosts, 4);
        run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            for round in 0..2000u32 {
                let root = (round / 100 % 4) as usize;
                let mut data = if collective.rank() == root { round.to_le_bytes() } else { [0; 4] };
                collective.broadcast(root, &mut data).unwrap();
                assert_eq!(u32::from_le_bytes(data), round);
            }
            collective.barrier().unwrap();
        });
    }
}

#[test]
fn wrong_arguments_are_named() {
    let (configs, listeners) = group(&["a"], 2);
    let call = |call: &(dyn Fn(&mut dyn Collective) -> Result<(), CollectiveError> + Sync)| {
        let results = run(&configs, &listeners, |collective| call(&mut collective.unwrap()));
        results.into_iter().next().unwrap().unwrap_err().to_string()
    };
    assert_eq!(
        call(&|it| it.all_reduce(&[0.0; 3], &mut [0.0; 4])),
        "all_reduce: partials has length 3, expected 4"
    );
    assert_eq!(
        call(&|it| it.gather(0, &[0.0; 2], &[1], &mut [0.0])),
        "gather: mine has length 2, expected 1"
    );
    assert_eq!(
        call(&|it| it.broadcast(0, &mut vec![0; MESSAGE_BYTES_MAX + 1])),
        "broadcast: a message of 1073741825 bytes is over the limit of 1073741824: send it in parts"
    );
    assert_eq!(call(&|it| it.broadcast(1, &mut [])), "broadcast: root 1 is no rank of a group of 1");
}

#[test]
fn ranks_out_of_step_are_told_so() {
    for hosts in [["a", "a"], ["a", "b"]] {
        let (configs, listeners) = group(&hosts, 2);
        let results = run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            let len = if collective.rank() == 0 { 10 } else { 11 };
            collective.all_reduce(&vec![1.0; len], &mut vec![0.0; len])
        });
        // The first to see it tells the other, who may know it only from there.
        let errors: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
        assert!(
            errors.iter().any(|error| {
                let text = error.to_string();
                text.contains("all_reduce of 40 bytes") && text.contains("all_reduce of 44 bytes")
            }),
            "{errors:?}"
        );
        let results = run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            // The root does not wait, and shall not be gone before the other has come.
            collective.barrier().unwrap();
            if collective.rank() == 0 { collective.barrier() } else { collective.broadcast(1, &mut [1]) }
        });
        let text = results[0].as_ref().unwrap_err().to_string();
        assert!(
            text.contains("expected barrier of 0 bytes") && text.contains("got broadcast of 1 bytes"),
            "{text}"
        );
    }
}

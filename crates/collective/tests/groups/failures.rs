//! Threads as ranks: aborts, deadlines, strangers and stale peers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{group, run};
use galerne_collective::{AbortHandle, Collective, CollectiveError, connect};

/// Far below every timeout of the groups here, far above what waking a thread takes.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn abort_wakes_everyone() {
    for hosts in [["a", "a", "a"], ["a", "a", "b"], ["a", "b", "c"]] {
        let (configs, listeners) = group(&hosts, 3);
        let (handles, handle) = mpsc::channel();
        let aborter = thread::spawn(move || {
            let handle: AbortHandle = handle.recv().unwrap();
            handle.abort();
        });
        let woken = Barrier::new(3);
        let started = Instant::now();
        let errors = run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            // Now all have met; the abort may find some of them still in this barrier.
            let met = collective.barrier();
            if collective.rank() == 2 {
                // Makes no call, and hears of it all the same.
                woken.wait();
                return collective.abort_handle().wait(AT_ONCE).unwrap();
            }
            if collective.rank() == 0 {
                handles.send(collective.abort_handle()).unwrap();
            }
            let error = met.and_then(|()| collective.broadcast(2, &mut [0])).unwrap_err();
            woken.wait();
            error
        });
        aborter.join().unwrap();
        assert!(matches!(errors[0], CollectiveError::Aborted), "{errors:?}");
        assert!(matches!(errors[1], CollectiveError::AbortedBy { rank: 0 }), "{errors:?}");
        assert!(matches!(errors[2], CollectiveError::AbortedBy { rank: 0 }), "{errors:?}");
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    }
}

#[test]
fn a_rank_that_hangs_is_named_by_all() {
    for hosts in [["a", "a", "a"], ["a", "b", "c"]] {
        let (mut configs, listeners) = group(&hosts, 3);
        // Only rank 0 loses patience; the others hear of it.
        configs[0].timeout = Duration::from_millis(500);
        let given_up = Barrier::new(3);
        let errors = run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            if collective.rank() == 2 {
                given_up.wait();
                return collective.abort_handle().wait(AT_ONCE).unwrap();
            }
            let error = collective.barrier().unwrap_err();
            given_up.wait();
            error
        });
        for error in &errors[..2] {
            assert!(
                matches!(error, CollectiveError::Timeout { rank: 2, waited, .. } if waited.as_millis() == 500),
                "{errors:?}"
            );
        }
        assert!(matches!(errors[2], CollectiveError::AbortedBy { .. }), "{errors:?}");
    }
}

#[test]
fn a_closed_peer_is_no_error_until_it_is_missed() {
    for hosts in [["a", "a"], ["a", "b"]] {
        let (configs, listeners) = group(&hosts, 2);
        let results = run(&configs, &listeners, |collective| {
            let mut collective = collective.unwrap();
            // Now both have met.
            collective.barrier().unwrap();
            if collective.rank() == 0 {
                return collective.broadcast(0, &mut [1, 2, 3]);
            }
            let mut data = [0; 3];
            collective.broadcast(0, &mut data)?;
            assert_eq!(data, [1, 2, 3]);
            collective.barrier()
        });
        assert!(matches!(results[1], Err(CollectiveError::AbortedBy { rank: 0 })), "{results:?}");
    }
}

#[test]
fn the_meeting_can_be_aborted_and_ends_by_itself() {
    let (mut configs, listeners) = group(&["a", "b"], 2);
    let abort = AbortHandle::new();
    let result = thread::scope(|scope| {
        let meeting = scope.spawn(|| connect(&configs[1], &listeners[1], &abort));
        abort.abort();
        meeting.join().unwrap()
    });
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
    configs[0].meet_timeout = Duration::from_millis(20);
    let text = connect(&configs[0], &listeners[0], &AbortHandle::new()).unwrap_err().to_string();
    assert!(text.starts_with("rank 1 at 127.0.0.1:"), "{text}");
    assert!(text.contains("did not join epoch 42 within 20ms"), "{text}");
}

#[test]
fn strangers_do_not_disturb() {
    let (configs, listeners) = group(&["a", "b"], 2);
    let address = listeners[0].address();
    // They stand in the queue before the real rank comes: silent ones, more than may be pending; garbage; and
    // one that hangs up.
    let silent: Vec<_> = (0..120).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut garbage = TcpStream::connect(address).unwrap();
    garbage.write_all(&[0x5a; 4096]).unwrap();
    drop(TcpStream::connect(address).unwrap());
    let started = Instant::now();
    run(&configs, &listeners, |collective| collective.unwrap().barrier().unwrap());
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    // The liar got its challenge and nothing else.
    let mut heard = Vec::new();
    let _ = garbage.read_to_end(&mut heard);
    assert_eq!(heard.len(), 32);
    drop(silent);
}

#[test]
fn a_rank_whose_queue_strangers_have_filled_is_met_as_soon_as_it_looks() {
    let (mut configs, listeners) = group(&["a", "b"], 2);
    let address = listeners[0].address();
    let knock = || TcpStream::connect_timeout(&address, Duration::from_millis(50));
    let strangers: Vec<_> = std::iter::from_fn(|| knock().ok()).take(8192).collect();
    assert!(strangers.len() < 8192, "the queue has an end");
    // The system asks again after a second where an answer is missing, which is too late here.
    configs[0].meet_timeout = Duration::from_millis(800);
    thread::scope(|scope| {
        let meet = |rank: usize| connect(&configs[rank], &listeners[rank], &AbortHandle::new())?.barrier();
        let dials = scope.spawn(move || meet(1));
        thread::sleep(Duration::from_millis(20));
        meet(0).unwrap();
        dials.join().unwrap().unwrap();
    });
    drop(strangers);
}

#[test]
fn another_secret_and_another_epoch_are_refused() {
    for change in 0..2 {
        let (mut configs, listeners) = group(&["a", "b"], 2);
        configs[0].meet_timeout = Duration::from_millis(300);
        configs[1].meet_timeout = Duration::from_millis(300);
        match change {
            0 => configs[1].secret = [8; 32].into(),
            _ => configs[1].epoch -= 1,
        }
        let errors = run(&configs, &listeners, |collective| collective.unwrap_err());
        assert!(matches!(errors[0], CollectiveError::NotMet { rank: 1, .. }), "{errors:?}");
        assert!(matches!(errors[1], CollectiveError::NotMet { rank: 0, .. }), "{errors:?}");
    }
}

#[test]
fn a_rank_that_is_late_by_an_epoch_is_met_in_the_next() {
    let (mut configs, listeners) = group(&["a", "a"], 2);
    let mut stale = configs[1].clone();
    stale.epoch -= 1;
    configs[1].meet_timeout = Duration::from_secs(20);
    thread::scope(|scope| {
        let abort = AbortHandle::new();
        let stale_abort = abort.clone();
        let (stale, late, listeners) = (&stale, &configs[1], &listeners);
        let late = scope.spawn(move || {
            let refused = connect(stale, &listeners[1], &stale_abort).unwrap_err();
            assert!(matches!(refused, CollectiveError::Aborted), "{refused}");
            connect(late, &listeners[1], &AbortHandle::new()).unwrap().barrier().unwrap();
        });
        let current =
            scope.spawn(|| connect(&configs[0], &listeners[0], &AbortHandle::new()).unwrap().barrier());
        // The news of the epoch reaches the late rank.
        abort.abort();
        late.join().unwrap();
        current.join().unwrap().unwrap();
    });
}

#[test]
fn one_listener_serves_epoch_after_epoch() {
    let (mut configs, listeners) = group(&["a", "a", "b"], 3);
    for epoch in 1..20 {
        configs.iter_mut().for_each(|config| config.epoch = epoch);
        run(&configs, &listeners, |collective| collective.unwrap().barrier().unwrap());
    }
}

//! The life of a communicator, with a NCCL that hangs and fails as told.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::ptr::null_mut;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::nccl::fake::{self, EPOCH, Group, REMOTE_ERROR};
use crate::nccl::library::{Code, IN_PROGRESS, SUCCESS};
use crate::nccl::{ABORT_TIMEOUT, Communicator, Exchange, Transfer, UniqueId, connect};
use crate::{AbortHandle, Collective, CollectiveError, Config, CpuCollective, Solo, listen};

/// What was promised is half a second; noticing takes some of it.
const _: () = assert!(ABORT_TIMEOUT.as_millis() <= 400);

/// Far below every timeout of the groups here, far above what waking a thread takes.
const AT_ONCE: Duration = Duration::from_secs(2);

const INIT: &str = "init rank 1 of 2, blocking 0";

fn form(group: &Group, abort: &AbortHandle) -> Result<Communicator, CollectiveError> {
    connect(&group.config, &group.library, group.id(EPOCH), abort, || Ok::<_, Infallible>(()))
}

/// One that is ready, and its handle.
fn ready(group: &Group) -> (Communicator, AbortHandle) {
    let abort = AbortHandle::new();
    (form(group, &abort).unwrap(), abort)
}

fn never() -> Result<bool, CollectiveError> {
    Ok(false)
}

#[test]
fn ranks_form_and_leave_in_peace() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    assert_eq!((communicator.rank(), communicator.world_size()), (1, 2));
    assert_eq!(group.called(), [INIT]);
    communicator.close().unwrap();
    assert_eq!(group.called(), ["finalize", "destroy"]);
    assert!(abort.cause().is_none(), "the epoch lives on");
}

#[test]
fn forming_takes_until_nccl_tells_that_all_are_there() {
    let group = Group::new();
    let abort = AbortHandle::new();
    thread::scope(|scope| {
        let forming = scope.spawn(|| form(&group, &abort));
        assert_eq!(group.wait_for_calls(1), [INIT]);
        group.fake.told.store(SUCCESS, Ordering::SeqCst);
        forming.join().unwrap().unwrap().close().unwrap();
    });
}

#[test]
fn ranks_that_do_not_meet_give_up_in_time() {
    let mut group = Group::new();
    group.config.meet_timeout = Duration::from_millis(20);
    let text = form(&group, &AbortHandle::new()).unwrap_err().to_string();
    assert!(text.starts_with("the ranks of epoch 42 did not meet in NCCL within 20ms"), "{text}");
    assert_eq!(group.called(), [INIT, "abort"]);
}

#[test]
fn forming_can_be_aborted() {
    let group = Group::new();
    let abort = AbortHandle::new();
    let result = thread::scope(|scope| {
        let forming = scope.spawn(|| form(&group, &abort));
        assert_eq!(group.wait_for_calls(1), [INIT]);
        abort.abort();
        forming.join().unwrap()
    });
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
    assert_eq!(group.called(), ["abort"]);
}

#[test]
fn an_epoch_that_is_over_is_not_begun() {
    let group = Group::formed();
    let abort = AbortHandle::new();
    abort.abort();
    let result = form(&group, &abort);
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
    assert!(group.called().is_empty());
}

#[test]
fn an_init_that_is_refused_says_why() {
    let group = Group::new();
    group.fake.init.store(REMOTE_ERROR, Ordering::SeqCst);
    let abort = AbortHandle::new();
    let text = form(&group, &abort).unwrap_err().to_string();
    let expected = "ncclCommInitRankConfig failed: remote process exited or there was a network error: what had \
                    happened; NCCL_DEBUG=INFO tells more";
    assert_eq!(text, expected);
    assert_eq!(abort.cause().unwrap().to_string(), expected);
    assert_eq!(group.called(), [INIT], "there is nothing to abort");
}

#[test]
fn a_device_that_cannot_be_bound_says_why() {
    let group = Group::formed();
    let bind = || Err("no such device");
    let error =
        connect(&group.config, &group.library, group.id(EPOCH), &AbortHandle::new(), bind).unwrap_err();
    assert!(error.to_string().starts_with("binding the device failed: no such device"), "{error}");
    assert!(group.called().is_empty());
}

#[test]
fn a_hanging_init_asks_for_the_end_of_the_process() {
    let mut group = Group::formed();
    group.config.meet_timeout = Duration::from_millis(20);
    group.fake.hang("init");
    let started = Instant::now();
    let error = form(&group, &AbortHandle::new()).unwrap_err();
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    assert!(error.to_string().contains("exit this process"), "{error}");
    // Should it come back after all, nothing is left behind.
    group.fake.release();
    assert_eq!(group.wait_for_calls(2), [INIT, "abort"]);
}

#[test]
fn an_error_that_comes_by_itself_ends_the_epoch() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    group.fake.told.store(REMOTE_ERROR, Ordering::SeqCst);
    // Nobody calls or waits, and it is known all the same.
    let cause = abort.wait(AT_ONCE).unwrap().to_string();
    assert!(cause.starts_with("a call of NCCL failed: remote process exited"), "{cause}");
    communicator.close().unwrap();
    assert_eq!(group.called(), [INIT, "abort"]);
}

#[test]
fn a_wait_ends_with_the_epoch() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    let (entered, wait_entered) = mpsc::channel();
    let error = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            communicator.wait("a step", || {
                let _ = entered.send(());
                never()
            })
        });
        wait_entered.recv().unwrap();
        abort.abort();
        let started = Instant::now();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
        error
    });
    assert!(matches!(error, CollectiveError::Aborted), "{error:?}");
    communicator.close().unwrap();
    assert_eq!(group.called(), [INIT, "abort"]);
}

#[test]
fn a_wait_has_a_deadline() {
    let mut group = Group::formed();
    group.config.timeout = Duration::from_millis(20);
    let (communicator, abort) = ready(&group);
    let text = communicator.wait("a step", never).unwrap_err().to_string();
    assert!(text.starts_with("the group's GPUs did not end a step within 20ms"), "{text}");
    assert_eq!(abort.cause().unwrap().to_string(), text, "everybody hears the same");
    communicator.close().unwrap();
    assert_eq!(group.called(), [INIT, "abort"]);
}

#[test]
fn what_the_device_ends_after_an_abort_does_not_count() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    communicator.wait("a step", || Ok::<_, CollectiveError>(true)).unwrap();
    abort.abort();
    let result = communicator.wait("a step", || Ok::<_, CollectiveError>(true));
    assert!(matches!(result, Err(CollectiveError::Aborted)), "{result:?}");
}

#[test]
fn a_hanging_abort_asks_for_the_end_of_the_process() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    group.fake.hang("abort");
    let started = Instant::now();
    abort.abort();
    let error = communicator.close().unwrap_err();
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    assert!(matches!(error, CollectiveError::NcclStuck { .. }), "{error:?}");
    group.fake.release();
}

#[test]
fn peers_that_do_not_leave_are_not_waited_for_longer_than_for_a_call() {
    let mut group = Group::formed();
    group.config.timeout = Duration::from_millis(20);
    let (communicator, abort) = ready(&group);
    group.fake.told.store(IN_PROGRESS, Ordering::SeqCst);
    communicator.close().unwrap();
    assert_eq!(group.called(), [INIT, "finalize", "abort"]);
    let cause = abort.cause().unwrap().to_string();
    assert!(cause.starts_with("the group's GPUs did not end ncclCommFinalize within 20ms"), "{cause}");
}

#[test]
fn dropping_ends_the_epoch_without_a_panic() {
    let group = Group::formed();
    let (communicator, abort) = ready(&group);
    drop(communicator);
    assert!(matches!(abort.cause(), Some(CollectiveError::Aborted)), "{:?}", abort.cause());
    assert_eq!(group.called(), [INIT, "abort"]);

    let failed = Group::formed();
    let (communicator, abort) = ready(&failed);
    abort.abort();
    drop(communicator);
    assert_eq!(failed.called(), [INIT, "abort"]);

    let stuck = Group::formed();
    let (communicator, _) = ready(&stuck);
    stuck.fake.hang("abort");
    let started = Instant::now();
    drop(communicator);
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    stuck.fake.release();
}

#[test]
fn a_device_stays_until_nccl_has_left_it() {
    let group = Group::formed();
    let device = Arc::new(());
    let bound = Arc::clone(&device);
    let bind = move || {
        assert!(Arc::strong_count(&bound) > 0);
        Ok::<_, Infallible>(())
    };
    let communicator =
        connect(&group.config, &group.library, group.id(EPOCH), &AbortHandle::new(), bind).unwrap();
    group.fake.hang("abort");
    drop(communicator);
    assert_eq!(group.wait_for_calls(2), [INIT, "abort"]);
    assert_eq!(Arc::strong_count(&device), 2, "NCCL still works on it");
    group.fake.release();
    let began = Instant::now();
    while Arc::strong_count(&device) > 1 {
        assert!(began.elapsed() < AT_ONCE, "it is given back");
        thread::yield_now();
    }
}

#[test]
fn an_id_is_used_once_and_in_its_own_epoch() {
    let group = Group::formed();
    let (communicator, _) = ready(&group);
    communicator.close().unwrap();
    group.called();
    let text = form(&group, &AbortHandle::new()).unwrap_err().to_string();
    assert!(text.starts_with("NCCL's rendezvous id of epoch 42 is of no use in epoch 42"), "{text}");
    for (epoch, of) in [(43, EPOCH), (43, 44), (41, 41)] {
        let config = Config { epoch, ..group.config.clone() };
        let (abort, bind) = (AbortHandle::new(), || Ok::<_, Infallible>(()));
        let result = connect(&config, &group.library, group.id(of), &abort, bind);
        assert!(matches!(result, Err(CollectiveError::StaleId { .. })), "{epoch} {of}: {result:?}");
    }
    assert!(group.called().is_empty(), "NCCL saw none of them");
    let config = Config { epoch: 43, ..group.config.clone() };
    let bind = || Ok::<_, Infallible>(());
    connect(&config, &group.library, group.id(43), &AbortHandle::new(), bind).unwrap().close().unwrap();
}

#[test]
fn calls_reach_nccl_as_they_are() {
    let group = Group::formed();
    let (mut communicator, _) = ready(&group);
    group.called();
    let transfer = |peer, address, bytes| Transfer { peer, address, bytes };
    let exchange = Exchange {
        sends: vec![transfer(0, 0x30, 4), transfer(1, 0x40, 8)],
        receives: vec![transfer(0, 0x50, 4)],
    };
    // SAFETY: the fake follows no address.
    unsafe {
        communicator.all_gather(0x10, 0x20, 64, null_mut()).unwrap();
        communicator.broadcast(1, 0x10, 32, null_mut()).unwrap();
        communicator.exchange(&exchange, null_mut()).unwrap();
    }
    let expected = [
        "all_gather 0x10 0x20 64",
        "broadcast 0x10 0x10 32 root 1",
        "send 0x30 4 to 0",
        "send 0x40 8 to 1",
        "recv 0x50 4 from 0",
    ];
    assert_eq!(group.called(), expected);
    communicator.close().unwrap();
}

/// An all-gather, to the end of its call.
fn gather(communicator: &mut Communicator) -> Result<(), CollectiveError> {
    // SAFETY: the fake follows no address.
    unsafe { communicator.all_gather(0x10, 0x20, 64, null_mut()) }
}

#[test]
fn a_call_that_nccl_takes_up_later_is_waited_for() {
    let mut group = Group::formed();
    group.config.timeout = Duration::from_millis(20);
    let (mut communicator, _) = ready(&group);
    group.fake.enqueued.store(IN_PROGRESS, Ordering::SeqCst);
    gather(&mut communicator).unwrap();
    group.fake.told.store(IN_PROGRESS, Ordering::SeqCst);
    let text = gather(&mut communicator).unwrap_err().to_string();
    assert!(text.starts_with("the group's GPUs did not end ncclAllGather within 20ms"), "{text}");
}

#[test]
fn a_call_that_fails_ends_the_epoch() {
    let refused = |enqueued: Code, told: Code| {
        let group = Group::formed();
        let (mut communicator, abort) = ready(&group);
        group.fake.enqueued.store(enqueued, Ordering::SeqCst);
        group.fake.told.store(told, Ordering::SeqCst);
        let first = gather(&mut communicator).unwrap_err().to_string();
        assert!(first.contains("remote process exited or there was a network error"), "{first}");
        assert_eq!(gather(&mut communicator).unwrap_err().to_string(), first, "later calls repeat it");
        assert_eq!(abort.cause().unwrap().to_string(), first);
    };
    refused(REMOTE_ERROR, SUCCESS);
    refused(IN_PROGRESS, REMOTE_ERROR);

    let group = Group::formed();
    let (mut communicator, _) = ready(&group);
    group.fake.enqueued.store(REMOTE_ERROR, Ordering::SeqCst);
    let transfers = vec![Transfer { peer: 0, address: 0x10, bytes: 4 }; 2];
    let exchange = Exchange { sends: transfers, receives: Vec::new() };
    // SAFETY: the fake follows no address.
    let text = unsafe { communicator.exchange(&exchange, null_mut()) }.unwrap_err().to_string();
    assert!(text.contains("remote process exited or there was a network error"), "{text}");
    assert_eq!(fake::GROUPS.get(), 0, "the group is ended all the same");
}

/// Two ranks' processes, each in a thread, met on loopback or not.
fn processes<T: Send>(rank: impl Fn(Result<CpuCollective, CollectiveError>) -> T + Sync) -> Vec<T> {
    let listeners = [0, 1].map(|_| listen(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap());
    let mut config = fake::config(&[0..4, 4..8]);
    for (peer, listener) in config.peers.iter_mut().zip(&listeners) {
        peer.address = listener.address();
    }
    thread::scope(|scope| {
        let ranks: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(number, listener)| {
                let config = Config { rank: number, ..config.clone() };
                let rank = &rank;
                scope.spawn(move || rank(crate::connect(&config, listener, &AbortHandle::new())))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn every_rank_gets_the_id_of_rank_0() {
    let ids = processes(|control| {
        let mut control = control.unwrap();
        let id = UniqueId::share(&fake::library(), EPOCH, &mut control).unwrap();
        assert_eq!(format!("{id:?}"), "UniqueId(… of epoch 42)");
        control.barrier().unwrap();
        id.raw.0
    });
    assert_eq!(ids[0], ids[1]);
    let alone = UniqueId::share(&fake::library(), EPOCH, &mut Solo::new(8)).unwrap();
    assert_ne!(alone.raw.0, ids[0]);
}

#[test]
fn a_rank_that_is_in_another_epoch_takes_no_id() {
    let results = processes(|control| {
        let mut control = control.unwrap();
        let epoch = EPOCH + control.rank() as u64;
        let result = UniqueId::share(&fake::library(), epoch, &mut control);
        // Rank 0 hears of it.
        result.and_then(|_| control.barrier())
    });
    assert!(matches!(results[1], Err(CollectiveError::StaleId { of: EPOCH, epoch: 43 })), "{results:?}");
    assert!(matches!(results[0], Err(CollectiveError::AbortedBy { rank: 1 })), "{results:?}");
}

#[test]
fn without_an_id_nobody_waits_for_it() {
    let started = Instant::now();
    let results = processes(|control| {
        // It may hear of it while it still meets rank 0.
        UniqueId::share(&fake::library_without_network(), EPOCH, &mut control?).map(|_| ())
    });
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
    let text = results[0].as_ref().unwrap_err().to_string();
    let expected =
        "ncclGetUniqueId failed: unhandled system error: what had happened; NCCL_DEBUG=INFO tells more";
    assert_eq!(text, expected);
    assert!(matches!(results[1], Err(CollectiveError::AbortedBy { rank: 0 })), "{results:?}");
}

#[test]
fn a_rank_that_gives_up_takes_its_peers_out_of_nccl() {
    let waits = Barrier::new(2);
    let results = processes(|control| {
        let control = control.unwrap();
        // The devices are nobody's here, so to the fake both may be rank 1.
        let group = Group::formed();
        let communicator = form(&group, &control.abort_handle()).unwrap();
        if control.rank() == 1 {
            waits.wait();
            drop(communicator);
            return None;
        }
        let mut meet = Some(&waits);
        let started = Instant::now();
        let waited = communicator.wait("a step", || {
            meet.take().map(Barrier::wait);
            never()
        });
        let error = waited.unwrap_err();
        communicator.close().unwrap();
        assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
        assert_eq!(group.called(), [INIT, "abort"]);
        Some(error)
    });
    assert!(matches!(results[0], Some(CollectiveError::AbortedBy { rank: 1 })), "{results:?}");
}

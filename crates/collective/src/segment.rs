//! The memory through which a rank shows its messages to the ranks of its host.
//!
//! Every rank owns one segment, an anonymous memory file (`memfd`): it has no name that could be guessed or left
//! behind, and is gone with the last process that maps it, whatever kills them. Peers open it through
//! `/proc/PID/fd/N`, which the kernel allows to the same user only; pid and descriptor come over the
//! authenticated connection.
//!
//! # Protocol
//! Exchanges are numbered from 1 in the same order on all ranks; exchange k uses slot k mod 2 of each segment.
//!
//! 1. The owner waits until every peer's `finished` is at least k − 2, writes slot k mod 2, then stores
//!    `posted` = k with release ordering.
//! 2. A reader loads `posted` with acquire ordering until it is at least k, then reads the slot. The pair orders
//!    the owner's writes before the reads.
//! 3. A rank that will read nothing more of exchange k stores k into its own `finished` with release ordering;
//!    the owner's acquire load in step 1 of k + 2 orders these reads before the next writes to the slot.
//!
//! So nobody ever reads a slot while it is written.
//!
//! # Sleeping
//! A rank waits for one peer at a time and says for which in its own `asleep`, the futex word. Waiter: store
//! `asleep`, full fence, look once more at what it waits for, sleep. Waker: publish, full fence, look at
//! `asleep`. With both fences sequentially consistent, at least one sees the other: no wake-up is lost, and a
//! rank that nobody waits for pays no system call.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::thread::futex;

use crate::message::HEADER_BYTES;
use crate::wait::timespec;

/// Payload of one slot: longer messages stream through, so that no segment grows with a message. What all ranks
/// show at a time then fits the caches and the sockets' buffers (half or twice as much was slower for 1 MiB).
pub(crate) const PAYLOAD_BYTES: usize = 256 << 10;

/// A rank writes one slot while its peers still read the other.
const SLOTS: usize = 2;

const TOKEN_BYTES: usize = 32;
// Words that different ranks write stand on cache lines of their own.
const ASLEEP_AT: usize = 128;
const POSTED_AT: usize = 256;
const FINISHED_AT: usize = 384;
const SLOTS_AT: usize = 4096;
const PAYLOAD_AT: usize = 64;
const SLOT_BYTES: usize = PAYLOAD_AT + PAYLOAD_BYTES;
const SEGMENT_BYTES: usize = SLOTS_AT + SLOTS * SLOT_BYTES;

/// `asleep` of a rank that is awake; a rank that waits for peer p says p + 1.
const AWAKE: u32 = 0;

/// Proves that a segment is the one its owner spoke of.
pub(crate) type Token = [u8; TOKEN_BYTES];

/// Where a process of this host finds a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) pid: u32,
    pub(crate) descriptor: u32,
}

#[derive(Debug)]
pub(crate) struct Segment {
    map: MmapRaw,
    /// Held open by the owner, so that peers can open it too.
    file: File,
}

impl Segment {
    /// Makes this rank's own.
    pub(crate) fn create(token: &Token) -> io::Result<Self> {
        let file = memfd_create("galerne-collective", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let file = File::from(file);
        file.set_len(SEGMENT_BYTES as u64)?;
        // A peer that could shrink the file would make every reader die of SIGBUS.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let segment = Self::map(file)?;
        // SAFETY: the range lies within the map, and nobody else knows of the segment yet.
        unsafe { segment.map.as_mut_ptr().copy_from_nonoverlapping(token.as_ptr(), TOKEN_BYTES) };
        Ok(segment)
    }

    /// Opens a peer's.
    pub(crate) fn open(address: Address, token: &Token) -> io::Result<Self> {
        let path = format!("/proc/{}/fd/{}", address.pid, address.descriptor);
        let file = File::options().read(true).write(true).open(path)?;
        let wrong =
            || io::Error::new(io::ErrorKind::InvalidData, "it is not this epoch's memory of that rank");
        if file.metadata()?.len() != SEGMENT_BYTES as u64 {
            return Err(wrong());
        }
        let segment = Self::map(file)?;
        // SAFETY: the range lies within the map; the owner wrote the token before it told anyone of the segment,
        // and nobody writes it again.
        let found = unsafe { std::slice::from_raw_parts(segment.map.as_ptr(), TOKEN_BYTES) };
        if found == token { Ok(segment) } else { Err(wrong()) }
    }

    fn map(file: File) -> io::Result<Self> {
        // Populated, so that the first messages do not wait for page faults.
        let map = MmapOptions::new().len(SEGMENT_BYTES).populate().map_raw(&file)?;
        Ok(Self { map, file })
    }

    /// Where peers find this segment of this process.
    pub(crate) fn address(&self) -> Address {
        use std::os::fd::AsRawFd;
        Address { pid: std::process::id(), descriptor: self.file.as_raw_fd().unsigned_abs() }
    }

    /// The last exchange whose message the owner has written.
    pub(crate) fn posted(&self) -> &AtomicU64 {
        self.counter(POSTED_AT)
    }

    /// The last exchange of which the owner will read nothing more.
    pub(crate) fn finished(&self) -> &AtomicU64 {
        self.counter(FINISHED_AT)
    }

    fn counter(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `at` is one of the constants above: within the map, aligned (maps begin on a page), accessed
        // by atomic operations only, and mapped as long as `self` lives.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    fn asleep(&self) -> &AtomicU32 {
        // SAFETY: as in `counter`.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(ASLEEP_AT).cast()) }
    }

    /// Writes into the header of the slot of exchange `sequence`.
    ///
    /// # Safety
    /// The caller owns the segment and is in step 1 of the protocol.
    pub(crate) unsafe fn write_header(&self, sequence: u64, header: &[u8; HEADER_BYTES]) {
        let at = slot_at(sequence);
        // SAFETY: the slot lies within the map and its header below the payload; the protocol keeps readers away.
        unsafe { self.map.as_mut_ptr().add(at).copy_from_nonoverlapping(header.as_ptr(), HEADER_BYTES) };
    }

    /// Writes `bytes` into the payload of the slot of exchange `sequence`, beginning at byte `start`.
    ///
    /// # Safety
    /// The caller owns the segment and is in step 1 of the protocol.
    pub(crate) unsafe fn write(&self, sequence: u64, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= PAYLOAD_BYTES, "a slot holds {PAYLOAD_BYTES} bytes");
        let at = slot_at(sequence) + PAYLOAD_AT + start;
        // SAFETY: the range lies within the map as just checked; the protocol keeps readers away.
        unsafe { self.map.as_mut_ptr().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The header of exchange `sequence`.
    ///
    /// # Safety
    /// The caller is in step 2 of the protocol.
    pub(crate) unsafe fn header(&self, sequence: u64) -> [u8; HEADER_BYTES] {
        // SAFETY: within the map; the protocol keeps the writer away.
        unsafe { self.map.as_ptr().add(slot_at(sequence)).cast::<[u8; HEADER_BYTES]>().read() }
    }

    /// The payload of exchange `sequence`.
    ///
    /// # Safety
    /// The caller is in step 2 of the protocol (or owns the segment and has posted) and drops the slice before
    /// step 3.
    pub(crate) unsafe fn payload(&self, sequence: u64) -> &[u8] {
        let at = slot_at(sequence) + PAYLOAD_AT;
        // SAFETY: within the map; the protocol keeps the writer away.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(at), PAYLOAD_BYTES) }
    }

    /// The owner sleeps until `peer` wakes it, or somebody wakes it for good, or `timeout` is over, or for no
    /// reason; not at all if `ready`.
    pub(crate) fn sleep(&self, peer: usize, timeout: Duration, ready: impl Fn() -> bool) {
        let waiting_for = peer as u32 + 1;
        self.asleep().store(waiting_for, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !ready() {
            // Woken, too late to sleep, timed out, interrupted: the caller looks again in any case.
            let _ = futex::wait(self.asleep(), futex::Flags::empty(), waiting_for, Some(&timespec(timeout)));
        }
        self.asleep().store(AWAKE, Ordering::Relaxed);
    }

    /// Wakes the owner if it waits for rank `myself`; to be called after publishing what it waits for.
    pub(crate) fn wake_if_awaited(&self, myself: usize) {
        fence(Ordering::SeqCst);
        let asleep = self.asleep();
        let awaited = myself as u32 + 1;
        // The load comes first because it leaves the owner's cache line where it is.
        if asleep.load(Ordering::Relaxed) == awaited
            && asleep.compare_exchange(awaited, AWAKE, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            wake(asleep);
        }
    }

    /// Wakes the owner whomever it waits for; to be called after publishing that the epoch is over. Always calls
    /// the kernel: a peer may have been killed after it changed `asleep` and before it woke the owner.
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst);
        self.asleep().store(AWAKE, Ordering::Relaxed);
        wake(self.asleep());
    }
}

fn slot_at(sequence: u64) -> usize {
    SLOTS_AT + (sequence % SLOTS as u64) as usize * SLOT_BYTES
}

fn wake(asleep: &AtomicU32) {
    // Fails only for addresses that are no futex; there is one sleeper at most.
    let _ = futex::wake(asleep, futex::Flags::empty(), 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_sees_what_the_owner_wrote() {
        let token = [7; TOKEN_BYTES];
        let own = Segment::create(&token).unwrap();
        let peer = Segment::open(own.address(), &token).unwrap();
        // SAFETY: one thread, so nobody reads meanwhile.
        unsafe { own.write(5, 4, &[1, 2, 3]) };
        own.posted().store(5, Ordering::Release);
        assert_eq!(peer.posted().load(Ordering::Acquire), 5);
        // SAFETY: posted above.
        assert_eq!(unsafe { peer.payload(5) }[..8], [0, 0, 0, 0, 1, 2, 3, 0]);
    }

    #[test]
    fn memory_of_another_epoch_or_of_nobody_is_refused() {
        let own = Segment::create(&[7; TOKEN_BYTES]).unwrap();
        assert!(Segment::open(own.address(), &[8; TOKEN_BYTES]).is_err());
        let address = Address { pid: std::process::id(), descriptor: u32::MAX };
        assert!(Segment::open(address, &[7; TOKEN_BYTES]).is_err());
    }
}

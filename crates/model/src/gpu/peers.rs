//! The GPUs of one host by each other's memory: a short sum's pieces come from all to all with one trip (`cuda/peers.cu`).

use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use galerne_collective::{AbortHandle, Collective, CollectiveError};
use galerne_types::Shards;

use super::device::{Address, Buffer, Device, DeviceError, Launch, Shared, Word};
use super::inputs::{bytes_of, bytes_of_mut};
use super::kernels::{RANKS_MAX, Share};
use super::link::Ranks;

/// Blocks of a launch at most.
const SIGNALS: usize = 32;
const THREADS: u32 = 512;
/// Numbers that are moved at once.
const QUAD: usize = 4;
/// Two that take turns, and one each for a step's last sum and a round's last rows: what follows these begins with the first of the two.
/// What was drawn from these rows comes where the last sum came, which has been read.
const INBOXES: usize = 4;
/// How long the first turn of all may take.
const TRIAL_S_MAX: Duration = Duration::from_secs(2);
/// How long memory stays that others may still write to: until their kernels, too, have heard that the epoch is over.
const LINGER_S: Duration = Duration::from_secs(1);
/// How often it is looked at whether somebody still waits.
const LOOK_S: Duration = Duration::from_millis(100);
const FLOAT_BYTES: usize = size_of::<f32>();

/// Memory that each rank of a host has for the others, mapped by all of them for one epoch.
///
/// What a kernel waits for comes from other ranks. It quits when the epoch's [`AbortHandle`] is raised, wherever the host is then;
/// what the device has computed counts for nothing from then on.
pub struct Peers {
    device: Arc<dyn Device>,
    rank: usize,
    /// Of each rank; this one's own as it is.
    mapped: Vec<(Shared, Address)>,
    laid: Laid,
    /// Set when nobody waits any more.
    over: Arc<Word>,
    closed: Arc<AtomicBool>,
    abort: AbortHandle,
    timeout: Duration,
    /// `[inbox][rank][pieces_max][len_max]`, then signals `[rank][block]`, and the turns of each block.
    own: Arc<Buffer>,
}

/// Where what is in a rank's memory.
#[derive(Clone, Copy)]
struct Laid {
    ranks: usize,
    pieces_max: usize,
    len_max: usize,
}

impl Laid {
    fn inbox(self, at: usize) -> usize {
        at * (self.ranks * self.pieces_max * self.len_max * FLOAT_BYTES).next_multiple_of(256)
    }
    fn signals(self) -> usize {
        self.inbox(INBOXES)
    }
    fn turns(self) -> usize {
        self.signals() + self.ranks * SIGNALS * size_of::<u32>()
    }
    fn bytes(self) -> usize {
        self.turns() + SIGNALS * size_of::<u32>()
    }
}

impl Peers {
    /// Up to so many numbers of a sum come this way: 64 tokens of the 7 B model. Of more, NCCL moves less.
    pub const LEN_MAX: usize = 64 * 4096;

    /// Bytes that it takes of a rank's GPU.
    pub(super) fn bytes(ranks: &Ranks, len_max: usize) -> usize {
        if ranks.alone() { 0 } else { laid(ranks, len_max).bytes() }
    }

    /// Maps the memory of all ranks, which are on one host, and tries it. `None` at all of them if it cannot be had at one, which
    /// `refused` is told.
    ///
    /// # Errors
    /// [`CollectiveError`] if the other ranks are lost meanwhile.
    pub fn meet(
        device: &Arc<dyn Device>,
        (shards, rank, len_max): (Shards, usize, usize),
        collective: &mut dyn Collective,
        timeout: Duration,
        refused: &dyn Fn(&DeviceError),
    ) -> Result<Option<Self>, CollectiveError> {
        let ranks = Ranks::new(shards, rank);
        if ranks.alone() || shards.world_size() > RANKS_MAX {
            return Ok(None);
        }
        let laid = laid(&ranks, len_max);
        let own = Buffer::zeroed(device, laid.bytes())
            .and_then(|own| device.share(own.address()).map(|shared| (own, shared)));
        let all = agree(&own, collective, refused)?;
        let Some((own, shared)) = own.ok().filter(|_| all) else { return Ok(None) };
        let mut shareds = Vec::with_capacity(laid.ranks);
        for root in 0..laid.ranks {
            let mut bytes = shared.to_bytes();
            collective.broadcast(root, &mut bytes)?;
            shareds.push(Shared::from_bytes(bytes));
        }
        let met = Self::map(device, rank, laid, shareds, own, collective.abort_handle(), timeout);
        let all = agree(&met, collective, refused)?;
        let Some(met) = met.ok().filter(|_| all) else { return Ok(None) };
        let tried = met.try_once();
        Ok(agree(&tried, collective, refused)?.then_some(met))
    }

    fn map(
        device: &Arc<dyn Device>,
        rank: usize,
        laid: Laid,
        shareds: Vec<Shared>,
        own: Buffer,
        abort: AbortHandle,
        timeout: Duration,
    ) -> Result<Self, DeviceError> {
        let over = Arc::new(Word::zero(device)?);
        let closed = Arc::new(AtomicBool::new(false));
        let (device, mapped) = (Arc::clone(device), Vec::with_capacity(laid.ranks));
        let mut met = Self { device, rank, mapped, laid, over, closed, abort, timeout, own: Arc::new(own) };
        for (of, shared) in shareds.into_iter().enumerate() {
            let address = if of == rank { met.own.address() } else { met.device.map(&shared)? };
            met.mapped.push((shared, address));
        }
        met.watch();
        Ok(met)
    }

    /// Has kernels quit when the epoch is over, whatever the thread that launched them waits for.
    fn watch(&self) {
        let (over, closed, abort) = (Arc::clone(&self.over), Arc::clone(&self.closed), self.abort.clone());
        thread::spawn(move || {
            while !closed.load(Ordering::Acquire) {
                if abort.wait(LOOK_S).is_some() {
                    return over.set();
                }
            }
        });
    }

    /// A turn in which every rank brings numbers that the others know.
    fn try_once(&self) -> Result<(), DeviceError> {
        let Laid { ranks, pieces_max, len_max } = self.laid;
        let count = (pieces_max * len_max).min(SIGNALS * THREADS as usize * QUAD) / QUAD * QUAD;
        let of = |rank: usize| (0..count).map(move |at| (rank * count + at) as f32);
        let pieces = Buffer::zeroed(&self.device, count * FLOAT_BYTES)?;
        pieces.upload(0, bytes_of(&of(self.rank).collect::<Vec<_>>()))?;
        self.put(pieces.address(), count, 0)?;
        let began = Instant::now();
        let mut in_time = true;
        while !self.device.is_idle()? {
            if began.elapsed() > TRIAL_S_MAX {
                in_time = false;
                self.over.set();
            }
            thread::sleep(Duration::from_millis(1));
        }
        let mut found = vec![0.0f32; ranks * count];
        self.own.download(bytes_of_mut(&mut found))?;
        let expected = (0..ranks).flat_map(of);
        if in_time && found.into_iter().eq(expected) {
            return Ok(());
        }
        let says = "numbers did not come from GPU to GPU as they were sent".to_owned();
        Err(DeviceError::Call { call: "share", says })
    }

    /// Whether a sum of `len` numbers comes this way.
    pub fn take(&self, len: usize) -> bool {
        len <= self.laid.len_max && (self.laid.pieces_max * len).is_multiple_of(QUAD)
    }

    /// Brings this rank's pieces of a sum of `len` numbers to all; where those of all are then, `[N][pieces_max][len]`, until the turn
    /// after the next.
    ///
    /// # Errors
    /// As [`Device::launch`].
    ///
    /// # Panics
    /// If it does not [take](Self::take) as many.
    pub fn share(&self, pieces: &Buffer, len: usize, turn: Turn) -> Result<Address, DeviceError> {
        assert!(self.take(len), "a short sum");
        self.bring(pieces, 0..self.laid.pieces_max * len, turn)
    }

    /// Numbers that a rank can bring in one turn.
    pub(super) fn room(&self) -> usize {
        self.laid.pieces_max * self.laid.len_max / QUAD * QUAD
    }

    /// Brings these numbers of `from` to all; where those of all are then, `[N][range]`, until the turn after the next.
    pub(super) fn bring(
        &self,
        from: &Buffer,
        range: Range<usize>,
        turn: Turn,
    ) -> Result<Address, DeviceError> {
        let fits = range.len() <= self.laid.pieces_max * self.laid.len_max
            && range.end * FLOAT_BYTES <= from.bytes();
        assert!(
            fits && range.start.is_multiple_of(QUAD) && range.len().is_multiple_of(QUAD),
            "numbers in fours"
        );
        self.put(from.address() + (range.start * FLOAT_BYTES) as Address, range.len(), turn.inbox)?;
        Ok(self.own.address() + self.laid.inbox(turn.inbox) as Address)
    }

    fn put(&self, pieces: Address, count: usize, inbox: usize) -> Result<(), DeviceError> {
        let places = |offset: usize| {
            let mut places = [0; RANKS_MAX];
            iter::zip(&mut places, &self.mapped).for_each(|(place, (_, at))| *place = at + offset as Address);
            places
        };
        let blocks = count.div_ceil(QUAD * THREADS as usize).clamp(1, SIGNALS) as u32;
        let arguments = Share {
            pieces,
            inboxes: places(self.laid.inbox(inbox)),
            signals: places(self.laid.signals()),
            turns: self.own.address() + self.laid.turns() as Address,
            over: self.over.address(),
            count: count as u64,
            rank: self.rank as u32,
            ranks: self.laid.ranks as u32,
            blocks,
        };
        let launch = Launch::new(c"share", [blocks, 1, 1], THREADS, 0, &arguments);
        // SAFETY: as many pieces, and room for those of all in each inbox, which is mapped.
        unsafe { self.device.launch(&launch) }
    }

    /// As [`AbortHandle::wait_for_device`].
    pub(super) fn wait<E: From<CollectiveError>>(
        &self,
        done: impl FnMut() -> Result<bool, E>,
    ) -> Result<(), E> {
        self.abort.wait_for_device("a step", self.timeout, done)
    }
}

/// Which exchange of a series: where its numbers are must not be where somebody may still read what came before.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    inbox: usize,
}

impl Turn {
    /// One of so many sums of a step.
    pub fn sum(number: usize, of: usize) -> Self {
        Self { inbox: if number + 1 == of { 2 } else { number % 2 } }
    }

    /// What was drawn from a round's logits.
    pub(super) fn drawn() -> Self {
        Self { inbox: 2 }
    }

    /// One of so many that bring a round's logits.
    pub(super) fn rows(number: usize, of: usize) -> Self {
        Self { inbox: if number + 1 == of { 3 } else { number % 2 } }
    }
}

/// Whether all ranks have what they need.
fn agree<T>(
    own: &Result<T, DeviceError>,
    collective: &mut dyn Collective,
    refused: &dyn Fn(&DeviceError),
) -> Result<bool, CollectiveError> {
    if let Err(error) = own {
        refused(error);
    }
    let (own, mut all) = ([f32::from(u8::from(own.is_ok()))], vec![0.0; collective.world_size()]);
    collective.all_gather(&own, &vec![1; all.len()], &mut all)?;
    Ok(all.iter().all(|have| *have == 1.0))
}

fn laid(ranks: &Ranks, len_max: usize) -> Laid {
    Laid { ranks: ranks.world_size(), pieces_max: ranks.pieces_max(), len_max }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.over.set();
        self.closed.store(true, Ordering::Release);
        let own = Arc::clone(&self.own);
        thread::spawn(move || {
            thread::sleep(LINGER_S);
            drop(own);
        });
        // Kernels quit soon. If the device does not say so nobody knows what it still writes.
        let began = Instant::now();
        while !matches!(self.device.is_idle(), Ok(true)) {
            if began.elapsed() > TRIAL_S_MAX {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        for (of, (shared, address)) in self.mapped.iter().enumerate() {
            if of != self.rank {
                self.device.unmap(shared, *address);
            }
        }
    }
}

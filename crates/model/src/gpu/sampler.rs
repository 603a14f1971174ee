//! Draws where the logits are: what [`crate::sampler`] does, by a block of threads a row (`cuda/sampler.cu`). Only ids come back,
//! and what reports follow from where they are asked for.

use std::sync::Arc;

use galerne_types::limits::TOP_LOGPROBS_MAX;
use galerne_types::{Draw, TokenId, TokenOut};

use super::device::{Address, Buffer, Device, DeviceError, Launch, Stage};
use super::kernels::{Keep, threads_of};
use super::post::Post;
use crate::head::ROUND_MAX;
use crate::sampler::{Allowed, Past, Told, Unit, random};

/// What is wanted of a row of logits.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    /// The token that stands so many behind the one that is drawn so, after what stands before it.
    Draw(&'a Draw, u32, Option<&'a Past>),
    /// This token's log probability, and so many of the likeliest ones'.
    Score(TokenId, u32),
}

/// What a device needs for drawing.
pub struct Sampler {
    device: Arc<dyn Device>,
    post: Post,
    wants: Buffer,
    edits: Buffer,
    scores: Buffer,
    weights: Buffer,
    ids: Buffer,
    told: Buffer,
    /// `[slot]`: what was drawn for it last, if it was drawn to be [kept](Asked::keep).
    last: Buffer,
    vocab: usize,
}

/// What a launch is told.
pub(super) struct Asked {
    wants: Vec<Want>,
    edits: Vec<Edit>,
}

impl Asked {
    /// So many rows of which only tokens come, from wherever they are drawn.
    pub(super) fn elsewhere(rows: usize) -> Self {
        Self { wants: vec![Want::new(0); rows], edits: Vec::new() }
    }

    /// Rows that are not left to the host.
    pub(super) fn len(&self) -> usize {
        self.wants.len()
    }

    /// What is drawn becomes the last token of each of these slots.
    pub(super) fn keep(&mut self, slots: impl Iterator<Item = u32>) {
        self.wants.iter_mut().zip(slots).for_each(|(want, slot)| want.slot = slot.into());
    }

    fn tells(&self) -> bool {
        self.wants.iter().any(|want| want.tops != NONE)
    }
}

/// Scores of a launch that are changed at most, by penalties above all: 1 MiB. Rows with more are left to the host.
pub(crate) const EDITS_MAX: usize = 1 << 16;
const TOPS: usize = TOP_LOGPROBS_MAX as usize;
const NONE: u32 = u32::MAX;
const NOBODY: u64 = u64::MAX;
/// Shared memory of a block: a number of 64 bits for each of 256 digits, for each group of 16, and for each warp.
const SHARED_BYTES: u32 = (256 + 16 + 32) * 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct Want {
    scale: f64,
    random: u64,
    slot: u64,
    row: u32,
    edits: u32,
    edit_count: u32,
    lowest: u32,
    given: u32,
    tops: u32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    frequency: f32,
    presence: f32,
}

impl Want {
    /// The likeliest token, and nothing else.
    fn new(row: u32) -> Self {
        Self {
            scale: 0.0,
            random: 0,
            slot: NOBODY,
            row,
            edits: 0,
            edit_count: 0,
            lowest: 0,
            given: NONE,
            tops: NONE,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            frequency: 0.0,
            presence: 0.0,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Edit {
    id: TokenId,
    bias: f32,
    times: u32,
    what: u32,
}

const SEEN: u32 = 1;
const BANNED: u32 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct Answer {
    total: u64,
    own: f32,
    max: f32,
    rank: u32,
    tops: u32,
    top_ids: [u32; TOPS],
    top_logits: [f32; TOPS],
}

#[repr(C)]
struct Arguments {
    logits: Address,
    wants: Address,
    edits: Address,
    scores: Address,
    weights: Address,
    ids: Address,
    last: Address,
    told: Address,
    one: f64,
    vocab: u32,
    id_bits: u32,
}

/// Bytes of each buffer, in the order of [`Sampler`]'s fields.
fn sizes(rows: usize, slots: usize, vocab: usize) -> [usize; 7] {
    let edits = if rows == 0 { 0 } else { EDITS_MAX };
    [
        rows * size_of::<Want>(),
        edits * size_of::<Edit>(),
        rows * vocab * size_of::<f32>(),
        rows * vocab * size_of::<u64>(),
        rows.max(ROUND_MAX) * size_of::<TokenId>(), // also where others draw
        rows * size_of::<Answer>(),
        slots * size_of::<TokenId>(),
    ]
}

/// Bytes of what a row that is drawn from comes to: its token, and a report.
pub(super) const ROW_BYTES: usize = size_of::<TokenId>() + size_of::<Answer>();

impl Sampler {
    /// Room for so many rows at once, and for the last tokens of so many slots.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn new(
        device: &Arc<dyn Device>,
        rows: usize,
        slots: usize,
        vocab: usize,
    ) -> Result<Self, DeviceError> {
        let sizes = sizes(rows, slots, vocab);
        let [wants, edits, scores, weights, ids, told, last] =
            sizes.map(|bytes| Buffer::zeroed(device, bytes.max(1)));
        Ok(Self {
            device: Arc::clone(device),
            post: Post::new(device, sizes[0].max(sizes[1]).max(1))?,
            wants: wants?,
            edits: edits?,
            scores: scores?,
            weights: weights?,
            ids: ids?,
            told: told?,
            last: last?,
            vocab,
        })
    }

    /// Bytes that it takes.
    pub(super) fn bytes(rows: usize, slots: usize, vocab: usize) -> usize {
        sizes(rows, slots, vocab).into_iter().sum()
    }

    /// Where the last tokens are.
    pub(super) fn last(&self) -> Address {
        self.last.address()
    }

    /// What each row of `logits`, `[row][vocab]`, is asked for: the same as [`crate::sampler`] finds in it. `None` for a row
    /// that is left to the host: where a grammar binds the draw, and where penalties change more scores than there is room for.
    ///
    /// # Errors
    /// As [`Device::download`].
    ///
    /// # Panics
    /// If there is no room for as many rows.
    pub fn read(
        &mut self,
        logits: &Buffer,
        asks: &[Option<Ask<'_>>],
    ) -> Result<Vec<Option<TokenOut>>, DeviceError> {
        let asked = self.asked(asks);
        let mut found = vec![None; asks.len()];
        if asked.wants.is_empty() {
            return Ok(found);
        }
        self.tell(&asked)?;
        self.draw(logits, asked.len())?;
        let mut ids = vec![0u32; asked.len()];
        self.ids.download(bytes_of_mut(&mut ids))?;
        let mut answers = vec![Answer::default(); if asked.tells() { asked.len() } else { 0 }];
        if asked.tells() {
            self.told.download(bytes_of_mut(&mut answers))?;
        }
        for (at, want) in asked.wants.iter().enumerate() {
            found[want.row as usize] = Some(self.found(want, ids[at], answers.get(at)));
        }
        Ok(found)
    }

    /// What a launch is told of these rows, but for those that are left to the host.
    pub(super) fn asked(&self, asks: &[Option<Ask<'_>>]) -> Asked {
        let mut asked = Asked { wants: Vec::with_capacity(asks.len()), edits: Vec::new() };
        for (row, ask) in (0..).zip(asks) {
            asked.wants.extend(ask.and_then(|ask| self.want(row, ask, &mut asked.edits)));
        }
        asked
    }

    /// Tells the device what is asked for.
    ///
    /// # Errors
    /// As [`Stage::send`].
    ///
    /// # Panics
    /// If there is no room for as many rows.
    pub(super) fn tell(&mut self, asked: &Asked) -> Result<(), DeviceError> {
        self.post.put(&self.wants, bytes_of(&asked.wants))?;
        if asked.edits.is_empty() { Ok(()) } else { self.post.put(&self.edits, bytes_of(&asked.edits)) }
    }

    /// Draws from so many rows of which the device was told; nobody waits.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub(super) fn draw(&self, logits: &Buffer, rows: usize) -> Result<(), DeviceError> {
        let [wants, edits, scores, weights, ids, last, told] =
            [&self.wants, &self.edits, &self.scores, &self.weights, &self.ids, &self.last, &self.told]
                .map(Buffer::address);
        let arguments = Arguments {
            logits: logits.address(),
            wants,
            edits,
            scores,
            weights,
            ids,
            last,
            told,
            one: Unit::of(self.vocab).one(),
            vocab: self.vocab as u32,
            id_bits: self.vocab.next_power_of_two().ilog2().max(1).next_multiple_of(8),
        };
        let (grid, threads) = ([rows as u32, 1, 1], threads_of(arguments.vocab));
        // SAFETY: a row of logits for each want, and room for as many.
        unsafe { self.device.launch(&Launch::new(c"draw", grid, threads, SHARED_BYTES, &arguments)) }
    }

    /// What was drawn, a row after the other.
    pub(super) fn ids(&self) -> &Buffer {
        &self.ids
    }

    /// Takes so many tokens that were drawn elsewhere for last ones of the slots that stand at `slots`.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub(super) fn keep(&self, from: Address, slots: Address, count: usize) -> Result<(), DeviceError> {
        let (ids, last) = (self.ids.address(), self.last.address());
        let keep = Keep { from, slots, ids, last, count: count as u32 };
        // SAFETY: as many tokens and slots, which there are.
        unsafe { self.device.launch(&Launch::new(c"keep", [1, 1, 1], 32, 0, &keep)) }
    }

    /// Has what was drawn brought to `inbox`, behind what the first rows of a step came to.
    ///
    /// # Errors
    /// As [`Stage::receive`].
    pub(super) fn give(&self, inbox: &mut dyn Stage, first: usize, asked: &Asked) -> Result<(), DeviceError> {
        let rows = first..first + asked.len();
        // Reports stand before ids: they want the larger alignment.
        let ids = inbox.bytes().len() / ROW_BYTES * size_of::<Answer>();
        if asked.tells() {
            self.told.give(inbox, rows.start * size_of::<Answer>()..rows.end * size_of::<Answer>())?;
        }
        self.ids.give(inbox, ids + rows.start * size_of::<TokenId>()..ids + rows.end * size_of::<TokenId>())
    }

    /// What has come to `inbox`, when it is there, of rows that were asked so.
    pub(super) fn drawn(&self, inbox: &mut dyn Stage, asked: &[Asked]) -> Vec<TokenOut> {
        let wants: Vec<_> = asked.iter().flat_map(|asked| &asked.wants).collect();
        let (mut ids, mut answers) = (vec![0u32; wants.len()], vec![Answer::default(); wants.len()]);
        let bytes = inbox.bytes();
        let (told, drawn) = bytes.split_at(bytes.len() / ROW_BYTES * size_of::<Answer>());
        let copy = |to: &mut [u8], from: &[u8]| to.copy_from_slice(&from[..to.len()]);
        copy(bytes_of_mut(&mut ids), drawn);
        copy(bytes_of_mut(&mut answers), told);
        let all = wants.into_iter().zip(ids).zip(&answers);
        all.map(|((want, id), answer)| self.found(want, id, Some(answer))).collect()
    }

    fn found(&self, want: &Want, id: TokenId, answer: Option<&Answer>) -> TokenOut {
        match answer.filter(|_| want.tops != NONE) {
            None => TokenOut::unreported(id),
            Some(answer) => answer.told(id).report(self.vocab),
        }
    }

    /// What the device is told of a row; nothing of one that it cannot do.
    fn want(&self, row: u32, ask: Ask<'_>, edits: &mut Vec<Edit>) -> Option<Want> {
        let first = edits.len();
        let nothing = Want { edits: first as u32, ..Want::new(row) };
        let (draw, ahead, past) = match ask {
            Ask::Score(id, tops) => return Some(Want { given: id, tops, ..nothing }),
            Ask::Draw(Draw { grammar: Some(_), .. }, ..) => return None,
            Ask::Draw(draw, ahead, past) => (draw, ahead, past),
        };
        let sampling = &draw.sampling;
        let allowed = Allowed::new(self.vocab, &draw.banned, None);
        edits.extend(self.changes(draw, past.filter(|_| sampling.looks_back()), &allowed));
        merge(edits, first);
        if edits.len() > EDITS_MAX {
            edits.truncate(first);
            return None;
        }
        let warm = sampling.temperature > 0.0;
        Some(Want {
            scale: if warm { 1.0 / f64::from(sampling.temperature) } else { 0.0 },
            random: random(sampling.seed, draw.index.saturating_add(ahead)),
            edit_count: (edits.len() - first) as u32,
            lowest: allowed.lowest(),
            tops: sampling.logprobs.unwrap_or(NONE),
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition: sampling.repetition_penalty,
            frequency: sampling.frequency_penalty,
            presence: sampling.presence_penalty,
            ..nothing
        })
    }

    /// What becomes of scores, reason by reason.
    fn changes(&self, draw: &Draw, past: Option<&Past>, allowed: &Allowed<'_>) -> impl Iterator<Item = Edit> {
        let nothing = Edit { id: 0, bias: 0.0, times: 0, what: 0 };
        let seen = past.into_iter().flat_map(Past::tokens);
        let seen = seen.map(move |(id, times)| Edit { id, times, what: SEEN, ..nothing });
        let bias = draw.sampling.logit_bias.iter().map(move |&(id, bias)| Edit { id, bias, ..nothing });
        let banned = draw.banned.iter().filter(|id| !allowed.contains(**id));
        let banned = banned.map(move |&id| Edit { id, what: BANNED, ..nothing });
        seen.chain(bias).chain(banned).filter(|edit| (edit.id as usize) < self.vocab)
    }
}

/// Makes one edit of those from `first` on that are of the same token.
fn merge(edits: &mut Vec<Edit>, first: usize) {
    edits[first..].sort_by_key(|edit| edit.id);
    let mut last = first;
    for at in first + 1..edits.len() {
        let Edit { id, bias, times, what } = edits[at];
        if edits[last].id == id {
            let into = &mut edits[last];
            (into.bias, into.times, into.what) = (into.bias + bias, into.times + times, into.what | what);
        } else {
            last += 1;
            edits[last] = edits[at];
        }
    }
    edits.truncate(edits.len().min(last + 1));
}

impl Default for Answer {
    fn default() -> Self {
        Self { total: 0, own: 0.0, max: 0.0, rank: 0, tops: 0, top_ids: [0; TOPS], top_logits: [0.0; TOPS] }
    }
}

impl Answer {
    fn told(&self, id: TokenId) -> Told {
        let &Self { total, own, max, rank, tops, top_ids, top_logits } = self;
        let mut top: Vec<_> = top_ids.into_iter().zip(top_logits).take(tops as usize).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Told { id, own, rank, max, total, top }
    }
}

/// What may go to a device and come back as it lies in memory.
trait Record: Copy {}
impl Record for Want {}
impl Record for Edit {}
impl Record for Answer {}
impl Record for u32 {}

fn bytes_of<T: Record>(records: &[T]) -> &[u8] {
    // SAFETY: records are numbers without padding between or behind them.
    unsafe { std::slice::from_raw_parts(records.as_ptr().cast(), size_of_val(records)) }
}

fn bytes_of_mut<T: Record>(records: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are numbers.
    unsafe { std::slice::from_raw_parts_mut(records.as_mut_ptr().cast(), size_of_val(records)) }
}

//! The layers on a GPU, over a tile of tokens at a time: what `crate::forward` is on a CPU.

use std::sync::Arc;

use galerne_collective::Collective;
use galerne_types::Slice;

use super::ahead::Ahead;
use super::device::{Address, Buffer, Device, DeviceError};
use super::fast::{Fast, Packed};
use super::head::asks;
use super::inputs::{Inputs, bytes_of_mut};
use super::kernels::{
    Activations, AddNorm, Attend, Embed, FEW_TOKENS_MAX, GATE_UP, GateUp, Kv, Order, PLAIN, Pick, Plain,
    Product, QKV, QKV_SEGMENT_PAIRS, Qkv, Tree, add_norm, attend, each_row, multiply, order, sum_slots,
    together,
};
use super::layout::{KvPacking, tree_of};
use super::link::{Link, Places, Ranks};
use super::peers::Turn;
use super::plan::{Layer, Shape};
use super::weights::GpuWeights;
use super::workspace::{Room, Workspace};
use crate::check::Place;
use crate::error::ModelError;
use crate::head::{Read, Wanted};
use crate::products::Engine;
use crate::rank::{Trace, Tracer};
use crate::rows::Rows;
use crate::sampler::Past;

/// What the layers work with besides the weights.
pub(crate) struct Forward {
    /// What is kept to be replayed names the link and the memory, so it goes first.
    kept: Kept,
    /// Ends before the memory goes that its messages come from and go to.
    pub(super) link: Link,
    pub(super) core: Core,
    /// What was begun, and is under way.
    pub(super) ahead: Ahead,
    /// For what is left to the host: drawing.
    engine: Engine,
}

/// Has its device forget what it keeps.
struct Kept(Arc<dyn Device>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.forget();
    }
}

/// All that launching needs; nothing of it changes within a tile.
pub(super) struct Core {
    pub(super) weights: Arc<GpuWeights>,
    pub(super) ranks: Ranks,
    window: Option<usize>,
    pub(super) inputs: Inputs,
    pub(super) work: Workspace,
}

/// Leaves of a sum that is still to be made: where they begin, and their tree.
#[derive(Clone, Copy)]
struct Leaves {
    at: Address,
    tree: Tree,
}

impl Forward {
    /// # Errors
    /// [`ModelError::Device`], above all if there is too little memory.
    pub(crate) fn new(
        weights: Arc<GpuWeights>,
        engine: Engine,
        room: Room,
        link: Link,
    ) -> Result<Self, ModelError> {
        let ranks = Ranks::new(weights.portion.shards, weights.portion.rank);
        let work = Workspace::new(&weights, &ranks, room)?;
        let ahead = Ahead::new(&weights.device, room.sequences)?;
        let kept = Kept(Arc::clone(&weights.device));
        let core = Core { weights, ranks, window: room.window, inputs: Inputs::default(), work };
        Ok(Self { kept, link, core, ahead, engine })
    }

    /// Leaves the other ranks' GPUs.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the device is not let go: then the process must end, and nothing is given back.
    pub(crate) fn close(self) -> Result<(), ModelError> {
        let Self { kept, link, core, ahead, .. } = self;
        drop(kept);
        // What gives memory back would wait for a device that is not let go.
        link.close().inspect_err(|_| std::mem::forget((core, ahead)))
    }

    pub(crate) fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// As [`crate::forward::Forward::tile`].
    ///
    /// # Errors
    /// [`ModelError::Collective`] if the other ranks are lost, [`ModelError::Device`].
    pub(crate) fn tile(
        &mut self,
        slices: &[Slice],
        places: &[Place],
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        self.lay(slices, places)?;
        self.launch(0, collective, trace)
    }

    /// Tells the device of a tile's tokens.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(super) fn lay(&mut self, slices: &[Slice], places: &[Place]) -> Result<(), ModelError> {
        let Core { inputs, work, weights, window, .. } = &mut self.core;
        inputs.set(slices, places, weights.shape.group, *window);
        Ok(work.post.put(&work.inputs, inputs.bytes())?)
    }

    /// Runs the layers over the tile that was laid out last, and draws from so many rows that were [asked for](Core::ask), all of it as one
    /// graph where that can be.
    ///
    /// # Errors
    /// As [`tile`](Self::tile).
    pub(super) fn launch(
        &mut self,
        drawn: usize,
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        let Self { core, link, .. } = self;
        let work = |link: &mut Link, collective: &mut dyn Collective, trace: &mut Tracer<'_>| {
            core.layers(link, collective, trace)?;
            if drawn > 0 { core.draw(drawn, link, collective) } else { Ok(()) }
        };
        let row = if drawn > 0 { core.width() } else { 0 };
        let on_device = core.ranks.alone() || link.is_on_device(core.len(), row);
        if !on_device || trace.is_some() || core.inputs.tokens > FEW_TOKENS_MAX as usize {
            return work(link, collective, trace);
        }
        let mut stopped = None;
        let replayed = core.device().replay(core.key(drawn), &mut || {
            work(link, collective, &mut None).map_err(|error| match error {
                ModelError::Device(error) => error,
                other => {
                    stopped = Some(other);
                    DeviceError::GivenUp
                }
            })
        });
        stopped.map_or(Ok(()), Err)?;
        Ok(replayed?)
    }

    /// The logits of this rank's rows of the vocabulary for the rows of the last tile that `round` names, into `part`.
    ///
    /// # Errors
    /// [`ModelError::Device`]; [`ModelError::Collective`] if the other ranks are lost meanwhile.
    pub(crate) fn project(&mut self, round: &[Wanted], part: &mut Rows) -> Result<(), ModelError> {
        self.core.want(round, &[])?;
        self.core.logits(round.len(), part.width)?;
        self.link.wait(self.core.device())?;
        let part = bytes_of_mut(&mut part.data[..round.len() * part.width]);
        Ok(self.core.work.logits.download(part)?)
    }

    /// Draws and scores where the logits are, if rank 0's GPU can have all of them: `None` for a row that is left to the host.
    ///
    /// # Errors
    /// [`ModelError::Device`]; [`ModelError::Collective`] if the other ranks are lost meanwhile.
    pub(crate) fn read(
        &mut self,
        slices: &[Slice],
        round: &[Wanted],
        pasts: &[Option<Past>],
        collective: &mut dyn Collective,
    ) -> Result<Read, ModelError> {
        let Self { core, link, .. } = self;
        if !core.draws() {
            return Ok(Read::Nothing);
        }
        core.want(round, &[])?;
        core.logits(round.len(), core.width())?;
        if !core.ranks.alone() {
            core.join(link, round.len(), collective)?;
            if core.ranks.rank() > 0 {
                return Ok(Read::Elsewhere);
            }
            link.wait(core.device())?;
        }
        let Workspace { sampler, logits, joined, .. } = &mut core.work;
        let logits = if core.ranks.alone() { logits } else { joined };
        Ok(Read::Here(sampler.read(logits, &asks(slices, round, pasts))?))
    }

    /// Logits of a row of the round that was [read](Self::read) last, of the whole vocabulary.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn row(&self, at: usize, row: &mut [f32]) -> Result<(), ModelError> {
        Ok(self.core.whole().download_at(at * size_of_val(row), bytes_of_mut(row))?)
    }
}

impl Core {
    /// What has the same key is the same work, whatever the tokens.
    fn key(&self, drawn: usize) -> u64 {
        (drawn << 50 | self.inputs.tokens << 40 | self.inputs.tiles << 20 | self.chunks()) as u64
    }

    /// All layers.
    fn layers(
        &self,
        link: &mut Link,
        collective: &mut dyn Collective,
        trace: &mut Tracer<'_>,
    ) -> Result<(), ModelError> {
        let (weights, layers) = (&self.weights, self.weights.layers.len());
        self.embed()?;
        let mut leaves = match self.ranks.alone() {
            true => Leaves { at: self.work.leaves.address(), tree: tree_of(1) },
            false => self.meet(0, link, collective)?,
        };
        for (index, layer) in weights.layers.iter().enumerate() {
            self.add_norm(layer.attn_norm, leaves, index == 0, self.order_for(self.fast()), false)?;
            self.tell(index, &self.work.residual, trace)?;
            self.attention(layer, index)?;
            leaves = self.reduce(2 * index + 1, link, collective)?;
            self.add_norm(layer.mlp_norm, leaves, false, self.order_for(self.fast_gate_up()), false)?;
            self.mlp(layer)?;
            leaves = self.reduce(2 * index + 2, link, collective)?;
        }
        self.add_norm(weights.final_norm, leaves, false, self.order(), trace.is_some())?;
        self.tell(layers, &self.work.plain, trace)
    }

    /// Sums over all ranks' shards, but for what the next norm adds up. It is sum `number` of the step.
    fn reduce(
        &self,
        number: usize,
        link: &mut Link,
        collective: &mut dyn Collective,
    ) -> Result<Leaves, ModelError> {
        let (Workspace { leaves, pieces, .. }, together) = (&self.work, self.together());
        if self.ranks.alone() {
            let count = if self.fast().is_some() { 1 } else { self.weights.shape.shards / together };
            return Ok(Leaves { at: leaves.address(), tree: tree_of(count) });
        }
        let len = self.len();
        for (slot, piece) in self.ranks.own().enumerate().filter(|_| self.fast().is_none()) {
            let (from, to) = (self.row(leaves, piece.start / together), self.row(pieces, slot));
            // SAFETY: a row of each leaf and of each piece for each token.
            unsafe { sum_slots(self.device(), [from, to], [len, len], tree_of(piece.len() / together))? };
        }
        self.meet(number, link, collective)
    }

    /// Sums the pieces of all ranks, but for what the next norm adds up.
    fn meet(
        &self,
        number: usize,
        link: &mut Link,
        collective: &mut dyn Collective,
    ) -> Result<Leaves, ModelError> {
        let Workspace { leaves, pieces, gathered, .. } = &self.work;
        let places = Places { pieces, gathered, sum: leaves };
        let turn = Turn::sum(number, 2 * self.weights.layers.len() + 1);
        let (at, tree) = link.sum(self.device(), &self.ranks, places, (self.len(), turn), collective)?;
        Ok(Leaves { at, tree })
    }

    /// Numbers of a sum.
    fn len(&self) -> usize {
        self.inputs.tokens * self.weights.shape.hidden
    }

    /// Where sum `index` of several begins.
    fn row(&self, sums: &Buffer, index: usize) -> Address {
        sums.address() + (index * self.len() * size_of::<f32>()) as Address
    }

    fn tell(&self, layer: usize, from: &Buffer, trace: &mut Tracer<'_>) -> Result<(), ModelError> {
        if let Some(trace) = trace {
            let mut rows = vec![0.0f32; self.inputs.tokens * self.weights.shape.hidden];
            from.download(bytes_of_mut(&mut rows))?;
            trace(Trace::Hidden { layer, rows: &rows });
        }
        Ok(())
    }

    pub(super) fn device(&self) -> &dyn Device {
        &*self.weights.device
    }

    fn tokens(&self) -> u32 {
        self.inputs.tokens as u32
    }

    fn input(&self, section: usize) -> Address {
        self.work.inputs.address() + (self.inputs.offsets()[section] * size_of::<u32>()) as Address
    }

    /// Chunks of attention that warps of their own take; 0 if a warp runs through all of a tile's.
    fn chunks(&self) -> usize {
        let (shape, tokens) = (&self.weights.shape, self.inputs.tokens);
        let chunks = self.inputs.chunks.next_power_of_two();
        let bytes = chunks * tokens * shape.heads * (shape.dim + 2) * size_of::<f32>();
        let split = chunks > 1 && tokens <= FEW_TOKENS_MAX as usize && bytes <= self.work.chunks.bytes();
        if split { chunks } else { 0 }
    }

    /// A product whose sums are not cut into segments.
    pub(super) fn product(&self, weights: Address, x: Activations, tiles: usize) -> Product {
        Product {
            weights,
            x: x.numbers,
            tiles: tiles as u32,
            tokens: self.tokens(),
            token_tiles: x.token_tiles,
            pairs: x.pairs,
            segment: x.pairs.next_multiple_of(4).max(4),
            together: 1,
        }
    }

    /// Activations of the tile, a row of so many pairs of k-tiles for each shard.
    fn activations(&self, numbers: &Buffer, [shards, pairs]: [usize; 2], order: Order) -> Activations {
        let (numbers, token_tiles) = (numbers.address(), self.work.token_tiles as u32);
        Activations { numbers, token_tiles, pairs: pairs as u32, shards: shards as u32, order }
    }

    /// What is normed.
    pub(super) fn normed(&self, order: Order) -> Activations {
        self.activations(&self.work.normed, [1, self.weights.shape.hidden_pairs()], order)
    }

    /// How our own products take activations of the tile.
    pub(super) fn order(&self) -> Order {
        order(self.device(), self.inputs.tokens)
    }

    /// How activations stand for a product that may be the library's.
    fn order_for(&self, fast: Option<&Fast>) -> Order {
        if fast.is_some() { Order::Rows } else { self.order() }
    }

    /// Shards that are summed into a leaf.
    fn together(&self) -> usize {
        together(self.device(), self.inputs.tokens, self.ranks.own())
    }

    fn embed(&self) -> Result<(), DeviceError> {
        let portion = &self.weights.portion;
        let alone = self.ranks.alone();
        let arguments = Embed {
            rows: self.weights.embedding,
            ids: self.work.inputs.address(),
            last: self.work.sampler.last(),
            out: if alone { &self.work.leaves } else { &self.work.pieces }.address(),
            stride: self.len() as u64,
            pieces: if alone { 1 } else { self.ranks.pieces_max() as u32 },
            first: portion.cut.vocab(portion.own_shards()).start as u32,
            own: self.weights.shape.vocab as u32,
            hidden: self.weights.shape.hidden as u32,
        };
        // SAFETY: ids of the tile, and room for a row each.
        unsafe { each_row(self.device(), c"embed", self.tokens(), &arguments) }
    }

    /// Adds the leaves to the residual stream, and norms it.
    fn add_norm(
        &self,
        weight: Address,
        leaves: Leaves,
        starts: bool,
        order: Order,
        plain: bool,
    ) -> Result<(), DeviceError> {
        let Shape { hidden, .. } = self.weights.shape;
        let arguments = AddNorm {
            leaves: leaves.at,
            residual: self.work.residual.address(),
            weight,
            out: self.normed(order),
            plain: if plain { self.work.plain.address() } else { 0 },
            stride: self.len() as u64,
            hidden: hidden as u32,
            starts: u32::from(starts),
            eps: self.weights.portion.config.norm_eps,
            tree: leaves.tree,
        };
        // SAFETY: a row of each leaf, of the residual stream and of what is normed for each token.
        unsafe { add_norm(self.device(), self.tokens(), &arguments) }
    }

    /// Attention of one layer, into the leaves.
    fn attention(&self, layer: &Layer, index: usize) -> Result<(), DeviceError> {
        let GpuWeights { shape, packing, portion, .. } = &*self.weights;
        let (packing, config) = (*packing, &portion.config);
        let layer_bytes = shape.kv_heads * self.work.kv_packing.head_bytes(shape.dim);
        let kv = Kv {
            data: self.work.kv.address() + (index * layer_bytes) as Address,
            stride: (config.layers * layer_bytes) as u64,
            dim: shape.dim as u32,
            fp8: u32::from(self.work.kv_packing == KvPacking::Fp8),
        };
        let fast = self.fast();
        let order = self.order_for(fast);
        let normed = self.normed(order);
        let product = self.product(layer.qkv, normed, shape.qkv_tiles());
        let qkv = Qkv {
            product: Product { segment: QKV_SEGMENT_PAIRS as u32, ..product },
            positions: self.input(0),
            places: self.input(1),
            kv,
            turns: self.work.turns.address(),
            queries: self.work.queries.address(),
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            rotary_pairs: (config.head_dim / 2) as u32,
        };
        let attended = [shape.shards, shape.attended_pairs()];
        let seen = Attend {
            queries: qkv.queries,
            kv,
            tiles: self.input(2),
            table: self.input(3),
            out: self.activations(&self.work.attended, attended, self.order()),
            partials: self.work.chunks.address(),
            scale: std::f32::consts::LOG2_E / (config.head_dim as f32).sqrt(),
            tile_count: self.inputs.tiles as u32,
            tokens: self.tokens(),
            kv_heads: shape.kv_heads as u32,
            group: shape.group as u32,
            window: self.window.map_or(0, |window| window as u32),
            chunks: self.chunks() as u32,
        };
        // SAFETY: `check` has seen to it that blocks exist and reach to the last position; buffers have room for a tile.
        unsafe {
            match fast {
                Some(fast) => self.multiply_fast(fast, (&qkv.product, normed), c"qkv_finished", &qkv)?,
                None => multiply(self.device(), &QKV, (packing, &qkv.product), 1, &qkv)?,
            }
            attend(self.device(), &seen)?;
        }
        let Some(fast) = fast else { return self.partial(layer.o, seen.out) };
        let rows = self.activations(&fast.attended, attended, Order::Rows);
        let pick = Pick { from: seen.out, to: rows, wanted: 0 };
        // SAFETY: as many rows in both, and all are wanted.
        unsafe { each_row(self.device(), c"pick", self.tokens(), &pick)? };
        self.partial(layer.o, rows)
    }

    /// The MLP of one layer, into the leaves.
    fn mlp(&self, layer: &Layer) -> Result<(), DeviceError> {
        let (shape, packing, fast) = (&self.weights.shape, self.weights.packing, self.fast_gate_up());
        let normed = self.normed(self.order_for(fast));
        let product = self.product(layer.gate_up, normed, shape.gate_up_tiles());
        let order = self.order_for(self.fast());
        let out = self.activations(&self.work.mlp, [shape.shards, shape.mlp_pairs()], order);
        let gate_up = GateUp { product, out };
        match fast {
            Some(fast) => self.multiply_fast(fast, (&product, normed), c"gate_up_finished", &gate_up)?,
            // SAFETY: buffers have room for a tile.
            None => unsafe { multiply(self.device(), &GATE_UP, (packing, &product), 1, &gate_up)? },
        }
        self.partial(layer.down, out)
    }

    /// A product of each shard's columns, into a leaf of its own, or one for some shards that are summed; or, by the library, of all
    /// columns of each of this rank's pieces.
    fn partial(&self, weights: Address, x: Activations) -> Result<(), DeviceError> {
        let (shape, Workspace { leaves, pieces, .. }) = (&self.weights.shape, &self.work);
        if let Some(fast) = self.fast() {
            let (shards, tiles, pairs) = (shape.shards, shape.hidden_tiles(), x.pairs as usize);
            let packed = Packed { at: weights, shards, tiles, pairs };
            if self.ranks.alone() {
                return self.sum_fast(fast, packed, x, shape.hidden, [(0..shards, leaves.address())]);
            }
            let pieces = self.ranks.own().enumerate().map(|(slot, piece)| (piece, self.row(pieces, slot)));
            return self.sum_fast(fast, packed, x, shape.hidden, pieces);
        }
        let together = self.together() as u32;
        let product = Product { together, ..self.product(weights, x, shape.hidden_tiles()) };
        let plain = Plain { product, out: leaves.address(), width: shape.hidden as u32 };
        let packing = (self.weights.packing, &product);
        // SAFETY: buffers have room for a tile.
        unsafe { multiply(self.device(), &PLAIN, packing, shape.shards as u32, &plain) }
    }
}

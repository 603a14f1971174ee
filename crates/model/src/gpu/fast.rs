//! `fast`: products of many tokens by the vendor's library, which adds up in whatever order is quick. What it takes and gives are
//! rows of matrices: weights are taken out of their fragments before (`cuda/library.cu`), and what our own products do with sums in
//! registers is done after.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::device::{Address, Buffer, Device, DeviceError, Gemm};
use super::forward::Core;
use super::kernels::{Activations, Finished, HOPPER, PAIR, Product, TILE_ROWS, Unpack, finish, unpack};
use super::plan::Shape;
use super::workspace::{PACKED_BYTES, Room};

/// From so many tokens on a tile's products are the library's: taking weights out of their fragments takes as long for few.
const TOKENS_MIN: usize = 512;
/// What the library asks for on Hopper and newer.
const SCRATCH_BYTES: usize = 32 << 20;

/// Memory for it.
pub(super) struct Fast {
    /// `[rows][shards][inputs of a shard]`, bf16: one matrix at a time.
    unpacked: Buffer,
    /// `[token][rows]`, of products that do not end with their sums.
    sums: Buffer,
    /// `[token][shard][inputs of a shard]`.
    pub(super) attended: Buffer,
    scratch: Buffer,
}

/// Weights of some shards, as they are packed.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    pub(super) at: Address,
    pub(super) shards: usize,
    pub(super) tiles: usize,
    /// Of each shard.
    pub(super) pairs: usize,
}

/// Whether gate and up are the library's, too. On Hopper our own product comes to nine tenths of the library's rate, and its sums
/// need not pass through memory.
fn takes_gate_up(architecture: u16) -> bool {
    architecture != HOPPER
}

/// Bytes of each buffer, in the order of [`Fast`]'s fields.
pub(super) fn sizes(architecture: u16, shape: &Shape, room: Room) -> [usize; 4] {
    if room.tokens() < TOKENS_MIN {
        return [0; 4];
    }
    let gate_up = if takes_gate_up(architecture) { shape.gate_up_tiles() } else { 0 };
    let matrix = |tiles: usize, pairs: usize| tiles * TILE_ROWS * pairs * PAIR * size_of::<bf16>();
    let matrices = [
        matrix(shape.qkv_tiles().max(gate_up), shape.hidden_pairs()),
        matrix(shape.hidden_tiles(), shape.shards * shape.attended_pairs()),
        matrix(shape.hidden_tiles(), shape.shards * shape.mlp_pairs()),
    ];
    [
        matrices.into_iter().max().unwrap_or(0),
        room.tokens() * shape.qkv_tiles().max(gate_up) * TILE_ROWS * size_of::<f32>(),
        shape.shards * room.token_tiles() * shape.attended_pairs() * PACKED_BYTES,
        SCRATCH_BYTES,
    ]
}

impl Fast {
    pub(super) fn new(device: &Arc<dyn Device>, shape: &Shape, room: Room) -> Result<Self, DeviceError> {
        device.open_library()?;
        let sizes = sizes(device.architecture(), shape, room);
        let [unpacked, sums, attended, scratch] = sizes.map(|bytes| Buffer::zeroed(device, bytes.max(1)));
        Ok(Self { unpacked: unpacked?, sums: sums?, attended: attended?, scratch: scratch? })
    }
}

impl Core {
    /// What the tile's products are made with, if the library makes them.
    pub(super) fn fast(&self) -> Option<&Fast> {
        self.work.fast.as_ref().filter(|_| self.inputs.tokens >= TOKENS_MIN)
    }

    /// The same for gate and up.
    pub(super) fn fast_gate_up(&self) -> Option<&Fast> {
        self.fast().filter(|_| takes_gate_up(self.device().architecture()))
    }

    /// Multiplies, and ends the product with `kernel`, whose arguments begin with `product`.
    pub(super) fn multiply_fast<F: Copy>(
        &self,
        fast: &Fast,
        (product, x): (&Product, Activations),
        kernel: &CStr,
        arguments: &F,
    ) -> Result<(), DeviceError> {
        if product.tiles == 0 {
            return Ok(());
        }
        let (tiles, pairs) = (product.tiles as usize, product.pairs as usize);
        let weights = Packed { at: product.weights, shards: 1, tiles, pairs };
        let sums = fast.sums.address();
        self.sum_fast(fast, weights, x, tiles * TILE_ROWS, [(0..1, sums)])?;
        let finished = Finished { finish: *arguments, sums };
        // SAFETY: the sums are there, and the caller's arguments are those of the kernel.
        unsafe { finish(self.device(), kernel, product, &finished) }
    }

    /// Sums `rows` outputs over the inputs of each of some ranges of shards, `[token][rows]`, to where each goes.
    pub(super) fn sum_fast(
        &self,
        fast: &Fast,
        weights: Packed,
        x: Activations,
        rows: usize,
        pieces: impl IntoIterator<Item = (Range<usize>, Address)>,
    ) -> Result<(), DeviceError> {
        let Packed { at, shards, tiles, pairs } = weights;
        let unpacked = fast.unpacked.address();
        let arguments = Unpack {
            weights: at,
            out: unpacked,
            tiles: tiles as u32,
            pairs: pairs as u32,
            shards: shards as u32,
        };
        // SAFETY: there is room for the largest matrix.
        unsafe { unpack(self.device(), self.weights.packing, &arguments)? };
        let inputs = pairs * PAIR;
        for (piece, out) in pieces {
            let before = (piece.start * inputs * size_of::<bf16>()) as Address;
            let product = Gemm {
                weights: unpacked + before,
                x: x.numbers + before,
                out,
                rows,
                tokens: self.inputs.tokens,
                inputs: piece.len() * inputs,
                stride: shards * inputs,
                scratch: (fast.scratch.address(), fast.scratch.bytes()),
            };
            // SAFETY: a row of each matrix for each output and token, and room for as many sums.
            unsafe { self.device().multiply(&product)? };
        }
        Ok(())
    }
}

//! Where the arithmetic is done.

use std::sync::Arc;

use galerne_collective::Collective;
use galerne_types::{Slice, TokenOut};

use crate::check::{Bounds, Place};
use crate::error::ModelError;
use crate::head::{Head, Read, Wanted};
use crate::kv::Kept;
use crate::products::Engine;
use crate::rank::{Options, Tracer};
use crate::sampler::Past;
use crate::weights::Weights;
use crate::{forward, gpu};

/// The layers and the head, with the weights and the KV memory that they work on.
pub(crate) enum Backend {
    /// This process's threads.
    Cpu(Arc<Weights>, Box<forward::Forward>),
    /// A GPU; threads draw what it does not.
    Gpu(Box<gpu::Forward>),
}

impl Backend {
    /// # Errors
    /// [`ModelError::KvDtype`].
    pub(crate) fn cpu(
        weights: Arc<Weights>,
        options: &Options,
        bounds: &Bounds,
        engine: Engine,
    ) -> Result<Self, ModelError> {
        let room = forward::Room {
            kv_blocks: bounds.kv_blocks,
            positions: bounds.positions_max,
            tokens: bounds.step_tokens_max.min(forward::TILE_TOKENS_MAX),
            window: bounds.window,
            compute: options.compute,
            kept: Kept::of(options.kv_dtype)?,
        };
        let forward = forward::Forward::new(&weights, engine, room);
        Ok(Self::Cpu(weights, Box::new(forward)))
    }

    /// # Errors
    /// [`ModelError::Device`], [`ModelError::KvDtype`].
    pub(crate) fn gpu(
        weights: Arc<gpu::GpuWeights>,
        options: &Options,
        bounds: &Bounds,
        engine: Engine,
        link: gpu::Link,
    ) -> Result<Self, ModelError> {
        let room = gpu::Room {
            kv_blocks: bounds.kv_blocks,
            sequences: bounds.sequences_max,
            positions: bounds.positions_max,
            step_tokens: bounds.step_tokens_max,
            window: bounds.window,
            kv_packing: gpu::KvPacking::of(options.kv_dtype)?,
            fast: options.is_fast(),
        };
        Ok(Self::Gpu(Box::new(gpu::Forward::new(weights, engine, room, link)?)))
    }

    /// Leaves the other ranks' devices.
    ///
    /// # Errors
    /// [`ModelError::Collective`] if that cannot be done: then the process must end.
    pub(crate) fn close(self) -> Result<(), ModelError> {
        match self {
            Self::Cpu(..) => Ok(()),
            Self::Gpu(forward) => forward.close(),
        }
    }

    /// Most tokens that [`tile`](Self::tile) takes.
    pub(crate) fn tile_tokens_max(&self) -> usize {
        match self {
            Self::Cpu(..) => forward::TILE_TOKENS_MAX,
            Self::Gpu(_) => gpu::TILE_TOKENS_MAX,
        }
    }

    /// The threads that draw.
    pub(crate) fn engine(&mut self) -> &mut Engine {
        match self {
            Self::Cpu(_, forward) => forward.engine_and_normed().0,
            Self::Gpu(forward) => forward.engine(),
        }
    }

    /// Runs a tile of tokens through all layers; the rows after the final norm stand ready for the head.
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
        match self {
            Self::Cpu(weights, forward) => forward.tile(weights, slices, places, collective, trace),
            Self::Gpu(forward) => forward.tile(slices, places, collective, trace),
        }
    }

    /// Whether steps can be [begun](Self::begin).
    pub(crate) fn begins(&self) -> bool {
        match self {
            Self::Cpu(..) => false,
            Self::Gpu(forward) => forward.begins(),
        }
    }

    /// Gives a GPU all work of a step that is one tile, if it needs the host for nothing; whether it did.
    ///
    /// # Errors
    /// As [`tile`](Self::tile).
    pub(crate) fn begin(
        &mut self,
        step: (&[Slice], &[Place]),
        wanted: &[Wanted],
        pasts: &[Option<Past>],
        collective: &mut dyn Collective,
    ) -> Result<bool, ModelError> {
        match self {
            Self::Cpu(..) => Ok(false),
            Self::Gpu(forward) => forward.begin(step, wanted, pasts, collective),
        }
    }

    /// Whether the oldest step that was begun is still under way.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn is_busy(&self) -> Result<bool, ModelError> {
        match self {
            Self::Cpu(..) => Ok(false),
            Self::Gpu(forward) => forward.is_busy(),
        }
    }

    /// What the oldest step that was begun has drawn, once it is over.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn finish(&mut self) -> Result<Vec<TokenOut>, ModelError> {
        match self {
            Self::Cpu(..) => Ok(Vec::new()),
            Self::Gpu(forward) => forward.finish(),
        }
    }

    /// Draws and scores from the rows that `round` names where the logits are.
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
        match self {
            Self::Cpu(..) => Ok(Read::Nothing),
            Self::Gpu(forward) => forward.read(slices, round, pasts, collective),
        }
    }

    /// Brings the host logits of these rows of the round that was [read](Self::read) last.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn fetch(&self, head: &mut Head, rows: &[usize]) -> Result<(), ModelError> {
        match self {
            Self::Cpu(..) => Ok(()),
            Self::Gpu(forward) => head.fill(rows.len(), |at, row| forward.row(rows[at], row)),
        }
    }

    /// This rank's part of the logits of the rows that `round` names, into `head`.
    ///
    /// # Errors
    /// [`ModelError::Device`].
    pub(crate) fn project(&mut self, head: &mut Head, round: &[Wanted]) -> Result<(), ModelError> {
        match self {
            Self::Cpu(weights, forward) => {
                let (engine, normed) = forward.engine_and_normed();
                head.project(weights, engine, normed, round);
                Ok(())
            }
            Self::Gpu(forward) => forward.project(round, head.part()),
        }
    }
}

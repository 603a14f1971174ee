use std::path::Path;

use crate::error::CheckpointError;

/// The numbers of one model of Mistral's architecture: RMSNorm, RoPE, grouped-query attention, SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head, even.
    pub head_dim: usize,
    /// Width of the MLP between gate/up and down.
    pub intermediate: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// RoPE's base θ: pair `i` turns by `position · θ^(−2i / head_dim)`.
    pub rope_theta: f64,
    /// ε of RMSNorm.
    pub norm_eps: f32,
    /// Sliding window in tokens, the query's own included; `None` attends to everything before.
    pub window: Option<usize>,
    /// Longest sequence the model was made for, prompt and answer together.
    pub context_tokens_max: usize,
    /// The head is the embedding matrix.
    pub tied: bool,
    /// Token that a sequence starts with.
    pub bos: Option<u32>,
    /// Tokens that end an answer, ascending.
    pub eos: Vec<u32>,
}

/// Limits far above any model of this architecture, so that no product of two of them can overflow or be allocated
/// on a file's word alone.
const LAYERS_MAX: usize = 1 << 10;
const HEADS_MAX: usize = 1 << 12;
const HEAD_DIM_MAX: usize = 1 << 10;
const WIDTH_MAX: usize = 1 << 20;
const VOCAB_TOKENS_MAX: usize = 1 << 24;
const CONTEXT_TOKENS_MAX: usize = 1 << 26;

impl Config {
    /// Query heads that share one KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The width of a head where the file leaves it open.
    pub(crate) fn derive_head_dim(
        path: &Path,
        hidden: usize,
        heads: usize,
    ) -> Result<usize, CheckpointError> {
        match hidden.checked_rem(heads) {
            Some(0) => Ok(hidden / heads),
            _ => {
                let problem = format!("no head dimension is given, and {heads} heads do not divide {hidden}");
                Err(CheckpointError::malformed(path, problem))
            }
        }
    }

    /// Bytes that differ whenever two configurations do.
    pub(crate) fn canonical(&self) -> Vec<u8> {
        let Self { layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, .. } = *self;
        let mut bytes = Vec::new();
        let window = self.window.unwrap_or(0);
        for size in
            [layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, window, self.context_tokens_max]
        {
            bytes.extend((size as u64).to_le_bytes());
        }
        bytes.extend(self.rope_theta.to_le_bytes());
        bytes.extend(self.norm_eps.to_le_bytes());
        bytes.push(u8::from(self.tied));
        bytes.push(u8::from(self.bos.is_some()));
        for id in self.bos.iter().chain(&self.eos) {
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    /// Refuses what no model can mean; `path` is the file that said so.
    pub(crate) fn check(&self, path: &Path) -> Result<(), CheckpointError> {
        let refuse = |problem: String| Err(CheckpointError::malformed(path, problem));
        let sizes = [
            ("number of layers", self.layers, LAYERS_MAX),
            ("hidden size", self.hidden, WIDTH_MAX),
            ("number of attention heads", self.heads, HEADS_MAX),
            ("number of key/value heads", self.kv_heads, HEADS_MAX),
            ("head dimension", self.head_dim, HEAD_DIM_MAX),
            ("intermediate size", self.intermediate, WIDTH_MAX),
            ("vocabulary size", self.vocab, VOCAB_TOKENS_MAX),
            ("context length", self.context_tokens_max, CONTEXT_TOKENS_MAX),
        ];
        for (what, size, max) in sizes {
            if size == 0 || size > max {
                return refuse(format!("the {what} is {size}; expected 1 to {max}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return refuse(format!("{heads} attention heads do not divide among {kv_heads} key/value heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!("the head dimension is {}; RoPE needs an even one", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return refuse(format!("RoPE's theta is {}; expected a number of at least 1", self.rope_theta));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return refuse(format!("the norms' epsilon is {}; expected between 0 and 1", self.norm_eps));
        }
        if self.window == Some(0) {
            return refuse(
                "the sliding window is 0 tokens; expected at least 1, or null for none".to_owned(),
            );
        }
        for id in self.bos.iter().chain(&self.eos) {
            if usize::try_from(*id).is_ok_and(|id| id >= self.vocab) {
                return refuse(format!(
                    "the special token {id} lies beyond the vocabulary of {}",
                    self.vocab
                ));
            }
        }
        Ok(())
    }
}

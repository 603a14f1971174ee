//! `galerne model inspect`: what a checkpoint is, and what serving it takes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use galerne_checkpoint::{Checkpoint, TokenizerAsset, Weight};
use galerne_model::{Weights, gpu, kv_bytes_per_block};
use galerne_text::{ChatFormat, Tokenizer};
use galerne_types::limits::{KV_BLOCK_TOKENS, WORLD_SIZE_MAX};
use galerne_types::{KvDtype, Shards};
use serde::Serialize;

use super::bytes;

/// Tells what a checkpoint is: parameters, S, the numbers of ranks it can be cut into, and memory per rank.
///
/// Reads headers only. A checkpoint that could not be served is refused with a sentence.
#[derive(Args)]
pub(super) struct Inspect {
    /// Checkpoint: a folder (Hugging Face or Mistral safetensors) or a GGUF file.
    path: PathBuf,
    /// Virtual shards S; by default the smallest multiple of N that gives every KV head one.
    #[arg(long, value_name = "S")]
    virtual_shards: Option<usize>,
    /// How keys and values are to be kept: `f32`, `bf16` or `int8`.
    #[arg(long, default_value_t = KvDtype::Bf16, value_name = "HOW")]
    kv_dtype: KvDtype,
    /// As JSON, bytes and tokens as numbers.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    name: String,
    digest: String,
    parameters: u64,
    /// Bytes of all tensors by the type that they are stored in.
    stored_bytes: BTreeMap<String, u64>,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
    context_tokens_max: usize,
    window_tokens: Option<usize>,
    rope_theta: f64,
    tied_head: bool,
    tokenizer: &'static str,
    chat_format: Option<String>,
    /// How keys and values are kept.
    kv_dtype: KvDtype,
    cuts: Vec<Cut>,
}

/// What each rank of a group of N holds.
#[derive(Serialize)]
struct Cut {
    world_size: usize,
    virtual_shards: usize,
    /// Of the rank that holds most.
    weight_bytes: u64,
    /// Keys and values of one token.
    kv_bytes_per_token: u64,
    /// Keys and values of one full context.
    kv_bytes_per_context: u64,
}

impl Inspect {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let report = Report::new(&Checkpoint::open(&self.path)?, self.virtual_shards, self.kv_dtype)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            println!("{report}");
        }
        Ok(())
    }
}

impl Report {
    fn new(
        checkpoint: &Checkpoint,
        virtual_shards: Option<usize>,
        kv_dtype: KvDtype,
    ) -> anyhow::Result<Self> {
        let config = checkpoint.config();
        let mut stored_bytes = BTreeMap::<String, u64>::new();
        let mut parameters = 0;
        for weight in Weight::all(config) {
            let tensor = checkpoint.tensor(weight);
            // A tied head is the embedding: it is counted once.
            if !(config.tied && weight == Weight::Head) {
                parameters += (tensor.rows * tensor.cols) as u64;
                *stored_bytes.entry(tensor.dtype.to_string()).or_default() += tensor.bytes() as u64;
            }
        }
        let (tokenizer, chat_format) = text(checkpoint)?;
        let cuts = [1, 2, 3, 4, 6, 8, 12, 16].into_iter().filter(|&n| n <= WORLD_SIZE_MAX);
        let cuts = cuts.filter_map(|n| Shards::for_model(config.kv_heads, n, virtual_shards).ok());
        let cuts =
            cuts.map(|shards| Cut::new(checkpoint, shards, kv_dtype)).collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(
            !cuts.is_empty(),
            "{} virtual shards suit no number of ranks: S is at least the {} KV heads",
            virtual_shards.unwrap_or_default(),
            config.kv_heads
        );
        Ok(Self {
            name: checkpoint.name().to_owned(),
            digest: checkpoint.digest().to_owned(),
            parameters,
            stored_bytes,
            layers: config.layers,
            hidden: config.hidden,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            intermediate: config.intermediate,
            vocab: config.vocab,
            context_tokens_max: config.context_tokens_max,
            window_tokens: config.window,
            rope_theta: config.rope_theta,
            tied_head: config.tied,
            tokenizer,
            chat_format,
            kv_dtype,
            cuts,
        })
    }
}

/// What turns text into tokens, and how a chat becomes a prompt.
fn text(checkpoint: &Checkpoint) -> anyhow::Result<(&'static str, Option<String>)> {
    let assets = checkpoint.text();
    let kind = match (&assets.tokenizer, &assets.sentencepiece) {
        (TokenizerAsset::Json(_), _) => "tokenizer.json",
        (TokenizerAsset::Gguf(_), _) => "in the GGUF file",
        (TokenizerAsset::None, Some(_)) => "SentencePiece",
        (TokenizerAsset::None, None) => return Ok(("none: token ids only", None)),
    };
    let tokenizer = Tokenizer::load(assets)?;
    let format = ChatFormat::load(assets, &tokenizer, None)?;
    Ok((kind, format.map(|format| format.kind().to_string())))
}

impl Cut {
    fn new(checkpoint: &Checkpoint, shards: Shards, kv_dtype: KvDtype) -> anyhow::Result<Self> {
        let (mut weight_bytes, mut block_bytes) = (0, 0);
        for rank in 0..shards.world_size() {
            weight_bytes = weight_bytes.max(Weights::bytes_of(checkpoint, shards, rank)?);
            let of = if kv_dtype == KvDtype::Fp8 { gpu::kv_bytes_per_block } else { kv_bytes_per_block };
            block_bytes = block_bytes.max(of(checkpoint.config(), shards, rank, kv_dtype)?);
        }
        let blocks = checkpoint.config().context_tokens_max.div_ceil(KV_BLOCK_TOKENS);
        Ok(Self {
            world_size: shards.world_size(),
            virtual_shards: shards.virtual_shards(),
            weight_bytes: weight_bytes as u64,
            kv_bytes_per_token: (block_bytes / KV_BLOCK_TOKENS) as u64,
            kv_bytes_per_context: (blocks * block_bytes) as u64,
        })
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stored = self.stored_bytes.iter().map(|(dtype, count)| format!("{dtype} {}", bytes(*count)));
        let window = self.window_tokens.map_or("none".to_owned(), |tokens| format!("{tokens} tokens"));
        let head = if self.tied_head { "tied to the embedding" } else { "its own" };
        writeln!(f, "{}", self.name)?;
        writeln!(
            f,
            "  parameters   {:.2} M: {}",
            self.parameters as f64 / 1e6,
            stored.collect::<Vec<_>>().join(", ")
        )?;
        writeln!(
            f,
            "  shape        {} layers of {}; {} heads, {} KV heads of {}; MLP {}; vocabulary {}",
            self.layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate, self.vocab
        )?;
        writeln!(
            f,
            "  context      {} tokens; window {window}; RoPE base {}; head {head}",
            self.context_tokens_max, self.rope_theta
        )?;
        let chat = self.chat_format.as_deref().unwrap_or("none");
        writeln!(f, "  text         tokenizer {}; chat format {chat}", self.tokenizer)?;
        writeln!(f, "  digest       {}\n", self.digest)?;
        write!(
            f,
            "  {:>5}  {:>5}  {:>14}  {:>14}  {:>22}",
            "N", "S", "weights a rank", "KV of a token", "KV of a whole context"
        )?;
        for Cut { world_size, virtual_shards, weight_bytes, kv_bytes_per_token, kv_bytes_per_context } in
            &self.cuts
        {
            let [weights, token, context] =
                [weight_bytes, kv_bytes_per_token, kv_bytes_per_context].map(|count| bytes(*count));
            write!(f, "\n  {world_size:>5}  {virtual_shards:>5}  {weights:>14}  {token:>14}  {context:>22}")?;
        }
        Ok(())
    }
}

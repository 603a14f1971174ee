use std::collections::BTreeSet;

use super::metadata::Metadata;
use crate::config::Config;
use crate::error::{CheckpointError, quote};
use crate::layout::Found;
use crate::naming::GGUF;
use crate::text::{GgufVocab, TextAssets, TokenizerAsset};
use crate::weight::Weight;

const THETA_DEFAULT: f64 = 10_000.0;
const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
const EOS_KEY: &str = "tokenizer.ggml.eos_token_id";

/// The model's numbers; its head is tied if the file has none.
pub(super) fn config(metadata: &Metadata, tensors: &[Found]) -> Result<Config, CheckpointError> {
    let arch = metadata.require("general.architecture", metadata.text("general.architecture")?)?;
    if !["llama", "mistral"].contains(&arch) {
        let problem = format!("its architecture is {}; the engine computes llama and mistral", quote(arch));
        return Err(CheckpointError::unsupported(&metadata.path, problem));
    }
    let key = |key: &str| format!("{arch}.{key}");
    let size = |name: &str| metadata.size(&key(name));
    let required = |name: &str| metadata.require(&key(name), size(name)?);
    let (hidden, heads) = (required("embedding_length")?, required("attention.head_count")?);
    let head_dim = match size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => Config::derive_head_dim(&metadata.path, hidden, heads)?,
    };
    refuse_unsupported(metadata, arch, head_dim)?;
    let eps = key("attention.layer_norm_rms_epsilon");
    let ends = [EOS_KEY, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
    let ends = ends.into_iter().map(|key| metadata.token_id(key)).collect::<Result<Vec<_>, _>>()?;
    let eos: BTreeSet<u32> = ends.into_iter().flatten().collect();
    let has = |weight| tensors.iter().find(|found| found.name == GGUF.name(weight));
    // The embedding's rows; the table holds its shape against the rest.
    let rows = has(Weight::Embedding).and_then(|found| usize::try_from(*found.shape.first()?).ok());
    Ok(Config {
        layers: required("block_count")?,
        hidden,
        heads,
        kv_heads: size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate: required("feed_forward_length")?,
        vocab: metadata.require(&key("vocab_size"), size("vocab_size")?.or(rows))?,
        rope_theta: metadata.float(&key("rope.freq_base"))?.unwrap_or(THETA_DEFAULT),
        norm_eps: metadata.require(&eps, metadata.float(&eps)?)? as f32,
        window: size("attention.sliding_window")?,
        context_tokens_max: required("context_length")?,
        tied: has(Weight::Head).is_none(),
        bos: metadata.token_id(BOS_KEY)?,
        eos: eos.into_iter().collect(),
    })
}

fn refuse_unsupported(metadata: &Metadata, arch: &str, head_dim: usize) -> Result<(), CheckpointError> {
    let refuse = |problem: String| Err(CheckpointError::unsupported(&metadata.path, problem));
    for name in ["attention.value_length", "rope.dimension_count"] {
        let found = metadata.size(&format!("{arch}.{name}"))?.unwrap_or(head_dim);
        if found != head_dim {
            return refuse(format!(
                "its {arch}.{name} is {found}; the engine computes the head's {head_dim}"
            ));
        }
    }
    let scaling = metadata.text(&format!("{arch}.rope.scaling.type"))?.unwrap_or("none");
    let factors = ["rope.scaling.factor", "rope.scale_linear"];
    let factors = factors.map(|name| metadata.float(&format!("{arch}.{name}")));
    for factor in factors {
        if factor?.is_some_and(|factor| factor != 1.0) || scaling != "none" {
            return refuse(format!(
                "its RoPE is scaled ({}); the engine computes the plain one",
                quote(scaling)
            ));
        }
    }
    if let Some(experts) = metadata.size(&format!("{arch}.expert_count"))?.filter(|experts| *experts > 0) {
        return refuse(format!("it has {experts} experts; the engine computes dense models"));
    }
    if let Some(parts) = metadata.size("split.count")?.filter(|parts| *parts > 1) {
        return refuse(format!("it is one of {parts} parts; expected a model in one file"));
    }
    Ok(())
}

/// Tokenizer and template; `config` has the vocabulary's size.
pub(super) fn text(metadata: &Metadata, config: &Config) -> Result<TextAssets, CheckpointError> {
    let refuse = |problem: String| Err(CheckpointError::malformed(&metadata.path, problem));
    let chat_template = metadata.text("tokenizer.chat_template")?.map(str::to_owned);
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let Some(model) = metadata.text("tokenizer.ggml.model")?.filter(|_| !tokens.is_empty()) else {
        let tokenizer = TokenizerAsset::None;
        return Ok(TextAssets {
            tokenizer,
            sentencepiece: None,
            chat_template,
            bos_token: None,
            eos_token: None,
            add_bos: false,
        });
    };
    let sentencepiece = model == "llama";
    let vocab = GgufVocab {
        model: model.to_owned(),
        pre: metadata.text("tokenizer.ggml.pre")?.map(str::to_owned),
        types: metadata.ints("tokenizer.ggml.token_type")?,
        merges: metadata.texts("tokenizer.ggml.merges")?,
        scores: metadata.floats("tokenizer.ggml.scores")?,
        bos: metadata.token_id(BOS_KEY)?,
        eos: metadata.token_id(EOS_KEY)?,
        unk: metadata.token_id("tokenizer.ggml.unknown_token_id")?,
        add_space_prefix: metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(sentencepiece),
        tokens,
    };
    if vocab.tokens.len() != config.vocab {
        let (tokens, rows) = (vocab.tokens.len(), config.vocab);
        return refuse(format!("its tokenizer has {tokens} tokens, its model {rows}; expected as many"));
    }
    for (what, len) in [("token_type", vocab.types.len()), ("scores", vocab.scores.len())] {
        if len != 0 && len != vocab.tokens.len() {
            let tokens = vocab.tokens.len();
            return refuse(format!(
                "its tokenizer.ggml.{what} has {len} entries; expected one for each of {tokens} tokens"
            ));
        }
    }
    let token = |id: Option<u32>| id.map(|id| vocab.tokens.get(usize::try_from(id).unwrap_or(usize::MAX)));
    if [vocab.bos, vocab.eos, vocab.unk].into_iter().any(|id| token(id) == Some(None)) {
        return refuse(format!(
            "its tokenizer names a special token beyond the {} it has",
            vocab.tokens.len()
        ));
    }
    let text = |id| token(id).flatten().cloned();
    Ok(TextAssets {
        chat_template,
        bos_token: text(vocab.bos),
        eos_token: text(vocab.eos),
        add_bos: metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(sentencepiece),
        tokenizer: TokenizerAsset::Gguf(vocab),
        sentencepiece: None,
    })
}

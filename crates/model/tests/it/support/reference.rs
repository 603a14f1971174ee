//! The forward pass as the papers write it, on candle-core: whole sequences, no cache, no shards.

use candle_core::{D, Device, Result, Tensor};
use galerne_checkpoint::Config;

use super::files::Model;

/// Logits of every position, `[tokens][vocab]`.
pub(crate) fn logits(model: &Model, tokens: &[u32], window: Option<usize>) -> Vec<Vec<f32>> {
    forward(model, tokens, window).and_then(|logits| logits.to_vec2()).expect("candle computes it")
}

fn forward(model: &Model, tokens: &[u32], window: Option<usize>) -> Result<Tensor> {
    let config = &model.config;
    let &Config { heads, kv_heads, head_dim, .. } = config;
    let count = tokens.len();
    let weight = |name: &str| -> Result<Tensor> {
        let matrix = &model.tensors[&format!("{name}.weight")];
        Tensor::from_slice(&matrix.values, (matrix.rows, matrix.cols), &Device::Cpu)
    };
    let embedding = weight("model.embed_tokens")?;
    let mut x = embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
    let (cos, sin) = turns(config, count)?;
    let mask = mask(count, window)?;
    for layer in 0..config.layers {
        let weight = |name: &str| weight(&format!("model.layers.{layer}.{name}"));
        let normed = norm(&x, &weight("input_layernorm")?, config.norm_eps)?;
        let heads_of = |name: &str, heads: usize| -> Result<Tensor> {
            let projected = normed.matmul(&weight(name)?.t()?)?;
            projected.reshape((count, heads, head_dim))?.transpose(0, 1)?.contiguous()
        };
        let q = rope(&heads_of("self_attn.q_proj", heads)?, &cos, &sin)?;
        let k = repeat(&rope(&heads_of("self_attn.k_proj", kv_heads)?, &cos, &sin)?, heads / kv_heads)?;
        let v = repeat(&heads_of("self_attn.v_proj", kv_heads)?, heads / kv_heads)?;
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (head_dim as f64).sqrt())?;
        let scores = scores.broadcast_add(&mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let attended = weights.matmul(&v)?.transpose(0, 1)?.reshape((count, heads * head_dim))?;
        x = (x + attended.matmul(&weight("self_attn.o_proj")?.t()?)?)?;
        let normed = norm(&x, &weight("post_attention_layernorm")?, config.norm_eps)?;
        let gate = normed.matmul(&weight("mlp.gate_proj")?.t()?)?.silu()?;
        let up = normed.matmul(&weight("mlp.up_proj")?.t()?)?;
        x = (x + (gate * up)?.matmul(&weight("mlp.down_proj")?.t()?)?)?;
    }
    let head = if config.tied { embedding } else { weight("lm_head")? };
    norm(&x, &weight("model.norm")?, config.norm_eps)?.matmul(&head.t()?)
}

fn norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

/// `[tokens][head_dim / 2]` each.
fn turns(config: &Config, count: usize) -> Result<(Tensor, Tensor)> {
    let pairs = config.head_dim / 2;
    let angle = |position: usize, pair: usize| {
        position as f64 * config.rope_theta.powf(-2.0 * pair as f64 / config.head_dim as f64)
    };
    let table = |f: fn(f64) -> f64| {
        let values =
            (0..count).flat_map(|position| (0..pairs).map(move |pair| f(angle(position, pair)) as f32));
        Tensor::from_vec(values.collect(), (count, pairs), &Device::Cpu)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], 2)
}

/// Every KV head `group` times, as its query heads read it.
fn repeat(x: &Tensor, group: usize) -> Result<Tensor> {
    let (heads, count, dim) = x.dims3()?;
    x.unsqueeze(1)?.broadcast_as((heads, group, count, dim))?.reshape((heads * group, count, dim))
}

fn mask(count: usize, window: Option<usize>) -> Result<Tensor> {
    let window = window.unwrap_or(usize::MAX);
    let value = |query: usize, key: usize| {
        if key <= query && query - key < window { 0.0 } else { f32::NEG_INFINITY }
    };
    let values = (0..count).flat_map(|query| (0..count).map(move |key| value(query, key)));
    Tensor::from_vec(values.collect(), (count, count), &Device::Cpu)
}

use crate::config::Config;
use crate::weight::{Place, Weight};

/// What the weights are called in one form of checkpoint, and how RoPE pairs the rows of a head there.
#[derive(Debug)]
pub(crate) struct Naming {
    /// Embedding, final norm, head.
    model: [&'static str; 3],
    layer_prefix: &'static str,
    /// Attention norm, q, k, v, o, MLP norm, gate, up, down.
    layer: [&'static str; 9],
    /// Endings of tensors that may be left out: tables that follow from the configuration.
    derived: &'static [&'static str],
    /// RoPE turns rows (2i, 2i + 1) of a head, not (i, i + head_dim / 2).
    pub(crate) adjacent_pairs: bool,
}

pub(crate) static HUGGING_FACE: Naming = Naming {
    model: ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
    layer_prefix: "model.layers.",
    layer: [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ],
    derived: &[".rotary_emb.inv_freq"],
    adjacent_pairs: false,
};

pub(crate) static NATIVE: Naming = Naming {
    model: ["tok_embeddings.weight", "norm.weight", "output.weight"],
    layer_prefix: "layers.",
    layer: [
        "attention_norm.weight",
        "attention.wq.weight",
        "attention.wk.weight",
        "attention.wv.weight",
        "attention.wo.weight",
        "ffn_norm.weight",
        "feed_forward.w1.weight",
        "feed_forward.w3.weight",
        "feed_forward.w2.weight",
    ],
    derived: &["rope.freqs"],
    adjacent_pairs: true,
};

// `rope_freqs.weight` is not among the derived: in a GGUF file it stretches RoPE, and leaving it out changes the model.
pub(crate) static GGUF: Naming = Naming {
    model: ["token_embd.weight", "output_norm.weight", "output.weight"],
    layer_prefix: "blk.",
    layer: [
        "attn_norm.weight",
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "attn_output.weight",
        "ffn_norm.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "ffn_down.weight",
    ],
    derived: &[".attn_rot_embd.weight"],
    adjacent_pairs: true,
};

impl Naming {
    pub(crate) fn name(&self, weight: Weight) -> String {
        match weight.place() {
            Place::Model(place) => self.model[place].to_owned(),
            Place::Layer(layer, place) => format!("{}{layer}.{}", self.layer_prefix, self.layer[place]),
        }
    }

    /// Whether the model is the same without this tensor: a table derived from the configuration, or a tied head.
    pub(crate) fn may_be_left_out(&self, name: &str, config: &Config) -> bool {
        self.derived.iter().any(|ending| name.ends_with(ending))
            || (config.tied && name == self.name(Weight::Head))
    }
}

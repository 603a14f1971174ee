use std::fmt;

use crate::config::Config;

/// One weight of the architecture; `usize` is the layer, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weight {
    /// Token embedding, [vocab, hidden].
    Embedding,
    /// Output projection, [vocab, hidden]; the embedding itself where the model ties them.
    Head,
    /// Norm before the head, [1, hidden].
    FinalNorm,
    /// Norm before attention, [1, hidden].
    AttnNorm(usize),
    /// Norm before the MLP, [1, hidden].
    MlpNorm(usize),
    /// Query projection, [heads · head_dim, hidden].
    Q(usize),
    /// Key projection, [kv_heads · head_dim, hidden].
    K(usize),
    /// Value projection, [kv_heads · head_dim, hidden].
    V(usize),
    /// Attention's output projection, [hidden, heads · head_dim].
    O(usize),
    /// MLP gate, [intermediate, hidden].
    Gate(usize),
    /// MLP up projection, [intermediate, hidden].
    Up(usize),
    /// MLP down projection, [hidden, intermediate].
    Down(usize),
}

/// The weights of one layer, in the order of the table.
const LAYER: [fn(usize) -> Weight; 9] = [
    Weight::AttnNorm,
    Weight::Q,
    Weight::K,
    Weight::V,
    Weight::O,
    Weight::MlpNorm,
    Weight::Gate,
    Weight::Up,
    Weight::Down,
];
/// Weights outside the layers, first in the table; the head comes last of all, so that a tied model lacks only it.
const BEFORE_LAYERS: usize = 2;
const HEAD: usize = 2;

/// A weight's place among those of the whole model (embedding, final norm, head) or of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Model(usize),
    /// Layer, and place in [`LAYER`].
    Layer(usize, usize),
}

impl Weight {
    /// Every weight of a model, as it lies in the table: without the head if it is tied.
    pub fn all(config: &Config) -> impl Iterator<Item = Weight> {
        let layers = (0..config.layers).flat_map(|layer| LAYER.iter().map(move |weight| weight(layer)));
        [Self::Embedding, Self::FinalNorm]
            .into_iter()
            .chain(layers)
            .chain((!config.tied).then_some(Self::Head))
    }

    /// Its place in [`all`](Weight::all); a tied head shares the embedding's.
    pub(crate) fn index(self, config: &Config) -> usize {
        match self.place() {
            Place::Layer(layer, place) => {
                assert!(layer < config.layers, "{self}, of {} layers", config.layers);
                BEFORE_LAYERS + LAYER.len() * layer + place
            }
            Place::Model(_) if self == Self::Head && config.tied => Self::Embedding.index(config),
            Place::Model(HEAD) => BEFORE_LAYERS + LAYER.len() * config.layers,
            Place::Model(place) => place,
        }
    }

    /// Where it stands in lists such as [`LAYER`].
    pub(crate) fn place(self) -> Place {
        match self {
            Self::Embedding => Place::Model(0),
            Self::FinalNorm => Place::Model(1),
            Self::Head => Place::Model(HEAD),
            Self::AttnNorm(layer) => Place::Layer(layer, 0),
            Self::Q(layer) => Place::Layer(layer, 1),
            Self::K(layer) => Place::Layer(layer, 2),
            Self::V(layer) => Place::Layer(layer, 3),
            Self::O(layer) => Place::Layer(layer, 4),
            Self::MlpNorm(layer) => Place::Layer(layer, 5),
            Self::Gate(layer) => Place::Layer(layer, 6),
            Self::Up(layer) => Place::Layer(layer, 7),
            Self::Down(layer) => Place::Layer(layer, 8),
        }
    }

    /// [rows, cols], that is [outputs, inputs]; a norm is one row.
    pub fn shape(self, config: &Config) -> (usize, usize) {
        let Config { hidden, intermediate, vocab, head_dim, .. } = *config;
        let (queries, keys) = (config.heads * head_dim, config.kv_heads * head_dim);
        match self {
            Self::Embedding | Self::Head => (vocab, hidden),
            Self::FinalNorm | Self::AttnNorm(_) | Self::MlpNorm(_) => (1, hidden),
            Self::Q(_) => (queries, hidden),
            Self::K(_) | Self::V(_) => (keys, hidden),
            Self::O(_) => (hidden, queries),
            Self::Gate(_) | Self::Up(_) => (intermediate, hidden),
            Self::Down(_) => (hidden, intermediate),
        }
    }

    /// Whether it is a vector of RMSNorm.
    pub fn is_norm(self) -> bool {
        matches!(self, Self::FinalNorm | Self::AttnNorm(_) | Self::MlpNorm(_))
    }

    /// Whether RoPE turns its outputs, so that the order of rows within a head matters.
    pub(crate) fn is_rotated(self) -> bool {
        matches!(self, Self::Q(_) | Self::K(_))
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => write!(f, "the embedding"),
            Self::Head => write!(f, "the head"),
            Self::FinalNorm => write!(f, "the final norm"),
            Self::AttnNorm(layer) => write!(f, "the attention norm of layer {layer}"),
            Self::MlpNorm(layer) => write!(f, "the MLP norm of layer {layer}"),
            Self::Q(layer) => write!(f, "the query projection of layer {layer}"),
            Self::K(layer) => write!(f, "the key projection of layer {layer}"),
            Self::V(layer) => write!(f, "the value projection of layer {layer}"),
            Self::O(layer) => write!(f, "the output projection of layer {layer}"),
            Self::Gate(layer) => write!(f, "the MLP gate of layer {layer}"),
            Self::Up(layer) => write!(f, "the MLP up projection of layer {layer}"),
            Self::Down(layer) => write!(f, "the MLP down projection of layer {layer}"),
        }
    }
}

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How products of weights and activations are computed. It is part of the numerics, as S is: all ranks of a group do
/// it alike, and each way gives the same bits on every instruction set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// Weights of every format count as the f32 value that they stand for, and so do activations.
    #[default]
    F32,
    /// Quantized weights (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K) meet activations rounded to bytes, 32 to a scale; others as in
    /// [`F32`](Compute::F32).
    Int8,
    /// Weights of bf16 meet activations rounded to bf16, two products at a time; others as in [`F32`](Compute::F32).
    Bf16,
    /// A GPU's tensor cores of this compute capability (90 is 9.0): products of bf16, sums in f32. Those of another
    /// capability may round otherwise.
    Tensor(u16),
    /// The same, but products of many tokens are the vendor's library's, which sums in whatever order is quick: tokens may depend on
    /// what runs beside them, on how a prompt is cut, and on N.
    Fast(u16),
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::Int8 => f.write_str("int8"),
            Self::Bf16 => f.write_str("bf16"),
            Self::Tensor(capability) => write!(f, "bf16 (sm_{capability})"),
            Self::Fast(capability) => write!(f, "bf16, fast (sm_{capability})"),
        }
    }
}

impl FromStr for Compute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::F32, Self::Int8, Self::Bf16]
            .into_iter()
            .find(|compute| compute.to_string() == text)
            .ok_or_else(|| format!("{text:?} is no way to compute: f32, int8 or bf16"))
    }
}

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What matrices that a checkpoint holds in F32, F16 or BF16 become when they are loaded, in ggml's formats. It is part of
/// the numerics, as S is. Matrices that are quantized already stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantize {
    /// All of them Q8_0.
    Q8_0,
    /// Those of the layers Q4_0; embedding and head, which feel it most, Q8_0.
    Q4_0,
    /// The matrices of the layers e4m3 with a scale for each row of a virtual shard, whatever they are in the checkpoint: on
    /// GPUs.
    Fp8,
}

impl fmt::Display for Quantize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for Quantize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Q8_0, Self::Q4_0, Self::Fp8]
            .into_iter()
            .find(|quantize| quantize.to_string() == text)
            .ok_or_else(|| format!("{text:?} is no format to quantize to: q8_0 or q4_0, on GPUs fp8"))
    }
}

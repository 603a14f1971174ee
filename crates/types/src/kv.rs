use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How keys and values are kept in KV memory. It is part of the numerics, as S is: all ranks of a group do it alike,
/// and each way gives the same bits on every instruction set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvDtype {
    /// As they were computed: 4 bytes a number.
    #[default]
    F32,
    /// Rounded to the nearest bfloat16: 2 bytes.
    Bf16,
    /// Rounded to bytes, with a scale for each key and each value of a KV head and token: a little more than 1.
    Int8,
    /// Rounded to e4m3, with a power of two for 16 numbers of each key and each value: as much as in bytes. On GPUs.
    Fp8,
}

impl KvDtype {
    /// All of them, the exact one first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Int8, Self::Fp8];
    /// Those of CPUs.
    pub const CPU: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        })
    }
}

impl FromStr for KvDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|dtype| dtype.to_string() == text);
        named.ok_or_else(|| format!("{text:?} is no way to keep keys and values: f32, bf16, int8 or fp8"))
    }
}

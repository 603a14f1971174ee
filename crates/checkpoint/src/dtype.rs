use std::fmt;

use half::{bf16, f16};

use crate::superblock::{SUPER_ELEMS, SuperBlock};

/// How the numbers of a tensor are stored. The quantized ones hold blocks of 32 elements of one row, as ggml does, or
/// super-blocks of 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of an [`F32`](Dtype::F32).
    Bf16,
    /// f16 `d`, 32 × i8 `q`; value `d·q`.
    Q8_0,
    /// f16 `d`, 32 × u4 `q`; value `d·(q − 8)`. Byte `i` holds element `i` in its low half and `i + 16` in its high.
    Q4_0,
    /// f16 `d`, f16 `m`, 32 × u4 `q` packed as in [`Q4_0`](Dtype::Q4_0); value `d·q + m`.
    Q4_1,
    /// A [`SuperBlock`] with parts of 32 elements of four bits.
    Q4K,
    /// A [`SuperBlock`] with parts of 16 elements of six bits.
    Q6K,
}

/// Elements in a block of a quantized dtype.
pub(crate) const QUANTIZED_ELEMS: usize = 32;

impl Dtype {
    /// Elements that are stored together: 256 for a K-quant, 32 for another quantized dtype, otherwise 1.
    pub const fn block_elems(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => QUANTIZED_ELEMS,
            Self::Q4K | Self::Q6K => SUPER_ELEMS,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 2 + QUANTIZED_ELEMS,
            Self::Q4_0 => 2 + QUANTIZED_ELEMS / 2,
            Self::Q4_1 => 4 + QUANTIZED_ELEMS / 2,
            Self::Q4K => 4 + 12 + SUPER_ELEMS / 2,
            Self::Q6K => SUPER_ELEMS / 2 + SUPER_ELEMS / 4 + SUPER_ELEMS / 16 + 2,
        }
    }

    /// Bytes of `cols` elements of one row.
    ///
    /// # Panics
    /// If `cols` is no multiple of [`block_elems`](Dtype::block_elems).
    pub const fn row_bytes(self, cols: usize) -> usize {
        assert!(cols.is_multiple_of(self.block_elems()), "a row is cut at blocks only");
        cols / self.block_elems() * self.block_bytes()
    }

    /// Whether elements share a scale.
    pub const fn is_quantized(self) -> bool {
        self.block_elems() > 1
    }

    /// Whether its blocks are [`SuperBlock`]s.
    pub const fn is_k_quant(self) -> bool {
        self.block_elems() == SUPER_ELEMS
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        })
    }
}

/// One block of 32 elements, in the form that all such dtypes share: element `i` is `scale · quants[i] + offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    /// `d`.
    pub scale: f32,
    /// `m` of Q4_1, otherwise 0.
    pub offset: f32,
    /// Q8_0: −128…127, Q4_0: −8…7, Q4_1: 0…15.
    pub quants: [i8; QUANTIZED_ELEMS],
}

impl Block {
    /// Unpacks one block.
    ///
    /// # Panics
    /// If `dtype` has no blocks of 32, or `bytes` is not [`block_bytes`](Dtype::block_bytes) long.
    pub fn unpack(dtype: Dtype, bytes: &[u8]) -> Self {
        assert!(dtype.block_elems() == QUANTIZED_ELEMS, "{dtype} has no blocks of {QUANTIZED_ELEMS}");
        assert_eq!(bytes.len(), dtype.block_bytes(), "bytes of a block of {dtype}");
        let half_at = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let mut quants = [0i8; QUANTIZED_ELEMS];
        let (offset, zero, packed) = match dtype {
            Dtype::Q4_0 => (0.0, 8, &bytes[2..]),
            Dtype::Q4_1 => (half_at(2), 0, &bytes[4..]),
            _ => {
                for (quant, byte) in quants.iter_mut().zip(&bytes[2..]) {
                    *quant = byte.cast_signed();
                }
                return Self { scale: half_at(0), offset: 0.0, quants };
            }
        };
        let (low, high) = quants.split_at_mut(QUANTIZED_ELEMS / 2);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(packed) {
            *low = (byte & 15).cast_signed() - zero;
            *high = (byte >> 4).cast_signed() - zero;
        }
        Self { scale: half_at(0), offset, quants }
    }
}

/// Decodes `out.len()` elements: the plain definition of every dtype, against which fast kernels are tested.
///
/// # Panics
/// If `bytes` is not exactly [`row_bytes`](Dtype::row_bytes)`(out.len())` long.
pub fn dequantize(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), dtype.row_bytes(out.len()), "bytes of {} elements of {dtype}", out.len());
    match dtype {
        Dtype::F32 => decode(bytes, out, f32::from_le_bytes),
        Dtype::F16 => decode(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bf16 => decode(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 => {
            for (out, bytes) in
                out.chunks_exact_mut(QUANTIZED_ELEMS).zip(bytes.chunks_exact(dtype.block_bytes()))
            {
                let Block { scale, offset, quants } = Block::unpack(dtype, bytes);
                for (out, quant) in out.iter_mut().zip(quants) {
                    *out = scale * f32::from(quant) + offset;
                }
            }
        }
        Dtype::Q4K | Dtype::Q6K => {
            for (out, bytes) in out.chunks_exact_mut(SUPER_ELEMS).zip(bytes.chunks_exact(dtype.block_bytes()))
            {
                SuperBlock::unpack(dtype, bytes).dequantize(out);
            }
        }
    }
}

fn decode<const N: usize>(bytes: &[u8], out: &mut [f32], element: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, bytes) in out.iter_mut().zip(elements) {
        *out = element(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()
    }

    fn values(dtype: Dtype, bytes: &[u8]) -> [f32; 32] {
        let mut out = [f32::NAN; 32];
        dequantize(dtype, bytes, &mut out);
        out
    }

    #[test]
    fn blocks_decode_as_ggml_lays_them_out() {
        // Byte i of the packed formats: low half i, high half 15 - i; of Q8_0: 8 i, negative from 16 on.
        let packed: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let q8: Vec<u8> = (0..32).map(|i| i * 8).collect();
        for i in 0..32i8 {
            let quant = if i < 16 { i } else { 31 - i };
            let at = usize::from(i.cast_unsigned());
            let q8_0 = values(Dtype::Q8_0, &[halves(&[0.5]), q8.clone()].concat());
            assert_eq!(q8_0[at], 0.5 * f32::from((i.cast_unsigned() * 8).cast_signed()));
            let q4_0 = values(Dtype::Q4_0, &[halves(&[-2.0]), packed.clone()].concat());
            assert_eq!(q4_0[at], -2.0 * f32::from(quant - 8));
            let q4_1 = values(Dtype::Q4_1, &[halves(&[2.0, -5.5]), packed.clone()].concat());
            assert_eq!(q4_1[at], 2.0 * f32::from(quant) - 5.5);
        }
    }

    #[test]
    fn floats_decode_exactly() {
        let numbers = [0.0, -1.5, 65504.0, 2f32.powi(-24), f32::INFINITY];
        let mut out = [0.0; 5];
        dequantize(Dtype::F16, &halves(&numbers), &mut out);
        assert_eq!(out, numbers);
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        dequantize(Dtype::F32, &bytes, &mut out);
        assert_eq!(out, numbers);
        dequantize(Dtype::Bf16, &[0x80, 0x3F, 0x00, 0xC0], &mut out[..2]);
        assert_eq!(out[..2], [1.0, -2.0]);
    }

    #[test]
    fn sizes_of_rows() {
        let of_64 = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1]
            .map(|d| d.row_bytes(64));
        assert_eq!(of_64, [256, 128, 128, 68, 36, 40]);
        assert_eq!([Dtype::Q4K, Dtype::Q6K].map(|d| d.row_bytes(512)), [288, 420]);
    }
}

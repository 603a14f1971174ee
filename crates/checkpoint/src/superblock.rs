use half::f16;

use crate::dtype::Dtype;

/// Elements of a super-block.
pub(crate) const SUPER_ELEMS: usize = 256;
/// Elements that share a scale, at least.
const PART_ELEMS: usize = 16;
const PARTS: usize = SUPER_ELEMS / PART_ELEMS;

/// 256 elements of one row of a K-quant, ggml's formats whose scales are quantized too. Element `i`, of part `i / 16`,
/// is `scale · scales[part] · quants[i] − offset · offsets[part]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SuperBlock {
    /// `d`.
    pub scale: f16,
    /// `dmin`; 0 for Q6_K.
    pub offset: f16,
    /// Q4_K: 0…63, and of each two parts the same; Q6_K: −128…127.
    pub scales: [i8; PARTS],
    /// Q4_K: 0…63, and of each two parts the same; Q6_K: 0.
    pub offsets: [i8; PARTS],
    /// Q4_K: 0…15; Q6_K: −32…31.
    pub quants: [i8; SUPER_ELEMS],
}

impl SuperBlock {
    /// Unpacks one super-block.
    ///
    /// # Panics
    /// If `dtype` is no K-quant, or `bytes` is not [`block_bytes`](Dtype::block_bytes) long.
    pub fn unpack(dtype: Dtype, bytes: &[u8]) -> Self {
        assert!(dtype.is_k_quant() && bytes.len() == dtype.block_bytes(), "no super-block of {dtype}");
        if dtype == Dtype::Q4K { Self::q4_k(bytes) } else { Self::q6_k(bytes) }
    }

    /// f16 `d`, f16 `dmin`, 8 scales and 8 offsets of 6 bits in 12 bytes, 128 bytes of nibbles: byte `32 j + i` holds
    /// element `64 j + i` in its low half and `64 j + 32 + i` in its high.
    fn q4_k(bytes: &[u8]) -> Self {
        let (packed, nibbles) = (&bytes[4..16], &bytes[16..]);
        let part = |part: usize| match part / 2 {
            // The first four have a byte each, whose two high bits belong to the last four.
            at @ 0..4 => (packed[at] & 63, packed[at + 4] & 63),
            at => {
                let both = packed[at + 4];
                ((both & 15) | packed[at - 4] >> 6 << 4, (both >> 4) | packed[at] >> 6 << 4)
            }
        };
        Self {
            scale: half_at(bytes, 0),
            offset: half_at(bytes, 2),
            scales: std::array::from_fn(|at| part(at).0.cast_signed()),
            offsets: std::array::from_fn(|at| part(at).1.cast_signed()),
            quants: std::array::from_fn(|at| {
                let byte = nibbles[at / 64 * 32 + at % 32];
                (byte >> (at / 32 % 2 * 4) & 15).cast_signed()
            }),
        }
    }

    /// 128 bytes of nibbles, 64 bytes of two bits, 16 scales of i8, f16 `d`. Of each 128 elements, 64 bytes hold the low
    /// halves (elements `0…63`, then `64…127` in their high halves) and 32 bytes the two bits above, 32 elements apart.
    fn q6_k(bytes: &[u8]) -> Self {
        let (nibbles, rest) = bytes.split_at(SUPER_ELEMS / 2);
        let (pairs, scales) = rest.split_at(SUPER_ELEMS / 4);
        Self {
            scale: half_at(scales, PARTS),
            offset: f16::ZERO,
            scales: std::array::from_fn(|at| scales[at].cast_signed()),
            offsets: [0; PARTS],
            quants: std::array::from_fn(|at| {
                let (half, within) = (at / 128, at % 128);
                let low = nibbles[half * 64 + within % 64] >> (within / 64 * 4) & 15;
                let high = pairs[half * 32 + within % 32] >> (within / 32 * 2) & 3;
                (low | high << 4).cast_signed() - 32
            }),
        }
    }

    /// Writes all elements.
    pub(crate) fn dequantize(&self, out: &mut [f32]) {
        let (scale, offset) = (self.scale.to_f32(), self.offset.to_f32());
        let parts = self.scales.iter().zip(self.offsets).zip(self.quants.chunks(PART_ELEMS));
        for (out, ((part_scale, part_offset), quants)) in out.chunks_mut(PART_ELEMS).zip(parts) {
            let (scale, offset) = (scale * f32::from(*part_scale), offset * f32::from(part_offset));
            out.iter_mut().zip(quants).for_each(|(out, quant)| *out = scale * f32::from(*quant) - offset);
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::dequantize;

    /// Bytes and the values that ggml's own Python package gives them.
    #[test]
    fn super_blocks_decode_as_ggml_decodes_them() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/k_quants.json")).unwrap();
        for dtype in [Dtype::Q4K, Dtype::Q6K] {
            let hex = |name: &str| -> Vec<u8> {
                let text = golden[dtype.to_string()][name].as_str().unwrap().as_bytes();
                let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
                text.chunks(2).map(byte).collect()
            };
            let mut values = [f32::NAN; 2 * SUPER_ELEMS];
            dequantize(dtype, &hex("bytes"), &mut values);
            let expected = hex("values");
            let (expected, _) = expected.as_chunks();
            assert!(
                values.iter().zip(expected).all(|(x, bytes)| *x == f32::from_le_bytes(*bytes)),
                "{dtype}"
            );
        }
    }
}

//! Weights into blocks of 32, bit for bit as ggml's reference (`quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`) makes them.

use galerne_types::Quantize;
use half::f16;
use half::slice::HalfFloatSliceExt as _;

use crate::dtype::{Dtype, QUANTIZED_ELEMS};
use crate::weight::Weight;

/// Values that are compared side by side.
const LANES: usize = 8;
/// Adding it to |n| < 2^22 rounds n to the nearest integer, to the even one from the middle, and leaves it in the lowest
/// bits. So the compiler does several at once on any processor, as it cannot with `round`.
const NEAREST: f32 = 12_582_912.0;
/// The same for 0 ≤ n < 2^22, and the bits are those of this number and the integer.
const WHOLE: f32 = 8_388_608.0;

type Values = [f32; QUANTIZED_ELEMS];

/// The format that a weight is read in, if those of its files are to be quantized.
pub(crate) fn target(weight: Weight, stored: Dtype, cols: usize, quantize: Quantize) -> Dtype {
    if weight.is_norm() || stored.is_quantized() || !cols.is_multiple_of(QUANTIZED_ELEMS) {
        return stored;
    }
    match (quantize, weight) {
        (Quantize::Fp8, _) => stored, // whoever loads it for a GPU does that
        (Quantize::Q8_0, _) | (_, Weight::Embedding | Weight::Head) => Dtype::Q8_0,
        (Quantize::Q4_0, _) => Dtype::Q4_0,
    }
}

/// Encodes whole blocks of floats that are encoded as `from`.
///
/// # Panics
/// If `from` is quantized, `to` is neither Q8_0 nor Q4_0, or the two are not of the same elements.
pub(crate) fn quantize(from: Dtype, encoded: &[u8], to: Dtype, out: &mut [u8]) {
    let blocks = encoded.len() / from.row_bytes(QUANTIZED_ELEMS);
    assert_eq!(encoded.len(), blocks * from.row_bytes(QUANTIZED_ELEMS), "whole blocks of {from}");
    assert_eq!(out.len(), blocks * to.block_bytes(), "room for {blocks} blocks of {to}");
    match to {
        Dtype::Q8_0 => encode(from, encoded, out, q8_0),
        Dtype::Q4_0 => encode(from, encoded, out, q4_0),
        _ => panic!("nothing is quantized to {to}"),
    }
}

fn encode<const BYTES: usize>(
    from: Dtype,
    encoded: &[u8],
    out: &mut [u8],
    block: impl Fn(&Values) -> [u8; BYTES],
) {
    let (out, _) = out.as_chunks_mut();
    match from {
        Dtype::F32 => each(encoded, out, |x| block(&values(x, f32::from_le_bytes))),
        Dtype::F16 => each(encoded, out, |x| {
            let mut values = [0.0; QUANTIZED_ELEMS];
            x.map(f16::from_le_bytes).convert_to_f32_slice(&mut values);
            block(&values)
        }),
        Dtype::Bf16 => each(encoded, out, |x| {
            block(&values(x, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)))
        }),
        _ => panic!("{from} is quantized already"),
    }
}

fn each<const SIZE: usize, const BYTES: usize>(
    encoded: &[u8],
    out: &mut [[u8; BYTES]],
    block: impl Fn(&[[u8; SIZE]; QUANTIZED_ELEMS]) -> [u8; BYTES],
) {
    let (elements, _) = encoded.as_chunks::<SIZE>();
    let (blocks, _) = elements.as_chunks();
    for (out, elements) in out.iter_mut().zip(blocks) {
        *out = block(elements);
    }
}

/// `from.map(to)` as a loop, of which the compiler does several at once.
fn values<T: Copy, U: Copy + Default>(
    from: &[T; QUANTIZED_ELEMS],
    to: impl Fn(T) -> U,
) -> [U; QUANTIZED_ELEMS] {
    let mut values = [U::default(); QUANTIZED_ELEMS];
    for (value, from) in values.iter_mut().zip(from) {
        *value = to(*from);
    }
    values
}

/// `d = max |x| / 127` and `q = x / d`, rounded to the nearest and from the middle away from 0; `d` is rounded to f16 after
/// that only.
fn q8_0(x: &Values) -> [u8; 34] {
    let d = largest(&values(x, f32::abs)) / 127.0;
    let inverse = inverse(d);
    let quants = values(x, |x| {
        let scaled = x * inverse;
        let nearest = scaled + NEAREST;
        // From the middle it went to the even side, which may be that of 0.
        let towards_zero = scaled - (nearest - NEAREST) == 0.5f32.copysign(scaled);
        (nearest + if towards_zero { 1f32.copysign(scaled) } else { 0.0 }).to_bits()
    });
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    block[2..].copy_from_slice(&values(&quants, |bits| bits as u8));
    block
}

/// `d = x / −8` of the first `x` of the largest magnitude, `q = x / d + 8` rounded to the nearest and from the middle up, 15
/// at most; likewise.
fn q4_0(x: &Values) -> [u8; 18] {
    let (low, high) = (-largest(&values(x, |x| -x)), largest(x));
    let extreme = if high == -low {
        x.iter().copied().find(|x| x.abs() == high).unwrap_or_default()
    } else if high > -low {
        high
    } else {
        low
    };
    let d = extreme / -8.0;
    let inverse = inverse(d);
    let quants = values(x, |x| {
        let scaled = x * inverse + 8.5;
        let scaled = if scaled < 15.5 { scaled } else { 15.5 };
        let nearest = scaled + WHOLE;
        let above = u32::from(nearest - WHOLE > scaled);
        nearest.to_bits().wrapping_sub(WHOLE.to_bits() + above)
    });
    let mut block = [0; 18];
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let (low, high) = quants.split_at(QUANTIZED_ELEMS / 2);
    for (byte, (low, high)) in block[2..].iter_mut().zip(low.iter().zip(high)) {
        *byte = (low | high << 4) as u8;
    }
    block
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The largest value, or 0: lane by lane, then the lanes.
fn largest(x: &Values) -> f32 {
    let larger = |x: f32, than: f32| if x > than { x } else { than };
    let mut most = [0f32; LANES];
    for x in x.chunks_exact(LANES) {
        most.iter_mut().zip(x).for_each(|(most, x)| *most = larger(*x, *most));
    }
    for half in [4, 2, 1] {
        (0..half).for_each(|lane| most[lane] = larger(most[lane], most[lane + half]));
    }
    most[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Floats in each of their formats, and the blocks that ggml's own Python package makes of them.
    #[test]
    fn blocks_are_those_that_ggml_makes() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/quantized.json")).unwrap();
        for from in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let hex = |name: &str| -> Vec<u8> {
                let text = golden[from.to_string()][name].as_str().unwrap().as_bytes();
                let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
                text.chunks(2).map(byte).collect()
            };
            for to in [Dtype::Q8_0, Dtype::Q4_0] {
                let expected = hex(&to.to_string());
                let mut found = vec![0xEE; expected.len()];
                quantize(from, &hex("bytes"), to, &mut found);
                let blocks = found.chunks(to.block_bytes()).zip(expected.chunks(to.block_bytes()));
                for (at, (found, expected)) in blocks.enumerate() {
                    assert_eq!(found, expected, "block {at} from {from} to {to}");
                }
            }
        }
    }
}

//! Super-blocks of 256 elements, as ggml lays them out.

use galerne_checkpoint::Dtype;
use half::f16;

/// A super-block whose elements are near `values`.
pub(crate) fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    if dtype == Dtype::Q4K { q4_k(values) } else { q6_k(values) }
}

/// The largest of all over `most`, as the file's f16, and each as a multiple of it.
fn shared(all: &[f32], most: f32) -> (f16, Vec<f32>) {
    let step = f16::from_f32(all.iter().fold(1e-6f32, |most, x| most.max(x.abs())) / most);
    (step, all.iter().map(|x| (x / step.to_f32()).round().clamp(-most, most)).collect())
}

fn q4_k(values: &[f32]) -> Vec<u8> {
    let (mut steps, mut lows) = (Vec::new(), Vec::new());
    for part in values.chunks(32) {
        let (low, high) = part.iter().fold((0f32, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
        steps.push((high - low) / 15.0);
        lows.push(-low);
    }
    let ((d, scales), (m, offsets)) = (shared(&steps, 63.0), shared(&lows, 63.0));
    let mut bytes = [d.to_le_bytes(), m.to_le_bytes()].concat();
    let six = |of: &[f32], at: usize| of[at] as u8;
    bytes.extend((0..4).map(|at| six(&scales, at) | six(&scales, at + 4) >> 4 << 6));
    bytes.extend((0..4).map(|at| six(&offsets, at) | six(&offsets, at + 4) >> 4 << 6));
    bytes.extend((4..8).map(|at| six(&scales, at) & 15 | six(&offsets, at) << 4));
    let quant = |at: usize| {
        let (scale, offset) = (d.to_f32() * scales[at / 32], m.to_f32() * offsets[at / 32]);
        ((values[at] + offset) / scale.max(1e-9)).round().clamp(0.0, 15.0) as u8
    };
    bytes.extend((0..128).map(|at| at / 32 * 64 + at % 32).map(|at| quant(at) | quant(at + 32) << 4));
    bytes
}

fn q6_k(values: &[f32]) -> Vec<u8> {
    let steps: Vec<f32> =
        values.chunks(16).map(|part| part.iter().fold(0f32, |most, x| most.max(x.abs())) / 31.0).collect();
    let (d, scales) = shared(&steps, 127.0);
    let quant = |at: usize| {
        let scale = (d.to_f32() * scales[at / 16]).max(1e-9);
        ((values[at] / scale).round().clamp(-32.0, 31.0) + 32.0) as u8
    };
    let low = |at: usize| quant(at) & 15;
    let mut bytes: Vec<u8> =
        (0..128).map(|at| at / 64 * 128 + at % 64).map(|at| low(at) | low(at + 64) << 4).collect();
    bytes.extend(
        (0..64)
            .map(|at| at / 32 * 128 + at % 32)
            .map(|at| (0..4).fold(0, |byte, pair| byte | quant(at + 32 * pair) >> 4 << (2 * pair))),
    );
    bytes.extend(scales.iter().map(|scale| (*scale as i8).cast_unsigned()));
    bytes.extend(d.to_le_bytes());
    bytes
}

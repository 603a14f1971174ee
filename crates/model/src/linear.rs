//! Linear layers on packed weights, in f32: the reference, and the way of formats that nothing else multiplies.
//!
//! Every output is `acc = fma(w_k, x_k, acc)` for k = 0, 1, 2 … from acc = 0, in f32, with `w_k` the weight's f32
//! value: the same chain for one token and for a thousand, so neither the batch nor the prefill's chunking shows in
//! the bits. What varies is only where `w_k` comes from: few tokens widen it in registers, many tokens share a part of a
//! panel that was widened once into a scratch that stays in the first-level cache; between two parts the sums wait in `y`.
//!
//! Bounds, for SmolLM2-135M in Q4_1 on a Zen 4 of 3.6 GHz. Decode reads every weight byte once, 96 MB a token: the
//! bandwidth of one core (30 GB/s with huge pages, 17 without) allows some 300 tok/s. Prefill is 106 M multiply-adds a
//! token, at 16 a cycle some 540 tok/s a core. `examples/speed` measures what is reached.

mod formats;

use std::marker::PhantomData;
use std::ops::Range;

use galerne_checkpoint::Dtype;

use self::formats::{Bf16, F16, F32, Format, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
use crate::dots::dots;
use crate::packed::{BLOCK, GROUP_BLOCKS, PANEL, Packed};
use crate::pairs::pairs;
use crate::rows::{Form, Inputs};
use crate::simd::{Isa, Kernel, Vector};

/// Inputs of a panel that are widened at once: half a first-level cache of 32 KiB.
const WIDENED_INPUTS: usize = 4 * BLOCK;

/// Up to this many tokens widen weights in registers, if the format does not say otherwise; more share a widened panel.
const TOKENS_DIRECT_MAX: usize = 3;

/// Rows of activations: row t starts at `start + t · stride`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<P> {
    pub(crate) start: P,
    pub(crate) stride: usize,
}

/// `y[t][o] = Σ_k w[o][k] · x[t][k]` for the outputs of `panels` and all tokens; o counts from the first panel of
/// the matrix, and the zero outputs that fill the last panel are written too.
///
/// # Safety
/// `x` has `tokens` rows of at least `weights.cols()` elements; `y` has `tokens` rows that reach to the end of
/// `panels`, which nobody else reads or writes.
pub(crate) unsafe fn linear(
    isa: Isa,
    weights: &Packed,
    panels: Range<usize>,
    tokens: usize,
    Inputs { rows: x, form }: Inputs,
    y: Strided<*mut f32>,
) {
    if weights.cols() == 0 {
        for token in 0..tokens {
            // SAFETY: the caller's.
            unsafe {
                y.start.add(token * y.stride + panels.start * PANEL).write_bytes(0, panels.len() * PANEL);
            }
        }
        return;
    }
    // SAFETY: the caller's; each format is the one that the matrix was packed in.
    unsafe {
        match form {
            Form::Quants(x) if weights.dtype().is_quantized() => {
                return dots(isa, weights, panels, tokens, x, y);
            }
            Form::Halves(x) if weights.dtype() == Dtype::Bf16 => {
                return pairs(isa, weights, panels, tokens, x, y);
            }
            _ => {}
        }
        match weights.dtype() {
            Dtype::F32 => tiles::<F32>(isa, weights, panels, tokens, x, y),
            Dtype::F16 => any::<F16>(isa, weights, panels, tokens, x, y),
            Dtype::Bf16 => any::<Bf16>(isa, weights, panels, tokens, x, y),
            Dtype::Q8_0 => any::<Q8_0>(isa, weights, panels, tokens, x, y),
            Dtype::Q4_0 => any::<Q4_0>(isa, weights, panels, tokens, x, y),
            Dtype::Q4_1 => any::<Q4_1>(isa, weights, panels, tokens, x, y),
            Dtype::Q4K => any::<Q4K>(isa, weights, panels, tokens, x, y),
            Dtype::Q6K => any::<Q6K>(isa, weights, panels, tokens, x, y),
        }
    }
}

/// # Safety
/// As [`linear`]; `weights` are packed in `F`.
unsafe fn any<F: Format>(
    isa: Isa,
    weights: &Packed,
    panels: Range<usize>,
    tokens: usize,
    x: Strided<*const f32>,
    y: Strided<*mut f32>,
) {
    if tokens <= F::TOKENS_DIRECT_MAX {
        // SAFETY: the caller's.
        return unsafe { tiles::<F>(isa, weights, panels, tokens, x, y) };
    }
    let mut scratch = Scratch([0.0; WIDENED_INPUTS * PANEL]);
    for panel in panels {
        let from = weights.panel(panel).as_ptr();
        let y = Strided { start: y.start.wrapping_add(panel * PANEL), ..y };
        for first in (0..weights.cols()).step_by(WIDENED_INPUTS) {
            let inputs = first..weights.cols().min(first + WIDENED_INPUTS);
            let (to, count) = (scratch.0.as_mut_ptr(), inputs.len());
            let x = Strided { start: x.start.wrapping_add(first), ..x };
            // SAFETY: `from` holds a panel, the scratch so many of its inputs, and then is a panel in F32.
            unsafe {
                isa.run(Widen::<F> { from, inputs, to, format: PhantomData });
                let start = to.cast_const().cast();
                let widened = Panels { start, bytes: 0, count: 1, inputs: count, goes_on: first > 0 };
                token_tiles::<F32>(isa, widened, tokens, x, y);
            }
        }
    }
}

/// A part of a panel in F32.
#[repr(align(64))]
struct Scratch([f32; WIDENED_INPUTS * PANEL]);

/// # Safety
/// As [`any`].
unsafe fn tiles<F: Format>(
    isa: Isa,
    weights: &Packed,
    panels: Range<usize>,
    tokens: usize,
    x: Strided<*const f32>,
    y: Strided<*mut f32>,
) {
    if panels.is_empty() {
        return;
    }
    let y = Strided { start: y.start.wrapping_add(panels.start * PANEL), ..y };
    let (start, bytes) = (weights.panel(panels.start).as_ptr(), weights.panel_bytes());
    // SAFETY: the caller's.
    unsafe {
        token_tiles::<F>(
            isa,
            Panels { start, bytes, count: panels.len(), inputs: weights.cols(), goes_on: false },
            tokens,
            x,
            y,
        );
    }
}

/// # Safety
/// As [`any`]; `y` starts at the first of the panels.
unsafe fn token_tiles<F: Format>(
    isa: Isa,
    panels: Panels,
    tokens: usize,
    x: Strided<*const f32>,
    y: Strided<*mut f32>,
) {
    let mut done = 0;
    while done < tokens {
        let x = Strided { start: x.start.wrapping_add(done * x.stride), ..x };
        let y = Strided { start: y.start.wrapping_add(done * y.stride), ..y };
        // SAFETY: each arm takes at most the tokens that are left.
        done += unsafe {
            match tokens_together(tokens - done, isa.tokens_in_registers_max()) {
                12.. => tile::<F, 12>(isa, panels, x, y),
                6.. => tile::<F, 6>(isa, panels, x, y),
                4.. => tile::<F, 4>(isa, panels, x, y),
                3 => tile::<F, 3>(isa, panels, x, y),
                2 => tile::<F, 2>(isa, panels, x, y),
                _ => tile::<F, 1>(isa, panels, x, y),
            }
        };
    }
}

/// How many of the tokens that are left to take together: a last tile of one or two would wait for the latency of its few
/// chains of multiply-adds, so there four and what is left share the work.
pub(crate) fn tokens_together(left: usize, most: usize) -> usize {
    match left % most {
        1 | 2 | 5 if left > most => 4,
        5 if left == 5 => 3,
        _ => left.min(most),
    }
}

/// # Safety
/// As [`token_tiles`], for `M` tokens. Returns `M`.
unsafe fn tile<F: Format, const M: usize>(
    isa: Isa,
    panels: Panels,
    x: Strided<*const f32>,
    y: Strided<*mut f32>,
) -> usize {
    // SAFETY: the caller's.
    unsafe { isa.run(Tile::<F, M> { panels, x, y, format: PhantomData }) };
    M
}

/// `count` consecutive panels.
#[derive(Clone, Copy)]
struct Panels {
    start: *const u8,
    bytes: usize,
    count: usize,
    inputs: usize,
    /// The sums begin with what stands in `y`, not with 0.
    goes_on: bool,
}

/// The micro-kernel: M tokens by the outputs of some panels, sums in registers over all inputs.
struct Tile<F, const M: usize> {
    panels: Panels,
    x: Strided<*const f32>,
    y: Strided<*mut f32>,
    format: PhantomData<F>,
}

impl<F: Format, const M: usize> Kernel for Tile<F, M> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let strips = self.panels.count * (PANEL / 2 / V::LANES);
        let mut strip = 0;
        // SAFETY: strips are within the panels.
        unsafe {
            if M == 1 {
                // One chain of multiply-adds alone would wait for its latency.
                while strip + 2 <= strips {
                    self.strips::<V, 2>(strip);
                    strip += 2;
                }
            }
            while strip < strips {
                self.strips::<V, 1>(strip);
                strip += 1;
            }
        }
    }
}

impl<F: Format, const M: usize> Tile<F, M> {
    /// A strip is a pair of vectors of one panel: outputs `lane …` and `lane + 16 …`, as a Q4 byte holds them.
    ///
    /// # Safety
    /// As [`Tile`]; strips `first … first + U` exist.
    #[inline(always)]
    unsafe fn strips<V: Vector, const U: usize>(&self, first: usize) {
        let layout = F::LAYOUT;
        let per_panel = PANEL / 2 / V::LANES;
        let inputs = self.panels.inputs;
        // SAFETY: within the panels, the rows of x and the rows of y, as the caller has promised.
        unsafe {
            let mut from = [self.panels.start; U];
            let mut lanes = [0; U];
            for u in 0..U {
                from[u] = self.panels.start.add((first + u) / per_panel * self.panels.bytes);
                lanes[u] = (first + u) % per_panel * V::LANES;
            }
            let mut groups = from;
            let mut sums = [[[V::splat(0.0); 2]; U]; M];
            let at =
                |m: usize, u: usize| self.y.start.add(m * self.y.stride + (first + u) / per_panel * PANEL);
            if self.panels.goes_on {
                for (m, sums) in sums.iter_mut().enumerate() {
                    for (u, sum) in sums.iter_mut().enumerate() {
                        *sum = load_strip(at(m, u), lanes[u]);
                    }
                }
            }
            let mut done = 0;
            while done < inputs {
                let mut scales = [[V::splat(0.0); 4]; U];
                for u in 0..U {
                    if layout.group > 0 && done % (GROUP_BLOCKS * BLOCK) == 0 {
                        groups[u] = from[u];
                        from[u] = from[u].add(layout.group);
                    }
                    scales[u] = F::scales::<V>(groups[u], from[u], lanes[u]);
                    from[u] = from[u].add(layout.header);
                }
                let (start, stop) = (done, inputs.min(done + BLOCK));
                while done < stop {
                    for k in 0..layout.inputs {
                        let mut weights = [[V::splat(0.0); 2]; U];
                        for u in 0..U {
                            weights[u] = F::weights::<V>(from[u], lanes[u], done - start + k, scales[u]);
                        }
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let x = V::splat(*self.x.start.add(m * self.x.stride + done + k));
                            for u in 0..U {
                                sums[u][0] = weights[u][0].mul_add(x, sums[u][0]);
                                sums[u][1] = weights[u][1].mul_add(x, sums[u][1]);
                            }
                        }
                    }
                    from.iter_mut().for_each(|from| *from = from.add(layout.row));
                    done += layout.inputs;
                }
            }
            for (m, sums) in sums.into_iter().enumerate() {
                for (u, sums) in sums.into_iter().enumerate() {
                    store_strip(sums, at(m, u), lanes[u]);
                }
            }
        }
    }
}

/// A strip of a row of a panel's 32 outputs.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn load_strip<V: Vector>(row: *const f32, lane: usize) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe { [V::load(row.add(lane)), V::load(row.add(lane + PANEL / 2))] }
}

/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn store_strip<V: Vector>([low, high]: [V; 2], row: *mut f32, lane: usize) {
    // SAFETY: the caller's.
    unsafe {
        low.store(row.add(lane));
        high.store(row.add(lane + PANEL / 2));
    }
}

/// Widens whole blocks of one panel to f32: `to` is `[inputs][32]`.
struct Widen<F> {
    from: *const u8,
    inputs: Range<usize>,
    to: *mut f32,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Widen<F> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        let Self { from, inputs, to, format: _ } = self;
        for lane in (0..PANEL / 2).step_by(V::LANES) {
            // SAFETY: within the panel and the scratch, as the caller has promised.
            unsafe {
                let mut to = to;
                for first in inputs.clone().step_by(BLOCK) {
                    let (header, group) = F::LAYOUT.block_at(first / BLOCK);
                    let scales = F::scales::<V>(from.add(group), from.add(header), lane);
                    let mut row = from.add(header + F::LAYOUT.header);
                    for done in (first..inputs.end.min(first + BLOCK)).step_by(F::LAYOUT.inputs) {
                        for k in 0..F::LAYOUT.inputs {
                            store_strip(F::weights::<V>(row, lane, done - first + k, scales), to, lane);
                            to = to.add(PANEL);
                        }
                        row = row.add(F::LAYOUT.row);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::packed::{BLOCK, Shape};

    #[test]
    fn every_isa_and_batch_gives_the_same_bits_in_every_format() {
        let mut state = 1u64;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        let quantized = [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().chain(quantized) {
            let (rows, tokens) = (70, 29);
            let cols = if dtype.is_k_quant() { 2 * GROUP_BLOCKS } else { 7 } * BLOCK;
            let shape = Shape { dtype, rows, cols };
            let elements = dtype.block_elems();
            let mut row = || {
                let mut encoded = Vec::new();
                for _ in 0..cols / elements {
                    let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| byte()).collect();
                    // Exponents of moderate numbers, of every element or of scale and offset.
                    let highs: &[usize] = match dtype {
                        Dtype::F32 => &[3],
                        Dtype::Q4_1 | Dtype::Q4K => &[1, 3],
                        Dtype::Q6K => &[209],
                        _ => &[1],
                    };
                    for high in highs {
                        block[*high] = block[*high] & 0x83 | if elements == 1 { 0x3c } else { 0x20 };
                    }
                    encoded.extend(block);
                }
                encoded
            };
            let packed = Packed::of_rows(shape, &(0..rows).map(|_| row()).collect::<Vec<_>>());
            let x: Vec<f32> = (0..tokens * cols).map(|_| f32::from(byte()) / 127.3 - 1.0).collect();
            let stride = packed.padded_rows();
            let on = |isa: Isa, batch: usize| {
                let mut y = vec![f32::NAN; tokens * stride];
                for at in (0..tokens).step_by(batch) {
                    let rows = Strided { start: x[at * cols..].as_ptr(), stride: cols };
                    let to = Strided { start: y[at * stride..].as_mut_ptr(), stride };
                    let (inputs, count) = (Inputs { rows, form: Form::Plain }, batch.min(tokens - at));
                    // SAFETY: the rows are as long as the strides say.
                    unsafe { linear(isa, &packed, 0..packed.panels(), count, inputs, to) };
                }
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let expected = on(Isa::available()[0], 1);
            assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{dtype}");
            for isa in Isa::available() {
                for batch in [1, 2, 5, 12, tokens] {
                    assert!(on(isa, batch) == expected, "{dtype} on {}, batches of {batch}", isa.name());
                }
            }
        }
    }
}

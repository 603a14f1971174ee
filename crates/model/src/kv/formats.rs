//! How the numbers of keys and values stand in KV memory.

use half::bf16;

use crate::quants::{QUANT_MAX, ROUNDING_SHIFT};
use crate::simd::Vector;

/// What is stored follows from one key or value of one KV head alone, in plain f32: so neither the batch nor the
/// instruction set shows.
pub(crate) trait Format {
    /// A number as it stands in memory.
    type Number: Copy;
    /// The numbers of a key share a scale, and so do those of a value.
    const SCALED: bool = false;

    /// The scale of a key or value.
    fn scale(_numbers: &[f32]) -> f32 {
        1.0
    }

    fn narrow(x: f32, scale: f32) -> Self::Number;

    /// Widens numbers, without their scale.
    ///
    /// # Safety
    /// As [`Vector`].
    unsafe fn load<V: Vector>(from: *const Self::Number) -> V;
}

pub(crate) struct F32;
pub(crate) struct Bf16;
pub(crate) struct Int8;

impl Format for F32 {
    type Number = f32;

    fn narrow(x: f32, _: f32) -> f32 {
        x
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
}

/// Rounded to the nearest, of two to the even one: off by 2⁻⁸ of itself at most.
impl Format for Bf16 {
    type Number = u16;

    fn narrow(x: f32, _: f32) -> u16 {
        bf16::from_f32(x).to_bits()
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u16) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bf16(from) }
    }
}

/// d = max |x| / 127, q = x / d rounded to the nearest, of two to the even one: off by d / 2 at most. If a number is not
/// finite, no multiple of d is.
impl Format for Int8 {
    type Number = i8;
    const SCALED: bool = true;

    fn scale(numbers: &[f32]) -> f32 {
        // Positive numbers are in the order of their bits, what is not finite above all others.
        let max = numbers.iter().fold(0, |max, x| x.abs().to_bits().max(max));
        f32::from_bits(max) / QUANT_MAX
    }

    /// Where the scale is 0, whatever a byte is given to hold.
    fn narrow(x: f32, scale: f32) -> i8 {
        ((x / scale + ROUNDING_SHIFT) - ROUNDING_SHIFT) as i8
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const i8) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_bytes(from) }
    }
}

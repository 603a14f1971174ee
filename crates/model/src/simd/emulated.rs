//! [`Pairs`](super::Pairs) where the CPU has no instruction for them: slower, and the same bits.

use half::bf16;

use super::Vector;

/// As [`Pairs::load_weights`](super::Pairs::load_weights): the first of every two, and the second.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(super) unsafe fn load_weights<V: Vector>(from: *const [u16; 2]) -> [V; 2] {
    // SAFETY: the caller's.
    unsafe { [flushed(V::load_bf16_of(from, 0)), flushed(V::load_bf16_of(from, 1))] }
}

/// As [`Pairs::add_pair`](super::Pairs::add_pair).
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(super) unsafe fn add_pair<V: Vector>(sum: V, [first, second]: [V; 2], x: [u16; 2]) -> V {
    // SAFETY: the caller's.
    unsafe {
        let of = |which: usize| f32::from_bits(u32::from(x[which]) << 16);
        let sum = flushed(second.mul_add(flushed(V::splat(of(1))), flushed(sum)));
        flushed(first.mul_add(flushed(V::splat(of(0))), sum))
    }
}

/// As [`Pairs::store_bf16`](super::Pairs::store_bf16).
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
pub(super) unsafe fn store_bf16<V: Vector>(x: V, to: *mut u16) {
    let mut lanes = [0.0; 16];
    // SAFETY: the caller's; there is room for the widest vector.
    unsafe {
        flushed(x).store(lanes.as_mut_ptr());
        for (at, lane) in lanes[..V::LANES].iter().enumerate() {
            to.add(at).write_unaligned(bf16::from_f32(*lane).to_bits());
        }
    }
}

/// Zeros of the same sign for numbers below 2⁻¹²⁶.
///
/// # Safety
/// As [`Vector`].
#[inline(always)]
unsafe fn flushed<V: Vector>(x: V) -> V {
    // SAFETY: the caller's.
    unsafe {
        let (least, zero) = (V::splat(f32::MIN_POSITIVE), V::splat(0.0));
        x.where_below(least, zero.sub(x).where_below(least, x.mul(zero), x), x)
    }
}

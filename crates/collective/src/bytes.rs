//! Numbers as bytes and back, without copying.

/// The bytes of `values`.
pub(crate) fn of(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four initialized bytes, u8 has no alignment, and the borrow is carried over.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to be written.
pub(crate) fn of_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `of`; and whatever four bytes are written, they are a valid f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// The numbers in `bytes`, which begin at a multiple of four and are a multiple of four long.
pub(crate) fn floats(bytes: &[u8]) -> &[f32] {
    // SAFETY: any four bytes are a valid f32; `align_to` sees to alignment and length.
    let (before, values, after) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && after.is_empty(), "payloads hold whole numbers");
    values
}

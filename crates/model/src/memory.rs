//! Memory for kernels: aligned to cache lines, zeroed, huge pages asked for; and slices that threads share.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

/// From this size on a buffer is mapped by itself, and huge pages are asked for: they spare the hardware prefetcher
/// from stopping at every 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const CACHE_LINE_BYTES: usize = 64;

/// Plain numbers, for which all-zero bytes are a value.
pub(crate) trait Number: Copy + Send + Sync + 'static {}

impl Number for u8 {}
impl Number for i8 {}
impl Number for u16 {}
impl Number for f32 {}

/// A zeroed slice of numbers. Pages that were never written take no memory.
pub(crate) struct Buffer<T: Number> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: a buffer owns its memory as a boxed slice does.
unsafe impl<T: Number> Send for Buffer<T> {}
// SAFETY: shared access gives shared slices only.
unsafe impl<T: Number> Sync for Buffer<T> {}

impl<T: Number> Buffer<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        let start = match layout.size() {
            0 => Some(NonNull::dangling()),
            HUGE_PAGE_BYTES.. => map(layout.size()),
            // SAFETY: the layout's size is not zero.
            _ => NonNull::new(unsafe { alloc_zeroed(layout) }),
        };
        let Some(start) = start else { handle_alloc_error(layout) };
        Self { start: start.cast(), len }
    }

    /// Asks for the pages of some of the numbers, which nobody has written yet, in a node's memory if there is room. A page on
    /// an edge goes to whoever asked last.
    #[cfg(target_os = "linux")]
    pub(crate) fn prefer(&self, numbers: Range<usize>, node: usize) {
        if self.len * size_of::<T>() < HUGE_PAGE_BYTES {
            return; // it shares its pages with others
        }
        let own = self[numbers].as_ptr_range();
        let start = own.start.addr() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        let bytes = own.end.addr().next_multiple_of(HUGE_PAGE_BYTES) - start;
        let Some(nodes) = u32::try_from(node).ok().and_then(|node| 1_u64.checked_shl(node)) else { return };
        // SAFETY: whole pages of this buffer's mapping; a policy moves nothing and changes only speed, so that a refusal (a
        // container may forbid it) does no harm. Nodes are bits of one word.
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start,
                bytes,
                libc::MPOL_PREFERRED,
                &nodes,
                u64::BITS as usize + 1,
                0,
            )
        };
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn prefer(&self, _numbers: Range<usize>, _node: usize) {}

    fn layout(len: usize) -> Layout {
        let bytes = len.saturating_mul(size_of::<T>());
        Layout::from_size_align(bytes, CACHE_LINE_BYTES).expect("a buffer fits the address space")
    }
}

/// What is mapped for a large buffer: whole huge pages, of which the untouched ones take no memory.
fn mapped_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(HUGE_PAGE_BYTES)
}

/// Fresh zeroed pages, which take memory once they are written, from a bound of huge pages on; `None` if the system
/// has none.
fn map(bytes: usize) -> Option<NonNull<u8>> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new private mapping touches no existing memory.
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), mapped_bytes(bytes) + HUGE_PAGE_BYTES, access, kind, -1, 0)
    };
    if mapped == libc::MAP_FAILED {
        return None;
    }
    let before = mapped.align_offset(HUGE_PAGE_BYTES);
    let start = mapped.wrapping_byte_add(before);
    // SAFETY: what lies before and behind was just mapped, is whole pages, and nobody knows of it.
    unsafe {
        libc::munmap(mapped, before);
        libc::munmap(start.wrapping_byte_add(mapped_bytes(bytes)), HUGE_PAGE_BYTES - before);
    }
    #[cfg(target_os = "linux")]
    // SAFETY: the range was just mapped; the advice changes nothing but speed, so its failure is ignored.
    unsafe {
        libc::madvise(start, mapped_bytes(bytes), libc::MADV_HUGEPAGE)
    };
    NonNull::new(start.cast())
}

impl<T: Number> Drop for Buffer<T> {
    fn drop(&mut self) {
        let layout = Self::layout(self.len);
        match layout.size() {
            0 => {}
            HUGE_PAGE_BYTES.. => {
                // SAFETY: mapped in `zeroed` with the same size.
                unsafe { libc::munmap(self.start.as_ptr().cast(), mapped_bytes(layout.size())) };
            }
            // SAFETY: allocated in `zeroed` with the same layout.
            _ => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
        }
    }
}

impl<T: Number> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` numbers, initialized to zero, owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A mutable slice that the threads of one job write at places of their own.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: every access is unsafe, and its caller promises that no other thread touches the same elements.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Panics
    /// If the range is not within the slice.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements while the returned slice lives.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps the threads apart")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: within the slice that `new` borrowed; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All but the first `count` elements.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn skip(&self, count: usize) -> Self {
        assert!(count <= self.len, "skipping {count} of {}", self.len);
        Self { start: self.start.wrapping_add(count), len: self.len - count, borrow: PhantomData }
    }

    /// For kernels that write scattered elements.
    pub(crate) fn as_ptr(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_size_are_zeroed_aligned_and_writable() {
        for len in [0, 1, 1000, HUGE_PAGE_BYTES / 4, HUGE_PAGE_BYTES + 5] {
            let mut buffer = Buffer::<f32>::zeroed(len);
            assert!(buffer.len() == len && buffer.iter().all(|x| *x == 0.0));
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(CACHE_LINE_BYTES));
            buffer.fill(1.0);
            assert!(buffer.iter().all(|x| *x == 1.0));
        }
    }
}

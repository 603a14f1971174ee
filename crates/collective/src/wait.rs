use std::time::Duration;

use rustix::event::Timespec;

/// A timeout in the kernel's form.
pub(crate) fn timespec(timeout: Duration) -> Timespec {
    // Longer than the kernel can count is for ever.
    let tv_sec = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: timeout.subsec_nanos().into() }
}

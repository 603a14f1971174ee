//! Memory as the kernel counts it.

use std::fs::read_to_string;

/// Memory that this process has resident, in bytes; 0 when the kernel does not say.
pub(crate) fn resident_bytes() -> u64 {
    let statm = read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok());
    // SAFETY: sysconf reads a constant.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.unwrap_or_default().saturating_mul(u64::try_from(page_bytes).unwrap_or_default())
}

/// Memory that the machine can still give without swapping, in bytes, if the kernel says so.
pub(crate) fn available_bytes() -> Option<u64> {
    available_in(&read_to_string("/proc/meminfo").ok()?)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers() {
        assert!(resident_bytes() > 100 << 10);
        assert!(available_bytes().unwrap() > 1 << 20);
        assert_eq!(available_in("MemTotal: 9 kB\nMemAvailable:     7 kB\n"), Some(7 << 10));
        assert_eq!(available_in("MemTotal: 9 kB\n"), None);
    }
}

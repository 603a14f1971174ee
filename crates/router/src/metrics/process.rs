//! This process, under the names that every Prometheus client uses.

use super::page::Page;

/// Writes what `/proc` tells; what it does not tell is left out.
pub(super) fn write(page: &mut Page) {
    if let Some(bytes) = resident_bytes() {
        page.family("process_resident_memory_bytes", "gauge", "Resident memory of the router's process.");
        page.sample(&[], bytes);
    }
    if let Some(seconds) = cpu_s() {
        page.family("process_cpu_seconds_total", "counter", "Processor time of the router's process.");
        page.sample(&[], seconds);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        page.family("process_open_fds", "gauge", "Open file descriptors of the router's process.");
        page.sample(&[], open.count());
    }
}

fn resident_bytes() -> Option<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    let resident: u64 = pages.split(' ').nth(1)?.parse().ok()?;
    Some(resident * rustix::param::page_size() as u64)
}

fn cpu_s() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; user and system time are the 12th and 13th fields behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

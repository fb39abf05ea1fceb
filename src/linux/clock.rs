//! Whether the system's clock is synchronised, as the kernel was told by whatever keeps it, and how long it runs.

/// Milliseconds since boot, suspended time included: the same for all processes of a machine.
pub fn boot_ms() -> u64 {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    since.tv_sec as u64 * 1000 + since.tv_nsec as u64 / 1_000_000
}

/// False when nothing disciplines the clock, or the kernel won't say.
pub fn is_synchronised() -> bool {
    // SAFETY: an all-zero timex asks for the status and changes nothing; the kernel writes within the struct, which
    // outlives the call.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        let state = libc::adjtimex(&mut timex);
        (state, timex.status)
    };
    state >= 0 && state != libc::TIME_ERROR && status & libc::STA_UNSYNC == 0
}

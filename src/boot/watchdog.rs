//! The hardware watchdog: fed while the daemon answers, so that a board that hangs starts anew by itself.
//!
//! Input: when the daemon last answered. Output: food. After `PATIENCE_MS` without an answer it gets none, and the
//! hardware restarts the board.

use crate::linux::machine;
use std::fs::File;
use std::io::Write;

/// What the Raspberry Pi's can count to, rounded down.
const TIMEOUT_S: u32 = 15;
const FEED_EVERY_MS: u64 = 4_000;
/// A daemon that copies a snapshot or waits for a slow card is not dead.
const PATIENCE_MS: u64 = 120_000;

pub struct Watchdog {
    device: File,
    next_ms: u64,
    /// The end of the patience: nothing later than this is fed.
    alive_until_ms: u64,
}

impl Watchdog {
    /// `None`: this board has none.
    pub fn open(now_ms: u64) -> Option<(Watchdog, u32)> {
        let device = File::options().write(true).open("/dev/watchdog").ok()?;
        let seconds = machine::set_watchdog_timeout(&device, TIMEOUT_S).unwrap_or(TIMEOUT_S);
        Some((Watchdog { device, next_ms: now_ms, alive_until_ms: now_ms + PATIENCE_MS }, seconds))
    }

    /// Fed when due; `answered_ms`: when the daemon last answered.
    pub fn step(&mut self, now_ms: u64, answered_ms: Option<u64>) {
        if let Some(answered_ms) = answered_ms {
            self.alive_until_ms = self.alive_until_ms.max(answered_ms + PATIENCE_MS);
        }
        if now_ms >= self.next_ms && now_ms <= self.alive_until_ms {
            self.next_ms = now_ms + FEED_EVERY_MS;
            // One that can't be written to bites, which is what it is for.
            let _ = self.device.write_all(b"\0");
        }
    }

    pub fn deadline_ms(&self) -> u64 {
        self.next_ms
    }

    pub fn is_patient(&self, now_ms: u64) -> bool {
        now_ms <= self.alive_until_ms
    }
}

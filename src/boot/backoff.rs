//! How long to wait before a child is started again. Pure.
//!
//! The first start is at once; each end doubles the wait from 0.2 s to 10 s; a minute of steady running resets it.

const FIRST_MS: u64 = 200;
const LAST_MS: u64 = 10_000;
const STEADY_MS: u64 = 60_000;

#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    wait_ms: u64,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { wait_ms: FIRST_MS }
    }
}

impl Backoff {
    /// When to start again a child that ran from `started_ms` to `now_ms`.
    pub fn after_end(&mut self, started_ms: u64, now_ms: u64) -> u64 {
        if now_ms.saturating_sub(started_ms) >= STEADY_MS {
            self.wait_ms = FIRST_MS;
        }
        let at = now_ms + self.wait_ms;
        self.wait_ms = (self.wait_ms * 2).min(LAST_MS);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_a_steady_minute_resets_them() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8).map(|_| backoff.after_end(0, 1_000) - 1_000).collect();
        assert_eq!(waits, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
        assert_eq!(backoff.after_end(0, 60_000), 60_200);
    }
}

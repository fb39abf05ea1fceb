//! Probe results and thresholds to a verdict. Pure: time is passed in.
//!
//! Probing starts with the container: every 250 ms, doubling up to the interval, until the first success. Failures
//! count only after the start period; `retries` in a row make it unhealthy, one success makes it healthy.

use crate::model::{HealthSpec, Mono};

const FIRST_PROBE_MS: u64 = 250;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No success yet, and not given up.
    Starting,
    Healthy,
    Unhealthy,
}

#[derive(Clone, Debug)]
pub struct Judge {
    verdict: Verdict,
    failures: u32,
    started_at: Mono,
    pause_ms: u64,
}

impl Judge {
    pub fn new(started_at: Mono) -> Judge {
        Judge { verdict: Verdict::Starting, failures: 0, started_at, pause_ms: FIRST_PROBE_MS }
    }

    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes one result; returns the pause until the next probe, in ms.
    pub fn take(&mut self, is_success: bool, spec: &HealthSpec, now: Mono) -> u64 {
        if is_success {
            self.verdict = Verdict::Healthy;
            self.failures = 0;
            return spec.interval_ms;
        }
        let is_excused =
            self.verdict == Verdict::Starting && now.since_ms(self.started_at) < spec.start_period_ms;
        if !is_excused {
            self.failures += 1;
            if self.failures >= spec.retries.max(1) {
                self.verdict = Verdict::Unhealthy;
            }
        }
        if self.verdict == Verdict::Starting {
            let pause = self.pause_ms.min(spec.interval_ms);
            self.pause_ms = self.pause_ms.saturating_mul(2);
            return pause;
        }
        spec.interval_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HealthTest;

    fn spec() -> HealthSpec {
        HealthSpec {
            test: HealthTest::Shell("true".into()),
            interval_ms: 1000,
            timeout_ms: 500,
            retries: 3,
            start_period_ms: 2000,
        }
    }

    #[test]
    fn failures_count_only_after_the_start_period() {
        let mut judge = Judge::new(Mono(0));
        for at in [0, 500, 1000, 1999] {
            judge.take(false, &spec(), Mono(at));
        }
        assert_eq!(judge.verdict(), Verdict::Starting);
        for at in [2000, 3000] {
            judge.take(false, &spec(), Mono(at));
            assert_eq!(judge.verdict(), Verdict::Starting);
        }
        judge.take(false, &spec(), Mono(4000));
        assert_eq!(judge.verdict(), Verdict::Unhealthy);
        judge.take(true, &spec(), Mono(5000));
        assert_eq!(judge.verdict(), Verdict::Healthy);
    }

    #[test]
    fn pauses_double_up_to_the_interval_until_the_first_success() {
        let mut judge = Judge::new(Mono(0));
        let pauses: Vec<u64> = (0..4).map(|_| judge.take(false, &spec(), Mono(10))).collect();
        assert_eq!(pauses, [250, 500, 1000, 1000]);
        assert_eq!(judge.take(true, &spec(), Mono(20)), 1000);
    }
}

//! How many strangers may try to join at once, and how often one address may fail.
//!
//! Pure: monotonic milliseconds are passed in. Counts completed handshakes only, whose source address is proved, so
//! nobody can lock out another's address. IPv6 counts by /64.
//!
//! Invariant: at most 8 at once and 5 failures a minute per source (`floods_are_limited`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::hello::{Refusal, RefusalCode};
use crate::model::source_of;

pub(super) const JOINS_AT_ONCE_MAX: usize = 8;
pub(super) const FAILURES_A_MINUTE_MAX: usize = 5;
const MINUTE_MS: u64 = 60_000;
/// Sources remembered; over it the one that failed longest ago is forgotten.
const SOURCES_MAX: usize = 256;

#[derive(Default)]
pub(super) struct JoinLimit {
    active: usize,
    failures: BTreeMap<IpAddr, Vec<u64>>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum JoinOutcome {
    /// Whoever it is has proved that it is meant to come: its failures are forgotten.
    Accepted,
    /// Counted elsewhere, or not by the source's fault.
    Refused,
    Failed,
}

impl JoinLimit {
    /// Each `Ok` must be followed by one `leave`.
    pub fn enter(&mut self, address: IpAddr, now_ms: u64) -> Result<(), Refusal> {
        if let Some(times) = self.failures.get_mut(&source_of(address)) {
            times.retain(|time| now_ms.saturating_sub(*time) < MINUTE_MS);
            if let (true, Some(oldest)) = (times.len() >= FAILURES_A_MINUTE_MAX, times.first()) {
                let wait_s = (MINUTE_MS - now_ms.saturating_sub(*oldest)).div_ceil(1000);
                return Err(Refusal::new(
                    RefusalCode::TooManyFailures,
                    format!("too many failed joins from this address; try again in {wait_s} s"),
                ));
            }
        }
        if self.active >= JOINS_AT_ONCE_MAX {
            return Err(Refusal::new(
                RefusalCode::Busy,
                format!("{JOINS_AT_ONCE_MAX} joins are under way; try again in a few seconds"),
            ));
        }
        self.active += 1;
        Ok(())
    }

    pub fn leave(&mut self, address: IpAddr, outcome: JoinOutcome, now_ms: u64) {
        self.active -= 1;
        let source = source_of(address);
        match outcome {
            JoinOutcome::Accepted => {
                self.failures.remove(&source);
            }
            JoinOutcome::Refused => {}
            JoinOutcome::Failed => {
                self.failures.entry(source).or_default().push(now_ms);
                if self.failures.len() > SOURCES_MAX {
                    let oldest = self
                        .failures
                        .iter()
                        .min_by_key(|(_, times)| times.last().copied())
                        .map(|(source, _)| *source);
                    oldest.map(|source| self.failures.remove(&source));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn floods_are_limited() {
        let mut limit = JoinLimit::default();
        for source in 0..8 {
            limit.enter(address(source), 0).unwrap();
        }
        assert_eq!(limit.enter(address(9), 0).unwrap_err().code, RefusalCode::Busy);
        for source in 0..8 {
            limit.leave(address(source), JoinOutcome::Accepted, 0);
        }
        for time in 0..5 {
            limit.enter(address(1), time * 1000).unwrap();
            limit.leave(address(1), JoinOutcome::Failed, time * 1000);
        }
        let refusal = limit.enter(address(1), 10_000).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::TooManyFailures);
        assert!(refusal.sentence.ends_with("in 50 s"), "{refusal}");
        limit.enter(address(2), 10_000).unwrap();
        limit.enter(address(1), 60_000).unwrap();
    }

    #[test]
    fn a_refusal_takes_back_no_failure() {
        let mut limit = JoinLimit::default();
        for time in 0..5 {
            limit.enter(address(1), time).unwrap();
            limit.leave(address(1), JoinOutcome::Failed, time);
            if time < 4 {
                limit.enter(address(1), time).unwrap();
                limit.leave(address(1), JoinOutcome::Refused, time);
            }
        }
        assert_eq!(limit.enter(address(1), 10).unwrap_err().code, RefusalCode::TooManyFailures);
    }

    #[test]
    fn one_network_s_ipv6_addresses_count_as_one_and_memory_is_bounded() {
        let mut limit = JoinLimit::default();
        for host in 0..5u16 {
            let address = IpAddr::from([0xfd00, 0, 0, 1, 0, 0, 0, host]);
            limit.enter(address, 0).unwrap();
            limit.leave(address, JoinOutcome::Failed, 0);
        }
        assert!(limit.enter(IpAddr::from([0xfd00, 0, 0, 1, 9, 9, 9, 9]), 1).is_err());
        for source in 0..2000u32 {
            let address = IpAddr::from(source.to_be_bytes());
            limit.enter(address, 2).unwrap();
            limit.leave(address, JoinOutcome::Failed, u64::from(source));
        }
        assert_eq!(limit.failures.len(), SOURCES_MAX);
    }
}

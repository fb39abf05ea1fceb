//! What the DNS server has done since it started, for `tinydc net`.

use super::upstreams::UpstreamView;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub struct Counters {
    pub questions: AtomicU64,
    pub by_tcp: AtomicU64,
    pub answered_here: AtomicU64,
    pub from_cache: AtomicU64,
    pub forwarded: AtomicU64,
    pub upstream_failures: AtomicU64,
    pub malformed: AtomicU64,
    pub strangers: AtomicU64,
    pub overloaded: AtomicU64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsCounts {
    pub questions: u64,
    pub by_tcp: u64,
    pub answered_here: u64,
    pub from_cache: u64,
    /// Sent upstream; one for all who ask the same at once.
    pub forwarded: u64,
    pub upstream_failures: u64,
    pub malformed: u64,
    /// From addresses outside this node and the cluster's ranges: dropped.
    pub strangers: u64,
    /// Refused because too much was on its way.
    pub overloaded: u64,
    pub cache_entries: usize,
    pub cache_bytes: usize,
    pub upstreams: Vec<UpstreamView>,
}

impl Counters {
    pub fn read(&self) -> DnsCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DnsCounts {
            questions: read(&self.questions),
            by_tcp: read(&self.by_tcp),
            answered_here: read(&self.answered_here),
            from_cache: read(&self.from_cache),
            forwarded: read(&self.forwarded),
            upstream_failures: read(&self.upstream_failures),
            malformed: read(&self.malformed),
            strangers: read(&self.strangers),
            overloaded: read(&self.overloaded),
            ..DnsCounts::default()
        }
    }
}

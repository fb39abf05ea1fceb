//! What the ingress has done since it started, for `tinydc net`.

use super::routes::{LiveRoute, RouteKey};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub struct RouteCounters {
    pub requests: AtomicU64,
    pub in_flight: AtomicU64,
    /// By the first digit of the status, 1 to 5.
    pub answers: [AtomicU64; 5],
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    /// Requests that a second endpoint or connection got.
    pub retries: AtomicU64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteCounts {
    pub key: RouteKey,
    pub endpoints: usize,
    pub requests: u64,
    pub in_flight: u64,
    /// 1xx to 5xx.
    pub answers: [u64; 5],
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub retries: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IngressCounts {
    /// Open now.
    pub connections: usize,
    /// To endpoints, waiting for their next request.
    pub idle_connections: usize,
    /// Turned away because too many were open.
    pub refused: u64,
    pub failed_handshakes: u64,
    /// Requests for which there was no route.
    pub unrouted: u64,
    pub routes: Vec<RouteCounts>,
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl RouteCounters {
    pub fn count_answer(&self, status: hyper::StatusCode) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5);
        add(&self.answers[class - 1], 1);
    }
}

impl LiveRoute {
    pub fn counts(&self) -> RouteCounts {
        let counters = &self.counters;
        RouteCounts {
            key: self.key.clone(),
            endpoints: self.route.endpoints.len(),
            requests: read(&counters.requests),
            in_flight: read(&counters.in_flight),
            answers: std::array::from_fn(|class| read(&counters.answers[class])),
            bytes_in: read(&counters.bytes_in),
            bytes_out: read(&counters.bytes_out),
            retries: read(&counters.retries),
        }
    }
}

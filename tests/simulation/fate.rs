//! What a run is about: its random stream, the bug that was planted, what it counted.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    None,
    /// A batch counts as durable as soon as it is submitted.
    AcknowledgeBeforeWrite,
    /// A read is served without asking a quorum.
    ReadLocally,
    /// The vote of a term does not survive a crash. Too rare by chance: a directed run shows it.
    ForgetVote,
    /// A retry carries a new request id.
    RetryAsNew,
    /// After a crash a later batch is there and an earlier one is not.
    ReorderBatches,
    /// The applied index is written, the rows are not.
    LoseRows,
}

impl Bug {
    /// With the seeds within which each must be caught.
    pub const PLANTED: [(Bug, u64); 6] = [
        (Bug::AcknowledgeBeforeWrite, 40),
        (Bug::ReadLocally, 20),
        (Bug::ForgetVote, 1),
        (Bug::RetryAsNew, 60),
        (Bug::ReorderBatches, 40),
        (Bug::LoseRows, 20),
    ];
}

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub trace: u64,
    pub simulated_ms: u64,
    pub elections: u64,
    pub crashes: u64,
    pub lost_batches: u64,
    pub snapshots: u64,
    pub writes: u64,
    pub reads: u64,
    pub conf_changes: u64,
}

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

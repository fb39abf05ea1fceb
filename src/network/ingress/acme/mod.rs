//! Certificates that browsers trust, from a certificate authority that speaks ACME (RFC 8555), such as Let's Encrypt.
//!
//! Account key, hosts and a way to publish the answers to challenges → a chain and its key. HTTP-01 only: the authority
//! asks the ingress of whatever node the host's address leads to, so the answers must be in every node's table first. What
//! comes out is kept by the caller, as is the account key; nothing is written here.
//!
//! Blocks for up to two minutes; it belongs on a blocking thread of the one node that is in charge. When to ask and when
//! to ask again is decided by pure functions, because authorities count failures.
//!
//! Invariant: an authority that is asked to hold to its protocol issues (`an_order_ends_with_a_certificate`), and one that
//! refuses is quoted (`a_refusal_is_told_in_the_authority_s_words`).

mod account;
mod messages;
mod order;
mod session;
#[cfg(test)]
mod tests;

pub use account::AccountKey;
pub use order::{Issued, Wish, obtain};

/// The production service of Let's Encrypt.
pub const LETS_ENCRYPT: &str = "https://acme-v02.api.letsencrypt.org/directory";
const FIRST_PAUSE_SECONDS: u64 = 3600;
const LONGEST_PAUSE_SECONDS: u64 = 24 * 3600;

#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    #[error("{step}")]
    Ask {
        step: &'static str,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("{step}: the authority says: {detail}")]
    Refused {
        step: &'static str,
        status: u16,
        /// The last part of the problem's type: `rateLimited`, `rejectedIdentifier`.
        kind: String,
        detail: String,
        /// It wants to be left alone for so long.
        retry_after_seconds: Option<u64>,
    },
    #[error("{step}: the authority's answer makes no sense")]
    Unreadable {
        step: &'static str,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{0} is a wildcard; those can't be proved by HTTP")]
    Wildcard(String),
    #[error("the authority offers no proof by HTTP for {0}")]
    NoHttpChallenge(String),
    #[error("publish the answers to the challenges")]
    Publish(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("{host} was not proved: the authority says: {detail}")]
    NotProved { host: String, detail: String },
    #[error("the authority gave the order up: {0}")]
    OrderFailed(String),
    #[error("the authority took longer than {0} s")]
    Late(u64),
    #[error("stopped")]
    Stopped,
    #[error("make a key")]
    Key,
    #[error("make the request for the certificate")]
    Csr(#[source] rcgen::Error),
}

/// Whether a certificate should be renewed: in the last third of its life. All in seconds since 1970.
pub fn is_due(not_before: u64, not_after: u64, now: u64) -> bool {
    let life = not_after.saturating_sub(not_before);
    now >= not_after.saturating_sub(life / 3)
}

/// How long to wait after so many failures in a row: an hour, doubling up to a day. Authorities block who asks more.
pub fn pause_seconds(failures: u32) -> u64 {
    match failures {
        0 => 0,
        _ => (FIRST_PAUSE_SECONDS << (failures - 1).min(10)).min(LONGEST_PAUSE_SECONDS),
    }
}

//! Certificates that browsers trust, from a certificate authority that speaks ACME (RFC 8555), such as Let's Encrypt.
//!
//! Account key, hosts and a way to publish the answers to challenges → a chain and its key. HTTP-01 only: the authority
//! asks the ingress of whatever node the host's address leads to, so the answers must be in every node's table first. What
//! comes out is kept by the caller, as is the account key; nothing is written here.
//!
//! Blocks for up to two minutes; it belongs on a blocking thread of the one node that is in charge. When to ask and when
//! to ask again is the planner's, because authorities count failures.
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

//! The ingress on loopback, with endpoints that answer, stall, break off and switch protocols.

mod endings;
pub(super) mod kit;
mod passing;
mod secure;

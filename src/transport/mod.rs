//! Identity, peers, frames.

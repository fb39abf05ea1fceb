//! HTTP API.

pub mod wire;

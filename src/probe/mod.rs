//! Runs one health check.

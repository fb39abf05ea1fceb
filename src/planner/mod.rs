//! Decides what should run where.

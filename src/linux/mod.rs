//! The only place with `unsafe`: system calls that no crate serves.

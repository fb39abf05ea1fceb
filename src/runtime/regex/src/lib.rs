//! `regex` for those that ask for it: oci-spec and libcontainer match a few short patterns of plain ASCII.
//!
//! regex-lite has the same interface without the tables of Unicode and the engines for long texts, which were half a
//! megabyte of the binary.
pub use regex_lite::{Captures, Error, Match, Regex, RegexBuilder};

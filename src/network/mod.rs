//! Turns desired tables into the kernel's.

//! argv → container shim | the demo image's server | command line.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match args.first().and_then(|verb| verb.to_str()) {
        Some(verb) if verb.starts_with("shim") => tinydc::runtime::shim_main(&args),
        Some("hello") => tinydc::cli::hello::main(&args[1..]),
        _ => tinydc::cli::main(&args),
    }
}

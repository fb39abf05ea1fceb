//! argv → first process of a machine | its helpers | container shim | a board's prompt | the demo image's server | command line.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    if tinydc::boot::is_init() {
        tinydc::boot::main();
    }
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = tinydc::boot::helper(&args) {
        return code;
    }
    match args.first().and_then(|verb| verb.to_str()) {
        Some(verb) if verb.starts_with("shim") => tinydc::runtime::shim_main(&args),
        Some("console") => tinydc::cli::console::main(),
        Some("hello") => tinydc::cli::hello::main(&args[1..]),
        _ => tinydc::cli::main(&args),
    }
}

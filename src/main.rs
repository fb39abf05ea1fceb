//! The one binary: a container's shim, or the command line.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.first().and_then(|verb| verb.to_str()).is_some_and(|verb| verb.starts_with("shim")) {
        return tinydc::runtime::shim_main(&args);
    }
    let options = tinydc::node::RunOptions { config: args.first().map(Into::into), data_dir: None };
    match tinydc::node::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

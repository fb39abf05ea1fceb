//! The processes that stand between the daemon and its containers.
//!
//! `tinydc shim` starts one container from a single thread, then executes itself again as `tinydc shim-wait`, which
//! is small, keeps the container's output and exit, and needs no daemon. `tinydc shim-exec` runs one more command
//! inside. All three are this binary; nobody types them.
//!
//! Invariant: a killed daemon loses no container and no exit code (`tests/runtime`, killed starter).

mod executor;
mod launch;
mod proxy;
mod record;
mod waiter;

use std::ffi::OsString;
use std::process::ExitCode;

pub(super) use launch::LaunchArguments;
pub(super) use proxy::ExecArguments;
pub use record::ExitRecord;
pub(super) use record::{EXIT_FILE, RECORD_FILE, ShimRecord, boot_id};

/// Where a starting process of tinydc reports: `started`, or `error ` and the whole chain.
pub(super) const STATUS_FD: i32 = 3;
/// The process description of `shim-exec`.
pub(super) const PROCESS_FD: i32 = 4;
pub(super) const CONTROL_SOCKET: &str = "control.sock";
/// The last to be killed when memory runs out, after the daemon.
const OOM_SCORE: i32 = -998;

/// Runs a hidden verb; `args` begins with it: `shim`, `shim-wait` or `shim-exec`.
pub fn shim_main(args: &[OsString]) -> ExitCode {
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        let Some(word) = arg.to_str() else { return ExitCode::from(2) };
        words.push(word);
    }
    match words.split_first() {
        Some((&"shim", rest)) => launch::run(rest),
        Some((&"shim-wait", rest)) => waiter::run(rest),
        Some((&"shim-exec", rest)) => proxy::run(rest),
        _ => ExitCode::from(2),
    }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // libcontainer repeats causes in its own texts.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

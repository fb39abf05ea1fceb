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
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::linux::{clock, socket};

pub(super) use launch::LaunchArguments;
pub(super) use proxy::ExecArguments;
pub use record::ExitRecord;
pub(super) use record::{EXIT_FILE, RECORD_FILE, ShimRecord, boot_id};

/// Where a starting process of tinydc reports: `started`, or `error ` and the whole chain.
pub(super) const STATUS_FD: i32 = 3;
/// The process description of `shim-exec`.
pub(super) const PROCESS_FD: i32 = 4;
pub(super) const CONTROL_SOCKET: &str = "control.sock";
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// The last to be killed when memory runs out, after the daemon.
const OOM_SCORE: i32 = -998;

/// When an exclusive container must have ended, in ms since boot: what its shim keeps in memory and the daemon moves
/// on. A shim that hears nothing ends its container then, also without a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseEnd(pub u64);

impl LeaseEnd {
    fn to_word(lease: Option<LeaseEnd>) -> String {
        lease.map_or(0, |end| end.0).to_string()
    }

    /// `Some(None)`: a container without a lease.
    fn parse(word: &str) -> Option<Option<LeaseEnd>> {
        let end = word.parse().ok()?;
        Some((end != 0).then_some(LeaseEnd(end)))
    }

    fn left(self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(clock::boot_ms()))
    }

    fn has_come(self) -> bool {
        self.left().is_zero()
    }

    /// Tells the shim whose folder is `run` that its container may run until then.
    pub(super) fn send(self, run: &Path) -> io::Result<()> {
        let shim = socket::connect_messages(&run.join(CONTROL_SOCKET), ANSWERS_WITHIN)?;
        socket::send(shim.as_fd(), format!("lease {}", self.0).as_bytes())?;
        let mut answer = [0u8; 64];
        let length = socket::receive(shim.as_fd(), &mut answer)?;
        match &answer[..length] {
            b"ok" => Ok(()),
            other => Err(io::Error::other(String::from_utf8_lossy(other).into_owned())),
        }
    }
}

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

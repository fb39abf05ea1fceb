//! The children of the first process: the daemon, the prompts, the one that asks for the time.
//!
//! Input: starts, ends, time. Output: processes, started again with backoff. What the daemon prints is kept in memory,
//! bounded, and goes to a terminal of its own where the kernel's command line names one: `tinydc.log=ttyS1`.

use super::backoff::Backoff;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const LOG_FILE: &str = "/run/tinydc-boot/log";
const LOG_BYTES_MAX: u64 = 256 << 10;
const READ_BYTES: usize = 4096;
/// A pipe that is never empty must not hold up the rest of a turn.
const READS_PER_TURN: usize = 16;

/// This program again, with other words.
pub fn own(words: &[&str]) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("tinydc").args(words).env_clear().env("HOME", "/root").env("PATH", "/").current_dir("/");
    command
}

/// A child that always runs.
pub struct Kept {
    backoff: Backoff,
    pid: Option<i32>,
    started_ms: u64,
    start_at_ms: Option<u64>,
    is_retired: bool,
}

impl Kept {
    pub fn new() -> Kept {
        Kept {
            backoff: Backoff::default(),
            pid: None,
            started_ms: 0,
            start_at_ms: Some(0),
            is_retired: false,
        }
    }

    pub fn is_due(&self, now_ms: u64) -> bool {
        self.deadline_ms().is_some_and(|at| now_ms >= at)
    }

    pub fn deadline_ms(&self) -> Option<u64> {
        self.start_at_ms.filter(|_| !self.is_retired)
    }

    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    pub fn started(&mut self, outcome: &Result<i32>, now_ms: u64) {
        self.started_ms = now_ms;
        match outcome {
            Ok(pid) => (self.pid, self.start_at_ms) = (Some(*pid), None),
            Err(_) => self.start_at_ms = Some(self.backoff.after_end(now_ms, now_ms)),
        }
    }

    /// True when it was this child that ended.
    pub fn ended(&mut self, pid: i32, now_ms: u64) -> bool {
        if self.pid != Some(pid) {
            return false;
        }
        self.pid = None;
        self.start_at_ms = Some(self.backoff.after_end(self.started_ms, now_ms));
        true
    }

    /// It is not started any more.
    pub fn retire(&mut self) {
        self.is_retired = true;
    }

    pub fn is_retired(&self) -> bool {
        self.is_retired
    }
}

/// What children print, line by line.
pub struct Output {
    reader: OwnedFd,
    writer: OwnedFd,
    rest: Vec<u8>,
}

impl Output {
    pub fn open() -> Result<Output> {
        use rustix::pipe::{PipeFlags, pipe_with};
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("make a pipe")?;
        rustix::io::ioctl_fionbio(&reader, true).context("make a pipe non-blocking")?;
        Ok(Output { reader, writer, rest: Vec::new() })
    }

    /// Both outputs of a child come here.
    pub fn attach(&self, command: &mut Command) -> Result<()> {
        let copy = || self.writer.try_clone().context("copy a pipe");
        command.stdin(Stdio::null()).stdout(Stdio::from(copy()?)).stderr(Stdio::from(copy()?));
        Ok(())
    }

    pub fn waits_on(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// Whole lines that have come.
    pub fn take_lines(&mut self) -> Vec<String> {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS_PER_TURN {
            match crate::linux::machine::read_waiting(self.reader.as_fd(), &mut buffer) {
                Ok(Some(length)) if length > 0 => self.rest.extend(&buffer[..length]),
                _ => break,
            }
        }
        let mut lines = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            lines.push(String::from_utf8_lossy(&line).trim_end().to_string());
        }
        // A line without an end is cut.
        if self.rest.len() > READ_BYTES {
            lines.push(String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned());
        }
        lines
    }
}

/// The terminal that a word of the kernel's command line names.
pub fn open_log_terminal(word: &str) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = Path::new("/dev").join(word.strip_prefix("tinydc.log=")?);
    File::options().write(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open(path).ok()
}

/// The last lines of the daemon, in memory: two files, of which the older is dropped when the newer is full.
pub fn log(line: &str) {
    let path = Path::new(LOG_FILE);
    if fs::metadata(path).is_ok_and(|file| file.len() > LOG_BYTES_MAX) {
        let _ = fs::rename(path, older(path));
    }
    // Memory is full: the line is lost, the board runs on.
    if let Ok(mut file) = File::options().create(true).append(true).open(path) {
        let _ = writeln!(file, "{line}");
    }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("old")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_ended_is_due_again_unless_it_is_retired() {
        let mut kept = Kept::new();
        assert!(kept.is_due(0));
        kept.started(&Ok(10), 0);
        assert!(kept.deadline_ms().is_none() && !kept.ended(11, 5));
        assert!(kept.ended(10, 5_000) && kept.deadline_ms().is_some());
        kept.started(&Ok(12), 6_000);
        kept.retire();
        assert!(kept.ended(12, 60_000) && kept.deadline_ms().is_none() && !kept.is_due(u64::MAX));
    }
}

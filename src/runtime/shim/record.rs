//! What a shim writes down for a daemon that comes later: who runs, and how it ended.
//!
//! Plain words in one line, written whole by rename, so that a reader sees all of it or nothing. No serde: the
//! waiter's memory is counted in pages.

use std::fs;
use std::io;
use std::path::Path;

use crate::linux::process::ProcessId;

pub const RECORD_FILE: &str = "processes";
pub const EXIT_FILE: &str = "exit";

/// The processes of one started container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShimRecord {
    /// Start times repeat after a reboot; a record of another boot means nothing any more.
    pub boot_id: String,
    pub shim: ProcessId,
    /// `None` while the container is being made.
    pub container: Option<ProcessId>,
    pub started_at_ms: u64,
}

/// How a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// The exit code, or 128 + the signal.
    pub code: i32,
    pub signal: Option<i32>,
    /// The main process was killed because memory ran out.
    pub is_oom_killed: bool,
    /// Processes of the container that the kernel killed for memory, children included.
    pub oom_kills: u64,
    /// ms since 1970.
    pub started_at_ms: u64,
    pub finished_at_ms: u64,
}

/// Changes at every boot.
pub fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

impl ShimRecord {
    pub fn write(&self, run: &Path) -> io::Result<()> {
        let container = self.container.unwrap_or(ProcessId { pid: 0, start_ticks: 0 });
        let text = format!(
            "1 {} {} {} {} {} {}\n",
            self.boot_id,
            self.shim.pid,
            self.shim.start_ticks,
            container.pid,
            container.start_ticks,
            self.started_at_ms
        );
        write_whole(run, RECORD_FILE, &text)
    }

    /// `None`: there is none, or it is not understood.
    pub fn read(run: &Path) -> Option<ShimRecord> {
        ShimRecord::parse(&fs::read_to_string(run.join(RECORD_FILE)).ok()?)
    }

    fn parse(text: &str) -> Option<ShimRecord> {
        let mut words = text.strip_prefix("1 ")?.split_ascii_whitespace();
        let boot_id = words.next()?.to_owned();
        let mut process =
            || Some(ProcessId { pid: words.next()?.parse().ok()?, start_ticks: words.next()?.parse().ok()? });
        let (shim, container) = (process()?, process()?);
        let container = (container.pid != 0).then_some(container);
        Some(ShimRecord { boot_id, shim, container, started_at_ms: words.next()?.parse().ok()? })
    }
}

impl ExitRecord {
    pub fn write(&self, run: &Path) -> io::Result<()> {
        let text = format!(
            "1 {} {} {} {} {} {}\n",
            self.code,
            self.signal.unwrap_or(0),
            u8::from(self.is_oom_killed),
            self.oom_kills,
            self.started_at_ms,
            self.finished_at_ms
        );
        write_whole(run, EXIT_FILE, &text)
    }

    /// `None`: there is none, or it is not understood.
    pub fn read(run: &Path) -> Option<ExitRecord> {
        ExitRecord::parse(&fs::read_to_string(run.join(EXIT_FILE)).ok()?)
    }

    fn parse(text: &str) -> Option<ExitRecord> {
        let mut words = text.strip_prefix("1 ")?.split_ascii_whitespace();
        let code = words.next()?.parse().ok()?;
        let mut number = || words.next()?.parse::<u64>().ok();
        let signal = number()?;
        Some(ExitRecord {
            code,
            signal: i32::try_from(signal).ok().filter(|signal| *signal != 0),
            is_oom_killed: number()? == 1,
            oom_kills: number()?,
            started_at_ms: number()?,
            finished_at_ms: number()?,
        })
    }
}

fn write_whole(run: &Path, name: &str, text: &str) -> io::Result<()> {
    let temporary = run.join(format!("{name}.new"));
    fs::write(&temporary, text)?;
    fs::rename(&temporary, run.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::scratch::Scratch;

    #[test]
    fn records_read_back_and_cut_ones_are_refused() {
        let scratch = Scratch::new("record");
        let process = |pid| ProcessId { pid, start_ticks: 7 };
        for container in [None, Some(process(12))] {
            let record =
                ShimRecord { boot_id: "b-1".into(), shim: process(11), container, started_at_ms: 99 };
            record.write(scratch.path()).unwrap();
            assert_eq!(ShimRecord::read(scratch.path()), Some(record));
        }
        let exit = ExitRecord {
            code: 137,
            signal: Some(9),
            is_oom_killed: true,
            oom_kills: 2,
            started_at_ms: 1,
            finished_at_ms: 2,
        };
        exit.write(scratch.path()).unwrap();
        assert_eq!(ExitRecord::read(scratch.path()), Some(exit));
        for cut in ["", "1 ", "1 b 1 2 3", "2 b 1 2 3 4 5"] {
            assert_eq!(ShimRecord::parse(cut), None, "{cut}");
            assert_eq!(ExitRecord::parse(cut), None, "{cut}");
        }
    }
}

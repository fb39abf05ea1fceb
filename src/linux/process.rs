//! Processes: a pid that cannot be mistaken for another, signals, descriptors for children, the OOM score.
//!
//! A pid is reused by the kernel; a process is therefore named by its pid and its start time, and signalled through
//! a pidfd that was opened while both matched.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, getrlimit, setrlimit};

/// What a container may have at most, as systemd gives it to services.
pub const OPEN_FILES_HARD: u64 = 524_288;
/// As in its unit for systemd; all that is bounded in it takes some thousands.
const OPEN_FILES_OF_DAEMON: u64 = 65_536;
/// Where glibc begins, before it has learned anything.
#[cfg(target_env = "gnu")]
const LARGE_ALLOCATION: i32 = 128 << 10;

/// A pid with its start time in clock ticks since boot: unique for as long as the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId {
    pub pid: i32,
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that now has `pid`; `None` when there is none.
    pub fn of(pid: i32) -> Option<ProcessId> {
        start_ticks(pid).map(|start_ticks| ProcessId { pid, start_ticks })
    }

    pub fn is_alive(self) -> bool {
        ProcessId::of(self.pid) == Some(self)
    }

    /// A descriptor of this very process; `None` when it is gone.
    pub fn open(self) -> io::Result<Option<PidFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // Checked after opening: from here on the descriptor cannot move to another process.
        Ok(self.is_alive().then_some(PidFd(fd)))
    }
}

/// A descriptor of one process; readable once it has exited.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Sends a signal by number. `Ok(false)`: the process is gone.
    pub fn send(&self, signal: i32) -> io::Result<bool> {
        let signal = Signal::from_named_raw(signal).or_else(|| realtime_signal(signal));
        let signal = signal.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        match rustix::process::pidfd_send_signal(&self.0, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until the process has exited. `Ok(false)`: it still runs after `timeout`.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        poll_readable(self.0.as_fd(), timeout)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> OwnedFd {
        pidfd.0
    }
}

fn realtime_signal(number: i32) -> Option<Signal> {
    // SAFETY: any number from SIGRTMIN to 64 is a signal that the kernel delivers; libc reserves those below
    // SIGRTMIN for itself, and they are excluded here.
    (number >= libc::SIGRTMIN() && number <= 64).then(|| unsafe { Signal::from_raw_unchecked(number) })
}

/// Waits until `fd` is readable or hung up. `Ok(false)`: not within `timeout`.
pub fn poll_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Start time of `pid` in clock ticks since boot, field 22 of `/proc/PID/stat`. `None`: no such process, or a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_start_ticks(&String::from_utf8_lossy(&stat))
}

/// The name (field 2) may hold spaces and parentheses, so fields count from the last `)`.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Orphans below this process are given to it, not to PID 1.
pub fn set_child_subreaper() -> io::Result<()> {
    // The kernel takes any non-zero argument for "yes".
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Sets how eagerly the kernel's OOM killer takes this process: -1000 (never) to 1000.
/// Without CAP_SYS_RESOURCE lowering it fails; the caller decides that this is no harm.
pub fn set_oom_score_adj(score: i32) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", score.to_string())
}

/// One heap for all threads of a daemon that waits most of its life, before it starts any: glibc gives each thread its
/// own, of which every one keeps what its thread once needed (2.5 MiB of 16, measured with ten instances). And what is
/// large stays out of the heap for good, so that it goes back when it is freed: glibc raises that bound to the largest
/// piece freed so far, and the daemon that once loaded an image kept 10 MiB. Other C libraries have one heap.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes two numbers and may be called at any time; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_ALLOCATION);
    }
}

/// Collects one exited child of this process without waiting. Does nothing for a process that is not its child.
pub fn reap(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // ECHILD (adopted, or reaped already) is the normal case.
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Gives the child of `command` the descriptor `fd` under the number `target` (below 16). Nobody else inherits it:
/// the copy without close-on-exec exists only between fork and exec of this child.
pub fn inherit(command: &mut Command, fd: BorrowedFd<'_>, target: RawFd) -> io::Result<()> {
    assert!((3..16).contains(&target), "below the numbers of the sources");
    // High, so that no source is overwritten by an earlier target.
    let source = rustix::io::fcntl_dupfd_cloexec(fd, 16)?;
    // SAFETY: the closure runs in the forked child and calls only dup2, which is async-signal-safe. `source` is owned
    // by the closure, so it is open whenever the closure runs.
    unsafe {
        command.pre_exec(move || match libc::dup2(source.as_raw_fd(), target) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    Ok(())
}

/// Sets the size of a pseudo terminal through its master side.
pub fn set_terminal_size(master: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one `winsize` from the pointer, which is valid for the call; the descriptor is open.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes over a descriptor that the parent passed by number (`inherit`), and makes it close-on-exec.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: fcntl on any number is safe; a closed one fails with EBADF.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open (just checked), was passed to this process for this purpose, and each number is
    // taken once at start, before anything else could own it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Keeps `fd` open across the next exec.
pub fn keep_across_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?)
}

/// A descriptor that becomes readable when a child exits. Blocks SIGCHLD for this thread.
pub fn child_exit_fd() -> io::Result<OwnedFd> {
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    fd.as_fd().try_clone_to_owned()
}

/// Gives every signal its default action and unblocks all, as a program expects at its start. Rust's own start-up
/// ignores SIGPIPE, and exec passes that on.
pub fn reset_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
    for number in Signal::iterator().filter(|number| !matches!(number, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: SIG_DFL installs no handler, so nothing of this program runs in signal context.
        unsafe { signal(number, SigHandler::SigDfl) }?;
    }
    Ok(SigSet::empty().thread_set_mask()?)
}

/// The machine's hard limit of open files for a child of this process.
pub fn open_files_hard_limit() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// For the daemon: as much as it is allowed and could have a use for. The kernel gives a process 1024, which the
/// connections of an ingress alone exceed. Containers get limits of their own.
pub fn raise_open_files_limit() -> io::Result<()> {
    Ok(setrlimit(Resource::Nofile, raised(getrlimit(Resource::Nofile)))?)
}

fn raised(limits: Rlimit) -> Rlimit {
    let most = limits.maximum.map_or(OPEN_FILES_OF_DAEMON, |hard| hard.min(OPEN_FILES_OF_DAEMON));
    // Without one there is no limit.
    let current = limits.current.map(|soft| soft.max(most));
    Rlimit { current, ..limits }
}

/// For all that the first process of a machine starts: the kernel's 4096 is less than containers are given elsewhere.
pub fn raise_open_files_hard_limit() -> io::Result<()> {
    let old = getrlimit(Resource::Nofile);
    if old.maximum.is_some_and(|hard| hard < OPEN_FILES_HARD) {
        setrlimit(Resource::Nofile, Rlimit { maximum: Some(OPEN_FILES_HARD), ..old })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_as_far_as_allowed() {
        let limits = |current, maximum| Rlimit { current, maximum };
        for (old, wanted) in [
            (limits(Some(1024), Some(4096)), Some(4096)),
            (limits(Some(1024), Some(524_288)), Some(OPEN_FILES_OF_DAEMON)),
            (limits(Some(1024), None), Some(OPEN_FILES_OF_DAEMON)),
            (limits(Some(100_000), Some(524_288)), Some(100_000)),
            (limits(None, None), None),
        ] {
            assert_eq!(raised(old), limits(wanted, old.maximum), "{old:?}");
        }
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields: Vec<String> = (4..=52).map(|field| (field * 10).to_string()).collect();
        for name in ["sh", "a b", "x) (y", "))"] {
            let stat = format!("7 ({name}) S {}", fields.join(" "));
            assert_eq!(parse_start_ticks(&stat), Some(220), "{name}");
        }
        assert_eq!(
            parse_start_ticks(&format!("7 (sh) Z {}", fields.join(" "))),
            None,
            "a zombie runs no more"
        );
        assert_eq!(parse_start_ticks("7 (sh) S 1"), None);
    }

    #[test]
    fn a_pid_with_another_start_time_is_another_process() {
        let me = ProcessId::of(std::process::id() as i32).expect("this process runs");
        assert!(me.is_alive());
        let other = ProcessId { start_ticks: me.start_ticks + 1, ..me };
        assert!(!other.is_alive());
        assert!(other.open().unwrap().is_none());
    }
}

//! The orderly end of a machine's run: prompts, daemon and its containers, addresses, clock, file systems.
//!
//! Input: how to end. Output: none: the machine is off or starts anew. Each step has a limit, so that nothing keeps a
//! board from ending. The watchdog is fed until the end and then bites what hangs.

use super::clock;
use super::phases::DATA_DIR;
use super::supervisor::Supervisor;
use crate::agent::machine_end::GRACE_FILE;
use crate::linux::clock::boot_ms;
use crate::linux::machine::{self, Ending};
use crate::linux::mount;
use nix::mount::{MsFlags, mount as change_mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::time::Duration;

/// Tells the daemon that the machine ends: it stops its containers before it ends itself.
pub const MACHINE_ENDS: Signal = Signal::SIGQUIT;
/// For the daemon to tell the cluster and to stop all containers, when none has a longer grace.
const DAEMON_LIMIT_MS: u64 = 60_000;
/// Beside the longest grace.
const DAEMON_REST_MS: u64 = 15_000;
const REST_LIMIT_MS: u64 = 3_000;

pub fn end(mut supervisor: Supervisor, ending: Ending) -> ! {
    let what = match ending {
        Ending::PowerOff => "power off",
        Ending::Restart => "restart",
        Ending::RestartOther => "restart from the other slot",
    };
    supervisor.board.console.say(&format!("{what}: containers are stopped first"));
    supervisor.retire_children();
    for pid in supervisor.prompt_pids() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGHUP);
    }
    if let Some(pid) = supervisor.node.pid() {
        // Gone already is what is wanted.
        let _ = kill(Pid::from_raw(pid), MACHINE_ENDS);
        let begin = boot_ms();
        let is_over = || boot_ms() - begin > DAEMON_LIMIT_MS.max(longest_grace_ms() + DAEMON_REST_MS);
        await_that(&mut supervisor, u64::MAX, |supervisor| supervisor.node.pid().is_none() || is_over());
    }
    if let Some(network) = &mut supervisor.board.network {
        network.release(boot_ms());
    }
    // What is left: waiters of containers, and what the daemon could not stop.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = kill(Pid::from_raw(-1), signal);
        await_that(&mut supervisor, REST_LIMIT_MS, |_| {
            nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
                == Err(nix::errno::Errno::ECHILD)
        });
    }
    let data = Path::new(DATA_DIR);
    if supervisor.board.has_data_disk && crate::linux::clock::is_synchronised() {
        // Without it the next start only knows an older time.
        let _ = clock::note(data);
    }
    rustix::fs::sync();
    detach_all(&mut supervisor, data);
    supervisor.board.console.say(&format!("{what}: now"));
    let error = machine::end(ending);
    supervisor.board.console.say(&format!("the kernel refuses to {what}: {error}"));
    // The watchdog is not fed any more; without one the power has to be cut.
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// As the daemon has told when it began to stop containers.
fn longest_grace_ms() -> u64 {
    let path = Path::new(super::supervisor::RUN_DIR).join(GRACE_FILE);
    let told = std::fs::read_to_string(path).ok().and_then(|text| text.parse::<u64>().ok());
    told.unwrap_or(0).saturating_mul(1000)
}

fn await_that(supervisor: &mut Supervisor, limit_ms: u64, is_true: impl Fn(&Supervisor) -> bool) {
    let begin = boot_ms();
    while !is_true(supervisor) && boot_ms() - begin < limit_ms {
        std::thread::sleep(Duration::from_millis(20));
        supervisor.take_output();
        supervisor.reap();
        if let Some(watchdog) = &mut supervisor.board.watchdog {
            watchdog.step(boot_ms(), Some(boot_ms()));
        }
    }
}

/// Disks are unmounted, or at least made read-only: the next start finds them clean.
fn detach_all(supervisor: &mut Supervisor, data: &Path) {
    let disks: Vec<String> = supervisor.board.settings.disks.iter().map(|disk| disk.target.clone()).collect();
    let disks = disks.iter().map(Path::new);
    for target in disks.chain([data]) {
        for inner in mount::mounted_below(target).unwrap_or_default() {
            let is_gone = nix::mount::umount(&inner).is_ok();
            if !is_gone {
                let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                let _ = change_mount(None::<&str>, &inner, None::<&str>, flags, None::<&str>);
            }
        }
    }
}

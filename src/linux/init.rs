//! A small first process for a container: it passes signals on, reaps orphans, and ends as its one child ends.

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setpgid, tcsetpgrp};
use std::io;

/// Splits this process, which must have one thread: the child returns and goes on to be the program; this process
/// stays as its init and never returns.
///
/// Signals stay blocked in the init: so the kernel keeps those that a first process would otherwise not get.
pub fn stay_as_init() -> io::Result<()> {
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut before))?;
    // SAFETY: there is one thread, so no lock is held by another one; both sides go on in ordinary code.
    match unsafe { fork() } {
        Err(error) => {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
            Err(error.into())
        }
        Ok(ForkResult::Child) => {
            // Ctrl-C at the container's terminal goes to the program; without a terminal both calls do no harm.
            let own = Pid::from_raw(0);
            let _ = setpgid(own, own);
            let _ = tcsetpgrp(io::stdin(), nix::unistd::getpid());
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
            Ok(())
        }
        Ok(ForkResult::Parent { child }) => std::process::exit(watch(child)),
    }
}

fn watch(child: Pid) -> i32 {
    // What this process holds is the node's, not the container's: nobody inside may look at it through /proc.
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = nix::sys::prctl::set_name(c"tinydc-init");
    // SAFETY: nothing below uses a descriptor above 2, and no owner of one is dropped any more.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let all = SigSet::all();
    loop {
        let mut number = 0;
        // SAFETY: both pointers are to live values of this frame.
        if unsafe { libc::sigwait(all.as_ref(), &mut number) } != 0 {
            continue;
        }
        if number != Signal::SIGCHLD as i32 {
            // SAFETY: a number that sigwait gave; a real-time one has no name in nix.
            unsafe { libc::kill(child.as_raw(), number) };
            continue;
        }
        if let Some(code) = reap(child) {
            // The kernel ends what is left of the namespace with its first process.
            return code;
        }
    }
}

/// Takes all that have ended; the child's exit code once it is among them.
fn reap(child: Pid) -> Option<i32> {
    let mut code = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == child => code = Some(status),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => code = Some(128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(_) => return code,
            Ok(_) => {}
        }
    }
}

/// Ends a child whose program could not be started, without running what the parent's exit would.
pub fn give_up(code: i32) -> ! {
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(code) }
}

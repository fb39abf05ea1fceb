//! `tinydc shim-exec`: runs one command inside a running container and reports its end.
//!
//! Input: the process description (descriptor 4), its own standard streams, which become the command's. Output:
//! `started` at the status socket, with the terminal if one was asked for; then `exited CODE`. When the other side of
//! the socket closes or says `kill`, the command's whole process group is killed: a caller that gave up leaves nothing.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Process;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use super::executor::FilteredExecutor;
use super::launch::receive_terminal;
use super::{PROCESS_FD, STATUS_FD, chain};
use crate::linux::{process, socket};
use crate::runtime::seccomp::SeccompError;

/// What `tinydc shim-exec` is told, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecArguments {
    pub id: String,
    pub states: PathBuf,
    /// Where libcontainer hands over the terminal; `None` without one.
    pub console: Option<PathBuf>,
}

impl ExecArguments {
    pub fn to_words(&self) -> Vec<PathBuf> {
        let mut words = vec!["shim-exec".into(), self.id.clone().into(), self.states.clone()];
        words.extend(self.console.clone());
        words
    }

    fn parse(words: &[&str]) -> Option<ExecArguments> {
        let (id, states, console) = match words {
            [id, states] => (id, states, None),
            [id, states, console] => (id, states, Some(PathBuf::from(console))),
            _ => return None,
        };
        Some(ExecArguments { id: (*id).to_owned(), states: PathBuf::from(states), console })
    }
}

#[derive(Debug, thiserror::Error)]
enum ProxyError {
    #[error("{0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error("read the process description")]
    BadProcess(#[source] serde_json::Error),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("run the command in the container")]
    Join(#[source] LibcontainerError),
}

pub fn run(words: &[&str]) -> ExitCode {
    let Some(arguments) = ExecArguments::parse(words) else { return ExitCode::from(2) };
    let Ok(status) = process::take_inherited(STATUS_FD) else { return ExitCode::from(2) };
    match execute(&arguments, &status) {
        Ok(code) => {
            let _ = socket::send(status.as_fd(), format!("exited {code}").as_bytes());
            ExitCode::from(u8::try_from(code).unwrap_or(255))
        }
        Err(error) => {
            let _ = socket::send(status.as_fd(), format!("error {}", chain(&error)).as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn execute(arguments: &ExecArguments, status: &OwnedFd) -> Result<i32, ProxyError> {
    let failed = |step| move |source: io::Error| ProxyError::Prepare(step, source);
    // So that background processes of the command are collected here and not left to the container's first process.
    process::set_child_subreaper().map_err(failed("become the reaper of the command"))?;
    let description = process::take_inherited(PROCESS_FD).map_err(failed("take the process description"))?;
    let path = format!("/proc/self/fd/{PROCESS_FD}");
    let text = std::fs::read(&path).map_err(failed("read the process description"))?;
    let parsed: Process = serde_json::from_slice(&text).map_err(ProxyError::BadProcess)?;
    let mut builder = ContainerBuilder::new(arguments.id.clone(), SyscallType::default())
        .with_root_path(&arguments.states)
        .map_err(ProxyError::Join)?
        .with_executor(FilteredExecutor::new(Some(&parsed))?);
    let mut listener = None;
    if let Some(console) = &arguments.console {
        listener = Some(socket::listen_stream(console).map_err(failed("listen for the terminal"))?);
        builder = builder.with_console_socket(Some(console.clone()));
    }
    let joined =
        builder.as_tenant().with_process(Some(Path::new(&path))).with_detach(listener.is_some()).build();
    if let Some(console) = &arguments.console {
        let _ = std::fs::remove_file(console);
    }
    drop(description);
    let pid = joined.map_err(ProxyError::Join)?.as_raw();
    match listener {
        Some(listener) => {
            let terminal = receive_terminal(&listener).map_err(failed("receive the terminal"))?;
            let _ = socket::send_fd(status.as_fd(), b"started", terminal.as_fd());
        }
        None => {
            let _ = socket::send(status.as_fd(), b"started");
        }
    }
    // The caller must see the end of the command's streams, so this process lets go of them.
    close_standard_streams().map_err(failed("close the standard streams"))?;
    wait(pid, status).map_err(failed("wait for the command"))
}

fn close_standard_streams() -> io::Result<()> {
    let nothing = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    rustix::stdio::dup2_stderr(&nothing)?;
    Ok(())
}

/// Waits for the command; kills its group when the caller gives up.
fn wait(pid: i32, status: &OwnedFd) -> io::Result<i32> {
    let command = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let children = process::child_exit_fd()?;
    let mut is_given_up = false;
    loop {
        // Not yet collected, so the number still belongs to the command.
        while let Some((ended, exit)) = match rustix::process::wait(WaitOptions::NOHANG) {
            Err(Errno::CHILD) => return Ok(255),
            other => other?,
        } {
            if ended == command {
                return Ok(exit_code(exit));
            }
        }
        let mut fds = vec![PollFd::new(&children, PollFlags::IN)];
        if !is_given_up {
            fds.push(PollFd::new(status, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_told = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let mut signal = [0u8; 128];
        let _ = rustix::io::read(&children, &mut signal);
        if is_told {
            is_given_up = true;
            // The command leads a session of its own; its children are in its group unless they left it.
            let _ = rustix::process::kill_process_group(command, Signal::KILL);
            let _ = rustix::process::kill_process(command, Signal::KILL);
        }
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(255)
}

//! One more command inside a running container: for people, and for health checks.
//!
//! Input: what to run, and the descriptors that become its standard streams, or a terminal. Output: its exit code.
//! It has the container's user, variables, capabilities and system call filter unless the request says otherwise.
//! When the handle is dropped, the command is killed with its process group.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Process, Spec, UserBuilder};

use super::Runtime;
use super::bundle::{BundleError, ContainerId};
use super::container::{ContainerError, ContainerState, failed};
use super::images::tree;
use super::rootfs::Rootfs;
use super::shim::{ExecArguments, PROCESS_FD, STATUS_FD};
use super::user::{self, UserError};
use crate::linux::{process, socket};

const START_TIMEOUT: Duration = Duration::from_secs(30);
/// What is kept of a health check's output.
const CHECK_OUTPUT_BYTES_MAX: usize = 4096;

static NEXT_CONSOLE: AtomicU64 = AtomicU64::new(0);

#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error("nothing to run")]
    NoCommand,
    #[error("describe the command")]
    Describe(#[from] BundleError),
    #[error("who the command runs as")]
    User(#[from] UserError),
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    #[error("run `{command}` in {id}: {reason}")]
    Start { command: String, id: ContainerId, reason: String },
    #[error("the command's proxy ended without a word")]
    ProxyGone,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    pub command: Vec<String>,
    /// Added to the container's; the same name replaces.
    pub env: Vec<(String, String)>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
}

/// The command's standard streams.
pub enum ExecStreams {
    Given {
        stdin: Stdio,
        stdout: Stdio,
        stderr: Stdio,
    },
    /// A pseudo terminal, whose master side `ExecHandle::terminal` holds.
    Terminal {
        rows: u16,
        columns: u16,
    },
}

/// A command under way.
#[derive(Debug)]
pub struct ExecHandle {
    /// Reads give the command's output, writes are its input; close it to hang up.
    pub terminal: Option<OwnedFd>,
    status: Option<OwnedFd>,
    proxy: Child,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    pub end: CheckEnd,
    /// The begin of stdout and stderr, together.
    pub output: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckEnd {
    Exited(i32),
    TimedOut,
}

impl Runtime {
    /// Runs a command in a running container. Returns once it runs. Blocks for a few ms.
    pub fn exec(
        &self,
        id: &ContainerId,
        request: &ExecRequest,
        streams: ExecStreams,
    ) -> Result<ExecHandle, ExecError> {
        if !matches!(self.state(id), ContainerState::Running { .. }) {
            return Err(ContainerError::NotRunning(id.clone()).into());
        }
        let size = match &streams {
            ExecStreams::Terminal { rows, columns } => Some((*rows, *columns)),
            ExecStreams::Given { .. } => None,
        };
        let description = self.describe_process(id, request, size.is_some())?;
        let console = size.map(|_| self.console_path(id));
        let arguments = ExecArguments { id: id.as_str().to_owned(), states: self.states_dir(), console };
        let mut command = self.shim_command(arguments.to_words());
        if let ExecStreams::Given { stdin, stdout, stderr } = streams {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        let (status, theirs) = socket::message_pair().map_err(|e| ExecError::Io("make a socket", e))?;
        let passed = process::inherit(&mut command, theirs.as_fd(), STATUS_FD)
            .and_then(|()| process::inherit(&mut command, description.as_fd(), PROCESS_FD));
        passed.map_err(|e| ExecError::Io("pass descriptors", e))?;
        let proxy = command.spawn().map_err(|e| ExecError::Io("spawn the proxy", e))?;
        // The command object holds the child's streams; a pipe ends only when the last copy is closed.
        drop((theirs, command));
        let mut handle = ExecHandle { terminal: None, status: Some(status), proxy };
        handle.await_start(id, request)?;
        if let Some((rows, columns)) = size {
            handle.resize(rows, columns)?;
        }
        Ok(handle)
    }

    /// Runs a health check: no input, a bounded output, killed when `timeout` is over.
    pub fn check(
        &self,
        id: &ContainerId,
        request: &ExecRequest,
        timeout: Duration,
    ) -> Result<CheckResult, ExecError> {
        let deadline = Instant::now() + timeout;
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from);
        let (reader, writer) = pipe().map_err(|e| ExecError::Io("make a pipe", e))?;
        let second = writer.try_clone().map_err(|e| ExecError::Io("make a pipe", e))?;
        let streams = ExecStreams::Given {
            stdin: Stdio::null(),
            stdout: Stdio::from(writer),
            stderr: Stdio::from(second),
        };
        let mut handle = self.exec(id, request, streams)?;
        rustix::io::ioctl_fionbio(&reader, true).map_err(|e| ExecError::Io("read the output", e.into()))?;
        let mut reader = std::fs::File::from(reader);
        let mut output = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = wait_either(handle.as_fd(), reader.as_fd(), left)
                .map_err(|e| ExecError::Io("wait for the command", e))?;
            let is_output_open = ready.output && keep_some(&mut reader, &mut output);
            if ready.status {
                while keep_some(&mut reader, &mut output) {}
                let code = handle.wait(Duration::ZERO)?.unwrap_or(255);
                return Ok(CheckResult { end: CheckEnd::Exited(code), output });
            }
            if !ready.output {
                handle.kill();
                return Ok(CheckResult { end: CheckEnd::TimedOut, output });
            }
            if !is_output_open {
                // Closed its streams and goes on: only the exit is left to wait for.
                let left = deadline.saturating_duration_since(Instant::now());
                let end = handle.wait(left)?.map_or(CheckEnd::TimedOut, CheckEnd::Exited);
                return Ok(CheckResult { end, output });
            }
        }
    }

    fn console_path(&self, id: &ContainerId) -> PathBuf {
        let number = NEXT_CONSOLE.fetch_add(1, Ordering::Relaxed);
        self.places(id).run.join(format!("exec-{}-{number}.sock", std::process::id()))
    }

    /// The container's own process with the request's changes, in memory.
    fn describe_process(
        &self,
        id: &ContainerId,
        request: &ExecRequest,
        has_terminal: bool,
    ) -> Result<OwnedFd, ExecError> {
        if request.command.first().is_none_or(String::is_empty) {
            return Err(ExecError::NoCommand);
        }
        let places = self.places(id);
        let spec = Spec::load(places.run.join("config.json")).map_err(BundleError::from)?;
        let mut process: Process = spec.process().clone().unwrap_or_default();
        let mut env = process.env().clone().unwrap_or_default();
        let user = match &request.user {
            Some(wanted) => {
                let rootfs = Rootfs::new(&places.instance).path();
                let root = tree::open_root(&rootfs).map_err(|source| failed("open", &rootfs, source))?;
                Some(user::read(root.as_fd(), wanted)?)
            }
            None => None,
        };
        let home = user.as_ref().and_then(|user| Some(("HOME".to_owned(), user.home.clone()?)));
        let terminal = has_terminal.then(|| ("TERM".to_owned(), "xterm".to_owned()));
        for (name, value) in terminal.iter().chain(&home).chain(&request.env) {
            let prefix = format!("{name}=");
            env.retain(|variable| !variable.starts_with(&prefix));
            env.push(format!("{prefix}{value}"));
        }
        process.set_args(Some(request.command.clone())).set_env(Some(env)).set_terminal(Some(has_terminal));
        if let Some(folder) = &request.working_dir {
            process.set_cwd(PathBuf::from(folder));
        }
        if let Some(user) = user {
            let user = UserBuilder::default()
                .uid(user.uid)
                .gid(user.gid)
                .additional_gids(user.groups)
                .build()
                .map_err(BundleError::from)?;
            process.set_user(user);
        }
        let text =
            serde_json::to_vec(&process).map_err(|e| ExecError::Io("describe the command", e.into()))?;
        let memory = rustix::fs::memfd_create(c"process", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| ExecError::Io("describe the command", e.into()))?;
        let mut file = std::fs::File::from(memory);
        file.write_all(&text).map_err(|e| ExecError::Io("describe the command", e))?;
        Ok(file.into())
    }
}

impl ExecHandle {
    fn await_start(&mut self, id: &ContainerId, request: &ExecRequest) -> Result<(), ExecError> {
        let failed = |reason: String| ExecError::Start {
            command: request.command.join(" ").chars().take(100).collect(),
            id: id.clone(),
            reason,
        };
        let status = self.status.as_ref().ok_or(ExecError::ProxyGone)?;
        let is_ready = process::poll_readable(status.as_fd(), START_TIMEOUT);
        if !is_ready.map_err(|e| ExecError::Io("wait for the proxy", e))? {
            return Err(failed(format!("nothing happened for {} s", START_TIMEOUT.as_secs())));
        }
        let mut message = vec![0u8; 4096];
        let (length, terminal) = socket::receive_fd(status.as_fd(), &mut message)
            .map_err(|e| ExecError::Io("listen to the proxy", e))?;
        match &message[..length] {
            b"started" => {
                self.terminal = terminal;
                Ok(())
            }
            b"" => Err(ExecError::ProxyGone),
            other => {
                let text = String::from_utf8_lossy(other);
                Err(failed(text.strip_prefix("error ").unwrap_or(&text).to_owned()))
            }
        }
    }

    /// The exit code (128 + the signal for a killed one). `None`: still running after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<i32>, ExecError> {
        let Some(status) = &self.status else { return Err(ExecError::ProxyGone) };
        if !process::poll_readable(status.as_fd(), timeout)
            .map_err(|e| ExecError::Io("wait for the command", e))?
        {
            return Ok(None);
        }
        self.collect().map(Some)
    }

    /// As `wait`, on the executor's reactor and without an end.
    pub async fn finished(&mut self) -> Result<i32, ExecError> {
        let status = self.status.as_ref().ok_or(ExecError::ProxyGone)?;
        let copy = status.try_clone().map_err(|e| ExecError::Io("wait for the command", e))?;
        let ready =
            async_io::Async::new_nonblocking(copy).map_err(|e| ExecError::Io("wait for the command", e))?;
        ready.readable().await.map_err(|e| ExecError::Io("wait for the command", e))?;
        drop(ready);
        self.collect()
    }

    fn collect(&mut self) -> Result<i32, ExecError> {
        let status = self.status.take().ok_or(ExecError::ProxyGone)?;
        let mut message = [0u8; 64];
        let length = socket::receive(status.as_fd(), &mut message).unwrap_or(0);
        let _ = self.proxy.wait();
        let text = std::str::from_utf8(&message[..length]).unwrap_or_default();
        text.strip_prefix("exited ").and_then(|code| code.parse().ok()).ok_or(ExecError::ProxyGone)
    }

    /// Sets the terminal's size; without a terminal it does nothing.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), ExecError> {
        match &self.terminal {
            Some(terminal) => process::set_terminal_size(terminal.as_fd(), rows, columns)
                .map_err(|e| ExecError::Io("resize the terminal", e)),
            None => Ok(()),
        }
    }

    /// Kills the command and its process group.
    pub fn kill(&mut self) {
        if let Some(status) = self.status.take() {
            let _ = socket::send(status.as_fd(), b"kill");
            drop(status);
            // The proxy ends as soon as the killed command is collected.
            let _ = self.proxy.wait();
        }
    }
}

impl AsFd for ExecHandle {
    /// Readable when the command has ended. Only before `wait` has returned its code.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.status.as_ref().expect("the status socket lives until the exit code was taken").as_fd()
    }
}

impl Drop for ExecHandle {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Ready {
    status: bool,
    output: bool,
}

fn wait_either(status: BorrowedFd<'_>, output: BorrowedFd<'_>, timeout: Duration) -> io::Result<Ready> {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds =
        [PollFd::from_borrowed_fd(status, PollFlags::IN), PollFd::from_borrowed_fd(output, PollFlags::IN)];
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    rustix::event::poll(&mut fds, Some(&timeout))?;
    Ok(Ready { status: !fds[0].revents().is_empty(), output: !fds[1].revents().is_empty() })
}

/// Reads once, keeping the first bytes. `false`: nothing more for now, or ever.
fn keep_some(reader: &mut std::fs::File, output: &mut Vec<u8>) -> bool {
    let mut buffer = [0u8; 4096];
    match reader.read(&mut buffer) {
        Ok(0) | Err(_) => false,
        Ok(count) => {
            let room = CHECK_OUTPUT_BYTES_MAX.saturating_sub(output.len());
            output.extend_from_slice(&buffer[..count.min(room)]);
            true
        }
    }
}

//! `tinydc shim`: makes and starts one container, then becomes its waiter.
//!
//! libcontainer clones and changes the folder of the whole process, so it runs here, in a process of one thread, and
//! never in the daemon. What it allocated is gone with the exec into the waiter.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::Spec;

use super::executor::FilteredExecutor;
use super::record::{ShimRecord, boot_id};
use super::waiter::WaitArguments;
use super::{CONTROL_SOCKET, LeaseEnd, OOM_SCORE, STATUS_FD, chain};
use crate::linux::cgroup::{CgroupError, Cgroups};
use crate::linux::process::{self, ProcessId};
use crate::linux::socket;
use crate::runtime::seccomp::SeccompError;

/// What `tinydc shim` is told, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchArguments {
    pub id: String,
    /// The shim's folder; also the bundle, with `config.json`.
    pub run: PathBuf,
    /// libcontainer's folder of states.
    pub states: PathBuf,
    pub logs: PathBuf,
    pub cgroup: String,
    /// For an exclusive service, until when it may run.
    pub lease: Option<LeaseEnd>,
}

impl LaunchArguments {
    pub fn to_words(&self) -> Vec<PathBuf> {
        vec![
            "shim".into(),
            self.id.clone().into(),
            self.run.clone(),
            self.states.clone(),
            self.logs.clone(),
            self.cgroup.clone().into(),
            LeaseEnd::to_word(self.lease).into(),
        ]
    }

    fn parse(words: &[&str]) -> Option<LaunchArguments> {
        let [id, run, states, logs, cgroup, lease] = words else { return None };
        Some(LaunchArguments {
            id: (*id).to_owned(),
            run: PathBuf::from(run),
            states: PathBuf::from(states),
            logs: PathBuf::from(logs),
            cgroup: (*cgroup).to_owned(),
            lease: LeaseEnd::parse(lease)?,
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error("{0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error("read the bundle")]
    Bundle(#[source] oci_spec::OciSpecError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("make the container")]
    Create(#[source] LibcontainerError),
    #[error("limit the container")]
    Limit(#[from] CgroupError),
    #[error("start the container")]
    Start(#[source] LibcontainerError),
    #[error("the container ended while it was being started")]
    Gone,
    #[error("its lease ended before it could be started")]
    LeaseEnded,
}

pub fn run(words: &[&str]) -> ExitCode {
    let Some(arguments) = LaunchArguments::parse(words) else { return ExitCode::from(2) };
    let Ok(status) = process::take_inherited(STATUS_FD) else { return ExitCode::from(2) };
    let Err(error) = launch(&arguments, &status);
    // A daemon that died meanwhile does not listen; its successor sees the missing container.
    let _ = socket::send(status.as_fd(), format!("error {}", chain(&error)).as_bytes());
    ExitCode::FAILURE
}

/// Where the container's output comes from.
struct Output {
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

fn launch(arguments: &LaunchArguments, status: &OwnedFd) -> Result<Infallible, LaunchError> {
    let failed = |step| move |source: io::Error| LaunchError::Prepare(step, source);
    // Fails only for a group leader, which a child just spawned is not.
    let _ = rustix::process::setsid();
    process::set_child_subreaper().map_err(failed("become the reaper of the container"))?;
    let shim = ProcessId::of(std::process::id() as i32).ok_or(LaunchError::Gone)?;
    let mut record = ShimRecord { boot_id: boot_id(), shim, container: None, started_at_ms: unix_ms() };
    record.write(&arguments.run).map_err(failed("write the shim's record"))?;
    let spec = Spec::load(arguments.run.join("config.json")).map_err(LaunchError::Bundle)?;
    let control = socket::listen_messages(&arguments.run.join(CONTROL_SOCKET))
        .map_err(failed("listen at the control socket"))?;
    let (mut container, output) = create(arguments, &spec)?;
    let started = begin(arguments, &spec, &mut container);
    let container_id = match started {
        Ok(id) => id,
        Err(error) => {
            // Nothing half-made stays behind.
            let _ = container.delete(true);
            return Err(error);
        }
    };
    record.container = Some(container_id);
    record.write(&arguments.run).map_err(failed("write the shim's record"))?;
    let _ = socket::send(status.as_fd(), b"started");
    let error = become_waiter(arguments, &record, &control, &output);
    Err(LaunchError::Prepare("become the waiter", error))
}

fn create(arguments: &LaunchArguments, spec: &Spec) -> Result<(Container, Output), LaunchError> {
    let failed = |step| move |source: io::Error| LaunchError::Prepare(step, source);
    let process = spec.process().as_ref();
    let has_terminal = process.and_then(|process| process.terminal()).unwrap_or(false);
    let mut builder = ContainerBuilder::new(arguments.id.clone(), SyscallType::default())
        .with_root_path(&arguments.states)
        .and_then(ContainerBuilder::validate_id)
        .map_err(LaunchError::Create)?
        .with_executor(FilteredExecutor::new(process)?.with_init_of(spec));
    if has_terminal {
        let console = arguments.run.join("console.sock");
        let listener = socket::listen_stream(&console).map_err(failed("listen for the terminal"))?;
        builder = builder.with_console_socket(Some(console));
        let container = build(builder, &arguments.run)?;
        let stdout = receive_terminal(&listener).map_err(failed("receive the terminal"))?;
        return Ok((container, Output { stdout, stderr: None }));
    }
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from);
    let (stdout, container_stdout) = pipe().map_err(failed("make the pipes"))?;
    let (stderr, container_stderr) = pipe().map_err(failed("make the pipes"))?;
    let nothing = std::fs::File::open("/dev/null").map_err(failed("open /dev/null"))?;
    builder = builder.with_stdin(nothing).with_stdout(container_stdout).with_stderr(container_stderr);
    let container = build(builder, &arguments.run)?;
    Ok((container, Output { stdout, stderr: Some(stderr) }))
}

fn build(builder: ContainerBuilder, bundle: &Path) -> Result<Container, LaunchError> {
    // Its default is to ask systemd for the cgroup.
    builder.as_init(bundle).with_systemd(false).with_detach(true).build().map_err(LaunchError::Create)
}

/// libcontainer sends the master side over the console socket.
pub(super) fn receive_terminal(listener: &std::os::unix::net::UnixListener) -> io::Result<OwnedFd> {
    let (connection, _) = listener.accept()?;
    let mut name = [0u8; 128];
    let (_, terminal) = socket::receive_fd(connection.as_fd(), &mut name)?;
    terminal.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no terminal came"))
}

/// Sets what the spec cannot say, then lets the program run.
fn begin(
    arguments: &LaunchArguments,
    spec: &Spec,
    container: &mut Container,
) -> Result<ProcessId, LaunchError> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    if resources.is_some_and(|resources| resources.memory().is_some()) {
        Cgroups::detect()?.forbid_swap(&arguments.cgroup)?;
    }
    let pid = container.pid().ok_or(LaunchError::Gone)?.as_raw();
    let id = ProcessId::of(pid).ok_or(LaunchError::Gone)?;
    if arguments.lease.is_some_and(LeaseEnd::has_come) {
        return Err(LaunchError::LeaseEnded);
    }
    container.start().map_err(LaunchError::Start)?;
    Ok(id)
}

/// Replaces this process by the waiter; children and the descriptors named here stay. Returns only on failure.
fn become_waiter(
    arguments: &LaunchArguments,
    record: &ShimRecord,
    control: &OwnedFd,
    output: &Output,
) -> io::Error {
    let kept = [Some(control), Some(&output.stdout), output.stderr.as_ref()];
    for fd in kept.into_iter().flatten() {
        if let Err(error) = process::keep_across_exec(fd.as_fd()) {
            return error;
        }
    }
    let wait = WaitArguments {
        run: arguments.run.clone(),
        logs: arguments.logs.clone(),
        cgroup: arguments.cgroup.clone(),
        lease: arguments.lease,
        pid: record.container.map_or(0, |container| container.pid),
        started_at_ms: record.started_at_ms,
        control_fd: control.as_raw_fd(),
        stdout_fd: output.stdout.as_raw_fd(),
        stderr_fd: output.stderr.as_ref().map_or(-1, |fd| fd.as_raw_fd()),
    };
    let _ = process::set_oom_score_adj(OOM_SCORE);
    Command::new("/proc/self/exe").arg0("tinydc").args(wait.to_words()).env_clear().current_dir("/").exec()
}

pub(super) fn unix_ms() -> u64 {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_1970.map_or(0, |elapsed| elapsed.as_millis() as u64)
}

//! The containers of this node: made, started, found again, stopped, removed.
//!
//! Input: specs and ids. Output: processes, mounts and cgroups whose names all carry this node's tag. Everything
//! here blocks and belongs on a thread for blocking work; for one container the caller runs one call at a time.
//! Nothing is kept in memory: what is true stands in the run folder, in `/proc` and in the instance's folder, so a
//! daemon that starts anew knows as much as the one before.

use crate::model::Order;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::bundle::{BundleError, ContainerId, ContainerSpec, Seed, Surroundings, oci_spec};
use super::logs::{self, LogError, LogReader, LogRequest};
use super::rootfs::{Rootfs, RootfsError};
use super::shim::{ExitRecord, LaunchArguments, LeaseEnd, RECORD_FILE, STATUS_FD, ShimRecord, boot_id};
use super::user::{self, UserError};
use super::{Runtime, images::tree};
use crate::linux::cgroup::{CgroupError, Usage};
use crate::linux::process::{self, PidFd, ProcessId};
use crate::linux::socket;

/// A container that is not running after this time will not be.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// From SIGKILL to the end of every process; longer means that the kernel hangs in a disk or a network share.
const ERASE_ATTEMPTS: u32 = 5;
const ERASE_PAUSE: Duration = Duration::from_millis(100);
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Files of the node that appear in a container when they exist in the instance's folder.
const INSTANCE_FILES: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf"), ("hostname", "/etc/hostname")];
const SPEC_FILE: &str = "container.json";

#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("container {0} is not on this node")]
    NotFound(ContainerId),
    #[error("container {0} is running")]
    Running(ContainerId),
    #[error("container {0} is not running")]
    NotRunning(ContainerId),
    #[error("container {0} exists")]
    Exists(ContainerId),
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the description of container {id} is damaged")]
    BadSpec {
        id: ContainerId,
        #[source]
        source: serde_json::Error,
    },
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error("who the container runs as")]
    User(#[from] UserError),
    #[error("describe the container")]
    Bundle(#[from] BundleError),
    #[error("spawn the container's shim")]
    SpawnShim(#[source] io::Error),
    #[error("start container {id}: {reason}")]
    Start { id: ContainerId, reason: String },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("signal container {id}")]
    Signal {
        id: ContainerId,
        #[source]
        source: io::Error,
    },
    #[error("container {0} does not end after SIGKILL; a process of it hangs in the kernel")]
    WillNotEnd(ContainerId),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Images(#[from] super::images::StoreError),
}

/// Where a container stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Made, not started since the machine booted.
    Created,
    /// Its shim is at work.
    Starting,
    Running {
        main: ProcessId,
        started_at_ms: u64,
    },
    Exited(ExitRecord),
    /// Its shim was killed, so nobody knows how it ended; what still ran of it is killed by `adopt` or `start`.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerStatus {
    pub id: ContainerId,
    pub state: ContainerState,
}

/// How a container that was running came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerEnd {
    Exited(ExitRecord),
    Lost,
}

/// Whether a removed container's log stays readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepLogs {
    Yes,
    No,
}

/// What a sweep took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub cgroups: Vec<String>,
    pub mounts: Vec<PathBuf>,
    pub folders: Vec<PathBuf>,
}

/// The folders of one container.
pub(super) struct Places {
    pub instance: PathBuf,
    pub run: PathBuf,
    pub logs: PathBuf,
    pub state: PathBuf,
}

impl Runtime {
    pub(super) fn places(&self, id: &ContainerId) -> Places {
        let instance = self.instance_dir(id);
        Places {
            run: self.run_dir.join("shim").join(id.as_str()),
            logs: instance.join("logs"),
            state: self.states_dir().join(id.as_str()),
            instance,
        }
    }

    /// The container's folder on disk. The caller may put `hosts`, `resolv.conf` and `hostname` there between
    /// `create` and `start`; they appear in the container's `/etc`.
    pub fn instance_dir(&self, id: &ContainerId) -> PathBuf {
        self.data_dir.join("instances").join(id.as_str())
    }

    pub(super) fn cgroup_path(&self, id: &ContainerId) -> String {
        format!("{}/{}", self.cgroup_parent, id)
    }

    /// Makes a container: folders, root, seeded volumes. Volumes' folders must exist. On an error nothing stays.
    pub fn create(&self, spec: &ContainerSpec) -> Result<(), ContainerError> {
        let places = self.places(&spec.id);
        if places.instance.join(SPEC_FILE).exists() {
            return Err(ContainerError::Exists(spec.id.clone()));
        }
        let result = self.create_in(&places, spec);
        if result.is_err() {
            let _ = self.remove_instance(&spec.id, KeepLogs::No);
        }
        result
    }

    fn create_in(&self, places: &Places, spec: &ContainerSpec) -> Result<(), ContainerError> {
        for path in [&places.instance, &places.logs] {
            fs::create_dir_all(path).map_err(|source| failed("create", path, source))?;
        }
        let rootfs = Rootfs::new(&places.instance);
        rootfs.mount(&self.layer_paths(spec))?;
        // Everything that can be wrong about the spec shows now, not at the start.
        self.describe(places, spec)?;
        if spec.effective_working_dir() != "/" {
            rootfs.make_working_dir(spec.effective_working_dir())?;
        }
        for bind in spec.binds.iter().filter(|bind| bind.seed == Seed::FromImageOnce) {
            rootfs.seed_volume(&bind.destination, &bind.source)?;
        }
        let text = serde_json::to_vec(spec)
            .map_err(|source| ContainerError::BadSpec { id: spec.id.clone(), source })?;
        let (path, temporary) = (places.instance.join(SPEC_FILE), places.instance.join("container.json.new"));
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| failed("write", &path, source))
    }

    fn layer_paths(&self, spec: &ContainerSpec) -> Vec<PathBuf> {
        spec.layers.iter().map(|layer| self.images.layer_path(layer)).collect()
    }

    fn describe(
        &self,
        places: &Places,
        spec: &ContainerSpec,
    ) -> Result<oci_spec::runtime::Spec, ContainerError> {
        let rootfs = Rootfs::new(&places.instance).path();
        let root = tree::open_root(&rootfs).map_err(|source| failed("open", &rootfs, source))?;
        let files =
            INSTANCE_FILES.iter().map(|(name, target)| (places.instance.join(name), (*target).to_owned()));
        let around = Surroundings {
            rootfs,
            cgroup_path: self.cgroup_path(&spec.id),
            user: user::read(root.as_fd(), spec.effective_user())?,
            files: files.filter(|(source, _)| source.exists()).collect(),
            open_files_hard_max: process::open_files_hard_limit(),
        };
        Ok(oci_spec(spec, &around)?)
    }

    /// What a container was made of.
    pub fn spec(&self, id: &ContainerId) -> Result<ContainerSpec, ContainerError> {
        let path = self.instance_dir(id).join(SPEC_FILE);
        let text = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ContainerError::NotFound(id.clone()),
            _ => failed("read", &path, source),
        })?;
        serde_json::from_slice(&text).map_err(|source| ContainerError::BadSpec { id: id.clone(), source })
    }

    /// Starts a container, for the first time or again; its writable layer stays. Returns once its program runs. With a
    /// lease it is killed at its end unless that is moved on.
    pub fn start(&self, id: &ContainerId, lease: Option<LeaseEnd>) -> Result<ProcessId, ContainerError> {
        let spec = self.spec(id)?;
        let places = self.places(id);
        match self.state_in(&places) {
            ContainerState::Running { .. } | ContainerState::Starting => {
                return Err(ContainerError::Running(id.clone()));
            }
            ContainerState::Created | ContainerState::Exited(_) | ContainerState::Lost => {}
        }
        self.clear_last_run(id, &places)?;
        // The mount is gone after a reboot.
        Rootfs::new(&places.instance).mount(&self.layer_paths(&spec))?;
        fs::create_dir_all(&places.run).map_err(|source| failed("create", &places.run, source))?;
        let config = places.run.join("config.json");
        self.describe(&places, &spec)?.save(&config).map_err(BundleError::from)?;
        let started = self.launch(id, &places, lease);
        if started.is_err() {
            let _ = self.clear_last_run(id, &places);
            let _ = fs::remove_file(places.run.join(RECORD_FILE));
        }
        started
    }

    /// Ends and forgets what an earlier start left. The unflushed log stays for the next shim.
    fn clear_last_run(&self, id: &ContainerId, places: &Places) -> Result<(), ContainerError> {
        if let Some(record) = ShimRecord::read(&places.run) {
            process::reap(record.shim.pid);
        }
        let cgroup = self.cgroup_path(id);
        self.cgroups.kill_all(&cgroup, KILL_TIMEOUT)?;
        self.cgroups.remove(&cgroup)?;
        tree::remove(&places.state).map_err(|source| failed("remove", &places.state, source))?;
        for name in [super::shim::EXIT_FILE, RECORD_FILE] {
            let path = places.run.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path, source));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves the end of a lease. A container that does not run is no error: it needs none.
    pub fn renew_lease(&self, id: &ContainerId, end: LeaseEnd) -> Result<(), ContainerError> {
        if !matches!(self.state(id), ContainerState::Running { .. }) {
            return Ok(());
        }
        let run = self.places(id).run;
        end.send(&run).map_err(|source| failed("renew the lease in", &run, source))
    }

    fn launch(
        &self,
        id: &ContainerId,
        places: &Places,
        lease: Option<LeaseEnd>,
    ) -> Result<ProcessId, ContainerError> {
        let arguments = LaunchArguments {
            id: id.as_str().to_owned(),
            run: places.run.clone(),
            states: self.states_dir(),
            logs: places.logs.clone(),
            cgroup: self.cgroup_path(id),
            lease,
        };
        let (status, theirs) = socket::message_pair().map_err(ContainerError::SpawnShim)?;
        let mut command = self.shim_command(arguments.to_words());
        process::inherit(&mut command, theirs.as_fd(), STATUS_FD).map_err(ContainerError::SpawnShim)?;
        let mut shim = command.spawn().map_err(ContainerError::SpawnShim)?;
        drop((theirs, command));
        match await_start(&status) {
            Ok(()) => {}
            Err(reason) => {
                let _ = shim.kill();
                let _ = shim.wait();
                return Err(ContainerError::Start { id: id.clone(), reason });
            }
        }
        let record = ShimRecord::read(&places.run);
        record
            .and_then(|record| record.container)
            .ok_or_else(|| ContainerError::Start { id: id.clone(), reason: "its shim left no record".into() })
    }

    pub(super) fn shim_command(&self, words: Vec<PathBuf>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    // ---- what is

    /// All containers of this node, sorted by id, as they are now.
    pub fn list(&self) -> Result<Vec<ContainerStatus>, ContainerError> {
        let mut all = Vec::new();
        for id in ids_in(&self.data_dir.join("instances"))? {
            if self.is_known(&id) {
                let state = self.state(&id);
                all.push(ContainerStatus { id, state });
            }
        }
        Ok(all)
    }

    /// A description that a power cut left damaged makes no container; one that cannot be read now might.
    fn is_known(&self, id: &ContainerId) -> bool {
        !matches!(self.spec(id), Err(ContainerError::NotFound(_) | ContainerError::BadSpec { .. }))
    }

    /// Removed containers whose logs were kept, sorted by id. `remove` with `KeepLogs::No` takes those too.
    pub fn kept_logs(&self) -> Result<Vec<ContainerId>, ContainerError> {
        let mut ids = ids_in(&self.data_dir.join("instances"))?;
        ids.retain(|id| !self.is_known(id) && self.places(id).logs.is_dir());
        Ok(ids)
    }

    /// As `list`, and ends what nobody can follow any more: containers whose shim was killed. To be called once at
    /// start; the processes of all others are the same as before.
    pub fn adopt(&self) -> Result<Vec<ContainerStatus>, ContainerError> {
        let all = self.list()?;
        for status in all.iter().filter(|status| status.state == ContainerState::Lost) {
            self.cgroups.kill_all(&self.cgroup_path(&status.id), KILL_TIMEOUT)?;
        }
        Ok(all)
    }

    /// Where a container stands now. One that is not here counts as created.
    pub fn state(&self, id: &ContainerId) -> ContainerState {
        self.state_in(&self.places(id))
    }

    fn state_in(&self, places: &Places) -> ContainerState {
        // The record is read before the exit: a shim writes its exit record before it ends.
        let record = ShimRecord::read(&places.run);
        let is_shim_alive = record.as_ref().is_some_and(|record| record.shim.is_alive());
        if let Some(exit) = ExitRecord::read(&places.run) {
            return ContainerState::Exited(exit);
        }
        match record {
            None => ContainerState::Created,
            Some(record) if record.boot_id != boot_id() => ContainerState::Created,
            Some(_) if !is_shim_alive => ContainerState::Lost,
            Some(record) => match record.container {
                Some(main) => ContainerState::Running { main, started_at_ms: record.started_at_ms },
                None => ContainerState::Starting,
            },
        }
    }

    /// Something to wait on until the container ends. It is there at once when it does not run.
    pub fn watch(&self, id: &ContainerId) -> Result<ExitWatch, ContainerError> {
        let run = self.places(id).run;
        let record = ShimRecord::read(&run).filter(|record| record.boot_id == boot_id());
        let signal_failed = |source| ContainerError::Signal { id: id.clone(), source };
        let shim = match &record {
            Some(record) => record.shim.open().map_err(signal_failed)?,
            None => None,
        };
        Ok(ExitWatch { run, shim_pid: record.map_or(0, |record| record.shim.pid), shim })
    }

    /// What it uses now; `None` when it does not run.
    pub fn stats(&self, id: &ContainerId) -> Option<Usage> {
        self.cgroups.usage(&self.cgroup_path(id))
    }

    /// Bytes on disk in the container's writable layer.
    pub fn writable_bytes(&self, id: &ContainerId) -> u64 {
        Rootfs::new(&self.instance_dir(id)).upper_bytes()
    }

    pub fn logs(&self, id: &ContainerId, request: LogRequest) -> Result<LogReader, ContainerError> {
        let places = self.places(id);
        if !places.logs.is_dir() {
            return Err(ContainerError::NotFound(id.clone()));
        }
        Ok(LogReader::open(&places.logs, &places.run, request)?)
    }

    // ---- ends

    /// Sends a signal to the main process. `false`: it does not run.
    pub fn signal(&self, id: &ContainerId, number: i32) -> Result<bool, ContainerError> {
        let ContainerState::Running { main, .. } = self.state(id) else { return Ok(false) };
        let sent = main.open().and_then(|pidfd| pidfd.map_or(Ok(false), |pidfd| pidfd.send(number)));
        sent.map_err(|source| ContainerError::Signal { id: id.clone(), source })
    }

    /// Asks the main process to end with `signal`; after `grace` everything in the container is killed. Returns how
    /// it ended; a container that was not running returns what is known of its last run.
    pub fn stop(
        &self,
        id: &ContainerId,
        signal: i32,
        grace: Duration,
    ) -> Result<ContainerEnd, ContainerError> {
        let mut watch = self.watch(id)?;
        if watch.is_running() {
            let asked = match self.state(id) {
                ContainerState::Running { .. } => self.signal(id, signal)?,
                _ => false,
            };
            let ended = asked && watch.wait_for(grace)?;
            if !ended {
                self.cgroups.kill_all(&self.cgroup_path(id), KILL_TIMEOUT)?;
                if !watch.wait_for(KILL_TIMEOUT)? {
                    return Err(ContainerError::WillNotEnd(id.clone()));
                }
            }
        }
        // Also when its shim was gone: nothing of it runs on.
        self.cgroups.kill_all(&self.cgroup_path(id), KILL_TIMEOUT)?;
        Ok(watch.end())
    }

    /// Removes a container that does not run: mounts, cgroup, files. Its volumes stay. A missing one is fine.
    pub fn remove(&self, id: &ContainerId, keep_logs: KeepLogs) -> Result<(), ContainerError> {
        match self.state(id) {
            ContainerState::Running { .. } | ContainerState::Starting => {
                Err(ContainerError::Running(id.clone()))
            }
            _ => self.remove_instance(id, keep_logs),
        }
    }

    fn remove_instance(&self, id: &ContainerId, keep_logs: KeepLogs) -> Result<(), ContainerError> {
        let places = self.places(id);
        self.clear_last_run(id, &places)?;
        let keeps = keep_logs == KeepLogs::Yes && places.logs.is_dir();
        if keeps {
            logs::settle(&places.logs, &places.run)?;
        }
        detach_below(&places.instance)?;
        tree::remove(&places.run).map_err(|source| failed("remove", &places.run, source))?;
        if !keeps {
            return tree::remove(&places.instance)
                .map_err(|source| failed("remove", &places.instance, source));
        }
        let entries =
            fs::read_dir(&places.instance).map_err(|source| failed("list", &places.instance, source))?;
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| *path != places.logs) {
            tree::remove(&path).map_err(|source| failed("remove", &path, source))?;
        }
        Ok(())
    }

    /// Takes away what belongs to no container of this node: cgroups, mounts, run folders, half-removed instances.
    /// Kept logs stay. Only names with this node's tag and paths below its folders are touched.
    pub fn sweep(&self) -> Result<Swept, ContainerError> {
        let mut swept = Swept::default();
        let is_known = |name: &str| ContainerId::parse(name).is_ok_and(|id| self.is_known(&id));
        for name in self.cgroups.children(&self.cgroup_parent).into_iter().filter(|name| !is_known(name)) {
            let path = format!("{}/{name}", self.cgroup_parent);
            self.cgroups.kill_all(&path, KILL_TIMEOUT)?;
            self.cgroups.remove(&path)?;
            swept.cgroups.push(path);
        }
        for id in ids_in(&self.data_dir.join("instances"))?.into_iter().filter(|id| !is_known(id.as_str())) {
            swept.mounts.extend(detach_below(&self.instance_dir(&id))?);
            if self.places(&id).logs.is_dir() {
                self.remove_instance(&id, KeepLogs::Yes)?;
            } else {
                self.remove_instance(&id, KeepLogs::No)?;
                swept.folders.push(self.instance_dir(&id));
            }
        }
        for folder in [self.run_dir.join("shim"), self.states_dir()] {
            for id in ids_in(&folder)?.into_iter().filter(|id| !is_known(id.as_str())) {
                let path = folder.join(id.as_str());
                tree::remove(&path).map_err(|source| failed("remove", &path, source))?;
                swept.folders.push(path);
            }
        }
        Ok(swept)
    }

    /// Ends and removes every container of this node and its cgroups. For tests, the demo, and leaving a machine.
    pub fn erase(&self) -> Result<(), ContainerError> {
        // A removal that was under way takes the same files away, so that either may find one gone.
        for _ in 1..ERASE_ATTEMPTS {
            if self.erase_once().is_ok() {
                return Ok(());
            }
            std::thread::sleep(ERASE_PAUSE);
        }
        self.erase_once()
    }

    fn erase_once(&self) -> Result<(), ContainerError> {
        self.cgroups.kill_all(&self.cgroup_parent, KILL_TIMEOUT)?;
        for id in ids_in(&self.data_dir.join("instances"))? {
            self.stop(&id, libc::SIGKILL, Duration::ZERO)?;
            self.remove_instance(&id, KeepLogs::No)?;
        }
        self.sweep()?;
        Ok(self.cgroups.remove(&self.cgroup_parent)?)
    }
}

/// Waits for the end of a container without polling: the shim ends right after it wrote the exit record.
#[derive(Debug)]
pub struct ExitWatch {
    run: PathBuf,
    shim_pid: i32,
    shim: Option<PidFd>,
}

impl ExitWatch {
    /// Waits on the executor's reactor.
    pub async fn wait(mut self) -> io::Result<ContainerEnd> {
        if let Some(shim) = self.shim.take() {
            let shim = async_io::Async::new_nonblocking(OwnedFd::from(shim))?;
            shim.readable().await?;
        }
        Ok(self.end())
    }

    /// Waits on this thread. `None`: still running after `timeout`.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<ContainerEnd>, ContainerError> {
        Ok(self.wait_for(timeout)?.then(|| self.end()))
    }

    fn is_running(&self) -> bool {
        self.shim.is_some()
    }

    fn wait_for(&mut self, timeout: Duration) -> Result<bool, ContainerError> {
        let Some(shim) = &self.shim else { return Ok(true) };
        shim.wait(timeout).map_err(|source| failed("wait for the shim of", &self.run, source))
    }

    fn end(&self) -> ContainerEnd {
        // A child of this daemon leaves a zombie otherwise; an adopted shim is not its child.
        process::reap(self.shim_pid);
        ExitRecord::read(&self.run).map_or(ContainerEnd::Lost, ContainerEnd::Exited)
    }
}

/// Waits for the shim's one message. `Err`: why it did not start.
pub(super) fn await_start(status: &OwnedFd) -> Result<(), String> {
    let mut message = vec![0u8; 4096];
    match process::poll_readable(status.as_fd(), START_TIMEOUT) {
        Ok(true) => {}
        Ok(false) => return Err(format!("nothing happened for {} s", START_TIMEOUT.as_secs())),
        Err(error) => return Err(error.to_string()),
    }
    let length = socket::receive(status.as_fd(), &mut message).unwrap_or(0);
    match &message[..length] {
        b"started" => Ok(()),
        b"" => Err("its shim ended without a word".to_owned()),
        other => {
            let text = String::from_utf8_lossy(other);
            Err(text.strip_prefix("error ").unwrap_or(&text).to_owned())
        }
    }
}

fn detach_below(folder: &Path) -> Result<Vec<PathBuf>, ContainerError> {
    use crate::linux::mount;
    let points =
        mount::mounted_below(folder).map_err(|source| failed("list the mounts below", folder, source))?;
    for point in &points {
        mount::detach(point).map_err(|source| failed("unmount", point, source))?;
    }
    Ok(points)
}

fn ids_in(folder: &Path) -> Result<Vec<ContainerId>, ContainerError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed("list", folder, source)),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut ids: Vec<ContainerId> = names.filter_map(|name| ContainerId::parse(&name).ok()).collect();
    ids.order();
    Ok(ids)
}

pub(super) fn failed(action: &'static str, path: &Path, source: io::Error) -> ContainerError {
    ContainerError::Io { action, path: path.to_owned(), source }
}

//! What a container is → the OCI runtime spec that libcontainer executes.
//!
//! Input: a `ContainerSpec` and where its pieces lie on this node. Output: a `Spec`. Pure: no file, no clock.
//! The defaults are Docker's: capabilities, mounts, masked paths. Two differ. CAP_MKNOD is not given, because on
//! cgroup v2 nothing else would keep a container from the disks; and no_new_privileges is always set.

use crate::model::Order;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder,
    LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimitBuilder,
    PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use serde::{Deserialize, Serialize};

use super::images::{Digest, ImageConfig};
use super::user::ResolvedUser;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files, as systemd gives them to services: old programs walk the soft limit, new ones raise it.
const OPEN_FILES_SOFT: u64 = 1024;
const OPEN_FILES_HARD: u64 = 524_288;
const CPU_PERIOD_USEC: u64 = 100_000;
/// A quota below 1 ms per period is refused by the kernel.
const CPU_QUOTA_USEC_MIN: i64 = 1_000;
const ID_BYTES_MAX: usize = 64;
/// Set on a container whose first process is an init.
pub(super) const INIT_ANNOTATION: &str = "tinydc.init";

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("neither the image nor the service says what to run; set `command`")]
    NoCommand,
    #[error("`{0}` is no capability; see capabilities(7)")]
    BadCapability(String),
    #[error("`{0}` is not absolute")]
    RelativePath(String),
    #[error("`{0}` contains a zero byte")]
    ZeroByte(String),
    #[error("build the runtime spec")]
    Build(#[from] OciSpecError),
}

#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is no container id: 1 to {ID_BYTES_MAX} letters, digits, `.`, `_` or `-`, a letter or digit first"
)]
pub struct ContainerIdError(String);

/// Names a container on this node; safe as a file name and as a cgroup name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    pub fn parse(text: &str) -> Result<ContainerId, ContainerIdError> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let starts_well = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if starts_well && text.len() <= ID_BYTES_MAX && text.bytes().all(is_plain) {
            Ok(ContainerId(text.to_owned()))
        } else {
            Err(ContainerIdError(text.chars().take(100).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for ContainerId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = ContainerIdError;

    fn try_from(text: String) -> Result<ContainerId, ContainerIdError> {
        ContainerId::parse(&text)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

/// A folder or file of the node inside the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub source: PathBuf,
    pub destination: String,
    pub access: Access,
    /// A named volume: while its folder is empty it is filled with what the image has at `destination`.
    #[serde(default)]
    pub seed: Seed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    ReadWrite,
    ReadOnly,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seed {
    #[default]
    Never,
    FromImageOnce,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    pub destination: String,
    pub size_bytes_max: Option<u64>,
}

/// Everything that makes a container, apart from where its files lie. Stored with the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub id: ContainerId,
    pub hostname: String,
    pub image: ImageConfig,
    /// Unpacked layers of the image, base first.
    pub layers: Vec<Digest>,
    /// Replaces the image's entrypoint and drops its command.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// Added to the image's; the same name replaces.
    pub env: Vec<(String, String)>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
    pub binds: Vec<Bind>,
    pub tmpfs: Vec<Tmpfs>,
    pub memory_bytes_max: Option<u64>,
    /// Thousandths of one processor.
    pub cpu_millis_max: Option<u64>,
    pub pids_max: Option<u64>,
    pub is_rootfs_read_only: bool,
    /// `NET_ADMIN`, `CAP_NET_ADMIN` or `ALL`.
    pub cap_add: Vec<String>,
    pub cap_drop: Vec<String>,
    /// A pseudo terminal for the main process; its output is one stream.
    pub has_terminal: bool,
    /// `init: true`: a small first process reaps orphans and passes signals on.
    #[serde(default)]
    pub has_init: bool,
    /// The network namespace to join. `None`: a new one with nothing but loopback.
    pub netns: Option<PathBuf>,
}

impl ContainerSpec {
    /// A container that runs what its image says, without limits.
    pub fn new(id: ContainerId, image: ImageConfig, layers: Vec<Digest>) -> ContainerSpec {
        ContainerSpec {
            hostname: id.as_str().chars().take(63).collect(),
            id,
            image,
            layers,
            entrypoint: None,
            command: None,
            env: Vec::new(),
            user: None,
            working_dir: None,
            binds: Vec::new(),
            tmpfs: Vec::new(),
            memory_bytes_max: None,
            cpu_millis_max: None,
            pids_max: None,
            is_rootfs_read_only: false,
            cap_add: Vec::new(),
            cap_drop: Vec::new(),
            has_terminal: false,
            has_init: false,
            netns: None,
        }
    }

    /// `user[:group]` as it is to be resolved in the image.
    pub fn effective_user(&self) -> &str {
        self.user.as_deref().unwrap_or(&self.image.user)
    }

    pub fn effective_working_dir(&self) -> &str {
        match self.working_dir.as_deref().unwrap_or(&self.image.working_dir) {
            "" => "/",
            path => path,
        }
    }

    fn arguments(&self) -> Result<Vec<String>, BundleError> {
        let mut arguments = self.entrypoint.clone().unwrap_or_else(|| self.image.entrypoint.clone());
        match (&self.command, &self.entrypoint) {
            (Some(command), _) => arguments.extend(command.iter().cloned()),
            (None, Some(_)) => {}
            (None, None) => arguments.extend(self.image.command.iter().cloned()),
        }
        if arguments.first().is_none_or(String::is_empty) {
            return Err(BundleError::NoCommand);
        }
        Ok(arguments)
    }

    /// PATH, HOME, TERM, HOSTNAME, the image's variables, then the service's own; a later one replaces.
    fn environment(&self, home: Option<&str>) -> Vec<String> {
        let mut variables: BTreeMap<String, String> = BTreeMap::new();
        let mut set = |text: &str| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            variables.insert(name.to_owned(), value.to_owned());
        };
        set(DEFAULT_PATH);
        set(&format!("HOME={}", home.unwrap_or("/")));
        if self.has_terminal {
            set("TERM=xterm");
        }
        set(&format!("HOSTNAME={}", self.hostname));
        self.image.env.iter().for_each(|variable| set(variable));
        self.env.iter().for_each(|(name, value)| set(&format!("{name}={value}")));
        variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// Docker's default set, changed by `cap_add` and `cap_drop`. Additions win over `cap_drop: ALL`.
    pub fn capabilities(&self) -> Result<Capabilities, BundleError> {
        let drops_all = self.cap_drop.iter().any(|name| is_all(name));
        let adds_all = self.cap_add.iter().any(|name| is_all(name));
        let mut kept: Capabilities = match (adds_all, drops_all) {
            (true, _) => every_capability().into_iter().collect(),
            (false, true) => Capabilities::new(),
            (false, false) => DEFAULT_CAPABILITIES.into_iter().collect(),
        };
        for name in self.cap_add.iter().filter(|name| !is_all(name)) {
            kept.insert(parse_capability(name)?);
        }
        for name in self.cap_drop.iter().filter(|name| !is_all(name)) {
            kept.remove(&parse_capability(name)?);
        }
        Ok(kept)
    }
}

/// Docker's, without MKNOD (see the head of this file).
const DEFAULT_CAPABILITIES: [Capability; 13] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// What `ALL` means: the kernel's list up to CAP_CHECKPOINT_RESTORE, by name, so that no number is assumed.
#[rustfmt::skip]
const CAPABILITY_NAMES: [&str; 41] = [
    "AUDIT_CONTROL", "AUDIT_READ", "AUDIT_WRITE", "BLOCK_SUSPEND", "BPF", "CHECKPOINT_RESTORE", "CHOWN",
    "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK", "IPC_OWNER", "KILL", "LEASE",
    "LINUX_IMMUTABLE", "MAC_ADMIN", "MAC_OVERRIDE", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_BROADCAST",
    "NET_RAW", "PERFMON", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT",
    "SYS_MODULE", "SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

fn every_capability() -> Vec<Capability> {
    CAPABILITY_NAMES.iter().filter_map(|name| parse_capability(name).ok()).collect()
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("all")
}

fn parse_capability(name: &str) -> Result<Capability, BundleError> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let value = serde_json::Value::String(format!("CAP_{short}"));
    serde_json::from_value(value).map_err(|_| BundleError::BadCapability(name.chars().take(40).collect()))
}

/// Where the pieces of a container lie on this node, and what the machine allows.
#[derive(Clone, Debug)]
pub struct Surroundings {
    pub rootfs: PathBuf,
    pub cgroup_path: String,
    pub user: ResolvedUser,
    /// Files that the node writes for the container: `(source, destination)`, such as `/etc/hosts`.
    pub files: Vec<(PathBuf, String)>,
    pub open_files_hard_max: u64,
}

/// A signal as Compose files and images write it: `SIGTERM`, `term`, `15`, `SIGRTMIN+3`. `None`: there is none such.
pub fn parse_signal(text: &str) -> Option<i32> {
    const RT_MIN: i32 = 34;
    const RT_MAX: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return (1..=RT_MAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = short.strip_prefix("RTMIN") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse::<i32>().ok()? };
        return (0..=RT_MAX - RT_MIN).contains(&offset).then_some(RT_MIN + offset);
    }
    if let Some(offset) = short.strip_prefix("RTMAX") {
        let offset = if offset.is_empty() { 0 } else { offset.strip_prefix('-')?.parse::<i32>().ok()? };
        return (0..=RT_MAX - RT_MIN).contains(&offset).then_some(RT_MAX - offset);
    }
    format!("SIG{short}").parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

/// The runtime spec of a container.
pub fn oci_spec(spec: &ContainerSpec, around: &Surroundings) -> Result<Spec, BundleError> {
    let namespaces = namespaces(spec)?;
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(resources(spec)?)
        .cgroups_path(format!("/{}", around.cgroup_path))
        .masked_paths(MASKED_PATHS.map(str::to_owned).to_vec())
        .readonly_paths(READ_ONLY_PATHS.map(str::to_owned).to_vec());
    linux = linux.sysctl(HashMap::from([
        // As Docker since 20.10: no privilege for low ports or ping inside the container's own network.
        ("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned()),
        ("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned()),
    ]));
    let root = RootBuilder::default().path(&around.rootfs).readonly(spec.is_rootfs_read_only).build()?;
    // The runtime spec has no word for it.
    let annotations = spec.has_init.then(|| (INIT_ANNOTATION.to_owned(), "true".to_owned()));
    let built = SpecBuilder::default()
        .annotations(annotations.into_iter().collect::<HashMap<_, _>>())
        .version("1.0.2")
        .root(root)
        .hostname(spec.hostname.clone())
        .mounts(mounts(spec, around)?)
        .process(process(spec, around)?)
        .linux(linux.build()?)
        .build()?;
    Ok(built)
}

#[rustfmt::skip]
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn namespaces(spec: &ContainerSpec) -> Result<Vec<LinuxNamespace>, BundleError> {
    let kinds = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Network,
    ];
    let build = |kind| {
        let mut namespace = LinuxNamespaceBuilder::default().typ(kind);
        if let (LinuxNamespaceType::Network, Some(path)) = (kind, &spec.netns) {
            namespace = namespace.path(path.clone());
        }
        Ok(namespace.build()?)
    };
    kinds.into_iter().map(build).collect()
}

fn process(spec: &ContainerSpec, around: &Surroundings) -> Result<Process, BundleError> {
    let kept = spec.capabilities()?;
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(kept.clone())
        .effective(kept.clone())
        .permitted(kept)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()?;
    let user = UserBuilder::default()
        .uid(around.user.uid)
        .gid(around.user.gid)
        .additional_gids(around.user.groups.clone())
        .umask(0o022u32)
        .build()?;
    let arguments = spec.arguments()?;
    let environment = spec.environment(around.user.home.as_deref());
    for text in arguments.iter().chain(&environment) {
        if text.contains('\0') {
            return Err(BundleError::ZeroByte(text.chars().take(40).collect()));
        }
    }
    // Never above what this machine allows: raising a hard limit needs a right that a node may lack.
    let hard = OPEN_FILES_HARD.min(around.open_files_hard_max);
    let open_files = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(OPEN_FILES_SOFT.min(hard))
        .hard(hard)
        .build()?;
    Ok(ProcessBuilder::default()
        .terminal(spec.has_terminal)
        .args(arguments)
        .env(environment)
        .cwd(absolute(spec.effective_working_dir())?)
        .user(user)
        .capabilities(capabilities)
        .no_new_privileges(true)
        .rlimits(vec![open_files])
        // The shim is protected from the OOM killer; what it starts is not.
        .oom_score_adj(0)
        .build()?)
}

fn resources(spec: &ContainerSpec) -> Result<LinuxResources, BundleError> {
    let mut devices = vec![LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?];
    // null, zero, full, random, urandom, tty, console, ptmx and pseudo terminals.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, -1)] {
        let mut device = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(oci_spec::runtime::LinuxDeviceType::C)
            .major(major)
            .access("rwm");
        if minor >= 0 {
            device = device.minor(minor);
        }
        devices.push(device.build()?);
    }
    let mut resources = LinuxResourcesBuilder::default().devices(devices);
    if let Some(bytes) = spec.memory_bytes_max {
        let limit = i64::try_from(bytes).unwrap_or(i64::MAX);
        resources = resources.memory(LinuxMemoryBuilder::default().limit(limit).build()?);
    }
    if let Some(millis) = spec.cpu_millis_max {
        let quota = i64::try_from(millis.saturating_mul(CPU_PERIOD_USEC) / 1000).unwrap_or(i64::MAX);
        let cpu = LinuxCpuBuilder::default().quota(quota.max(CPU_QUOTA_USEC_MIN)).period(CPU_PERIOD_USEC);
        resources = resources.cpu(cpu.build()?);
    }
    if let Some(count) = spec.pids_max {
        let limit = i64::try_from(count).unwrap_or(i64::MAX);
        resources = resources.pids(LinuxPidsBuilder::default().limit(limit).build()?);
    }
    Ok(resources.build()?)
}

fn mounts(spec: &ContainerSpec, around: &Surroundings) -> Result<Vec<Mount>, BundleError> {
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"])?,
    ];
    for tmpfs in &spec.tmpfs {
        let mut options =
            vec!["nosuid".to_owned(), "nodev".to_owned(), "noexec".to_owned(), "mode=1777".to_owned()];
        options.extend(tmpfs.size_bytes_max.map(|bytes| format!("size={bytes}")));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        mounts.push(mount(absolute(&tmpfs.destination)?, "tmpfs", "tmpfs", &options)?);
    }
    for (source, destination) in &around.files {
        mounts.push(bind(source, destination, &["rbind", "rprivate", "nosuid", "nodev"])?);
    }
    for wanted in &spec.binds {
        let access = match wanted.access {
            Access::ReadWrite => "rw",
            Access::ReadOnly => "ro",
        };
        mounts.push(bind(&wanted.source, absolute(&wanted.destination)?, &["rbind", "rprivate", access])?);
    }
    // A mount inside another's destination must come after it, whatever the order in the service.
    mounts[7..].order_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Result<Mount, BundleError> {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    Ok(MountBuilder::default().destination(destination).typ(kind).source(source).options(options).build()?)
}

fn bind(source: &std::path::Path, destination: &str, options: &[&str]) -> Result<Mount, BundleError> {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    Ok(MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(options)
        .build()?)
}

fn absolute(path: &str) -> Result<&str, BundleError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(path)
    } else {
        Err(BundleError::RelativePath(path.chars().take(200).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ContainerSpec {
        let image = ImageConfig {
            entrypoint: vec!["/entry".into()],
            command: vec!["serve".into()],
            env: vec!["PATH=/bin".into(), "A=1".into()],
            ..ImageConfig::default()
        };
        ContainerSpec::new(ContainerId::parse("web-1").unwrap(), image, Vec::new())
    }

    fn around() -> Surroundings {
        Surroundings {
            rootfs: "/r".into(),
            cgroup_path: "tinydc-00000000/web-1".into(),
            user: ResolvedUser { home: Some("/root".into()), ..ResolvedUser::default() },
            files: vec![("/i/hosts".into(), "/etc/hosts".into())],
            open_files_hard_max: 4096,
        }
    }

    #[test]
    fn a_new_entrypoint_drops_the_images_command() {
        let check = |entrypoint: Option<&[&str]>, command: Option<&[&str]>, expected: &[&str]| {
            let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
            let mut spec = spec();
            (spec.entrypoint, spec.command) = (entrypoint.map(list), command.map(list));
            assert_eq!(spec.arguments().unwrap_or_default(), list(expected), "{entrypoint:?} {command:?}");
        };
        check(None, None, &["/entry", "serve"]);
        check(None, Some(&["other"]), &["/entry", "other"]);
        check(Some(&["sh"]), None, &["sh"]);
        check(Some(&["sh"]), Some(&["-c", "x"]), &["sh", "-c", "x"]);
        check(Some(&[]), Some(&["x"]), &["x"]);
        check(Some(&[]), None, &[]);
    }

    #[test]
    fn the_services_variables_win_over_the_images() {
        let mut spec = spec();
        spec.env = vec![("A".into(), "2".into()), ("HOSTNAME".into(), "own".into())];
        let environment = spec.environment(Some("/root"));
        assert_eq!(environment, ["A=2", "HOME=/root", "HOSTNAME=own", "PATH=/bin"]);
    }

    #[test]
    fn capabilities_are_dockers_and_changed_by_name() {
        let check = |add: &[&str], drop: &[&str]| {
            let mut spec = spec();
            spec.cap_add = add.iter().map(|name| (*name).to_owned()).collect();
            spec.cap_drop = drop.iter().map(|name| (*name).to_owned()).collect();
            spec.capabilities()
        };
        assert!(!check(&[], &[]).unwrap().contains(&Capability::Mknod), "see the head of this file");
        assert_eq!(check(&["NET_ADMIN"], &["ALL"]).unwrap(), Capabilities::from([Capability::NetAdmin]));
        assert_eq!(check(&["all"], &[]).unwrap().len(), CAPABILITY_NAMES.len());
        assert!(!check(&[], &["cap_chown"]).unwrap().contains(&Capability::Chown));
        assert!(matches!(check(&["FLY"], &[]), Err(BundleError::BadCapability(_))));
    }

    #[test]
    fn limits_and_rights_stand_in_the_spec() {
        let mut spec = spec();
        (spec.memory_bytes_max, spec.cpu_millis_max, spec.pids_max) = (Some(1 << 26), Some(250), Some(99));
        let built = oci_spec(&spec, &around()).unwrap();
        let process = built.process().as_ref().unwrap();
        assert_eq!(process.no_new_privileges(), Some(true));
        let rlimit = &process.rlimits().as_ref().unwrap()[0];
        assert_eq!((rlimit.soft(), rlimit.hard()), (1024, 4096), "not above what the machine allows");
        let resources = built.linux().as_ref().unwrap().resources().as_ref().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(1 << 26));
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(25_000));
    }

    #[test]
    fn signals_are_read_as_docker_reads_them() {
        let cases = [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGRTMIN+99", None),
            ("0", None),
            ("65", None),
            ("SIGNOPE", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_signal(text), expected, "{text}");
        }
    }

    #[test]
    fn nested_mounts_come_after_what_holds_them() {
        let mut spec = spec();
        let bind = |destination: &str| Bind {
            source: "/v".into(),
            destination: destination.into(),
            access: Access::ReadWrite,
            seed: Seed::Never,
        };
        spec.binds = vec![bind("/data/inner/deep"), bind("/data")];
        let built = oci_spec(&spec, &around()).unwrap();
        let destinations: Vec<String> =
            built.mounts().as_ref().unwrap().iter().map(|m| m.destination().display().to_string()).collect();
        let place = |path: &str| destinations.iter().position(|d| d == path).unwrap();
        assert!(place("/data") < place("/data/inner/deep"));
        assert!(place("/dev") < place("/dev/pts"));
        spec.binds = vec![bind("relative")];
        assert!(matches!(oci_spec(&spec, &around()), Err(BundleError::RelativePath(_))));
    }

    #[test]
    fn an_id_is_a_safe_name() {
        for good in ["a", "web-1", "A.b_c-9", &"x".repeat(64)] {
            assert!(ContainerId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", &"x".repeat(65)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad}");
        }
    }
}

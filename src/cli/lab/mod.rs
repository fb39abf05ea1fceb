//! A cluster on one machine: each node a process in a network namespace of its own, on one LAN.
//!
//! Used by the demo, the cluster tests and the benchmarks. Everything it makes lies below one folder or carries its
//! name; `Lab::drop` takes it away, and `sweep` what a killed run left.
//!
//! Never: touches namespaces, links, cgroups or processes that are not its own.

mod ask;
mod image;
mod lan;

pub use ask::{Answer, ask, ask_with};
pub use image::{archive_of, hello_image, image_of, image_with};
pub use lan::Lan;

use crate::linux::{cgroup::Cgroups, mount, netns, process::ProcessId};
use crate::model::Order;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a lab needs of the machine, checked before anything is made.
pub fn check_machine() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        let program = std::env::args().collect::<Vec<_>>().join(" ");
        bail!("this makes network namespaces and containers, which takes root; type: sudo {program}");
    }
    let probe = std::env::temp_dir().join(format!("tinydc-probe-{}", std::process::id()));
    let made = netns::create(&probe);
    let removed = netns::remove(&probe);
    made.and(removed).context("the kernel makes no network namespace; it needs CONFIG_NET_NS")?;
    Cgroups::detect().context("the kernel shows no cgroups; mount cgroup2 at /sys/fs/cgroup")?;
    let systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_overlay = systems.contains("overlay");
    if !has_overlay && !Path::new("/sys/module/overlay").exists() {
        bail!("the kernel has no overlay file system; try: modprobe overlay");
    }
    Ok(())
}

/// One node: where its files are, and its daemon while it runs.
pub struct Node {
    pub number: u8,
    pub name: String,
    pub address: Ipv4Addr,
    pub dir: PathBuf,
    pub netns: PathBuf,
    program: PathBuf,
    environment: Vec<(String, String)>,
    config: String,
    daemon: Option<Child>,
}

pub struct Lab {
    pub dir: PathBuf,
    pub lan: Lan,
    pub nodes: Vec<Node>,
    pub program: PathBuf,
    _lock: File,
}

impl Lab {
    /// Makes the LAN and the namespaces of `count` nodes; no daemon runs yet. Sweeps what an earlier run left in `dir`.
    pub fn new(dir: &Path, program: &Path, count: u8) -> Result<Lab> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let lock_path = dir.with_extension("lock");
        let lock = File::create(&lock_path).with_context(|| format!("open {}", lock_path.display()))?;
        if lock.try_lock().is_err() {
            bail!("{} is in use by another run; wait for it or stop it", dir.display());
        }
        sweep(dir)?;
        fs::create_dir_all(dir.join("netns"))?;
        let lan = Lan::new(&dir.join("netns"), "lan", [10, 99, 0])?;
        let mut lab = Lab { dir: dir.into(), lan, nodes: Vec::new(), program: program.into(), _lock: lock };
        for _ in 0..count {
            lab.add_node()?;
        }
        Ok(lab)
    }

    /// One more machine on the LAN, switched off.
    pub fn add_node(&mut self) -> Result<&mut Node> {
        let number = self.nodes.len() as u8 + 1;
        let name = format!("pi{number}");
        let address = self.lan.address(number);
        let netns = self.lan.add_machine(&name, number)?;
        self.push_node(number, name, address, netns)
    }

    /// One more machine on a LAN of its own behind a router, switched off.
    pub fn add_far_node(&mut self) -> Result<&mut Node> {
        let number = self.nodes.len() as u8 + 1;
        let name = format!("pi{number}");
        let address = self.lan.far_address(number);
        let netns = self.lan.add_far_machine(&name, number)?;
        self.push_node(number, name, address, netns)
    }

    fn push_node(
        &mut self,
        number: u8,
        name: String,
        address: Ipv4Addr,
        netns: PathBuf,
    ) -> Result<&mut Node> {
        let dir = self.dir.join(&name);
        fs::create_dir_all(&dir)?;
        let node = Node {
            number,
            name,
            address,
            dir,
            netns,
            program: self.program.clone(),
            environment: Vec::new(),
            config: String::new(),
            daemon: None,
        };
        self.nodes.push(node);
        self.nodes.last_mut().context("a node was pushed just now")
    }

    /// Starts the first `count` nodes, founds a cluster on the first and lets the others join.
    pub fn form(&mut self, count: usize) -> Result<()> {
        self.found(count).map(drop)
    }

    /// As `form`; returns what `init` answered.
    pub fn found(&mut self, count: usize) -> Result<serde_json::Value> {
        for node in &mut self.nodes[..count] {
            node.start()?;
        }
        let first = &self.nodes[0];
        let founded = first.post("/v1/init", &serde_json::json!({}))?;
        let line = founded["join_line"].as_str().context("init answers with a join line")?;
        let token = line.rsplit(' ').next().unwrap_or_default().to_string();
        for node in &self.nodes[1..count] {
            node.post("/v1/join", &serde_json::json!({ "token": token }))?;
        }
        let wanted = count.to_string();
        self.nodes[0].wait(&format!("{wanted} nodes are up"), Duration::from_secs(30), |node| {
            let nodes = node.get("/v1/nodes")?;
            let up = nodes["nodes"]
                .as_array()
                .map_or(0, |all| all.iter().filter(|one| one["state"] == "up").count());
            Ok(up >= count)
        })?;
        Ok(founded)
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// Pulls the plug: the link is cut and every process of the node is killed at once, containers included.
    pub fn kill_node(&mut self, index: usize) -> Result<()> {
        self.lan.cut(self.nodes[index].number)?;
        self.nodes[index].kill_all()
    }

    /// The cgroup parents of this lab's nodes, which also name their tables and devices.
    pub fn tags(&self) -> Vec<String> {
        tags_below(&self.dir)
    }

    /// Which node leads, as a running node sees it.
    pub fn leader(&self) -> Result<usize> {
        let asked = self.nodes.iter().find(|node| node.is_running()).context("no node runs")?;
        let status = asked.get("/v1/status")?;
        let name = status["leader"].as_str().context("there is no leader now")?.to_string();
        self.nodes
            .iter()
            .position(|node| node.name == name)
            .with_context(|| format!("the leader {name} is no node"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            // A node that is gone already is what is wanted.
            let _ = node.kill_all();
        }
        if let Err(error) = sweep(&self.dir) {
            eprintln!("warning: {} was not taken away whole: {error:#}", self.dir.display());
        }
        let _ = fs::remove_file(self.dir.with_extension("lock"));
    }
}

impl Node {
    /// Adds to the environment of the next start.
    pub fn set_environment(&mut self, key: &str, value: &str) {
        self.environment.push((key.into(), value.into()));
    }

    /// Lines of the configuration from the next start on, besides the name and the data directory.
    pub fn set_config(&mut self, lines: &str) {
        self.config = lines.into();
    }

    /// Starts the daemon and waits until its socket answers.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(Vec::new())
    }

    /// The same behind a wrapper such as `faketime` or `strace`.
    pub fn start_with(&mut self, wrapper: Vec<String>) -> Result<()> {
        let config = self.dir.join("tinydc.toml");
        let text = format!("name = {:?}\ndata_dir = {:?}\n{}\n", self.name, self.data_dir(), self.config);
        fs::write(&config, text)?;
        let log = File::options().create(true).append(true).open(self.dir.join("log"))?;
        let mut words = wrapper;
        words.push(self.program.display().to_string());
        words.extend(["node".into(), "run".into(), "--config".into(), config.display().to_string()]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        // A child is born in the namespace of the thread that makes it.
        let child = netns::in_netns(&self.netns, || command.spawn())
            .with_context(|| format!("start {}", self.name))?;
        self.daemon = Some(child);
        self.wait("its socket answers", Duration::from_secs(20), |node| Ok(node.get("/v1/version").is_ok()))
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn socket(&self) -> PathBuf {
        self.data_dir().join("run/api.sock")
    }

    pub fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// SIGKILL to the daemon alone; its containers run on.
    pub fn kill_daemon(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().with_context(|| format!("kill {}", self.name))?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// A signal to the daemon alone, such as SIGSTOP.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let daemon = self.daemon.as_ref().with_context(|| format!("{} does not run", self.name))?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.id() as i32), signal)
            .with_context(|| format!("send {signal} to {}", self.name))
    }

    /// The daemon's exit, if it has ended by itself.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        let Some(daemon) = &mut self.daemon else { return Ok(None) };
        let ended = daemon.try_wait()?;
        if ended.is_some() {
            self.daemon = None;
        }
        Ok(ended)
    }

    /// SIGTERM, and its exit.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(daemon.id() as i32),
                nix::sys::signal::Signal::SIGTERM,
            )?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// Everything of this node that runs, as a power cut would end it.
    pub fn kill_all(&mut self) -> Result<()> {
        let daemon = self.daemon.take();
        kill_all_below(&self.dir)?;
        if let Some(mut daemon) = daemon {
            daemon.wait()?;
        }
        Ok(())
    }

    pub fn get(&self, path: &str) -> Result<serde_json::Value> {
        ask(&self.socket(), "GET", path, &[])?.json()
    }

    pub fn post(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
        ask(&self.socket(), "POST", path, body.to_string().as_bytes())?.json()
    }

    /// Asks every 20 ms until it is true; says what was waited for when it never is.
    pub fn wait(&self, what: &str, limit: Duration, is_true: impl Fn(&Node) -> Result<bool>) -> Result<()> {
        until(what, limit, Duration::from_millis(20), || is_true(self)).map_err(|error| {
            let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(5).collect();
            let tail = lines.into_iter().rev().collect::<Vec<_>>().join("\n  ");
            anyhow!("{error:#} ({})\n  {tail}", self.name)
        })
    }

    /// Runs something inside this node's network namespace, on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        netns::in_netns(&self.netns, work).with_context(|| format!("inside {}", self.name))
    }

    /// The folder's containers: pids by cgroup.
    pub fn container_pids(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        for tag in tags_below(&self.dir) {
            let cgroups = Cgroups::detect()?;
            for name in cgroups.children(&tag) {
                pids.extend(cgroups.pids(&format!("{tag}/{name}")));
            }
        }
        Ok(pids)
    }
}

/// Processes of tinydc (daemons and shims), whatever its file is called, whose command line names `dir`.
fn processes_below(dir: &Path) -> Vec<ProcessId> {
    let own_file = fs::read_link("/proc/self/exe").ok();
    let needle = dir.display().to_string().into_bytes();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid == std::process::id() as i32 {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        let program = words.next().unwrap_or_default();
        let is_called_so =
            program.ends_with(b"tinydc") || program.starts_with(b"tinydc") || program == b"/proc/self/exe";
        let is_ours = is_called_so || fs::read_link(entry.path().join("exe")).ok() == own_file;
        let names_dir = words.any(|word| word.windows(needle.len()).any(|part| part == needle));
        if is_ours && names_dir {
            found.extend(ProcessId::of(pid));
        }
    }
    found
}

/// The cgroup parents of nodes below `dir`: each node's store tells its tag.
fn tags_below(dir: &Path) -> Vec<String> {
    let mut tags = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        folders.push(entry.path());
    }
    for folder in folders {
        let store = folder.join("data/identity/store");
        let text = fs::read_to_string(store).unwrap_or_default();
        let id = serde_json::from_slice::<serde_json::Value>(text.as_bytes()).ok();
        let id = id.and_then(|store| u128::from_str_radix(store["store_id"].as_str()?, 16).ok());
        tags.extend(id.map(|id| format!("tinydc-{:08x}", id as u32)));
    }
    tags
}

/// Kills every process of the nodes below `dir`, containers first so that no shim tells of their end.
fn kill_all_below(dir: &Path) -> Result<()> {
    let tags = tags_below(dir);
    let cgroups = Cgroups::detect()?;
    // Twice: a daemon may have begun a container while the first round went through.
    for _ in 0..2 {
        for process in processes_below(dir) {
            if let Some(handle) = process.open()? {
                handle.send(libc::SIGKILL)?;
            }
        }
        for tag in &tags {
            cgroups.kill_all(tag, Duration::from_secs(5))?;
        }
    }
    Ok(())
}

/// Asks, with `pause` in between, until it is true; says what was waited for when it never is.
pub fn until(
    what: &str,
    limit: Duration,
    pause: Duration,
    mut is_true: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begin = Instant::now();
    loop {
        let outcome = is_true();
        if matches!(outcome, Ok(true)) {
            return Ok(());
        }
        if begin.elapsed() > limit {
            let why = outcome.err().map(|error| format!("; last: {error:#}")).unwrap_or_default();
            bail!("waited {} s until {what}{why}", limit.as_secs());
        }
        std::thread::sleep(pause);
    }
}

/// Takes away everything below `dir`: processes, cgroups, mounts, namespaces, files.
pub fn sweep(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    kill_all_below(dir)?;
    let cgroups = Cgroups::detect()?;
    for tag in tags_below(dir) {
        for name in cgroups.children(&tag) {
            cgroups.remove(&format!("{tag}/{name}"))?;
        }
        cgroups.remove(&tag)?;
    }
    let mut mounts = mount::mounted_below(dir)?;
    mounts.order();
    for target in mounts.into_iter().rev() {
        mount::detach(&target).with_context(|| format!("unmount {}", target.display()))?;
    }
    fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))
}

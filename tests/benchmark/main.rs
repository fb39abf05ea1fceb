//! `tests/bench`: what a cluster on this machine takes and how fast it is, as a table or as JSON lines.
//!
//! Absolute times depend on the machine; budgets that do not (bytes, memory, healing) are judged here, and the exit
//! code says whether they hold.

mod boards;
mod etcd;
mod ingress;
mod meter;
mod names;
mod network;
mod reaction;

// Guests are run as tests run them; what only those need is left unused here.
#[allow(dead_code)]
#[path = "../guests/field.rs"]
mod field;
#[allow(dead_code)]
#[path = "../guests/guest.rs"]
mod guest;
#[allow(dead_code)]
#[path = "../guests/image.rs"]
mod image;

use anyhow::{Context, Result, bail};
use meter::{Meter, percentile};
use std::path::Path;
use std::time::{Duration, Instant};
use tinydc::cli::lab::{self, Lab, Node};

const DIR: &str = "/var/tmp/tinydc-bench";

/// One measured number, with what it must not exceed.
pub struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// The same by another program.
    peer: Option<(&'static str, f64)>,
    budget: Option<f64>,
    /// A ratio that must be reached.
    floor: Option<f64>,
}

impl Row {
    fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Row {
        Row { name: name.into(), value, unit, peer: None, budget: None, floor: None }
    }

    fn within(mut self, budget: f64) -> Row {
        self.budget = Some(budget);
        self
    }

    fn at_least(mut self, floor: f64) -> Row {
        self.floor = Some(floor);
        self
    }

    fn beside(mut self, peer: Option<(&'static str, f64)>) -> Row {
        self.peer = peer;
        self
    }

    fn holds(&self) -> bool {
        self.budget.is_none_or(|budget| self.value <= budget)
            && self.floor.is_none_or(|floor| self.value >= floor)
    }
}

type Benchmark = fn() -> Result<Vec<Row>>;

const BENCHMARKS: [(&str, Benchmark); 11] = [
    ("commit", commit),
    ("idle", idle),
    ("twenty", twenty),
    ("container_kill", container_kill),
    ("leader_kill", leader_kill),
    ("node_kill", node_kill),
    ("network", network::network),
    ("reaction", reaction::reaction),
    ("names", names::names),
    ("ingress", ingress::ingress),
    ("boards", boards::boards),
];

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_json = arguments.iter().any(|argument| argument == "--json");
    let wanted: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    if let Some(unknown) = wanted.iter().find(|name| !BENCHMARKS.iter().any(|(known, _)| known == *name)) {
        let names: Vec<&str> = BENCHMARKS.iter().map(|(name, _)| *name).collect();
        eprintln!("error: no benchmark is called {unknown}; there are: {}", names.join(", "));
        return std::process::ExitCode::from(2);
    }
    if let Err(error) = lab::check_machine() {
        eprintln!("error: {error:#}");
        return std::process::ExitCode::FAILURE;
    }
    let mut is_good = true;
    if !is_json {
        println!("{:<48} {:>12} {:<14} {:>10}  BESIDE", "MEASURED", "VALUE", "UNIT", "BUDGET");
    }
    for (name, benchmark) in
        BENCHMARKS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|one| one == name))
    {
        match benchmark() {
            Ok(rows) => {
                for row in rows {
                    is_good &= row.holds();
                    show(&row, is_json);
                }
            }
            Err(error) => {
                eprintln!("error: {name}: {error:#}");
                is_good = false;
            }
        }
    }
    if is_good { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

fn show(row: &Row, is_json: bool) {
    if is_json {
        let peer = row.peer.map(|(name, value)| serde_json::json!({ "name": name, "value": value }));
        let line = serde_json::json!({
            "name": row.name, "value": row.value, "unit": row.unit, "budget": row.budget, "floor": row.floor,
            "peer": peer,
        });
        return println!("{line}");
    }
    let floor = row.floor.map(|floor| format!("≥ {floor}"));
    let budget = row.budget.map(|budget| format!("≤ {budget}")).or(floor).unwrap_or_default();
    let peer = row.peer.map(|(name, value)| format!("{name} {value:.1}")).unwrap_or_default();
    let mark = if row.holds() { "" } else { "  OVER BUDGET" };
    println!("{:<48} {:>12.2} {:<14} {:>10}  {peer}{mark}", row.name, row.value, row.unit, budget);
}

fn lab(count: u8) -> Result<Lab> {
    let program = std::env::current_exe()?;
    // The test's own binary lies in `deps`; the daemon's beside that folder.
    let program = program.ancestors().nth(2).context("a build folder")?.join("tinydc");
    if !program.exists() {
        bail!("{} is missing; build it: cargo build --release", program.display());
    }
    let mut lab = Lab::new(Path::new(DIR), &program, count)?;
    for node in &lab.nodes {
        // As `/run` is on a machine: what lies there is no write to a card.
        let run = node.data_dir().join("run");
        std::fs::create_dir_all(&run)?;
        let nothing: Option<&str> = None;
        nix::mount::mount(Some("tmpfs"), &run, Some("tmpfs"), nix::mount::MsFlags::empty(), nothing)?;
    }
    lab.form(usize::from(count))?;
    lab.nodes[0].wait("three nodes vote", Duration::from_secs(60), |node| {
        let nodes = node.get("/v1/nodes")?;
        let voters = nodes["nodes"]
            .as_array()
            .map_or(0, |all| all.iter().filter(|one| one["role"] != "learner").count());
        Ok(voters >= 3)
    })?;
    Ok(lab)
}

fn load_hello(lab: &Lab) -> Result<()> {
    let program = &lab.program;
    let image = lab::image_of("hello:bench", program, &["/tinydc".into(), "hello".into()], &[])?;
    lab::ask(&lab.nodes[0].socket(), "POST", "/v1/images", &image)?.json()?;
    lab.nodes[0].wait("the image lies on two nodes", Duration::from_secs(60), |node| {
        let images = node.get("/v1/images")?;
        Ok(images["images"][0]["nodes"].as_array().map_or(0, Vec::len) >= 2)
    })
}

fn service(replicas: u32, has_check: bool) -> Result<serde_json::Value> {
    use tinydc::model::*;
    let image = ImageSpec { reference: "hello:bench".into(), digest: None };
    let check = HealthSpec {
        test: HealthTest::Exec(vec!["/tinydc".into(), "version".into(), "--help".into()]),
        interval_ms: 5000,
        timeout_ms: 5000,
        retries: 3,
        start_period_ms: 0,
    };
    let spec = ServiceSpec {
        replicas,
        health: has_check.then_some(check),
        stop_grace_ms: 1000,
        ..ServiceSpec::new(image)
    };
    Ok(serde_json::to_value(spec)?)
}

fn deploy(lab: &Lab, services: serde_json::Value) -> Result<()> {
    let spec = serde_json::json!({ "name": "bench", "services": services, "volumes": {} });
    lab.nodes[0].post("/v1/apps/bench", &serde_json::json!({ "spec": spec }))?;
    Ok(())
}

fn count_in(node: &Node, phases: &[&str]) -> Result<usize> {
    let body = node.get("/v1/instances?app=bench")?;
    let rows = body["instances"].as_array().cloned().unwrap_or_default();
    Ok(rows.iter().filter(|row| phases.iter().any(|phase| row["phase"] == *phase)).count())
}

fn wait_running(lab: &Lab, count: usize) -> Result<()> {
    let node = lab.nodes.iter().find(|node| node.is_running()).context("a node runs")?;
    node.wait("all instances run", Duration::from_secs(60), |node| {
        Ok(count_in(node, &["running", "healthy"])? >= count)
    })
}

fn write_label(node: &Node, value: usize) -> Result<()> {
    let body = serde_json::json!({ "set": { "bench": value.to_string() }, "remove": [] });
    node.post("/v1/nodes/pi1/labels", &body)?;
    Ok(())
}

/// Lone writes one after the other, through the API of the leader.
fn commit() -> Result<Vec<Row>> {
    const WRITES: usize = 300;
    let lab = lab(3)?;
    let leader = &lab.nodes[lab.leader()?];
    for warm in 0..20 {
        write_label(leader, 1_000_000 + warm)?;
    }
    let meters: Vec<Meter> = lab.nodes.iter().map(Meter::of_daemon).collect::<Result<_>>()?;
    let mut times = Vec::with_capacity(WRITES);
    for value in 0..WRITES {
        let begin = Instant::now();
        write_label(leader, value)?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let mut written = 0;
    for meter in &meters {
        written += meter.bytes_since()?;
    }
    let per_command = written as f64 / WRITES as f64 / 3.0;
    drop(lab);
    let etcd = etcd::measure(WRITES).unwrap_or_else(|error| {
        eprintln!("etcd is left out: {error:#}");
        None
    });
    Ok(vec![
        Row::new("commit: median of a lone write, 3 nodes", percentile(&mut times, 50), "ms")
            .beside(etcd.as_ref().map(|etcd| ("etcd", etcd.median_ms))),
        Row::new("commit: 99th percentile", percentile(&mut times, 99), "ms")
            .beside(etcd.as_ref().map(|etcd| ("etcd", etcd.p99_ms))),
        Row::new("commit: bytes written per command, per node", per_command, "B")
            .within(10_000.0)
            .beside(etcd.as_ref().map(|etcd| ("etcd", etcd.bytes_per_put))),
    ])
}

/// Ten instances with health checks every 5 s: nothing may reach a disk, and little may stay in memory.
fn idle() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    deploy(&lab, serde_json::json!({ "web": service(10, true)? }))?;
    lab.nodes[0].wait("all instances are healthy", Duration::from_secs(60), |node| {
        Ok(count_in(node, &["healthy"])? >= 10)
    })?;
    // The update ends 5 s after the last instance; logs are flushed 30 s after their last line.
    std::thread::sleep(Duration::from_secs(60));
    let meters: Vec<Meter> = lab.nodes.iter().map(Meter::of_node).collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_secs(60));
    let mut idle = 0;
    for meter in &meters {
        idle += meter.bytes_since()?;
    }
    let daemons = lab.nodes.iter().map(meter::pss_of_daemon).collect::<Result<Vec<_>>>()?;
    let shims = meter::pss_of_shims(&lab)?;
    lab.nodes[0].post("/v1/apps/bench/scale", &serde_json::json!({ "replicas": { "web": 9 } }))?;
    let mut after = 0;
    for meter in &meters {
        after += meter.bytes_since()?;
    }
    if after == 0 {
        bail!("the meter shows nothing for a scale either");
    }
    let most = |all: &[u64]| all.iter().max().copied().unwrap_or(0) as f64 / 1024.0 / 1024.0;
    Ok(vec![
        Row::new("idle: bytes written in 60 s, all nodes", idle as f64, "B").within(0.0),
        Row::new("idle: bytes written for one scale after it", after as f64, "B"),
        Row::new("memory: largest daemon (PSS), 10 instances", most(&daemons), "MiB").within(16.0),
        Row::new("memory: largest shim (PSS)", most(&shims), "MiB").within(0.6),
    ])
}

fn twenty() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    // Every node has the image: what is measured is the start.
    deploy(&lab, serde_json::json!({ "web": service(3, false)? }))?;
    wait_running(&lab, 3)?;
    let begin = Instant::now();
    lab.nodes[0].post("/v1/apps/bench/scale", &serde_json::json!({ "replicas": { "web": 23 } }))?;
    wait_running(&lab, 23)?;
    Ok(vec![Row::new("twenty: instances wanted → running", begin.elapsed().as_secs_f64(), "s").within(2.0)])
}

fn container_kill() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    deploy(&lab, serde_json::json!({ "web": service(3, false)? }))?;
    wait_running(&lab, 3)?;
    let mut times = Vec::new();
    for node in &lab.nodes {
        let before = node.container_pids()?;
        let Some(pid) = before.iter().next().copied() else { continue };
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        let begin = Instant::now();
        node.wait("another process took its place", Duration::from_secs(10), |node| {
            let now = node.container_pids()?;
            Ok(!now.is_empty() && !now.contains(&pid))
        })?;
        times.push(begin.elapsed().as_secs_f64());
    }
    let worst = times.iter().copied().fold(0.0, f64::max);
    Ok(vec![Row::new("container killed → replaced (worst of 3)", worst, "s").within(0.5)])
}

/// SIGKILL to the leader's daemon; the next write that is accepted.
fn leader_kill() -> Result<Vec<Row>> {
    let measure = |profile: &str| -> Result<f64> {
        let mut lab = lab(3)?;
        let body = serde_json::json!({ "value": profile }).to_string();
        lab::ask(&lab.nodes[0].socket(), "PUT", "/v1/settings/timers", body.as_bytes())?.json()?;
        write_label(&lab.nodes[0], 1)?;
        let leader = lab.leader()?;
        let begin = Instant::now();
        lab.nodes[leader].kill_daemon()?;
        let other = lab.nodes.iter().find(|node| node.is_running()).context("a node is left")?;
        other.wait("a write is accepted", Duration::from_secs(20), |node| {
            write_label(node, 2)?;
            Ok(true)
        })?;
        Ok(begin.elapsed().as_secs_f64())
    };
    Ok(vec![
        Row::new("leader killed → next write, timers=fast", measure("fast")?, "s").within(1.0),
        Row::new("leader killed → next write, timers=card", measure("card")?, "s").within(4.0),
    ])
}

fn node_kill() -> Result<Vec<Row>> {
    let mut lab = lab(3)?;
    load_hello(&lab)?;
    deploy(&lab, serde_json::json!({ "web": service(6, false)? }))?;
    wait_running(&lab, 6)?;
    let leader = lab.leader()?;
    let name = lab.nodes[leader].name.clone();
    let begin = Instant::now();
    lab.kill_node(leader)?;
    let other = lab.nodes.iter().find(|node| node.is_running()).context("a node is left")?;
    other.wait("all run elsewhere", Duration::from_secs(30), |node| {
        let body = node.get("/v1/instances?app=bench")?;
        let rows = body["instances"].as_array().cloned().unwrap_or_default();
        Ok(rows.iter().filter(|row| row["phase"] == "running" && row["node"] != name.as_str()).count() >= 6)
    })?;
    Ok(vec![
        Row::new("node killed (the leader) → running elsewhere", begin.elapsed().as_secs_f64(), "s")
            .within(5.0),
    ])
}

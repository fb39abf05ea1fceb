//! `tinydc demo`: the main job in one command, on any Linux machine.
//!
//! Real nodes in network namespaces form a cluster; an image is made of the running binary; an app of three services
//! is deployed; the node that leads, holds the image and carries instances of all three is killed at once, and a
//! client elsewhere measures how long each service is away.

use super::lab::{self, Lab};
use crate::model::Gather;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const DIR: &str = "/var/tmp/tinydc-demo";
/// What may pass until every service answers again after its node was killed.
const GAP_MAX: Duration = Duration::from_secs(5);
const ASK_EVERY: Duration = Duration::from_millis(50);
const ASK_LIMIT: Duration = Duration::from_millis(150);
const APP: &str = "shop";
/// Name, published port, instances.
const SERVICES: [(&str, u16, u32); 3] = [("api", 8081, 2), ("store", 8082, 1), ("web", 8080, 2)];

pub struct DemoOptions {
    pub nodes: u8,
    pub has_chaos: bool,
    pub exits: bool,
}

/// Whether every service came back in time.
pub fn run(options: &DemoOptions) -> Result<bool> {
    if !(3..=9).contains(&options.nodes) {
        bail!("--nodes takes 3 to 9, not {}", options.nodes);
    }
    lab::check_machine()?;
    let interrupted = stop_on_signals()?;
    let program = std::env::current_exe().context("find the running binary")?;
    say("tinydc turns a handful of small machines into one. This demo makes some out of this one:");
    step(&format!("{} machines, each a network namespace with a cable to one switch", options.nodes));
    let mut lab = Lab::new(Path::new(DIR), &program, options.nodes)?;
    let begin = Instant::now();
    lab.form(usize::from(options.nodes))?;
    done(&format!("a cluster: pi1 founded it, the others joined with its token ({})", seconds(begin)));
    wait_for_voters(&lab)?;
    for name in ["pi1", "pi2"] {
        let body = serde_json::json!({ "set": { "role": "worker" }, "remove": [] });
        lab.nodes[0].post(&format!("/v1/nodes/{name}/labels"), &body)?;
    }
    done("pi1 and pi2 are labelled role=worker");
    deploy(&lab)?;
    let picture = Picture::of(&lab)?;
    print!("{}", picture.draw());
    check_interrupt(&interrupted)?;
    balance(&lab, &program)?;
    check_interrupt(&interrupted)?;
    let is_good = match options.has_chaos {
        true => chaos(&mut lab, &picture)?,
        false => true,
    };
    if !options.exits {
        say("");
        say("The cluster stays up. Look around, in another terminal:");
        let socket = lab.nodes.iter().find(|node| node.is_running()).map(|node| node.socket());
        if let Some(socket) = socket {
            say(&format!("  {} --host unix://{} status", program.display(), socket.display()));
            say(&format!("  {} --host unix://{} logs {APP}/web -f", program.display(), socket.display()));
        }
        say("Ctrl-C ends it and leaves nothing behind.");
        while !interrupted.load(Ordering::Relaxed) {
            thread::park_timeout(Duration::from_millis(100));
        }
    }
    drop(lab);
    done("taken away: processes, namespaces, mounts, cgroups, tables, files");
    Ok(is_good)
}

fn say(text: &str) {
    println!("{text}");
}

fn step(text: &str) {
    println!("  · {text}");
}

fn done(text: &str) {
    println!("  ✓ {text}");
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f64())
}

/// Ctrl-C must take everything away first: it only sets a flag, which the demo looks at between its steps.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let signals = async_signal::Signals::new([async_signal::Signal::Int, async_signal::Signal::Term])
        .context("listen for Ctrl-C")?;
    let flag = interrupted.clone();
    thread::Builder::new().name("signals".into()).spawn(move || {
        use futures_lite::StreamExt;
        let mut signals = signals;
        while async_io::block_on(signals.next()).is_some() {
            flag.store(true, Ordering::Relaxed);
        }
    })?;
    Ok(interrupted)
}

fn check_interrupt(interrupted: &AtomicBool) -> Result<()> {
    if interrupted.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// Three voters, so that the leader can be lost.
fn wait_for_voters(lab: &Lab) -> Result<()> {
    let begin = Instant::now();
    lab.nodes[0].wait("three nodes vote", Duration::from_secs(30), |node| {
        let nodes = node.get("/v1/nodes")?;
        let votes = |one: &&serde_json::Value| one["role"] == "voter" || one["role"] == "leader";
        Ok(nodes["nodes"].as_array().map_or(0, |all| all.iter().filter(votes).count()) >= 3)
    })?;
    done(&format!("three of them vote: one may be lost ({})", seconds(begin)));
    Ok(())
}

fn deploy(lab: &Lab) -> Result<()> {
    let image = lab::hello_image("tinydc-hello:demo")?;
    let size = image.len() >> 20;
    let loaded = lab::ask(&lab.nodes[0].socket(), "POST", "/v1/images", &image)?.json()?;
    let digest =
        loaded["images"][0]["digest"].as_str().unwrap_or_default().get(7..19).unwrap_or_default().to_string();
    done(&format!("an image of this very binary ({size} MiB, {digest}) was loaded into pi1"));
    lab.nodes[0].wait("the image lies on two nodes", Duration::from_secs(60), |node| {
        let images = node.get("/v1/images")?;
        Ok(images["images"][0]["nodes"].as_array().map_or(0, Vec::len) >= 2)
    })?;
    done("and copied to a second node, because no registry could give it again");
    let begin = Instant::now();
    let services: serde_json::Map<String, serde_json::Value> = SERVICES
        .iter()
        .map(|(name, port, replicas)| Ok((name.to_string(), service(name, *port, *replicas)?)))
        .collect::<Result<_>>()?;
    let spec = serde_json::json!({ "name": APP, "services": services, "volumes": {} });
    lab.nodes[0].post(&format!("/v1/apps/{APP}"), &serde_json::json!({ "spec": spec }))?;
    let wanted: u32 = SERVICES.iter().map(|(_, _, replicas)| replicas).sum();
    lab.nodes[0].wait("all instances run", Duration::from_secs(60), |node| {
        Ok(running(node)?.len() == wanted as usize)
    })?;
    done(&format!("app {APP} deployed: {wanted} instances run ({})", seconds(begin)));
    Ok(())
}

fn service(name: &str, port: u16, replicas: u32) -> Result<serde_json::Value> {
    use crate::model::*;
    let image = ImageSpec { reference: "tinydc-hello:demo".into(), digest: None };
    let constraint = Constraint {
        subject: ConstraintSubject::Label("role".into()),
        must_equal: true,
        value: "worker".into(),
    };
    let published = PortSpec {
        protocol: Protocol::Tcp,
        published: Some(port),
        target: 8080,
        host_address: None,
        is_host_mode: false,
    };
    let spec = ServiceSpec {
        replicas,
        ports: vec![published],
        environment: [("NAME".to_string(), name.to_string())].into(),
        placement: PlacementSpec { constraints: vec![constraint], ..PlacementSpec::default() },
        stop_grace_ms: 1000,
        ..ServiceSpec::new(image)
    };
    Ok(serde_json::to_value(spec)?)
}

/// Names of running instances with their nodes.
fn running(node: &lab::Node) -> Result<Vec<(String, String)>> {
    let body = node.get(&format!("/v1/instances?app={APP}"))?;
    let rows = body["instances"].as_array().cloned().unwrap_or_default();
    let up = rows.iter().filter(|row| row["phase"] == "running" && row["desired"] == "run");
    Ok(up
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_string();
            (text("name"), text("node"))
        })
        .collect())
}

/// Who is there and what runs where: the first picture of a datacenter.
struct Picture {
    leader: String,
    machines: Vec<(String, Ipv4Addr, bool)>,
    by_node: BTreeMap<String, Vec<String>>,
    holders: BTreeSet<String>,
}

impl Picture {
    fn of(lab: &Lab) -> Result<Picture> {
        let asked = lab.nodes.iter().find(|node| node.is_running()).context("no node runs")?;
        let mut by_node: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, node) in running(asked)? {
            by_node.entry(node).or_default().push(name.replace(&format!("{APP}/"), ""));
        }
        let images = asked.get("/v1/images")?;
        let holders = images["images"][0]["nodes"].as_array().cloned().unwrap_or_default();
        Ok(Picture {
            leader: lab.nodes[lab.leader()?].name.clone(),
            machines: lab
                .nodes
                .iter()
                .map(|node| (node.name.clone(), node.address, node.is_running()))
                .collect(),
            by_node,
            holders: holders.iter().filter_map(|name| name.as_str().map(String::from)).gather(),
        })
    }

    fn draw(&self) -> String {
        let width = 24;
        let mut rows: Vec<Vec<String>> = Vec::new();
        for (name, address, is_up) in &self.machines {
            let mut lines = vec![name.clone(), address.to_string()];
            lines.push(match (is_up, *name == self.leader) {
                (false, _) => "DEAD".into(),
                (true, true) => "leader".into(),
                (true, false) => String::new(),
            });
            let instances = self.by_node.get(name).filter(|_| *is_up);
            lines.extend(instances.into_iter().flatten().map(|instance| format!("▣ {instance}")));
            rows.push(lines);
        }
        let mut text = String::from("\n");
        for group in rows.chunks(3) {
            let height = group.iter().map(Vec::len).max().unwrap_or(0);
            let rule = |left: char, right: char| {
                let bar = "─".repeat(width);
                let boxes: Vec<String> = group.iter().map(|_| format!("{left}{bar}{right}")).collect();
                format!("  {}\n", boxes.join("  "))
            };
            text += &rule('┌', '┐');
            for line in 0..height {
                let cells: Vec<String> = group
                    .iter()
                    .map(|lines| format!("│ {:<1$}│", lines.get(line).map_or("", String::as_str), width - 1))
                    .collect();
                text += &format!("  {}\n", cells.join("  "));
            }
            text += &rule('└', '┘');
        }
        let ports: Vec<String> =
            SERVICES.iter().map(|(name, port, count)| format!("{name} ×{count} on port {port}")).collect();
        text += &format!("  {}; the image lies on {}\n\n", ports.join(", "), list(&self.holders));
        text
    }
}

fn list(names: &BTreeSet<String>) -> String {
    names.iter().cloned().collect::<Vec<_>>().join(" and ")
}

/// Names, virtual addresses and ports: who answers when the third service, or the LAN, asks the other two.
fn balance(lab: &Lab, program: &Path) -> Result<()> {
    const COUNT: &str = "40";
    let node = &lab.nodes[0];
    let network = node.get(&format!("/v1/network?app={APP}"))?;
    let services = network["services"].as_array().cloned().unwrap_or_default();
    let host = format!("unix://{}", node.socket().display());
    say("store asks the other two, by name and by their virtual addresses:");
    for (name, ..) in SERVICES.iter().filter(|(_, _, replicas)| *replicas > 1) {
        let service =
            services.iter().find(|one| one["service"] == *name).context("the service has an address")?;
        let vip = service["vip"].as_str().unwrap_or_default();
        let mut told = Vec::new();
        for target in [format!("{name}:8080"), format!("{vip}:8080")] {
            let words = ["exec", "shop/store", "/tinydc", "hello", "--ask", target.as_str(), COUNT];
            let output = std::process::Command::new(program).args(["--host", &host]).args(words).output()?;
            let text = String::from_utf8_lossy(&output.stdout).trim().replace('\n', ", ");
            if text.split(", ").count() < 2 {
                let errors = String::from_utf8_lossy(&output.stderr);
                bail!("{target} is not balanced over two instances: {text} {errors}");
            }
            told.push(format!("{target} {}", answers(&text)));
        }
        done(&told.join("; "));
    }
    from_outside(lab)
}

/// `23 web-1, 17 web-2` → `web-1 23×, web-2 17×`.
fn answers(tally: &str) -> String {
    let one =
        |text: &str| text.split_once(' ').map_or(String::new(), |(count, name)| format!("{name} {count}×"));
    tally.split(", ").map(one).collect::<Vec<_>>().join(", ")
}

fn from_outside(lab: &Lab) -> Result<()> {
    for node in lab.nodes.iter().filter(|node| node.is_running()) {
        for (name, port, _) in SERVICES {
            let address = SocketAddr::from((node.address, port));
            let is_served = crate::linux::netns::in_netns(&lab.lan.netns, move || Ok(is_answered(address)))?;
            if !is_served {
                bail!("{name} does not answer at {address}");
            }
        }
    }
    let names: Vec<&str> = lab.nodes.iter().map(|node| node.name.as_str()).collect();
    let ports: Vec<String> = SERVICES.iter().map(|(_, port, _)| port.to_string()).collect();
    done(&format!("from outside: ports {} answer on every machine ({})", ports.join(", "), names.join(", ")));
    say("");
    Ok(())
}

/// What a client saw of one service.
#[derive(Clone, Debug, Default)]
struct Seen {
    answered: u64,
    failed: u64,
    longest_gap: Duration,
}

/// Kills the node that leads, holds the image and carries all three services; measures until all serve again.
fn chaos(lab: &mut Lab, picture: &Picture) -> Result<bool> {
    let victim = lab.leader()?;
    let name = lab.nodes[victim].name.clone();
    let carried = picture.by_node.get(&name).cloned().unwrap_or_default();
    let carries_all = SERVICES.iter().all(|(service, ..)| carried.iter().any(|one| one.starts_with(service)));
    if !carries_all {
        bail!(
            "{name} leads but carries only {}; the demo wants all three services there",
            carried.join(", ")
        );
    }
    let addresses: Vec<Ipv4Addr> = lab.nodes.iter().map(|node| node.address).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = SERVICES
        .iter()
        .map(|(service, port, _)| {
            let (netns, addresses, stop, port) =
                (lab.lan.netns.clone(), addresses.clone(), stop.clone(), *port);
            let client = thread::Builder::new().name(format!("client-{service}"));
            client.spawn(move || {
                crate::linux::netns::in_netns(&netns, move || Ok(ask_until(&stop, &addresses, port)))
            })
        })
        .collect::<Result<_, _>>()?;
    say(
        "A client on the switch asks each service every 50 ms. Now the plug of the busiest machine is pulled:",
    );
    thread::park_timeout(Duration::from_millis(1000));
    let begin = Instant::now();
    lab.kill_node(victim)?;
    step(&format!(
        "{name} is dead: cable cut, daemon and {} containers killed at once. It led, held the image, and ran {}",
        carried.len(),
        carried.join(", ")
    ));
    let wanted: u32 = SERVICES.iter().map(|(_, _, replicas)| replicas).sum();
    let survivor = lab.nodes.iter().find(|node| node.is_running()).context("no node is left")?;
    survivor.wait("all instances run elsewhere", Duration::from_secs(30), |node| {
        let up = running(node)?;
        Ok(up.len() == wanted as usize && up.iter().all(|(_, on)| *on != name))
    })?;
    done(&format!("all {wanted} instances run again, on the machines that are left ({})", seconds(begin)));
    thread::park_timeout(Duration::from_millis(500));
    stop.store(true, Ordering::Relaxed);
    let mut is_good = true;
    print!("{}", Picture::of(lab)?.draw());
    for ((service, ..), client) in SERVICES.iter().zip(clients) {
        let seen = client.join().map_err(|_| anyhow::anyhow!("the client of {service} panicked"))??;
        let is_back = seen.longest_gap <= GAP_MAX && seen.answered > 0;
        is_good &= is_back;
        println!(
            "  {} {service:<6} longest gap {:.2} s, {} of {} requests failed",
            if is_back { "✓" } else { "✗" },
            seen.longest_gap.as_secs_f64(),
            seen.failed,
            seen.answered + seen.failed
        );
    }
    if !is_good {
        say(&format!("  ✗ a service was away for longer than {} s", GAP_MAX.as_secs()));
    }
    Ok(is_good)
}

/// A client that knows all machines: it stays with the one that answered and tries the next when one does not.
fn ask_until(stop: &AtomicBool, addresses: &[Ipv4Addr], port: u16) -> Seen {
    let mut seen = Seen::default();
    let mut current = 0;
    let mut answered_at = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        let answering = (0..addresses.len())
            .map(|step| (current + step) % addresses.len())
            .find(|index| is_answered(SocketAddr::from((addresses[*index], port))));
        match answering {
            Some(index) => {
                current = index;
                seen.answered += 1;
                seen.longest_gap = seen.longest_gap.max(answered_at.elapsed());
                answered_at = Instant::now();
            }
            None => seen.failed += 1,
        }
        thread::park_timeout(ASK_EVERY.saturating_sub(begin.elapsed()));
    }
    seen.longest_gap = seen.longest_gap.max(answered_at.elapsed());
    seen
}

fn is_answered(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, ASK_LIMIT)?;
        stream.set_read_timeout(Some(ASK_LIMIT))?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n")?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        Ok(answer.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}

//! Traffic between nodes, encrypted: changed to and fro under load, with new keys, and with nothing in clear on the LAN.

use super::Scenario;
use super::network::{ask_from, named, on_node};
use super::stage::{Stage, until};
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tinydc::linux::{netns, packet};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "encrypt",
    proves: "with encrypt nothing between nodes is in clear, also not for a node behind a router or one that joins later; \
             changes to it, of keys and back leave a connection no gap over 1 s; what comes in clear is not taken",
    machines: 2,
    run: encrypt,
}];

const PORT: u16 = 9100;
const MARK: &[u8; 32] = b"this must not be read on the LAN";
const EVERY: Duration = Duration::from_millis(20);
const GAP_MAX: Duration = Duration::from_secs(1);

/// One connection between two containers, on which a message goes to and fro all the time.
struct Talk {
    is_over: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
    client: JoinHandle<std::io::Result<()>>,
}

impl Talk {
    fn begin(server: &Path, address: Ipv4Addr, client: PathBuf) -> Result<Talk> {
        let listener = netns::in_netns(server, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
        thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut message = [0; MARK.len()];
            loop {
                stream.read_exact(&mut message)?;
                stream.write_all(&message)?;
            }
        });
        let (is_over, longest_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (over, longest) = (is_over.clone(), longest_us.clone());
        let client = thread::spawn(move || {
            let limit = Duration::from_secs(15);
            let mut stream = netns::in_netns(&client, move || {
                TcpStream::connect_timeout(&(address, PORT).into(), Duration::from_secs(2))
            })?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_nodelay(true)?;
            while !over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let mut answer = [0; MARK.len()];
                stream.write_all(MARK)?;
                stream.read_exact(&mut answer)?;
                longest.fetch_max(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
                thread::sleep(EVERY);
            }
            Ok(())
        });
        Ok(Talk { is_over, longest_us, client })
    }

    fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Until the message that is on its way now, however late, and one after it have come back; how long one took.
    fn go_on(&self) -> Result<Duration> {
        self.longest();
        let mut gap = Duration::ZERO;
        until("the connection goes on", LIMIT, || {
            gap = gap.max(self.longest());
            Ok(!gap.is_zero())
        })?;
        thread::sleep(EVERY * 5);
        self.longest();
        Ok(gap)
    }

    /// Says how long a message took at most since this was last asked, and fails if that was too long.
    fn check(&self, stage: &mut Stage, what: &str) -> Result<()> {
        let gap = self.longest();
        stage.remark(format!("{what}: longest wait of an established connection {} ms", gap.as_millis()));
        ensure!(!gap.is_zero() && gap < GAP_MAX, "{what}: a gap of {gap:?}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        self.is_over.store(true, Ordering::Relaxed);
        self.client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        Ok(())
    }
}

/// How many frames on the LAN hold the message, within `time`.
fn overheard(stage: &Stage, time: Duration) -> Result<usize> {
    const ALL_PROTOCOLS: u16 = 3;
    const ANY_INTERFACE: u32 = 0;
    let socket = netns::in_netns(&stage.lab.lan.netns, || {
        packet::open(ALL_PROTOCOLS, ANY_INTERFACE, Duration::from_millis(100))
    })?;
    let (begin, mut found, mut frame) = (Instant::now(), 0, [0; 2048]);
    while begin.elapsed() < time {
        let length =
            nix::sys::socket::recv(socket.as_raw_fd(), &mut frame, nix::sys::socket::MsgFlags::empty());
        let Ok(length) = length else { continue };
        found += usize::from(frame[..length].windows(MARK.len()).any(|part| part == MARK));
    }
    Ok(found)
}

/// Every node reaches every other this way, and waits for nobody.
fn all_ways(stage: &Stage, count: usize, kind: &str) -> Result<bool> {
    let body = stage.lab.nodes[0].get("/v1/network")?;
    let nodes = body["nodes"].as_array().cloned().unwrap_or_default();
    let is_settled = |node: &serde_json::Value| {
        let ways = node["ways"].as_array().cloned().unwrap_or_default();
        let is_kind = |way: &serde_json::Value| way["kind"].as_str().unwrap_or_default().starts_with(kind);
        let waits = node["problems"].to_string().contains("waits for");
        ways.len() == count - 1 && ways.iter().all(is_kind) && !waits
    };
    Ok(nodes.len() == count && nodes.iter().all(is_settled))
}

/// The link that leads from pi1 to pi2's containers.
fn link_to(stage: &Stage, address: Ipv4Addr) -> Result<String> {
    let netns = stage.lab.nodes[0].netns.clone();
    let route = netns::in_netns(&netns, move || {
        Command::new("ip").args(["route", "get", &address.to_string()]).output()
    })?;
    let text = String::from_utf8_lossy(&route.stdout).into_owned();
    let link = text.split_whitespace().nth(2).context("ip route get names a link")?;
    Ok(link.to_owned())
}

const LIMIT: Duration = Duration::from_secs(20);

fn encrypt(stage: &mut Stage) -> Result<()> {
    stage.form_on_two_lans()?;
    let yaml = format!("services:\n{}", named("web", 1, "").replace("{replicas: 1}", "{mode: global}"));
    stage.deploy(0, "shop", &yaml)?;
    let (client, _) = on_node(stage, "pi1")?;
    let (server, address) = on_node(stage, "pi2")?;
    let talk = Talk::begin(&server, address, client.clone())?;
    until("the message is seen in clear", LIMIT, || Ok(overheard(stage, Duration::from_millis(300))? > 0))?;
    talk.longest();
    switch_on(stage, &talk)?;
    let (_, far) = on_node(stage, "pi3")?;
    ask_from(&client, (far, 8080)).context("a node behind the router")?;
    go_around(stage, &client, address)?;
    // It was cut off meanwhile.
    talk.go_on()?;
    lose_a_tunnel(stage, &talk, &client, address)?;
    change_keys(stage, &talk, address)?;
    join_later(stage, &client)?;
    start_again(stage, &talk, &client, address)?;
    switch_off(stage, &talk)?;
    talk.end()
}

fn switch_on(stage: &mut Stage, talk: &Talk) -> Result<()> {
    let begin = Instant::now();
    stage.cli(0, &["settings", "encrypt", "true"])?;
    until("everything goes through tunnels", LIMIT, || all_ways(stage, 3, "wireguard"))?;
    stage.note("changed to encryption", begin);
    talk.check(stage, "changed to encryption")?;
    ensure!(overheard(stage, Duration::from_secs(2))? == 0, "the message is read on the LAN");
    Ok(())
}

/// Somebody on pi1 who sends past the tunnel.
fn go_around(stage: &Stage, client: &Path, address: Ipv4Addr) -> Result<()> {
    let netns = stage.lab.nodes[0].netns.clone();
    let (by, to) = (stage.lab.nodes[1].address.to_string(), format!("{address}/32"));
    let route = |verb: &'static str| {
        let words = ["route", verb, &to, "via", &by].map(String::from);
        netns::in_netns(&netns, move || Command::new("ip").args(words).status())
    };
    ensure!(route("add")?.success(), "a route in clear");
    until("what comes in clear is not taken", LIMIT, || Ok(ask_from(client, (address, 8080)).is_err()))?;
    ensure!(route("del")?.success(), "the route is taken away");
    ask_from(client, (address, 8080)).context("through the tunnel again")?;
    Ok(())
}

/// Somebody on pi1 takes the tunnel's interface away.
fn lose_a_tunnel(stage: &Stage, talk: &Talk, client: &Path, address: Ipv4Addr) -> Result<()> {
    let netns = stage.lab.nodes[0].netns.clone();
    let link = link_to(stage, address)?;
    let deleted =
        netns::in_netns(&netns, move || Command::new("ip").args(["link", "delete", &link]).status())?;
    ensure!(deleted.success(), "the interface is deleted");
    until("there is another tunnel", LIMIT, || Ok(ask_from(client, (address, 8080)).is_ok()))?;
    ensure!(all_ways(stage, 3, "wireguard")?, "not in clear");
    talk.go_on()?;
    talk.longest();
    Ok(())
}

fn change_keys(stage: &mut Stage, talk: &Talk, address: Ipv4Addr) -> Result<()> {
    let before = link_to(stage, address)?;
    let begin = Instant::now();
    stage.cli(0, &["settings", "encrypt_rotation", "10"])?;
    until("keys are changed", LIMIT, || {
        Ok(link_to(stage, address)? != before && all_ways(stage, 3, "wireguard")?)
    })?;
    stage.note("new keys everywhere", begin);
    talk.check(stage, "keys changed")?;
    stage.cli(0, &["settings", "encrypt_rotation", "604800"])?;
    Ok(())
}

fn join_later(stage: &mut Stage, client: &Path) -> Result<()> {
    let router = stage.lab.lan.address(254);
    let node = stage.lab.add_node()?;
    node.start()?;
    let index = stage.lab.nodes.len() - 1;
    stage.lab.lan.add_default_route(&stage.lab.nodes[index].netns, router)?;
    let token = stage.cli(0, &["token"])?;
    let token = token.split_whitespace().last().unwrap_or_default().to_owned();
    stage.cli(index, &["join", &token])?;
    let name = stage.lab.nodes[index].name.clone();
    until("the new node is reached", LIMIT, || {
        Ok(on_node(stage, &name).is_ok_and(|(_, new)| ask_from(client, (new, 8080)).is_ok()))
    })?;
    until("and only through a tunnel", LIMIT, || all_ways(stage, 4, "wireguard"))
}

fn start_again(stage: &mut Stage, talk: &Talk, client: &Path, address: Ipv4Addr) -> Result<()> {
    talk.longest();
    stage.lab.nodes[1].kill_daemon()?;
    stage.lab.nodes[1].start()?;
    until("a daemon that starts again is reached", LIMIT, || Ok(ask_from(client, (address, 8080)).is_ok()))?;
    until("its keys are known", LIMIT, || all_ways(stage, 4, "wireguard"))?;
    let gap = talk.longest().max(talk.go_on()?);
    stage.remark(format!("longest wait while a daemon was killed and started: {} ms", gap.as_millis()));
    ensure!(overheard(stage, Duration::from_secs(1))? == 0, "the message is read on the LAN");
    talk.longest();
    Ok(())
}

fn switch_off(stage: &mut Stage, talk: &Talk) -> Result<()> {
    let begin = Instant::now();
    stage.cli(0, &["settings", "encrypt", "false"])?;
    until("everything goes in clear", LIMIT, || {
        let seen = overheard(stage, Duration::from_millis(200))? > 0;
        Ok(seen && !stage.lab.nodes[0].get("/v1/network")?["nodes"].to_string().contains("wireguard"))
    })?;
    stage.note("changed back", begin);
    talk.check(stage, "changed back")?;
    until("no tunnel is left", LIMIT, || {
        let netns = stage.lab.nodes[0].netns.clone();
        let links = netns::in_netns(&netns, || Command::new("ip").args(["-o", "link"]).output())?;
        Ok(!String::from_utf8_lossy(&links.stdout).contains("tdw"))
    })
}

//! A service's address and a published port beside a direct connection: ratios of one run, between containers.

use super::{Row, lab, load_hello};
use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketType};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tinydc::cli::lab::Lab;
use tinydc::linux::netns;

const APP: &str = "net";
const ROUNDS: usize = 31;
/// Of each of two threads in a round.
const CONNECTIONS: u16 = 240;
/// The source ports of each target's connections. All end at one endpoint: with ports in common the connections by the
/// service's address would meet those made directly, which the kernel still remembers, and be given other ports.
const SOURCE_PORTS: u16 = 15_000;
const FIRST_SOURCE_PORT: u16 = 10_000;
const KEEP_ALIVE_PORT: u16 = 9001;
const BULK_PORT: u16 = 9000;
const BULK_BYTES: usize = 256 << 20;
const LIMIT: Duration = Duration::from_secs(5);

/// Two containers on two nodes: one asks, one serves.
pub struct Pair {
    pub client: PathBuf,
    server: PathBuf,
    direct: Ipv4Addr,
    pub vip: Ipv4Addr,
    /// Of the node that serves, where the port is published.
    node: Ipv4Addr,
}

impl Pair {
    /// Directly, by the service's address, by the published port.
    fn targets(&self, port: u16) -> [SocketAddr; 3] {
        [self.direct, self.vip, self.node].map(|address| (address, port).into())
    }
}

pub fn network() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    let pair = deploy_pair(&lab)?;
    let mut source = FIRST_SOURCE_PORT;
    let targets = [pair.direct, pair.vip, pair.node].map(|address| {
        let target = Target { address, source: AtomicU16::new(source) };
        source += SOURCE_PORTS;
        Arc::new(target)
    });
    let connections = compare(&targets, |target| connections_per_second(&pair.client, target))?;
    let requests = keep_alive(&pair)?;
    let bulk = bulk(&pair)?;
    Ok(vec![
        Row::new("network: connections/s, direct", connections[0], "1/s"),
        Row::new("network: connections by service address", connections[1] / connections[0], "× direct")
            .at_least(0.95),
        Row::new("network: connections by published port", connections[2] / connections[0], "× direct"),
        Row::new("network: keep-alive requests/s, direct", requests[0], "1/s"),
        Row::new("network: keep-alive requests by service address", requests[1] / requests[0], "× direct")
            .at_least(0.95),
        Row::new("network: keep-alive requests by published port", requests[2] / requests[0], "× direct"),
        Row::new("network: one stream, direct", bulk[0], "MB/s"),
        Row::new("network: one stream by service address", bulk[1] / bulk[0], "× direct").at_least(0.95),
        Row::new("network: one stream by published port", bulk[2] / bulk[0], "× direct"),
    ])
}

pub fn deploy_pair(lab: &Lab) -> Result<Pair> {
    let on = |node: &str| {
        serde_json::json!({ "constraints": [{ "subject": "NodeName", "must_equal": true, "value": node }],
            "instances_per_node_max": null, "spread_over": [] })
    };
    let mut services = serde_json::Map::new();
    for (name, node) in [("ask", "pi1"), ("serve", "pi2")] {
        let mut spec = super::service(1, false)?;
        spec["placement"] = on(node);
        if name == "serve" {
            let ports = [8080, KEEP_ALIVE_PORT, BULK_PORT].map(|port| {
                serde_json::json!({ "protocol": "Tcp", "published": port, "target": port, "host_address": null,
                    "is_host_mode": false })
            });
            spec["ports"] = serde_json::json!(ports);
        }
        services.insert(name.into(), spec);
    }
    deploy_services(lab, services.into())?;
    let (client, _, _) = container(lab, 0, "ask")?;
    let (server, direct, vip) = container(lab, 1, "serve")?;
    Ok(Pair { client, server, direct, vip, node: lab.nodes[1].address })
}

pub fn deploy_services(lab: &Lab, services: serde_json::Value) -> Result<()> {
    let count = services.as_object().map_or(0, |all| all.len());
    let body = serde_json::json!({ "spec": { "name": APP, "services": services, "volumes": {} } });
    lab.nodes[0].post(&format!("/v1/apps/{APP}"), &body)?;
    lab.nodes[0].wait("all serve", Duration::from_secs(30), |node| {
        let body = node.get(&format!("/v1/network?app={APP}"))?;
        let services = body["services"].as_array().cloned().unwrap_or_default();
        Ok(services.len() == count && services.iter().all(|one| one["endpoints"][0]["state"] == "serving"))
    })
}

pub fn container(lab: &Lab, index: usize, name: &str) -> Result<(PathBuf, Ipv4Addr, Ipv4Addr)> {
    let node = &lab.nodes[index];
    let rows = node.get(&format!("/v1/instances?app={APP}"))?;
    let wanted = format!("{APP}/{name}.1");
    let rows = rows["instances"].as_array().cloned().unwrap_or_default();
    let id = rows.iter().find(|row| row["name"] == wanted.as_str()).and_then(|row| row["id"].as_str());
    let netns = node.data_dir().join("run/netns").join(id.context("the instance is there")?);
    let body = node.get(&format!("/v1/network?app={APP}"))?;
    let services = body["services"].as_array().cloned().unwrap_or_default();
    let service = services.iter().find(|one| one["service"] == name).context("the service is there")?;
    let address = |value: &serde_json::Value| -> Result<Ipv4Addr> {
        Ok(value.as_str().context("it has an address")?.parse()?)
    };
    Ok((netns, address(&service["endpoints"][0]["address"])?, address(&service["vip"])?))
}

/// What each reaches, the first measured and the others by the median of their ratios to it: one round takes them
/// right after each other, so that what else the machine does hits both sides of a ratio.
pub fn compare<T>(targets: &[T], measure: impl Fn(&T) -> Result<f64>) -> Result<Vec<f64>> {
    let mut rounds = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS {
        let mut values = vec![0.0; targets.len()];
        for step in 0..targets.len() {
            // None always goes first.
            let index = (round + step) % targets.len();
            values[index] = measure(&targets[index])?;
        }
        rounds.push(values);
    }
    let median_of = |value: &dyn Fn(&Vec<f64>) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(value).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let first = median_of(&|round| round[0]);
    Ok((0..targets.len()).map(|index| first * median_of(&|round| round[index] / round[0])).collect())
}

struct Target {
    address: Ipv4Addr,
    /// The next connection's port.
    source: AtomicU16,
}

impl Target {
    fn connect(&self) -> std::io::Result<TcpStream> {
        let source = self.source.fetch_add(1, Ordering::Relaxed);
        let stream = TcpStream::from(rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?);
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        rustix::net::bind(&stream, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, source))?;
        rustix::net::connect(&stream, &SocketAddrV4::new(self.address, 8080))?;
        Ok(stream)
    }
}

/// A new connection for each request, from two threads.
fn connections_per_second(client: &Path, target: &Arc<Target>) -> Result<f64> {
    let workers: Vec<_> = (0..2)
        .map(|_| {
            let (client, target) = (client.to_path_buf(), target.clone());
            thread::spawn(move || {
                netns::in_netns(&client, move || {
                    let begin = Instant::now();
                    for _ in 0..CONNECTIONS {
                        let mut stream = target.connect()?;
                        stream.write_all(b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n")?;
                        let mut answer = Vec::new();
                        stream.read_to_end(&mut answer)?;
                    }
                    Ok(f64::from(CONNECTIONS) / begin.elapsed().as_secs_f64())
                })
            })
        })
        .collect();
    let mut sum = 0.0;
    for worker in workers {
        sum += worker.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }
    Ok(sum)
}

/// Small requests and answers on one connection, to each target.
fn keep_alive(pair: &Pair) -> Result<Vec<f64>> {
    const BYTES: usize = 128;
    const ROUND: Duration = Duration::from_millis(200);
    let listener =
        netns::in_netns(&pair.server, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, KEEP_ALIVE_PORT)))?;
    let echo = thread::spawn(move || {
        for stream in listener.incoming().take(3 * ROUNDS).flatten() {
            let mut stream = stream;
            // Without it each answer would wait for the next acknowledgement.
            let _ = stream.set_nodelay(true);
            let mut message = [0; BYTES];
            while stream.read_exact(&mut message).is_ok() && stream.write_all(&message).is_ok() {}
        }
    });
    let targets = pair.targets(KEEP_ALIVE_PORT);
    let speeds = compare(&targets, |address| {
        let address = *address;
        let count = netns::in_netns(&pair.client, move || {
            let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(LIMIT))?;
            let (begin, mut count, mut message) = (Instant::now(), 0u32, [7; BYTES]);
            while begin.elapsed() < ROUND {
                stream.write_all(&message)?;
                stream.read_exact(&mut message)?;
                count += 1;
            }
            Ok(count)
        })?;
        Ok(f64::from(count) / ROUND.as_secs_f64())
    })?;
    echo.join().map_err(|_| anyhow::anyhow!("the server panicked"))?;
    Ok(speeds)
}

/// MB/s of one stream to each target.
fn bulk(pair: &Pair) -> Result<Vec<f64>> {
    let listener = netns::in_netns(&pair.server, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, BULK_PORT)))?;
    let sink = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let (mut stream, _) = listener.accept()?;
            let mut total = 0;
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    length => total += length,
                }
            }
            // The last one says so by sending nothing.
            if total == 0 {
                return Ok(());
            }
        }
    });
    let targets = pair.targets(BULK_PORT);
    let speeds = compare(&targets, |address| {
        let address = *address;
        let begin = Instant::now();
        netns::in_netns(&pair.client, move || {
            let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
            let piece = vec![1; 1 << 20];
            (0..BULK_BYTES >> 20).try_for_each(|_| stream.write_all(&piece))?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut rest = [0; 1];
            stream.read(&mut rest).map(drop)
        })?;
        Ok(BULK_BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64())
    })?;
    let end = targets[0];
    netns::in_netns(&pair.client, move || TcpStream::connect_timeout(&end, LIMIT).map(drop))?;
    sink.join().map_err(|_| anyhow::anyhow!("the sink panicked"))??;
    ensure!(speeds.iter().all(|speed| *speed > 0.0), "nothing was sent");
    Ok(speeds)
}

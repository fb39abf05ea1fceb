//! What clients see when endpoints go: killed, or stopped because their machine ends.

use super::Scenario;
use super::network::{containers, named, on_node, vip};
use super::stage::{Stage, http_within, until};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "endpoint-death",
        proves: "at 1,000 requests/s over four instances of which one is killed every second, requests fail only if begun \
                 within 100 ms of a death or in flight, and none waits over 1 s",
        machines: 3,
        run: endpoint_death,
    },
    Scenario {
        name: "machine-end",
        proves: "a machine that is switched off in order gets no new connections before its containers are stopped: at 500 \
                 requests/s over three nodes not one fails",
        machines: 3,
        run: machine_end,
    },
    Scenario {
        name: "waiting-client",
        proves: "a client that only waits for an answer is told at once when the container that was to give it dies",
        machines: 3,
        run: waiting_client,
    },
];

/// Of the load's clients: what hangs shows as a long wait.
const PATIENCE: Duration = Duration::from_secs(5);

/// Begun at, took, and why it failed.
struct Request {
    begun: Instant,
    took: Duration,
    error: Option<String>,
}

/// Asks at a fixed rate from several threads inside one namespace, a connection each, until told to stop.
fn load(
    netns: PathBuf,
    address: SocketAddr,
    per_second: u32,
    stop: Arc<AtomicBool>,
) -> thread::JoinHandle<Vec<Request>> {
    // As many as fit into the queue of the server asked, busybox's httpd (listen(9)): beyond it a SYN is dropped, and sent
    // again after a second, whoever it was that brought it.
    const THREADS: u32 = 9;
    thread::spawn(move || {
        let next = Arc::new(AtomicU64::new(0));
        let begin = Instant::now();
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                let (netns, next, stop) = (netns.clone(), next.clone(), stop.clone());
                thread::spawn(move || {
                    let work = move || {
                        let mut done = Vec::new();
                        while !stop.load(Ordering::Relaxed) {
                            let turn = next.fetch_add(1, Ordering::Relaxed);
                            let due = begin + Duration::from_secs_f64(turn as f64 / f64::from(per_second));
                            thread::sleep(due.saturating_duration_since(Instant::now()));
                            let begun = Instant::now();
                            let error = http_within(address, PATIENCE).err().map(|error| error.to_string());
                            done.push(Request { begun, took: begun.elapsed(), error });
                        }
                        Ok(done)
                    };
                    netns::in_netns(&netns, work).unwrap_or_default()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    })
}

fn endpoint_death(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let health = "    healthcheck: {test: [CMD, wget, -q, -O, /dev/null, \"http://127.0.0.1:8080/\"], interval: 1s, retries: 1}\n";
    let yaml = format!("services:\n{}{}", named("web", 4, health), named("ask", 1, ""));
    stage.deploy(0, "shop", &yaml)?;
    let address = vip(stage, 0, "shop", "web")?;
    let (client, _) = containers(stage, "shop", "ask")?.into_iter().next().context("ask runs")?;
    let stop = Arc::new(AtomicBool::new(false));
    let running = load(client, (address, 8080).into(), 1_000, stop.clone());
    let mut deaths = Vec::new();
    for round in 0..8u32 {
        thread::sleep(Duration::from_secs(1));
        let wanted = format!("shop/web.{}", round % 4 + 1);
        let victim = stage.pids(0, "shop")?.get(&wanted).copied();
        if let Some(pid) = victim {
            deaths.push(Instant::now());
            stage.kill_process(pid)?;
        }
    }
    thread::sleep(Duration::from_secs(1));
    stop.store(true, Ordering::Relaxed);
    let requests = running.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
    ensure!(deaths.len() >= 6, "instances came back to be killed again: {} deaths", deaths.len());
    let failed: Vec<&Request> = requests.iter().filter(|request| request.error.is_some()).collect();
    let excused = |request: &Request| {
        deaths.iter().any(|death| {
            let end = request.begun + request.took;
            request.begun <= *death + Duration::from_millis(100) && end >= *death
        })
    };
    let unexcused: Vec<&&Request> = failed.iter().filter(|request| !excused(request)).collect();
    let slowest = requests.iter().map(|request| request.took).max().unwrap_or_default();
    stage.remark(format!(
        "{} requests, {} deaths: {} failed within 100 ms of a death, {} otherwise; slowest {} ms",
        requests.len(),
        deaths.len(),
        failed.len() - unexcused.len(),
        unexcused.len(),
        slowest.as_millis()
    ));
    ensure!(requests.len() >= 8_000, "the load was carried: {} requests", requests.len());
    let why: BTreeSet<&String> = unexcused.iter().filter_map(|request| request.error.as_ref()).collect();
    ensure!(unexcused.is_empty(), "failed without a death near: {why:?}");
    ensure!(slowest < Duration::from_secs(1), "one waited {slowest:?}");
    Ok(())
}

fn machine_end(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let spread = named("web", 3, "").replace("{replicas: 3}", "{mode: global}");
    stage.deploy(0, "shop", &format!("services:\n{spread}{}", named("ask", 1, "")))?;
    let address = vip(stage, 0, "shop", "web")?;
    let asks = stage.rows(0, "shop")?.into_iter().find(|row| row.name.starts_with("shop/ask."));
    let asks = asks.context("ask runs")?.node;
    let (client, _) = containers(stage, "shop", "ask")?.into_iter().next().context("ask runs")?;
    // The leader, unless the client is there.
    let leader = stage.lab.leader()?;
    let is_free = |index: &usize| format!("pi{}", index + 1) != asks;
    let victim = [leader, 2, 1].into_iter().find(is_free).context("another node")?;
    let stop = Arc::new(AtomicBool::new(false));
    let running = load(client, (address, 8080).into(), 500, stop.clone());
    thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    stage.lab.nodes[victim].signal(Signal::SIGQUIT)?;
    let node = &mut stage.lab.nodes[victim];
    until("its daemon has ended", Duration::from_secs(30), || Ok(node.ended()?.is_some()))?;
    stage.note("a machine's end was asked for → its containers and its daemon have ended", begin);
    thread::sleep(Duration::from_secs(4));
    stop.store(true, Ordering::Relaxed);
    let requests = running.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
    let failed: BTreeSet<&String> = requests.iter().filter_map(|request| request.error.as_ref()).collect();
    let slowest = requests.iter().map(|request| request.took).max().unwrap_or_default();
    stage.remark(format!("{} requests, slowest {} ms", requests.len(), slowest.as_millis()));
    ensure!(requests.len() >= 2_000, "the load was carried: {} requests", requests.len());
    ensure!(failed.is_empty(), "requests failed: {failed:?}");
    ensure!(slowest < Duration::from_secs(1), "one waited {slowest:?}");
    Ok(())
}

fn waiting_client(stage: &mut Stage) -> Result<()> {
    const PORT: u16 = 9200;
    stage.form(3)?;
    let yaml = format!(
        "services:\n{}{}",
        named("web", 3, "").replace("{replicas: 3}", "{mode: global}"),
        named("ask", 3, "").replace("{replicas: 3}", "{mode: global}")
    );
    stage.deploy(0, "shop", &yaml)?;
    let clients = containers(stage, "shop", "ask")?;
    let (silent, address) = on_node(stage, "pi2")?;
    let listener = netns::in_netns(&silent, || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
    let kept = thread::spawn(move || listener.incoming().take(4).flatten().collect::<Vec<_>>());
    let target: SocketAddr = (address, PORT).into();
    let limit = Duration::from_secs(5);
    let connect = move || std::net::TcpStream::connect_timeout(&target, limit);
    let mut waiting = Vec::new();
    for (netns, _) in clients {
        let stream = netns::in_netns(&netns, connect)?;
        stream.set_read_timeout(Some(limit))?;
        waiting.push((format!("a container's client at {}", netns.display()), stream));
    }
    let host = stage.lab.nodes[0].inside(connect)?;
    host.set_read_timeout(Some(limit))?;
    waiting.push(("a process of a node".into(), host));
    let kept = kept.join().map_err(|_| anyhow::anyhow!("the listener panicked"))?;
    ensure!(kept.len() == 4, "all four are connected");
    let pid =
        stage.rows(0, "shop")?.into_iter().find(|row| row.name.starts_with("shop/web.") && row.node == "pi2");
    let pid = stage.pids(0, "shop")?[&pid.context("web runs on pi2")?.name];
    let begin = Instant::now();
    stage.kill_process(pid)?;
    for (who, mut stream) in waiting {
        use std::io::Read;
        let error = stream.read(&mut [0]).err().with_context(|| format!("{who} got an answer"))?;
        ensure!(error.kind() != std::io::ErrorKind::WouldBlock, "{who} still waits");
    }
    stage.note("a container was killed → everybody who waited for it knows", begin);
    ensure!(begin.elapsed() < Duration::from_secs(1), "took {:?}", begin.elapsed());
    Ok(())
}

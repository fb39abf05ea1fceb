//! An endpoint dies: for how long do new connections still go to it, on any of three nodes, beside how many services.

use super::{Row, lab, load_hello, service};
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tinydc::cli::lab::Lab;
use tinydc::linux::netns;

/// One on each node: a container that exits more often within a minute is held back.
const DEATHS: usize = 3;
const SERVICES_PER_APP: usize = 100;
const LIMIT: Duration = Duration::from_secs(2);
const BUDGET_MS: f64 = 100.0;

pub fn reaction() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    let mut rows = Vec::new();
    let mut have = 1;
    for (count, name) in [
        (1, "endpoint dead → last new connection to it, 1 service"),
        (100, "the same, 100 services"),
        (1_000, "the same, 1,000 services"),
    ] {
        while have < count {
            have += add_services(&lab, have, (count - have).min(SERVICES_PER_APP))?;
        }
        let address = deploy_anew(&lab)?;
        rows.push(Row::new(name, worst_of(&lab, address)?, "ms").within(BUDGET_MS));
    }
    Ok(rows)
}

/// Three instances that have never exited, and their address.
fn deploy_anew(lab: &Lab) -> Result<Ipv4Addr> {
    for replicas in [0, 3] {
        super::deploy(lab, serde_json::json!({ "web": service(replicas, false)? }))?;
        let wanted = usize::try_from(replicas)?;
        lab.nodes[0].wait("all serve", Duration::from_secs(60), |_| Ok(serving(lab)? == wanted))?;
    }
    vip(lab)
}

/// Services that have an address and nothing behind it.
fn add_services(lab: &Lab, first: usize, count: usize) -> Result<usize> {
    let name = format!("more{first}");
    let spec = service(0, false)?;
    let services: serde_json::Map<String, serde_json::Value> =
        (0..count).map(|number| (format!("s{number}"), spec.clone())).collect();
    let body = serde_json::json!({ "spec": { "name": name, "services": services, "volumes": {} } });
    lab.nodes[0].post(&format!("/v1/apps/{name}"), &body)?;
    Ok(count)
}

fn vip(lab: &Lab) -> Result<Ipv4Addr> {
    let body = lab.nodes[0].get("/v1/network?app=bench")?;
    Ok(body["services"][0]["vip"].as_str().context("the service has an address")?.parse()?)
}

fn serving(lab: &Lab) -> Result<usize> {
    let body = lab.nodes[0].get("/v1/network?app=bench")?;
    let endpoints = body["services"][0]["endpoints"].as_array().cloned().unwrap_or_default();
    Ok(endpoints.iter().filter(|one| one["state"] == "serving").count())
}

/// Of several deaths, on all nodes, the longest time in milliseconds.
fn worst_of(lab: &Lab, address: Ipv4Addr) -> Result<f64> {
    let mut worst: f64 = 0.0;
    for round in 0..DEATHS {
        lab.nodes[0].wait("all serve", Duration::from_secs(30), |_| Ok(serving(lab)? == 3))?;
        let is_over = Arc::new(AtomicBool::new(false));
        let failed = Arc::new(Mutex::new(Vec::new()));
        let askers: Vec<_> = lab
            .nodes
            .iter()
            .map(|node| {
                let (netns, over, failed) = (node.netns.clone(), is_over.clone(), failed.clone());
                thread::spawn(move || netns::in_netns(&netns, move || ask(address, &over, &failed)))
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        let pids = lab.nodes[round % 3].container_pids()?;
        let pid = pids.first().copied().context("a container runs here")?;
        let death = Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        thread::sleep(Duration::from_millis(700));
        is_over.store(true, Ordering::Relaxed);
        let mut asked = 0;
        for asker in askers {
            asked += asker.join().map_err(|_| anyhow::anyhow!("an asker panicked"))??;
        }
        ensure!(asked > 300, "only {asked} connections were made");
        let failed = failed.lock().map_err(|_| anyhow::anyhow!("an asker panicked"))?;
        let last = failed.iter().filter_map(|begun: &Instant| begun.checked_duration_since(death)).max();
        worst = worst.max(last.unwrap_or_default().as_secs_f64() * 1e3);
    }
    Ok(worst)
}

/// Connects again and again; when each that failed was begun.
fn ask(address: Ipv4Addr, over: &AtomicBool, failed: &Mutex<Vec<Instant>>) -> std::io::Result<usize> {
    let target = SocketAddr::from((address, 8080));
    let mut count = 0;
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let outcome = TcpStream::connect_timeout(&target, LIMIT).and_then(|mut stream| {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)
        });
        count += 1;
        if outcome.is_err()
            && let Ok(mut failed) = failed.lock()
        {
            failed.push(begun);
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(count)
}

//! What the LAN finds by mDNS.

use super::Scenario;
use super::people::Laptop;
use super::stage::{Stage, until};
use anyhow::{Context, Result, bail};
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, Question, TYPE};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "local_names",
    proves: "a machine of the LAN finds each node by NODE.local, and all of them by CLUSTER.local",
    machines: 3,
    run: local_names,
}];

const MDNS_GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const MDNS_PORT: u16 = 5353;

fn local_names(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let own = stage.lab.lan.address(50);
    let asker = Asker { laptop: Laptop::new(stage, "laptop", 50)?, own };
    // A plain resolver's port, which gets its answer alone, and that of mDNS, where the group hears it.
    for port in [0, MDNS_PORT] {
        find_all(stage, &asker, port)?;
    }
    Ok(())
}

fn find_all(stage: &mut Stage, asker: &Asker, port: u16) -> Result<()> {
    let cluster = stage.lab.nodes[0].get("/v1/status")?["cluster"].as_str().context("a name")?.to_string();
    let addresses: BTreeSet<Ipv4Addr> = stage.lab.nodes.iter().map(|node| node.address).collect();
    for node in &stage.lab.nodes {
        let name = format!("{}.local", node.name);
        let wanted = BTreeSet::from([node.address]);
        until(&name, Duration::from_secs(15), || Ok(ask(asker, &name, port)? == wanted))?;
    }
    let begin = Instant::now();
    let name = format!("{cluster}.local");
    until(&name, Duration::from_secs(15), || Ok(ask(asker, &name, port)? == addresses))?;
    stage.note(&format!("the cluster's name from port {port} → all nodes"), begin);
    if !ask(asker, "nobody.local", port)?.is_empty() {
        bail!("a name that nobody has was answered");
    }
    Ok(())
}

struct Asker {
    laptop: Laptop,
    own: Ipv4Addr,
}

/// The addresses that come back within half a second.
fn ask(asker: &Asker, name: &str, port: u16) -> Result<BTreeSet<Ipv4Addr>> {
    let mut packet = Packet::new_query(1);
    packet.questions.push(Question::new(Name::new(name)?, TYPE::A.into(), CLASS::IN.into(), false));
    let message = packet.build_bytes_vec()?;
    let socket = asker.laptop.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))?;
    rustix::net::sockopt::set_ip_multicast_if(&socket, &asker.own)?;
    socket.join_multicast_v4(&MDNS_GROUP, &asker.own)?;
    socket.send_to(&message, (MDNS_GROUP, MDNS_PORT))?;
    let mut found = BTreeSet::new();
    let deadline = Instant::now() + Duration::from_millis(500);
    let mut buffer = [0; 1500];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(found);
        }
        socket.set_read_timeout(Some(left))?;
        let Ok(length) = socket.recv(&mut buffer) else { return Ok(found) };
        for record in Packet::parse(&buffer[..length])?.answers {
            if let RData::A(address) = record.rdata {
                found.insert(Ipv4Addr::from(address.address));
            }
        }
    }
}

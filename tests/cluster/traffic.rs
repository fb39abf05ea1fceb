//! What services, clients and neighbours on the LAN see of each other: who asks, datagrams, an address that is held
//! without a leader; and that addresses outlive a restart of everything.

use super::Scenario;
use super::mirror::{Mirror, PORT, Seen, by_new_udp, by_tcp, by_udp, datagrams};
use super::network::{ask_from, containers, holder, named, vip};
use super::stage::{Stage, throughout, until, web};
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use tinydc::linux::netns;
use tinydc::network::arp::{self, Ears};
use tinydc::network::{lan, link, netlink};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "sources-and-datagrams",
        proves: "a service sees the address of the container that asks, on its node and on others; datagrams to its address \
                 are balanced, answered from there, sent on when their endpoint goes, and refused at once when none is left",
        machines: 3,
        run: sources_and_datagrams,
    },
    Scenario {
        name: "restart-of-all",
        proves: "after all nodes lost power at once, and the kernel's rules with it, services have the addresses and names \
                 that they had",
        machines: 3,
        run: restart_of_all,
    },
    Scenario {
        name: "address-alone",
        proves: "a node without a leader keeps the LAN address, defends it by ARP, yields to a claim that repeats, and has it \
                 again when the other is gone",
        machines: 3,
        run: address_alone,
    },
];

const LIMIT: Duration = Duration::from_secs(10);
/// A share of a third is below a sixth of these once in a million.
const ASKED: usize = 150;

fn sources_and_datagrams(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let everywhere = named("ask", 3, "").replace("{replicas: 3}", "{mode: global}");
    stage.deploy(0, "shop", &format!("services:\n{}{everywhere}", named("web", 3, "")))?;
    let at: SocketAddr = (vip(stage, 0, "shop", "web")?, PORT).into();
    let servers = containers(stage, "shop", "web")?;
    let endpoints: BTreeSet<Ipv4Addr> = servers.iter().map(|(_, address)| *address).collect();
    ensure!(endpoints.len() == 3, "{endpoints:?}");
    let _mirror = Mirror::start(&servers)?;
    let clients = containers(stage, "shop", "ask")?;
    for (client, own) in &clients {
        let (tcp, udp) = netns::in_netns(client, || {
            let tcp: Vec<_> = (0..ASKED).map(|_| by_tcp(at)).collect::<std::io::Result<_>>()?;
            let udp: Vec<_> = (0..ASKED).map(|_| by_new_udp(at)).collect::<std::io::Result<_>>()?;
            Ok((tcp, udp))
        })
        .with_context(|| format!("ask from {own}"))?;
        for (how, answers) in [("TCP", tcp), ("UDP", udp)] {
            come_evenly_from(&endpoints, *own, &answers).with_context(|| format!("{how} from {own}"))?;
        }
    }
    let (client, _) = clients.first().context("ask runs")?;
    conversations_move_on(stage, client, at)
}

fn come_evenly_from(endpoints: &BTreeSet<Ipv4Addr>, own: Ipv4Addr, answers: &[Seen]) -> Result<()> {
    let mut shares: BTreeMap<Ipv4Addr, usize> = BTreeMap::new();
    for (server, client) in answers {
        ensure!(*client == IpAddr::V4(own), "{server} sees {client}");
        *shares.entry(*server).or_default() += 1;
    }
    let is_even = shares.keys().eq(endpoints) && shares.values().all(|share| *share >= ASKED / 6);
    ensure!(is_even, "not balanced: {shares:?}");
    Ok(())
}

/// One socket is one conversation: it must not stick to an endpoint that goes.
fn conversations_move_on(stage: &Stage, client: &Path, at: SocketAddr) -> Result<()> {
    let sockets =
        netns::in_netns(client, || (0..12).map(|_| datagrams(at)).collect::<std::io::Result<Vec<_>>>())?;
    for socket in &sockets {
        by_udp(socket).or_else(|_| by_udp(socket))?;
    }
    stage.cli(0, &["scale", "shop/web=1"])?;
    until("one is left", LIMIT, || Ok(containers(stage, "shop", "web")?.len() == 1))?;
    let left = containers(stage, "shop", "web")?.first().context("one is left")?.1;
    for socket in &sockets {
        until("a conversation goes on with the endpoint that is left", LIMIT, || {
            Ok(by_udp(socket).is_ok_and(|(server, _)| server == left))
        })?;
    }
    stage.cli(0, &["scale", "shop/web=0"])?;
    let refused = || {
        let begin = Instant::now();
        let socket = netns::in_netns(client, || datagrams(at))?;
        let is_refused =
            by_udp(&socket).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
        Ok::<_, anyhow::Error>((is_refused, begin.elapsed()))
    };
    until("the address refuses", LIMIT, || Ok(refused()?.0))?;
    let (is_refused, after) = refused()?;
    ensure!(is_refused && after < Duration::from_millis(100), "refused at once, not after {after:?}");
    Ok(())
}

fn restart_of_all(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let services = ["web", "api", "ask"];
    let yaml: String = services.iter().map(|name| named(name, 1, "")).collect();
    stage.deploy(0, "shop", &format!("services:\n{yaml}"))?;
    let addresses = |stage: &Stage, index: usize| -> Result<Vec<Ipv4Addr>> {
        services.iter().map(|name| vip(stage, index, "shop", name)).collect()
    };
    let before = addresses(stage, 0)?;
    for index in 0..3 {
        stage.lab.kill_node(index)?;
    }
    for node in &stage.lab.nodes {
        let flushed = node.inside(|| Command::new("nft").args(["flush", "ruleset"]).status())?;
        ensure!(flushed.success(), "nft flushes the rules");
    }
    let begin = Instant::now();
    for index in 0..3 {
        let number = stage.lab.nodes[index].number;
        stage.lab.lan.mend(number)?;
        stage.lab.nodes[index].start()?;
    }
    stage.wait_up(0, "shop", 3, Duration::from_secs(30))?;
    stage.note("all switched on → all services run", begin);
    for index in 0..3 {
        let after = addresses(stage, index)?;
        ensure!(after == before, "{} has {after:?}, before {before:?}", stage.lab.nodes[index].name);
    }
    let (client, _) = containers(stage, "shop", "ask")?.into_iter().next().context("ask runs")?;
    for (name, address) in services.iter().zip(&before) {
        let wanted = format!("hello from {name}-1");
        until(&format!("{name} answers at {address}"), LIMIT, || {
            Ok(ask_from(&client, (*address, 8080))?.contains(&wanted))
        })?;
        let url = format!("http://{name}.shop:8080/");
        let asked = stage.cli(0, &["exec", "shop/ask", "wget", "-q", "-O", "-", &url])?;
        ensure!(asked.contains(&wanted), "by name: {asked}, not {wanted}");
    }
    Ok(())
}

fn address_alone(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    let address = stage.lab.lan.address(100);
    stage.cli(0, &["address", "add", &address.to_string()])?;
    stage.wait_http(address, 8080, "hello from a", Duration::from_secs(5))?;
    let name = holder(stage, address)?;
    let others: Vec<usize> = (0..3).filter(|index| stage.lab.nodes[*index].name != name).collect();
    for index in &others {
        stage.lab.nodes[*index].kill_daemon()?;
    }
    throughout("the address answers without a leader", Duration::from_secs(5), || {
        Ok(stage.http(address, 8080)?.contains("hello from a") && holder(stage, address)? == name)
    })?;

    // A neighbour claims it.
    let claim = || {
        let interfaces = lan::interfaces()?;
        let own = lan::interface_for(address, &interfaces);
        let own = own.ok_or_else(|| std::io::Error::other("no interface on the LAN"))?;
        let mut ears = Ears::open(own)?;
        arp::announce(own, address)?;
        let begin = Instant::now();
        let mut is_defended = false;
        while !is_defended && begin.elapsed() < Duration::from_secs(1) {
            thread::sleep(Duration::from_millis(5));
            is_defended =
                ears.claims().iter().any(|claim| claim.sender == address && claim.target == address);
        }
        Ok((is_defended, begin.elapsed(), arp::text_of(own.hardware)))
    };
    let lan = stage.lab.lan.netns.clone();
    let (is_defended, after, neighbour) = netns::in_netns(&lan, claim)?;
    ensure!(is_defended, "the holder says by ARP that the address is its own");
    stage.remark(format!("claimed by a neighbour → defended: {} ms", after.as_millis()));
    ensure!(holder(stage, address)? == name, "and keeps it");

    // And stays: it has it, and claims it again.
    let has = move |is_added: bool| {
        let socket = netlink::Socket::route()?;
        let bridge = lan::interfaces()?.into_iter().find(|one| one.prefix_length == 24).map(|one| one.index);
        let bridge = bridge.ok_or_else(|| std::io::Error::other("no interface on the LAN"))?;
        match is_added {
            true => link::add_address(&socket, bridge, address, 32),
            false => link::delete_address(&socket, bridge, address, 32),
        }
    };
    netns::in_netns(&lan, || has(true))?;
    netns::in_netns(&lan, claim)?;
    until("it yields", Duration::from_secs(2), || Ok(holder(stage, address).is_err()))?;
    let index = stage.lab.nodes.iter().position(|node| node.name == name).context("the holder is a node")?;
    throughout("it takes nothing that another machine has", Duration::from_secs(3), || {
        Ok(holder(stage, address).is_err())
    })?;
    let shown = stage.cli(index, &["net"])?;
    ensure!(
        shown.contains(&address.to_string()) && shown.contains(&neighbour),
        "net names the neighbour: {shown}"
    );

    netns::in_netns(&lan, || has(false))?;
    let begin = Instant::now();
    until("it has it again", Duration::from_secs(5), || Ok(holder(stage, address)? == name))?;
    stage.note("the neighbour is gone → held again, still without a leader", begin);
    for index in others {
        stage.lab.nodes[index].start()?;
    }
    stage.wait_http(address, 8080, "hello from a", Duration::from_secs(10))?;
    Ok(())
}

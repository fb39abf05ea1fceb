//! One address per service, ports on every node, who may reach whom, addresses on the LAN, and how fast it follows.

use super::Scenario;
use super::cable::{Cable, Spoiling};
use super::stage::{IMAGE, Stage, http_here, throughout, until, web};
use super::watcher::Watcher;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "virtual-address",
        proves: "a service's address is kept over redeploys, balances evenly over both nodes, also for the instance itself, \
                 pins clients that ask for it, and refuses at once when nothing is behind it; nft decodes the table",
        machines: 3,
        run: virtual_address,
    },
    Scenario {
        name: "published-ports",
        proves: "a published port answers on every node, its loopback and IPv6; the client's address survives where an instance \
                 runs; a port that a host program or another app has is refused with its name",
        machines: 3,
        run: published_ports,
    },
    Scenario {
        name: "isolation",
        proves: "containers that share no network can't reach each other, on one node and across nodes; a shared network \
                 joins two apps; an internal one has no way out",
        machines: 3,
        run: isolation,
    },
    Scenario {
        name: "lossy-links",
        proves: "with 60 to 90 ms between two nodes and back and 8 % of round trips lost the leader stays, writes are taken, and a \
                 service is answered from every node, also after one of its containers died",
        machines: 3,
        run: lossy_links,
    },
    Scenario {
        name: "dead-node-endpoints",
        proves: "without a leader a silent node's endpoints are subtracted everywhere, and the rest serves on",
        machines: 3,
        run: dead_node_endpoints,
    },
    Scenario {
        name: "floating-address",
        proves: "an address on the LAN is held by one node, moves when that node dies, and a rolling kill of every node \
                 leaves gaps of at most 3 s; one that another machine has is refused",
        machines: 3,
        run: floating_address,
    },
    Scenario {
        name: "two-lans",
        proves: "a node behind a router is reached through VXLAN with the right MTU: by service address, by port, with \
                 large transfers; and over the LAN once it moves there",
        machines: 2,
        run: two_lans,
    },
    Scenario {
        name: "restart-apart",
        proves: "a daemon that starts while another is away keeps the way to that node's containers",
        machines: 3,
        run: restart_apart,
    },
    Scenario {
        name: "http-routes",
        proves: "labels, also Traefik's, route hosts to services on every node; an app that publishes the same port is refused \
                 with both names; without a route nothing listens",
        machines: 3,
        run: http_routes,
    },
    Scenario {
        name: "in-the-way",
        proves: "a foreign chain that drops what is forwarded is named with the line that cures it, a broken service with the \
                 step that is broken, and a table that somebody flushed is made again",
        machines: 1,
        run: in_the_way,
    },
];

/// What `GET /v1/network` says of a service.
fn service(stage: &Stage, index: usize, app: &str, name: &str) -> Result<Value> {
    let body = stage.lab.nodes[index].get(&format!("/v1/network?app={app}"))?;
    let services = body["services"].as_array().cloned().unwrap_or_default();
    services
        .into_iter()
        .find(|one| one["service"] == name)
        .with_context(|| format!("no service {app}/{name}"))
}

pub fn vip(stage: &Stage, index: usize, app: &str, name: &str) -> Result<Ipv4Addr> {
    let body = service(stage, index, app, name)?;
    Ok(body["vip"].as_str().context("a service has an address")?.parse()?)
}

/// The namespace and the address of each container of a service.
pub fn containers(stage: &Stage, app: &str, name: &str) -> Result<Vec<(PathBuf, Ipv4Addr)>> {
    let rows = stage.rows(stage.running()?, app)?;
    let body = service(stage, stage.running()?, app, name)?;
    let mut found = Vec::new();
    for row in rows.iter().filter(|row| row.is_up() && row.name.starts_with(&format!("{app}/{name}."))) {
        let node = stage.lab.node(&row.node)?;
        let endpoints = body["endpoints"].as_array().cloned().unwrap_or_default();
        let address = endpoints.iter().find(|one| one["instance"] == row.name.as_str());
        let address =
            address.and_then(|one| one["address"].as_str()).context("an endpoint has an address")?;
        found.push((node.data_dir().join("run/netns").join(&row.id), address.parse()?));
    }
    Ok(found)
}

pub(crate) fn ask_from(netns: &std::path::Path, address: impl Into<SocketAddr>) -> std::io::Result<String> {
    let address = address.into();
    netns::in_netns(netns, move || http_here(address))
}

/// How often each text was answered.
fn tally(netns: &std::path::Path, address: SocketAddr, count: usize) -> Result<BTreeMap<String, usize>> {
    let texts = netns::in_netns(netns, move || {
        (0..count).map(|_| http_here(address)).collect::<std::io::Result<Vec<String>>>()
    });
    let mut tally = BTreeMap::new();
    for text in texts.with_context(|| format!("ask {address}"))? {
        *tally.entry(text).or_default() += 1;
    }
    Ok(tally)
}

/// A service that says which instance answers.
pub(crate) fn named(service: &str, replicas: u32, more: &str) -> String {
    format!(
        "  {service}:\n    image: {IMAGE}\n    entrypoint: [sh, -c, \"export NAME=$$(cat /etc/hostname); exec serve\"]\n    \
         stop_grace_period: 1s\n    deploy: {{replicas: {replicas}}}\n{more}"
    )
}

fn virtual_address(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let pinned = "    x-tinydc: {affinity: client}\n";
    let yaml =
        format!("services:\n{}{}{}", named("web", 2, ""), named("sticky", 2, pinned), named("ask", 1, ""));
    stage.deploy(0, "shop", &yaml)?;
    let address = vip(stage, 0, "shop", "web")?;
    let (client, _) = containers(stage, "shop", "ask")?.into_iter().next().context("ask runs")?;
    let shares = tally(&client, (address, 8080).into(), 200)?;
    ensure!(shares.len() == 2 && shares.values().all(|count| *count >= 70), "uneven: {shares:?}");
    stage.remark(format!(
        "200 connections to the service's address: {:?}",
        shares.values().collect::<Vec<_>>()
    ));
    for (container, _) in containers(stage, "shop", "web")? {
        let shares = tally(&container, (address, 8080).into(), 40)?;
        ensure!(shares.len() == 2, "an instance reaches its own service, itself included: {shares:?}");
    }
    let sticky = vip(stage, 0, "shop", "sticky")?;
    let shares = tally(&client, (sticky, 8080).into(), 40)?;
    ensure!(shares.len() == 1, "a pinned client stays: {shares:?}");

    stage.deploy(1, "shop", &yaml.replace("stop_grace_period: 1s", "stop_grace_period: 2s"))?;
    ensure!(vip(stage, 1, "shop", "web")? == address, "the address is kept when the service changes");
    let (client, _) = containers(stage, "shop", "ask")?.into_iter().next().context("ask runs")?;
    stage.cli(0, &["scale", "shop/web=0"])?;
    until("nothing is behind the address", Duration::from_secs(10), || {
        Ok(ask_from(&client, (address, 8080)).is_err())
    })?;
    let begin = Instant::now();
    let refused = ask_from(&client, (address, 8080)).err().context("nothing answers")?;
    ensure!(refused.kind() == std::io::ErrorKind::ConnectionRefused, "refused, not {refused}");
    ensure!(begin.elapsed() < Duration::from_millis(100), "at once, not after {:?}", begin.elapsed());
    let listed =
        stage.lab.nodes[0].inside(|| std::process::Command::new("nft").args(["list", "ruleset"]).output())?;
    ensure!(listed.status.success(), "nft decodes the table: {}", String::from_utf8_lossy(&listed.stderr));
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    ensure!(text.contains("table ip tinydc") && text.contains("map vip"), "{text}");
    let shown = stage.cli(2, &["net"])?;
    ensure!(shown.contains("shop/sticky") && shown.contains(&sticky.to_string()), "{shown}");
    Ok(())
}

fn published_ports(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let peer = "      - {target: 8081, published: 8081}\n";
    let yaml = format!(
        "services:\n  web:\n    image: {IMAGE}\n    environment: {{NAME: one}}\n    stop_grace_period: 1s\n    \
         ports:\n      - \"8080:8080\"\n{peer}"
    );
    stage.deploy(0, "shop", &yaml)?;
    for node in &stage.lab.nodes {
        let address = node.address;
        stage.wait_http(address, 8080, "hello from one", Duration::from_secs(5))?;
        let on_loopback = node.inside(|| http_here((Ipv4Addr::LOCALHOST, 8080).into()))?;
        ensure!(on_loopback.contains("hello from one"), "{} on loopback: {on_loopback}", node.name);
        let on_six = node.inside(|| http_here((std::net::Ipv6Addr::LOCALHOST, 8080).into()))?;
        ensure!(on_six.contains("hello from one"), "{} on IPv6: {on_six}", node.name);
        // Published, but nobody listens on it in the container.
        let begin = Instant::now();
        ensure!(stage.http(address, 8081).is_err() && begin.elapsed() < Duration::from_millis(300));
    }
    client_address_survives(stage)?;
    let other = yaml.replace("8081", "8082");
    let path = stage.write_compose("other", &other)?.display().to_string();
    let refused = stage.cli_refused(1, &["deploy", "-f", &path, "--name", "other"], 1)?;
    ensure!(refused.contains("8080") && refused.contains("shop/web"), "{refused}");
    // A program of the host's own.
    let mut host = stage.lab.nodes[1]
        .inside(|| std::process::Command::new("/bin/busybox").args(["httpd", "-f", "-p", "2222"]).spawn())?;
    let taken = other.replace("8080:8080", "2222:8080");
    let path = stage.write_compose("other", &taken)?.display().to_string();
    let outcome = until("the port is seen as taken", Duration::from_secs(5), || {
        let output = stage.try_cli(0, &["deploy", "-f", &path, "--name", "other", "-d"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            stage.cli(0, &["rm", "other"])?;
        }
        Ok(text.contains("port 2222 is taken by busybox on pi2") && text.contains("192.0.2.10:2222:8080"))
    });
    host.kill()?;
    host.wait()?;
    outcome
}

/// Where an instance runs it sees the client itself.
fn client_address_survives(stage: &Stage) -> Result<()> {
    let (netns, _) = containers(stage, "shop", "web")?.into_iter().next().context("web runs")?;
    let node = stage.rows(0, "shop")?.first().map(|row| row.node.clone()).context("web runs")?;
    let address = stage.lab.node(&node)?.address;
    let listener = netns::in_netns(&netns, || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8081)))?;
    let client = netns::in_netns(&stage.lab.lan.netns, move || {
        std::net::TcpStream::connect_timeout(&(address, 8081).into(), Duration::from_secs(2))
    })?;
    let (_, seen) = listener.accept()?;
    ensure!(seen == client.local_addr()?, "the container saw {seen}, the client is {}", client.local_addr()?);
    Ok(())
}

fn isolation(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let networks = "networks:\n  front:\n  back: {internal: true}\n  proxy: {external: true}\n";
    let yaml = format!(
        "services:\n{}{}{}{networks}",
        named("web", 3, "    networks: [front, proxy]\n"),
        named("db", 3, "    networks: [back]\n"),
        named("api", 1, "    networks: [front, back]\n"),
    );
    stage.deploy(0, "shop", &yaml)?;
    let other = format!(
        "services:\n{}{}networks:\n  proxy: {{external: true}}\n",
        named("edge", 1, "    networks: [proxy]\n"),
        named("alone", 1, ""),
    );
    stage.deploy(1, "other", &other)?;
    let first = |app: &str, name: &str| -> Result<(PathBuf, Ipv4Addr)> {
        containers(stage, app, name)?.into_iter().next().with_context(|| format!("{app}/{name} runs"))
    };
    let (api, _) = first("shop", "api")?;
    let (web, _) = first("shop", "web")?;
    let (db, _) = first("shop", "db")?;
    let (edge, _) = first("other", "edge")?;
    let (alone, _) = first("other", "alone")?;
    let reaches = |from: &PathBuf, app: &str, name: &str| -> Result<BTreeSet<bool>> {
        let mut found: BTreeSet<bool> = containers(stage, app, name)?
            .into_iter()
            .map(|(_, address)| ask_from(from, (address, 8080)).is_ok())
            .collect();
        found.insert(ask_from(from, (vip(stage, 0, app, name)?, 8080)).is_ok());
        Ok(found)
    };
    // Each asks all instances of the other, which lie on all three nodes, and its address.
    let cases = [
        (&api, "shop", "web", true),
        (&api, "shop", "db", true),
        (&web, "shop", "db", false),
        (&db, "shop", "web", false),
        (&edge, "shop", "web", true),
        (&edge, "shop", "db", false),
        (&alone, "shop", "web", false),
        (&alone, "other", "edge", false),
        (&web, "other", "edge", true),
    ];
    for (from, app, name, may) in cases {
        let found = reaches(from, app, name)?;
        ensure!(found == BTreeSet::from([may]), "{} → {app}/{name}: {found:?}, not {may}", from.display());
    }
    for from in [&web, &db] {
        closed_to_containers(stage, from)?;
    }
    way_out(stage, &web, &db)
}

/// A DNS question for `localhost A`, which every name server here answers by itself.
const LOCALHOST_QUESTION: &[u8] =
    b"\x47\x11\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x09localhost\x00\x00\x01\x00\x01";

/// Where nodes listen for each other, and what each has for its own containers only.
fn closed_to_containers(stage: &Stage, from: &Path) -> Result<()> {
    let own =
        stage.lab.nodes.iter().position(|node| from.starts_with(&node.dir)).context("it runs on a node")?;
    for (index, node) in stage.lab.nodes.iter().enumerate() {
        let bridge = Ipv4Addr::new(10, 77, node.number, 1);
        let mut doors = vec![(node.address, 7400), (bridge, 7400), (node.address, 7401), (bridge, 7401)];
        if index != own {
            doors.push((bridge, 53));
        }
        for door in doors {
            let (stream, datagram) = netns::in_netns(from, move || {
                let stream = std::net::TcpStream::connect_timeout(&door.into(), Duration::from_secs(1));
                let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                socket.connect(door)?;
                socket.send(LOCALHOST_QUESTION)?;
                Ok((stream.map(drop), socket.recv(&mut [0; 64])))
            })?;
            let is_refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
            let says = format!("{} → {door:?}: {stream:?}, {datagram:?}", from.display());
            ensure!(stream.is_err_and(|error| is_refused(&error)), "{says}");
            // Said by a message of which the kernel sends one a second.
            ensure!(datagram.is_err(), "{says}");
        }
        let links = node.inside(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"))?;
        ensure!(!links.contains("tdv-"), "a container's link has an IPv6 address: {links}");
    }
    let links = netns::in_netns(from, || std::fs::read_to_string("/proc/thread-self/net/if_inet6"))?;
    ensure!(!links.contains("eth0"), "a container has an IPv6 address: {links}");
    Ok(())
}

fn way_out(stage: &Stage, web: &PathBuf, db: &PathBuf) -> Result<()> {
    let outside = stage.lab.lan.address(254);
    let listener =
        netns::in_netns(&stage.lab.lan.netns, || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9999)))?;
    let connect = |netns: &PathBuf| {
        netns::in_netns(netns, move || {
            std::net::TcpStream::connect_timeout(&(outside, 9999).into(), Duration::from_secs(1))
        })
    };
    ensure!(connect(web).is_ok(), "a container reaches the LAN");
    ensure!(connect(db).is_err(), "an internal network has no way out");
    drop(listener);
    // Somebody on the LAN who knows a route still reaches only what is published.
    let node = &stage.lab.nodes[0];
    let address = containers(stage, "shop", "web")?;
    let local = address.iter().find(|(path, _)| path.starts_with(&node.dir)).map(|(_, address)| *address);
    let service = vip(stage, 0, "shop", "web")?;
    let via = node.address;
    for target in local.into_iter().chain([service]) {
        netns::in_netns(&stage.lab.lan.netns, move || {
            let socket = tinydc::network::netlink::Socket::route()?;
            let route = tinydc::network::link::Route {
                to: Some((target, 32)),
                via: Some(via),
                link: 0,
                is_on_link: false,
            };
            tinydc::network::link::add_route(&socket, &route)
        })?;
        ensure!(stage.http(target, 8080).is_err(), "{target} is not reached past the published ports");
    }
    Ok(())
}

fn lossy_links(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let leader = stage.lab.nodes[0].get("/v1/status")?["leader"].clone();
    let how =
        Spoiling { delay: Duration::from_millis(15), jitter: Duration::from_millis(8), lost_percent: 2 };
    let _cables = (0..3).map(|index| Cable::spoil(stage, index, how)).collect::<Result<Vec<Cable>>>()?;
    let begin = Instant::now();
    let (mut slowest, mut writes) = (Duration::ZERO, 0);
    while begin.elapsed() < Duration::from_secs(12) {
        let write = Instant::now();
        stage.set_label(writes % 3, "pi1", "round", &writes.to_string())?;
        slowest = slowest.max(write.elapsed());
        writes += 1;
        for node in &stage.lab.nodes {
            // A lost first packet is repeated after 1 s, a second one after 2 s more.
            stage.wait_http(node.address, 8080, "hello from a", Duration::from_secs(8))?;
        }
    }
    stage.remark(format!("{writes} writes, the slowest took {} ms", slowest.as_millis()));
    let after = stage.lab.nodes[0].get("/v1/status")?["leader"].clone();
    ensure!(leader.is_string() && after == leader, "the leader changed: {leader} → {after}");
    let row = stage.rows(0, "shop")?.into_iter().find(|row| row.node == "pi2").context("web runs on pi2")?;
    let pid = stage.pids(0, "shop")?[&row.name];
    stage.kill_process(pid)?;
    for node in &stage.lab.nodes {
        stage.wait_http(node.address, 8080, "hello from a", Duration::from_secs(8))?;
    }
    stage.wait_up(0, "shop", 3, Duration::from_secs(15))
}

fn dead_node_endpoints(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    stage.wait_up(0, "shop", 3, Duration::from_secs(10))?;
    let address = vip(stage, 0, "shop", "web")?;
    // Two of three die: no quorum is left, and nobody can write down that they are gone.
    let leader = stage.lab.leader()?;
    let stays = (leader + 1) % 3;
    let begin = Instant::now();
    for index in 0..3 {
        if index != stays {
            stage.lab.kill_node(index)?;
        }
    }
    let node = &stage.lab.nodes[stays];
    until("every connection is answered", Duration::from_secs(6), || {
        let all = node.inside(|| {
            (0..20).map(|_| http_here((address, 8080).into())).collect::<std::io::Result<Vec<_>>>()
        });
        Ok(all.is_ok())
    })?;
    stage.note("two nodes and the quorum lost → the address is answered by the rest", begin);
    ensure!(begin.elapsed() < Duration::from_millis(5_500), "took {:?}", begin.elapsed());
    Ok(())
}

fn floating_address(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.deploy(0, "shop", &web(8080, 3, "a"))?;
    let address = stage.lab.lan.address(100);
    let taken = stage.lab.lan.address(254);
    let refused = stage.cli_refused(0, &["address", "add", &taken.to_string()], 1)?;
    ensure!(refused.contains("another machine"), "{refused}");
    let refused = stage.cli_refused(0, &["address", "add", "192.0.2.9"], 1)?;
    ensure!(refused.contains("no node's LAN"), "{refused}");
    let begin = Instant::now();
    stage.cli(0, &["address", "add", &address.to_string()])?;
    stage.wait_http(address, 8080, "hello from a", Duration::from_secs(5))?;
    stage.note("added → answers", begin);
    for _ in 0..3 {
        let name = holder(stage, address)?;
        let index =
            stage.lab.nodes.iter().position(|node| node.name == name).context("the holder is a node")?;
        let watcher = Watcher::start(stage, vec![address], 8080)?;
        thread::sleep(Duration::from_millis(300));
        stage.lab.kill_node(index)?;
        // A board without power has no address; a namespace keeps it.
        stage.lab.nodes[index].inside(|| {
            let socket = tinydc::network::netlink::Socket::route()?;
            let link = tinydc::network::link::index_of("eth0")?;
            tinydc::network::link::delete_address(&socket, link, address, 32)
        })?;
        until("another node holds it", Duration::from_secs(10), || Ok(holder(stage, address)? != name))?;
        thread::sleep(Duration::from_millis(1_500));
        let seen = watcher.stop()?;
        stage.remark(format!("{name} killed: longest gap {} ms", seen.longest_gap.as_millis()));
        ensure!(seen.longest_gap <= Duration::from_secs(3), "{name}: {seen:?}");
        let number = stage.lab.nodes[index].number;
        stage.lab.lan.mend(number)?;
        stage.lab.nodes[index].start()?;
        stage.lab.nodes[stage.running()?].wait("all are up", Duration::from_secs(30), |node| {
            let nodes = node.get("/v1/nodes")?;
            Ok(nodes["nodes"].as_array().is_some_and(|all| all.iter().all(|one| one["state"] == "up")))
        })?;
        stage.wait_up(index, "shop", 3, Duration::from_secs(20))?;
    }
    stage.cli(0, &["address", "rm", &address.to_string()])?;
    until("nobody answers any more", Duration::from_secs(3), || Ok(stage.http(address, 8080).is_err()))
}

/// Which machine has the address on its interface.
pub(crate) fn holder(stage: &Stage, address: Ipv4Addr) -> Result<String> {
    for node in stage.lab.nodes.iter().filter(|node| node.is_running()) {
        let has = node.inside(|| {
            let mut all = tinydc::network::lan::interfaces()?.into_iter();
            Ok(all.any(|one| one.address == address))
        })?;
        if has {
            return Ok(node.name.clone());
        }
    }
    anyhow::bail!("nobody holds {address}")
}

fn two_lans(stage: &mut Stage) -> Result<()> {
    stage.form_on_two_lans()?;
    let yaml = format!(
        "services:\n{}{}",
        named("web", 3, "    ports: [\"8080:8080\"]\n"),
        named("ask", 3, "").replace("{replicas: 3}", "{mode: global}")
    );
    stage.deploy(0, "shop", &yaml)?;
    let ways = stage.lab.nodes[0].get("/v1/network")?;
    let text = ways["nodes"].to_string();
    ensure!(text.contains("vxlan") && text.contains("direct"), "{text}");
    let address = vip(stage, 0, "shop", "web")?;
    for (client, _) in containers(stage, "shop", "ask")? {
        let shares = tally(&client, (address, 8080).into(), 60)?;
        ensure!(shares.len() == 3, "{}: all three are reached: {shares:?}", client.display());
    }
    for node in &stage.lab.nodes {
        stage.wait_http(node.address, 8080, "hello from", Duration::from_secs(5))?;
    }
    let (near, near_address) = on_node(stage, "pi1")?;
    let (far, _) = on_node(stage, "pi3")?;
    let megabytes = transfer(&near, near_address, &far)?;
    stage.remark(format!("one stream through the tunnel: {megabytes:.0} MB/s"));
    // A board is carried from one room to the other.
    for is_far in [true, false] {
        let node = &stage.lab.nodes[1];
        let new = stage.lab.lan.move_machine(&node.netns, node.number, is_far)?;
        stage.lab.nodes[1].address = new;
        let begin = Instant::now();
        until("the other way is taken", Duration::from_secs(30), || {
            let body = stage.lab.nodes[0].get("/v1/network")?;
            let nodes = body["nodes"].as_array().cloned().unwrap_or_default();
            let pi1 = nodes.iter().find(|one| one["node"] == "pi1").context("pi1 is there")?;
            let ways = pi1["ways"].as_array().cloned().unwrap_or_default();
            let way = ways.iter().find(|way| way["node"] == "pi2").context("pi1 reaches pi2")?;
            let (_, target) = on_node(stage, "pi2")?;
            Ok(way["kind"] == if is_far { "vxlan" } else { "direct" }
                && ask_from(&near, (target, 8080)).is_ok())
        })?;
        stage.note(if is_far { "moved behind the router → reached" } else { "moved back → reached" }, begin);
    }
    Ok(())
}

pub(crate) fn on_node(stage: &Stage, node: &str) -> Result<(PathBuf, Ipv4Addr)> {
    let dir = stage.lab.node(node)?.dir.clone();
    let all = containers(stage, "shop", "web")?;
    all.into_iter().find(|(path, _)| path.starts_with(&dir)).with_context(|| format!("web runs on {node}"))
}

/// Sends 64 MiB from one container to another: full segments must find their way.
fn transfer(server: &Path, address: Ipv4Addr, client: &Path) -> Result<f64> {
    use std::io::{Read, Write};
    const BYTES: usize = 64 << 20;
    let listener = netns::in_netns(server, || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9000)))?;
    let reader = thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(total),
                length => total += length,
            }
        }
    });
    let begin = Instant::now();
    netns::in_netns(client, move || {
        let mut stream =
            std::net::TcpStream::connect_timeout(&(address, 9000).into(), Duration::from_secs(2))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let piece = vec![7; 1 << 20];
        (0..BYTES >> 20).try_for_each(|_| stream.write_all(&piece))
    })?;
    let total = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(total == BYTES, "{total} of {BYTES} bytes arrived");
    Ok(BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

fn restart_apart(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let yaml = format!("services:\n{}", named("web", 1, "").replace("{replicas: 1}", "{mode: global}"));
    stage.deploy(0, "shop", &yaml)?;
    let (client, _) = on_node(stage, "pi1")?;
    let (_, target) = on_node(stage, "pi2")?;
    ask_from(&client, (target, 8080)).context("reached before")?;
    for index in [1, 0] {
        stage.lab.nodes[index].kill_daemon()?;
    }
    stage.lab.nodes[0].start()?;
    // Shorter than it takes until the silent node counts as lost, with its containers.
    throughout("the other node's container is reached", Duration::from_millis(1_500), || {
        Ok(ask_from(&client, (target, 8080)).is_ok())
    })
}

fn http_routes(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let labels = "    labels:\n      tinydc.http.host: shop.example\n      tinydc.http.port: \"8080\"\n";
    let traefik = "    labels:\n      - \"traefik.http.routers.b.rule=Host(`blog.example`) && PathPrefix(`/`)\"\n      \
                   - traefik.http.services.b.loadbalancer.server.port=8080\n";
    let yaml = format!("services:\n{}{}", named("web", 2, labels), named("blog", 1, traefik));
    stage.deploy(0, "shop", &yaml)?;
    let ask = |address: Ipv4Addr, host: &str| -> Result<String> {
        let output = netns::in_netns(&stage.lab.lan.netns, || {
            let url = format!("http://{address}/");
            let header = format!("host: {host}");
            std::process::Command::new("curl").args(["-s", "-m", "2", "-H", &header, &url]).output()
        })?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for node in &stage.lab.nodes {
        until(&format!("{} serves the routes", node.name), Duration::from_secs(5), || {
            Ok(ask(node.address, "shop.example")?.contains("hello from web")
                && ask(node.address, "blog.example")?.contains("hello from blog"))
        })?;
        let unknown = ask(node.address, "other.example")?;
        ensure!(!unknown.contains("hello"), "{unknown}");
    }
    let publishes = format!("services:\n{}", named("web", 1, "    ports: [\"80:8080\"]\n"));
    let path = stage.write_compose("other", &publishes)?.display().to_string();
    let refused = stage.cli_refused(0, &["deploy", "-f", &path, "--name", "other"], 1)?;
    ensure!(refused.contains("other/web") && refused.contains("shop/"), "both are named: {refused}");
    // Ports are bound only while there is a route.
    stage.cli(0, &["rm", "shop"])?;
    let address = stage.lab.nodes[1].address;
    until("the port is closed", Duration::from_secs(5), || {
        let connect =
            move || std::net::TcpStream::connect_timeout(&(address, 80).into(), Duration::from_millis(300));
        Ok(netns::in_netns(&stage.lab.lan.netns, connect).is_err())
    })
}

fn in_the_way(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    stage.deploy(0, "shop", &web(8080, 1, "a"))?;
    ensure!(stage.cli(0, &["net", "check", "shop/web"]).is_ok(), "nothing is in the way yet");
    let rules =
        "table ip filter {\n chain FORWARD {\n type filter hook forward priority filter; policy drop;\n }\n}";
    let made = stage.lab.nodes[0].inside(|| std::process::Command::new("nft").arg(rules).output())?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let shown = stage.cli(0, &["net"])?;
    ensure!(shown.contains("FORWARD") && shown.contains("iptables -I FORWARD -s 10.77.0.0/16"), "{shown}");
    let output = stage.try_cli(0, &["net", "check", "shop/web"])?;
    ensure!(output.status.code() == Some(1), "the check fails: {:?}", output.status);
    let flushed = stage.lab.nodes[0]
        .inside(|| std::process::Command::new("nft").args(["flush", "ruleset"]).status())?;
    ensure!(flushed.success(), "nft flushes the rules");
    let begin = Instant::now();
    stage.wait_http(stage.lab.nodes[0].address, 8080, "hello from a", Duration::from_secs(40))?;
    stage.note("all tables flushed by somebody → the table is there again", begin);
    stage.cli(0, &["scale", "shop/web=0"])?;
    until("the check says what is broken", Duration::from_secs(5), || {
        let output = stage.try_cli(0, &["net", "check", "shop/web"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.contains("leads nowhere"))
    })
}

//! IPv6 beside IPv4 within the cluster: names, services' addresses, isolation and deaths, on the LAN and encrypted.

use super::Scenario;
use super::mirror::{MUCH, Mirror, PORT, by_new_udp, by_tcp, fetch_much};
use super::network::{containers, named, vip};
use super::stage::{Stage, until};
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "dual-stack",
    proves: "with ipv6, containers that run already and new ones have IPv6 addresses, names have AAAA and PTR; services are \
             balanced over all nodes and see who asks, networks stay apart, a dead endpoint resets, encryption carries it; \
             without it nothing is left, and the machine has its own IPv6 all the time",
    machines: 3,
    run: dual_stack,
}];

const LIMIT: Duration = Duration::from_secs(10);
const ASKED: usize = 150;
const EAR_PORT: u16 = 9_200;

/// The cluster's prefix, as `tinydc net` says it.
fn prefix(stage: &Stage) -> Result<Option<Ipv6Addr>> {
    let body = stage.lab.nodes[0].get("/v1/network")?;
    let text = body["ipv6_prefix"].as_str().and_then(|text| text.split_once('/'));
    Ok(text.map(|(address, _)| address.parse()).transpose()?)
}

fn embed(prefix: Ipv6Addr, address: Ipv4Addr) -> Ipv6Addr {
    (u128::from(prefix) | u128::from(u32::from(address))).into()
}

/// What `dig` is told within a container.
fn dig(netns: &Path, server: Ipv4Addr, words: &[&str]) -> Result<Vec<String>> {
    let at = format!("@{server}");
    let run = || Command::new("dig").args(["+short", "+tries=1", "+time=2", &at]).args(words).output();
    let text = String::from_utf8(netns::in_netns(netns, run)?.stdout)?;
    Ok(text.lines().map(String::from).collect())
}

/// The name server of the node that has this container.
fn server_of(container: Ipv4Addr) -> Ipv4Addr {
    let [first, second, node, _] = container.octets();
    Ipv4Addr::new(first, second, node, 1)
}

fn has_address(netns: &Path, address: Ipv6Addr) -> Result<bool> {
    Ok(netns::in_netns(netns, || {
        let mut all = nix::ifaddrs::getifaddrs()?;
        Ok(all.any(|one| {
            one.address.as_ref().and_then(|own| own.as_sockaddr_in6()).is_some_and(|own| own.ip() == address)
        }))
    })?)
}

fn all_have_addresses(stage: &Stage, prefix: Ipv6Addr, services: &[&str]) -> Result<bool> {
    for service in services {
        for (netns, address) in containers(stage, "shop", service)? {
            if !has_address(&netns, embed(prefix, address))? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn dual_stack(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    let everywhere = named("ask", 3, "").replace("{replicas: 3}", "{mode: global}");
    stage.deploy(
        0,
        "shop",
        &format!("services:\n{}{everywhere}", named("web", 3, "    ports: [\"8080:8080\"]\n")),
    )?;
    stage.deploy(0, "blog", &format!("services:\n{}", named("stranger", 1, "")))?;
    let servers = containers(stage, "shop", "web")?;
    let clients = containers(stage, "shop", "ask")?;
    let (client, own) = clients.first().context("ask runs")?;
    ensure!(prefix(stage)?.is_none() && dig(client, server_of(*own), &["web", "AAAA"])?.is_empty(), "off");

    let begin = Instant::now();
    stage.cli(0, &["settings", "ipv6", "true"])?;
    let prefix = prefix(stage)?.context("a prefix")?;
    until("containers that run have IPv6 addresses", LIMIT, || {
        all_have_addresses(stage, prefix, &["web", "ask"])
    })?;
    stage.note("ipv6 is set → all containers have it", begin);
    links_have_no_more(stage)?;
    let _mirror = Mirror::start(&servers)?;
    let at: SocketAddr = (embed(prefix, vip(stage, 0, "shop", "web")?), PORT).into();
    until("all nodes have ways", LIMIT, || {
        let direct = servers.iter().map(|(_, address)| SocketAddr::from((embed(prefix, *address), PORT)));
        let asked: Vec<_> = clients
            .iter()
            .flat_map(|(netns, _)| direct.clone().map(move |at| netns::in_netns(netns, || by_tcp(at))))
            .collect();
        Ok(asked.iter().all(|answer| answer.is_ok()))
    })?;
    names_lead_there(stage, prefix, (client, *own))?;
    is_balanced(prefix, &servers, &clients, at)?;
    strangers_stay_apart(stage, prefix, at, &servers)?;
    a_waiting_client_is_told(stage, &clients, at)?;
    lan_is_kept(stage, true)?;
    encryption_carries_it(stage, prefix)?;
    it_goes_again(stage, prefix)
}

/// By a link-local address a container would reach whatever listens on its node, and by an advertisement it would become
/// that node's router.
fn links_have_no_more(stage: &Stage) -> Result<()> {
    for (netns, own) in containers(stage, "shop", "web")?.into_iter().chain(containers(stage, "shop", "ask")?)
    {
        let shown =
            netns::in_netns(&netns, || Command::new("ip").args(["-6", "addr", "show", "eth0"]).output())?;
        let text = String::from_utf8(shown.stdout)?;
        ensure!(text.matches("inet6").count() == 1, "{own} has one address: {text}");
    }
    for node in &stage.lab.nodes {
        const ALL: &str =
            "ip -o -6 addr show scope link; ip -6 route; grep -H . /proc/sys/net/ipv6/conf/td*/accept_ra";
        let shown = node.inside(|| Command::new("sh").args(["-c", ALL]).output())?;
        let text = String::from_utf8(shown.stdout)?;
        let has_more =
            |line: &str| line.contains("tdv-") && (line.contains("fe80") || line.ends_with("accept_ra:2"));
        ensure!(!text.lines().any(has_more) && text.contains("accept_ra:0"), "{text}");
    }
    Ok(())
}

fn names_lead_there(stage: &Stage, prefix: Ipv6Addr, (client, own): (&PathBuf, Ipv4Addr)) -> Result<()> {
    let server = server_of(own);
    let address = embed(prefix, vip(stage, 0, "shop", "web")?).to_string();
    until("web has an AAAA", LIMIT, || Ok(dig(client, server, &["web", "AAAA"])? == [address.clone()]))?;
    let tasks: BTreeSet<String> = dig(client, server, &["tasks.web", "AAAA"])?.into_iter().collect();
    let wanted: BTreeSet<String> = containers(stage, "shop", "web")?
        .iter()
        .map(|(_, address)| embed(prefix, *address).to_string())
        .collect();
    ensure!(tasks == wanted, "{tasks:?}, not {wanted:?}");
    let back = dig(client, server, &["-x", &address])?;
    ensure!(back == ["web.shop.tinydc.internal."], "{back:?}");
    let shown = stage.cli(0, &["net"])?;
    ensure!(shown.contains(&address), "net shows it: {shown}");
    let checked = stage.cli(0, &["net", "check", "shop/web"])?;
    ensure!(checked.matches("by IPv6, too").count() == 3, "{checked}");
    Ok(())
}

/// From each node evenly to all, each of which sees who asks; a server that asks may get itself.
fn is_balanced(
    prefix: Ipv6Addr,
    servers: &[(PathBuf, Ipv4Addr)],
    clients: &[(PathBuf, Ipv4Addr)],
    at: SocketAddr,
) -> Result<()> {
    for (netns, own) in clients.iter().chain(servers.first()) {
        netns::in_netns(netns, || by_new_udp(at)).with_context(|| format!("{own} asks {at} by UDP"))?;
        let answers =
            netns::in_netns(netns, || (0..ASKED).map(|_| by_tcp(at)).collect::<io::Result<Vec<_>>>());
        let mut shares: BTreeMap<Ipv4Addr, usize> = BTreeMap::new();
        for (server, seen) in answers.with_context(|| format!("{own} asks {at}"))? {
            let is_right = seen == IpAddr::V6(embed(prefix, *own)) || server == *own;
            ensure!(is_right, "{server} sees {seen}, not {own}");
            *shares.entry(server).or_default() += 1;
        }
        for (server, address) in servers {
            let fetched = netns::in_netns(netns, || fetch_much((embed(prefix, *address), PORT).into()));
            let fetched = fetched.with_context(|| format!("{own} fetches from {}", server.display()))?;
            ensure!(fetched == MUCH, "{own} got {fetched} bytes from {address}");
        }
        let is_even = shares.len() == servers.len() && shares.values().all(|share| *share >= ASKED / 6);
        ensure!(is_even, "not balanced: {shares:?}");
    }
    Ok(())
}

fn strangers_stay_apart(
    stage: &Stage,
    prefix: Ipv6Addr,
    at: SocketAddr,
    servers: &[(PathBuf, Ipv4Addr)],
) -> Result<()> {
    let (stranger, own) = containers(stage, "blog", "stranger")?.into_iter().next().context("it runs")?;
    for at in servers.iter().map(|(_, address)| (embed(prefix, *address), PORT).into()).chain([at]) {
        let begin = Instant::now();
        let answer = netns::in_netns(&stranger, || by_tcp(at));
        ensure!(answer.is_err() && begin.elapsed() < Duration::from_secs(2), "{at} by {own}: {answer:?}");
    }
    // A node itself reaches all.
    stage.lab.nodes[0].inside(|| by_tcp(at)).context("a node asks")?;
    let [(victim, from), (hears, to), ..] = servers else { anyhow::bail!("three run") };
    let (from, to) = (embed(prefix, *from), SocketAddr::from((embed(prefix, *to), EAR_PORT)));
    let ear = netns::in_netns(hears, || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, EAR_PORT)))?;
    ear.set_read_timeout(Some(Duration::from_millis(500)))?;
    let say = || UdpSocket::bind((from, 0))?.send_to(b"x", to);
    netns::in_netns(victim, say)?;
    ear.recv(&mut [0]).context("with its own address it is heard")?;
    netns::in_netns(&stranger, || {
        let address = |verb: &str| {
            let words = format!("-6 addr {verb} {from}/128 dev eth0");
            Command::new("ip")
                .args(words.split(' ').chain(["nodad"].into_iter().filter(|_| verb == "add")))
                .status()
        };
        address("add")?;
        let said = say();
        address("del")?;
        said
    })?;
    ensure!(ear.recv(&mut [0]).is_err(), "nobody speaks with another's address");
    let listed = stage.lab.nodes[0]
        .inside(|| Command::new("nft").args(["list", "table", "ip6", "tinydc"]).output())?;
    let text = String::from_utf8(listed.stdout)?;
    ensure!(
        text.contains("fib saddr . iif oif missing drop") && text.contains("map vip"),
        "nft decodes it: {text}"
    );
    Ok(())
}

fn a_waiting_client_is_told(
    stage: &mut Stage,
    clients: &[(PathBuf, Ipv4Addr)],
    at: SocketAddr,
) -> Result<()> {
    let waiting: Vec<TcpStream> = clients
        .iter()
        .flat_map(|(netns, _)| (0..12).map(move |_| netns::in_netns(netns, || TcpStream::connect(at))))
        .collect::<io::Result<_>>()?;
    let pid = stage.pids(0, "shop")?.get("shop/web.1").copied().context("web runs")?;
    stage.kill_process(pid)?;
    let begin = Instant::now();
    waiting.iter().try_for_each(|stream| stream.set_nonblocking(true))?;
    let is_told = |mut stream: &TcpStream| {
        !stream.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    };
    let mut told = 0;
    until("those who waited for it know", Duration::from_secs(1), || {
        told = waiting.iter().filter(|stream| is_told(stream)).count();
        Ok(told > 0)
    })?;
    stage.note("a container was killed → those who waited for it know", begin);
    ensure!(told < waiting.len(), "those who wait for another one are left alone");
    stage.wait_up(0, "shop", 6, LIMIT)
}

/// A machine that forwards takes router advertisements all the same.
fn lan_is_kept(stage: &Stage, is_on: bool) -> Result<()> {
    let wanted = if is_on { ["2", "1"] } else { ["1", "0"] };
    for node in &stage.lab.nodes {
        until("the kernel's settings", LIMIT, || {
            let found = node.inside(|| {
                ["eth0/accept_ra", "all/forwarding"]
                    .map(|name| fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}")))
                    .into_iter()
                    .collect::<io::Result<Vec<_>>>()
            })?;
            Ok(found.iter().map(|text| text.trim()).eq(wanted))
        })?;
    }
    Ok(())
}

/// Also for what was started under it.
fn encryption_carries_it(stage: &mut Stage, prefix: Ipv6Addr) -> Result<()> {
    stage.cli(0, &["settings", "encrypt", "true"])?;
    until("all ways are encrypted", Duration::from_secs(20), || {
        let body = stage.lab.nodes[0].get("/v1/network")?;
        let ways: Vec<String> = body["nodes"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|node| node["ways"].as_array().cloned().unwrap_or_default())
            .map(|way| way["kind"].to_string())
            .collect();
        Ok(ways.len() == 6 && ways.iter().all(|kind| kind.contains("wireguard")))
    })?;
    stage.deploy(0, "late", &format!("services:\n{}", named("web", 3, "")))?;
    let servers = containers(stage, "late", "web")?;
    let _mirror = Mirror::start(&servers)?;
    let at: SocketAddr = (embed(prefix, vip(stage, 0, "late", "web")?), PORT).into();
    until("it is carried", LIMIT, || {
        let asked: Vec<_> = servers.iter().map(|(netns, _)| netns::in_netns(netns, || by_tcp(at))).collect();
        Ok(asked.iter().all(|answer| answer.is_ok()))
    })?;
    is_balanced(prefix, &servers, &servers, at)?;
    ways_go_by(stage, "dev tdw")?;
    stage.cli(0, &["settings", "encrypt", "false"])?;
    until("it goes in clear again, by another link", LIMIT, || Ok(ways_go_by(stage, "dev tdx0").is_ok()))?;
    is_balanced(prefix, &servers, &servers, at)
}

fn ways_go_by(stage: &Stage, link: &str) -> Result<()> {
    for node in &stage.lab.nodes {
        let routes = node.inside(|| Command::new("ip").args(["-6", "route"]).output())?;
        let text = String::from_utf8(routes.stdout)?;
        let mut to_nodes = text.lines().filter(|line| line.contains("/120"));
        ensure!(to_nodes.clone().count() == 2 && to_nodes.all(|line| line.contains(link)), "{text}");
    }
    Ok(())
}

fn it_goes_again(stage: &Stage, prefix: Ipv6Addr) -> Result<()> {
    stage.cli(0, &["settings", "ipv6", "false"])?;
    lan_is_kept(stage, false)?;
    let digits = prefix.to_string();
    let start = digits.trim_end_matches(':');
    for node in &stage.lab.nodes {
        until("no trace is left on a node", LIMIT, || {
            const ALL: &str = "nft list tables && ip -6 addr && ip -6 route show table all && ip -6 neigh";
            let asked = node.inside(|| Command::new("sh").args(["-c", ALL]).output())?;
            let text = String::from_utf8(asked.stdout)?;
            // What is left forbids containers what they have no addresses for.
            Ok(asked.status.success() && !text.contains(start))
        })?;
    }
    let first = &stage.lab.nodes[0];
    let table = |verb: &'static str| {
        let words = [verb, "table", "ip6", "tinydc"];
        Ok::<_, anyhow::Error>(String::from_utf8(
            first.inside(|| Command::new("nft").args(words).output())?.stdout,
        )?)
    };
    let is_guarded = || {
        let text = table("list")?;
        Ok(text.contains(r#"iifname "tdv-*" drop"#) && !text.contains("map"))
    };
    until("containers send nothing by IPv6", LIMIT, is_guarded)?;
    table("delete")?;
    until("nor when somebody has deleted the rule", LIMIT, is_guarded)?;
    for (netns, own) in containers(stage, "shop", "ask")? {
        until("containers have IPv4 only", LIMIT, || Ok(!has_address(&netns, embed(prefix, own))?))?;
        until("and names, too", LIMIT, || Ok(dig(&netns, server_of(own), &["web", "AAAA"])?.is_empty()))?;
    }
    Ok(())
}

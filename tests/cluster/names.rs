//! Names inside of containers, asked for by stock clients of glibc and musl, and what is published on ports 53 and 22.

use super::Scenario;
use super::stage::{IMAGE, Stage, until};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tinydc::cli::lab;
use tinydc::linux::netns;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "service-names",
        proves: "dig, nslookup, getent and a musl program find services by every name they have, endpoints, instances, \
                 ports and reverse names, the outside by way of an upstream; names of an app stay in it unless a network is \
                 shared",
        machines: 3,
        run: service_names,
    },
    Scenario {
        name: "ports-53-and-22",
        proves: "a name server and an SSH-like server of the cluster are published on 53 and 22, TCP and UDP, beside tinydc's \
                 own name server",
        machines: 2,
        run: ports_53_and_22,
    },
];

const TOOLS: &str = "tools:1";

/// Asks as any program linked against musl does.
const MUSL_ASK: &str = r#"
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
    struct addrinfo hints, *found;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    int error = getaddrinfo(argv[1], 0, &hints, &found);
    if (error) { puts(gai_strerror(error)); return 1; }
    for (; found; found = found->ai_next) {
        char text[64];
        void *address = found->ai_family == AF_INET
            ? (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
            : (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(found->ai_family, address, text, sizeof text));
    }
    return 0;
}
"#;

/// Answers each datagram and each connection on a port with what it says: `musl-echo udp|tcp PORT`.
const MUSL_ECHO: &str = r#"
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
    int is_udp = argv[1][0] == 'u';
    int own = socket(AF_INET, is_udp ? SOCK_DGRAM : SOCK_STREAM, 0);
    struct sockaddr_in at;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_port = htons(atoi(argv[2]));
    if (bind(own, (void *)&at, sizeof at)) return 1;
    if (!is_udp && listen(own, 8)) return 1;
    for (;;) {
        char text[512];
        if (is_udp) {
            struct sockaddr_in from;
            socklen_t size = sizeof from;
            ssize_t length = recvfrom(own, text, sizeof text, 0, (void *)&from, &size);
            if (length > 0) sendto(own, text, length, 0, (void *)&from, size);
        } else {
            int client = accept(own, 0, 0);
            ssize_t length = read(client, text, sizeof text);
            if (length > 0) write(client, text, length);
            close(client);
        }
    }
}
"#;

fn compile(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let (source, program) = (folder.join(format!("{name}.c")), folder.join(name));
    fs::write(&source, text)?;
    let made = Command::new("musl-gcc").args(["-static", "-o"]).arg(&program).arg(&source).output();
    let made = made.context("run musl-gcc; it is in Debian's musl-tools")?;
    ensure!(made.status.success(), "musl-gcc: {}", String::from_utf8_lossy(&made.stderr));
    Ok(program)
}

/// dig, nslookup, getent and the musl program, each with what it needs.
fn tools_image(folder: &Path) -> Result<Vec<u8>> {
    let (ask, echo) = (compile(folder, "musl-ask", MUSL_ASK)?, compile(folder, "musl-echo", MUSL_ECHO)?);
    let programs: Vec<(&Path, &str)> = vec![
        (Path::new("/bin/busybox"), "/bin/busybox"),
        (Path::new("/bin/busybox"), "/bin/sh"),
        (Path::new("/usr/bin/dig"), "/bin/dig"),
        (Path::new("/usr/bin/nslookup"), "/bin/nslookup"),
        (Path::new("/usr/bin/getent"), "/bin/getent"),
        (&ask, "/bin/musl-ask"),
        (&echo, "/bin/musl-echo"),
    ];
    for (program, _) in &programs {
        ensure!(
            program.exists(),
            "there is no {}: apt-get install bind9-dnsutils libc-bin",
            program.display()
        );
    }
    let sleep: Vec<String> =
        ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do /bin/busybox sleep 1000 & wait; done"]
            .map(String::from)
            .into();
    lab::image_with(TOOLS, &programs, &sleep, &[])
}

fn load_tools(stage: &Stage) -> Result<()> {
    let archive = tools_image(&stage.lab.dir)?;
    lab::ask(&stage.lab.nodes[0].socket(), "POST", "/v1/images", &archive)?.json()?;
    Ok(())
}

fn serving(name: &str, more: &str) -> String {
    format!(
        "  {name}:\n    image: {IMAGE}\n    environment: {{NAME: {name}}}\n    stop_grace_period: 1s\n{more}"
    )
}

/// `shop` and `other`, which share the network `proxy`.
fn deploy_two_apps(stage: &Stage) -> Result<()> {
    let tools = format!("  ask:\n    image: {TOOLS}\n    stop_grace_period: 1s\n");
    let shop = format!(
        "services:\n{tools}{}{}{}networks:\n  back:\n  proxy: {{external: true}}\n",
        serving(
            "web",
            "    container_name: the-web\n    ports: [\"8080:8080\"]\n    deploy: {replicas: 3}\n    networks: {default: {aliases: [www]}, proxy: {aliases: [front]}}\n"
        ),
        serving("db", "    networks: [back]\n"),
        serving("my_api", ""),
    );
    stage.deploy(0, "shop", &shop)?;
    let other = format!(
        "services:\n{}{}networks:\n  proxy: {{external: true}}\n",
        tools.replace("    stop", "    networks: [proxy]\n    stop"),
        serving("web", "")
    );
    stage.deploy(1, "other", &other)?;
    Ok(())
}

fn service_names(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    load_tools(stage)?;
    deploy_two_apps(stage)?;
    let body = stage.lab.nodes[0].get("/v1/network?app=shop")?;
    let web = body["services"]
        .as_array()
        .and_then(|all| all.iter().find(|one| one["service"] == "web"))
        .context("web is there")?
        .clone();
    let vip = web["vip"].as_str().context("web has an address")?.to_string();
    let mut endpoints: Vec<String> = web["endpoints"]
        .as_array()
        .map(|all| all.iter().filter_map(|one| one["address"].as_str().map(String::from)).collect())
        .unwrap_or_default();
    endpoints.sort();
    let ask = |app: &str, words: &[&str]| -> Result<String> {
        let target = format!("{app}/ask");
        let mut line = vec!["exec", target.as_str()];
        line.extend(words);
        let output = stage.try_cli(0, &line)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    for name in ["web", "WEB", "web.shop", "web.shop.tinydc.internal", "www", "the-web"] {
        for words in [["dig", "+short", name], ["getent", "ahostsv4", name], ["nslookup", "-type=a", name]] {
            let said = ask("shop", &words)?;
            ensure!(said.contains(&vip), "{words:?}: {said:?}, not {vip}");
        }
        let said = ask("shop", &["musl-ask", name])?;
        ensure!(said == vip, "musl on {name}: {said:?}, not {vip}");
    }
    ensure!(!ask("shop", &["musl-ask", "my_api"])?.is_empty(), "an underscore is no hindrance");
    let mut tasks: Vec<String> =
        ask("shop", &["dig", "+short", "tasks.web"])?.lines().map(String::from).collect();
    tasks.sort();
    ensure!(tasks == endpoints, "tasks.web: {tasks:?}, not {endpoints:?}");
    let first = ask("shop", &["dig", "+short", "1.web"])?;
    ensure!(endpoints.contains(&first), "1.web: {first}");
    let port = ask("shop", &["dig", "+short", "SRV", "_8080._tcp.web"])?;
    ensure!(port.contains("8080"), "SRV: {port}");
    let reverse = ask("shop", &["dig", "+short", "-x", &vip])?;
    ensure!(reverse == "web.shop.tinydc.internal.", "PTR: {reverse}");
    let unknown = ask("shop", &["dig", "nobody.shop.tinydc.internal"])?;
    ensure!(unknown.contains("NXDOMAIN"), "{unknown}");
    let six = ask("shop", &["dig", "AAAA", "web"])?;
    ensure!(six.contains("NOERROR") && six.contains("ANSWER: 0"), "{six}");
    // A shared network shows what is in it, and nothing else of the other app.
    ensure!(ask("other", &["dig", "+short", "front"])? == vip, "the alias on the shared network");
    ensure!(ask("other", &["dig", "+short", "web.shop"])? == vip, "the service on the shared network");
    for hidden in ["db", "db.shop", "my_api.shop", "web.other"] {
        let said = ask("other", &["dig", "+short", hidden])?;
        ensure!(said.is_empty(), "{hidden} is not for this app's network: {said}");
    }
    ensure!(ask("shop", &["dig", "+short", "db"])?.is_empty(), "db shares no network with the asker");
    forwarded(stage, &ask)
}

struct Upstream(Child);

impl Drop for Upstream {
    fn drop(&mut self) {
        // Its end is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The machine's own name server, as nodes know it, stands in the LAN for this test.
fn forwarded(stage: &Stage, ask: &dyn Fn(&str, &[&str]) -> Result<String>) -> Result<()> {
    let text = fs::read_to_string("/etc/resolv.conf").context("read /etc/resolv.conf")?;
    let server = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .find_map(|server| server.trim().parse::<Ipv4Addr>().ok().filter(|address| !address.is_loopback()));
    let Some(server) = server else { bail!("/etc/resolv.conf names no IPv4 server but loopback's") };
    let router = stage.lab.lan.address(254);
    for node in &stage.lab.nodes {
        stage.lab.lan.add_default_route(&node.netns, router)?;
    }
    stage.lab.lan.add_own_address(server)?;
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--no-daemon", "--bind-interfaces"]);
    command
        .arg(format!("--listen-address={server}"))
        .args(["--host-record=example.org,203.0.113.7", "--local=/example.org/"]);
    command.args(["--txt-record=long.example.org,".to_owned() + &"x".repeat(240)]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let running = netns::in_netns(&stage.lab.lan.netns, || command.spawn());
    let _running = Upstream(running.context("run dnsmasq; it is in Debian's dnsmasq-base")?);
    until("the outside has names", Duration::from_secs(10), || {
        Ok(ask("shop", &["dig", "+short", "+time=2", "example.org"])? == "203.0.113.7")
    })?;
    ensure!(ask("shop", &["musl-ask", "example.org"])?.contains("203.0.113.7"), "musl");
    ensure!(ask("shop", &["getent", "ahostsv4", "example.org"])?.contains("203.0.113.7"), "glibc");
    let by_tcp = ask("shop", &["dig", "+short", "+tcp", "TXT", "long.example.org"])?;
    ensure!(by_tcp.contains("xxxx"), "TCP: {by_tcp}");
    Ok(())
}

fn ports_53_and_22(stage: &mut Stage) -> Result<()> {
    stage.form(2)?;
    load_tools(stage)?;
    let service = |name: &str, port: u16, protocol: &str| {
        format!(
            "  {name}:\n    image: {TOOLS}\n    stop_grace_period: 1s\n    \
             entrypoint: [musl-echo, {protocol}, \"{port}\"]\n    ports: [\"{port}:{port}/{protocol}\"]\n"
        )
    };
    let yaml = format!(
        "services:\n{}{}{}  ask:\n    image: {TOOLS}\n",
        service("pihole-udp", 53, "udp"),
        service("pihole-tcp", 53, "tcp"),
        service("gitea", 22, "tcp"),
    );
    stage.deploy(0, "home", &yaml)?;
    for node in &stage.lab.nodes {
        for port in [53, 22] {
            until(&format!("port {port} of {} answers", node.name), Duration::from_secs(5), || {
                Ok(echo_tcp(stage, node.address, port)? == b"hello")
            })?;
        }
        until(
            &format!("datagrams to port 53 of {} are answered", node.name),
            Duration::from_secs(5),
            || Ok(echo_udp(stage, node.address, 53)? == b"hello"),
        )?;
    }
    let said = stage.cli(1, &["exec", "home/ask", "dig", "+short", "gitea"])?;
    ensure!(said.trim().parse::<Ipv4Addr>().is_ok(), "containers still have their name server: {said}");
    Ok(())
}

fn echo_tcp(stage: &Stage, address: Ipv4Addr, port: u16) -> Result<Vec<u8>> {
    use std::io::{Read, Write};
    let work = move || {
        let mut stream =
            std::net::TcpStream::connect_timeout(&(address, port).into(), Duration::from_millis(500))?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        stream.write_all(b"hello")?;
        let mut answer = vec![0; 5];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    };
    Ok(netns::in_netns(&stage.lab.lan.netns, work)?)
}

fn echo_udp(stage: &Stage, address: Ipv4Addr, port: u16) -> Result<Vec<u8>> {
    let work = move || {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        socket.send_to(b"hello", (address, port))?;
        let mut answer = vec![0; 16];
        let (length, _) = socket.recv_from(&mut answer)?;
        answer.truncate(length);
        Ok(answer)
    };
    Ok(netns::in_netns(&stage.lab.lan.netns, work)?)
}

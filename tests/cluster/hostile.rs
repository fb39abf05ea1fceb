//! Input that means harm, or was written in haste.

use super::Scenario;
use super::stage::{IMAGE, Stage};
use anyhow::{Context, Result, ensure};
use async_io::Async;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};
use tinydc::cli::lab;
use tinydc::linux::netns;
use tinydc::transport::authority::Authority;
use tinydc::transport::https::HttpsClient;
use tinydc::transport::identity::{Identity, NodeKey};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile-layers",
        proves: "layers that climb out by .., absolute names, links or devices, and archives that lie, write nothing outside; \
                 the daemon lives on",
        machines: 1,
        run: hostile_layers,
    },
    Scenario {
        name: "ten-mistakes",
        proves: "a Compose file with ten mistakes gets all ten told at once, each with its line, and nothing is deployed",
        machines: 1,
        run: ten_mistakes,
    },
    Scenario {
        name: "stranger",
        proves: "who has no certificate, or one of another CA, learns nothing on UDP 7400 and TCP 7400 but the server's \
                 chain; garbage on both ports disturbs nobody",
        machines: 3,
        run: stranger,
    },
    Scenario {
        name: "idle-connections",
        proves: "a connection on which no request comes, or half of one, gives its place back after 30 s",
        machines: 1,
        run: idle_connections,
    },
];

/// One entry of a tar with any name at all, which the library would refuse to write.
fn entry(name: &str, kind: tar::EntryType, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    if matches!(kind, tar::EntryType::Block | tar::EntryType::Char) {
        let _ = header.set_device_major(8);
        let _ = header.set_device_minor(0);
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().div_ceil(512) * 512, 0);
    bytes
}

fn hostile_layers(stage: &mut Stage) -> Result<()> {
    use tar::EntryType::{Block, Link, Regular, Symlink};
    stage.form(1)?;
    let target = stage.lab.dir.join("outside");
    fs::create_dir_all(&target)?;
    fs::write(target.join("secret"), "untouched")?;
    let outside = target.display().to_string();
    let climbing = format!("{}{}/owned", "../".repeat(20), outside.trim_start_matches('/'));
    let layers: Vec<(&str, Vec<u8>)> = vec![
        ("climbing", entry(&climbing, Regular, "", b"owned")),
        ("absolute", entry(&format!("{outside}/owned"), Regular, "", b"owned")),
        (
            "link-out",
            [entry("out", Symlink, &outside, b""), entry("out/owned", Regular, "", b"owned")].concat(),
        ),
        (
            "link-up",
            [
                entry("up", Symlink, &format!("../../../../../../../..{outside}"), b""),
                entry("up/owned", Regular, "", b"owned"),
            ]
            .concat(),
        ),
        (
            "hard-link",
            [entry("hard", Link, &format!("{outside}/secret"), b""), entry("hard", Regular, "", b"changed")]
                .concat(),
        ),
        ("device", entry("disk", Block, "", b"")),
        ("whiteout-up", entry("../../.wh.outside", Regular, "", b"")),
        ("cut-off", entry("short", Regular, "", b"x")[..600].to_vec()),
    ];
    for (what, layer) in layers {
        let closed = [layer, vec![0; 1024]].concat();
        let archive = lab::archive_of(&format!("evil:{what}"), &closed, &["/bin/sh".into()])?;
        let answer = lab::ask(&stage.lab.nodes[0].socket(), "POST", "/v1/images", &archive)?;
        // Loaded or refused, either will do if nothing gets out; it is unpacked when an instance starts.
        let yaml = format!("services:\n  x:\n    image: evil:{what}\n    restart: \"no\"\n");
        if answer.status < 400 {
            let path = stage.write_compose("evil", &yaml)?.display().to_string();
            let _ = stage.try_cli(0, &["deploy", "-f", &path, "--name", "evil", "--timeout", "2s"])?;
        }
        stage.remark(format!("{what}: load answered {}", answer.status));
        ensure!(fs::read_to_string(target.join("secret"))? == "untouched", "{what} changed a file outside");
        ensure!(!target.join("owned").exists(), "{what} wrote outside");
        ensure!(stage.lab.nodes[0].ended()?.is_none(), "the daemon died of {what}");
        stage.lab.nodes[0].get("/v1/version")?;
    }
    for garbage in [&b"no tar at all"[..], &[0x1f, 0x8b, 8, 0, 0, 0][..], &[0; 4096][..]] {
        let answer = lab::ask(&stage.lab.nodes[0].socket(), "POST", "/v1/images", garbage)?;
        ensure!((400..500).contains(&answer.status), "garbage is answered {}", answer.status);
    }
    stage.cli(0, &["rm", "evil"]).map(drop).or(Ok(()))
}

/// One mistake a line, each with what the message must name.
const MISTAKES: &str = "name: Shop!
services:
  web:
    image: busy:1
    ports: [\"99999:80\"]
    deploy: {replicas: many}
    restart: sometimes
    comand: [sh]
  db:
    ports: [\"80:80\"]
    depends_on: [nowhere]
    stop_grace_period: soon
    healthcheck: {test: [\"CMD\", \"true\"], interval: never}
    volumes: [\"data:relative\"]
  cache:
    image: busy:1
    environment: {A: [1, 2]}
    deploy: {resources: {limits: {memory: lots}}}
";

fn ten_mistakes(stage: &mut Stage) -> Result<()> {
    stage.form(1)?;
    let path = stage.write_compose("mistakes", MISTAKES)?.display().to_string();
    let begin = Instant::now();
    let said = stage
        .cli_refused(0, &["deploy", "-f", &path], 1)
        .or_else(|_| stage.cli_refused(0, &["deploy", "-f", &path], 2))?;
    stage.note("all told", begin);
    let lines: std::collections::BTreeSet<usize> = said
        .lines()
        .filter_map(|line| line.split("mistakes.yaml:").nth(1)?.split(':').next()?.parse().ok())
        .collect();
    stage.remark(format!("mistakes told in lines {lines:?}"));
    ensure!(lines.len() >= 10, "only {} of the mistakes were told: {said}", lines.len());
    let apps = stage.lab.nodes[0].get("/v1/apps")?;
    ensure!(apps["apps"].as_array().is_some_and(Vec::is_empty), "nothing is deployed: {apps}");
    Ok(())
}

fn stranger(stage: &mut Stage) -> Result<()> {
    stage.form(3)?;
    stage.cli(0, &["node", "label", "pi1", "secret=xyzzy"])?;
    let address = stage.lab.nodes[0].address;
    let lan = stage.lab.lan.netns.clone();
    let inside = |words: &[&str]| -> Result<String> {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        let output = netns::in_netns(&lan, || command.output())?;
        Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
    };
    let url = format!("https://{address}:7400/v1/nodes");
    let bare = inside(&["curl", "-sSk", "--max-time", "5", &url])?;
    ensure!(!bare.contains("xyzzy") && !bare.contains("pi2"), "without a certificate curl was told {bare}");
    let foreign = foreign_certificate(stage, address)?;
    ensure!(
        !foreign.contains("xyzzy") && !foreign.contains("pi2"),
        "a foreign CA's certificate was told {foreign}"
    );
    stage.remark(format!("a foreign certificate is told: {}", foreign.lines().next().unwrap_or_default()));
    let plain = inside(&["curl", "-sS", "--max-time", "5", &format!("http://{address}:7400/v1/nodes")])?;
    ensure!(!plain.contains("xyzzy"), "plain HTTP was told {plain}");
    // QUIC: whatever comes back to garbage is at most a version negotiation, and never names anything.
    let heard = netns::in_netns(&lan, move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let mut heard = Vec::new();
        for size in [1, 20, 300, 1200, 1400] {
            for first in [0x00_u8, 0x40, 0xc0, 0xff] {
                let mut packet = vec![0x5a; size];
                packet[0] = first;
                socket.send_to(&packet, (address, 7400))?;
            }
        }
        let mut buffer = [0; 2048];
        while let Ok(length) = socket.recv(&mut buffer) {
            heard.extend_from_slice(&buffer[..length]);
        }
        Ok(heard)
    })?;
    let text = String::from_utf8_lossy(&heard).into_owned();
    ensure!(
        !text.contains("pi1") && !text.contains("home") && heard.len() < 5000,
        "garbage was answered {text:?}"
    );
    ensure!(stage.lab.nodes[0].ended()?.is_none(), "garbage ended the daemon");
    stage.label(1, "pi1", "after")?;
    let version = stage.cli(0, &["version"])?;
    ensure!(version.contains("pi1"), "{version} {IMAGE}");
    Ok(())
}

/// What a certificate gets to hear that another cluster's CA signed for a node.
fn foreign_certificate(stage: &Stage, address: Ipv4Addr) -> Result<String> {
    let authority = Authority::create()?;
    let key = NodeKey::create()?;
    let certificate = authority.sign_node(key.public_key())?;
    // It knows whom it dials, so that only its own certificate can be what is wrong.
    let identity = Identity::load(&stage.lab.nodes[0].data_dir())?.context("pi1 has an identity")?;
    let known = identity.membership.context("pi1 is a member")?.authority;
    let client = HttpsClient::new(known, Some((certificate, &key)))?;
    let said = netns::in_netns(&stage.lab.lan.netns, move || {
        async_io::block_on(async {
            let stream = Async::<TcpStream>::connect(SocketAddr::from((address, 7400))).await?;
            let mut stream = match client.connect(stream).await {
                Ok(stream) => stream,
                Err(error) => return Ok(error.to_string()),
            };
            let mut heard = Vec::new();
            let asked = stream.write_all(b"GET /v1/nodes HTTP/1.0\r\nhost: x\r\n\r\n").await;
            // With TLS 1.3 the client hears of its refusal only when it reads.
            let read = stream.read_to_end(&mut heard).await;
            Ok(format!("{asked:?} {read:?} {}", String::from_utf8_lossy(&heard)))
        })
    })?;
    Ok(said)
}

fn idle_connections(stage: &mut Stage) -> Result<()> {
    use std::io::{Read, Write};
    stage.form(1)?;
    let socket = stage.lab.nodes[0].socket();
    let begin = Instant::now();
    let mut streams = Vec::new();
    for sent in ["", "GET /v1/version HTTP/1.1\r\nhost: ", "GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket)?;
        stream.write_all(sent.as_bytes())?;
        stream.set_read_timeout(Some(Duration::from_secs(45)))?;
        streams.push((sent, stream));
    }
    for (sent, mut stream) in streams {
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        ensure!(ended.is_ok(), "after {sent:?} the connection stays open");
        let took = begin.elapsed();
        ensure!(took > Duration::from_secs(25), "after {sent:?} it ended in {took:?} already");
    }
    stage.note("connections without a request ended", begin);
    stage.lab.nodes[0].get("/v1/version").map(drop)
}

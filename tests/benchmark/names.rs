//! DNS answers per second beside dnsmasq: the same client, the same machine, in turn.

use super::network::{compare, deploy_pair};
use super::{Row, lab, load_hello};
use anyhow::{Context, Result};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tinydc::linux::netns;

const DNSMASQ_PORT: u16 = 5454;
const ROUND: Duration = Duration::from_millis(300);
/// Questions that wait for their answers at once.
const WINDOW: u16 = 32;
const NAME: &str = "serve.net.tinydc.internal";

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, or ended now; then it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn names() -> Result<Vec<Row>> {
    let lab = lab(3)?;
    load_hello(&lab)?;
    let pair = deploy_pair(&lab)?;
    let bridge = Ipv4Addr::new(10, 77, 1, 1);
    let netns = lab.nodes[0].netns.clone();
    let port = format!("--port={DNSMASQ_PORT}");
    let answer = format!("--address=/{NAME}/{}", pair.vip);
    let dnsmasq = netns::in_netns(&netns, move || {
        Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", &port, &answer])
            .args(["--conf-file=/dev/null", "--pid-file="])
            .stderr(Stdio::null())
            .spawn()
    });
    let _running = Running(dnsmasq.context("start dnsmasq; apt-get install dnsmasq-base")?);
    let targets = [SocketAddr::from((bridge, 53)), SocketAddr::from((bridge, DNSMASQ_PORT))];
    let speeds = compare(&targets, |server| answers_per_second(&pair.client, *server))?;
    Ok(vec![
        Row::new("names: DNS answers/s", speeds[0], "1/s").beside(Some(("dnsmasq", speeds[1]))),
        Row::new("names: DNS answers/s", speeds[0] / speeds[1], "× dnsmasq"),
    ])
}

fn question(id: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in NAME.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

fn answers_per_second(client: &Path, server: SocketAddr) -> Result<f64> {
    let count = netns::in_netns(client, move || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        for id in 0..WINDOW {
            socket.send(&question(id))?;
        }
        let (begin, mut count, mut buffer) = (Instant::now(), 0u64, [0; 512]);
        while begin.elapsed() < ROUND {
            let length = socket.recv(&mut buffer)?;
            let has_answer = length > 12 && buffer[3] & 0xf == 0 && buffer[7] >= 1;
            if !has_answer {
                return Err(std::io::Error::other("an answer without an address"));
            }
            count += 1;
            socket.send(&question(u16::from_be_bytes([buffer[0], buffer[1]])))?;
        }
        Ok(count)
    })?;
    Ok(count as f64 / ROUND.as_secs_f64())
}

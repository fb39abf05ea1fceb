//! Traffic between boards through the kernel's WireGuard: changed to, given new keys and changed back under a connection
//! between two containers, with the LAN listened to.

use crate::Case;
use crate::cluster::{deploy_to, form, load_archive, nodes_up};
use crate::field::{Field, until};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tinydc::cli::lab;
use tinydc::linux::{netns, packet};

pub const CASES: &[Case] = &[Case {
    name: "wireguard",
    proves: "with encrypt two boards talk through their kernels' WireGuard: a connection between containers goes on while it \
             is switched on, given new keys and switched off, and the LAN carries nothing of it in clear; with ipv6 they \
             talk by that, too; a board whose kernel has neither is named",
    run: wireguard,
}];

const MARK: &[u8; 32] = b"this must not be read on the LAN";
const EVERY: Duration = Duration::from_millis(20);
/// A message goes by the board's API into the container, to the other container and all the way back, and an emulator
/// that shares a processor with others may stand still for a second. A tunnel that was used before the other end took
/// it would cost 5 s at least: that is when WireGuard asks again.
const GAP_MAX: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(60);

const APP: &str = "\
services:
  server:
    image: busy:1
    command: [nc, -ll, -p, \"9100\", -e, /bin/busybox, cat]
    deploy: {placement: {constraints: [node.hostname == pi2]}}
  client:
    image: busy:1
    command: [sleep, \"100000\"]
    deploy: {placement: {constraints: [node.hostname == pi1]}}
";

/// One connection from a container to another, held by `exec`: what is said comes back from the other one.
struct Talk {
    exec: Child,
    is_over: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
    speaker: Option<JoinHandle<std::io::Result<()>>>,
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Gone already is what is wanted. The speaker ends with its pipes.
        let _ = self.exec.kill();
        let _ = self.exec.wait();
    }
}

impl Talk {
    fn begin(field: &Field, address: &str) -> Result<Talk> {
        let words = ["exec", "-i", "talk/client", "--", "/bin/busybox", "nc", address, "9100"];
        let mut exec = field.laptop_spoken_to(&words, Stdio::piped())?;
        let mut to = exec.stdin.take().context("standard input is a pipe")?;
        let mut from = exec.stdout.take().context("standard output is a pipe")?;
        let (is_over, longest_us) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (over, longest) = (is_over.clone(), longest_us.clone());
        let speaker = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let mut answer = [0; MARK.len()];
                to.write_all(MARK)?;
                to.flush()?;
                from.read_exact(&mut answer)?;
                longest.fetch_max(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
                thread::sleep(EVERY);
            }
            Ok(())
        });
        Ok(Talk { exec, is_over, longest_us, speaker: Some(speaker) })
    }

    fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Says how long a message took at most since this was last asked, with the one that is on its way.
    fn check(&self, field: &mut Field, what: &str) -> Result<()> {
        let mut gap = self.longest();
        self.longest_us.store(0, Ordering::Relaxed);
        until(&format!("{what}: the connection goes on"), LIMIT, || {
            let next = self.longest();
            gap = gap.max(next);
            Ok(!next.is_zero())
        })?;
        field.remark(format!("{what}: longest wait of an established connection {} ms", gap.as_millis()));
        ensure!(gap < GAP_MAX, "{what}: a gap of {gap:?}");
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.is_over.store(true, Ordering::Relaxed);
        let speaker = self.speaker.take().context("it ends once")?;
        speaker.join().map_err(|_| anyhow::anyhow!("the speaker panicked"))??;
        Ok(())
    }
}

/// What was heard on the LAN within some time.
#[derive(Debug, Default)]
struct Heard {
    /// Frames in which the message can be read.
    marks: usize,
    /// IPv4 packets from container to container.
    clear: usize,
    /// First messages of WireGuard's handshake, which have 148 bytes.
    handshakes: usize,
    /// Its packets of data, and the ports that they go to.
    data: usize,
    ports: BTreeSet<u16>,
}

impl Heard {
    fn take(&mut self, frame: &[u8]) {
        self.marks += usize::from(frame.windows(MARK.len()).any(|part| part == MARK));
        let Some(([.., 8, 0], packet)) = frame.split_first_chunk::<14>() else { return };
        let Some(header) = packet.first_chunk::<20>() else { return };
        let is_container = |address: &[u8]| address.starts_with(&[10, 77]);
        self.clear += usize::from(is_container(&header[12..16]) && is_container(&header[16..20]));
        let body = packet.get(usize::from(header[0] & 15) * 4..).unwrap_or_default();
        let Some((udp, message)) = body.split_first_chunk::<8>().filter(|_| header[9] == 17) else { return };
        let (port, length) = (u16::from_be_bytes([udp[2], udp[3]]), u16::from_be_bytes([udp[4], udp[5]]) - 8);
        match message {
            [1, 0, 0, 0, ..] if length == 148 => self.handshakes += 1,
            [4, 0, 0, 0, ..] if length >= 32 && length % 16 == 0 && [7402, 7404].contains(&port) => {
                self.data += 1;
                self.ports.insert(port);
            }
            _ => {}
        }
    }
}

/// Listens until it is told to end.
struct Ear {
    is_over: Arc<AtomicBool>,
    listener: JoinHandle<Heard>,
}

impl Ear {
    fn open(field: &Field) -> Result<Ear> {
        const ALL_PROTOCOLS: u16 = 3;
        const ANY_INTERFACE: u32 = 0;
        let socket = netns::in_netns(&field.lan.netns, || {
            packet::open(ALL_PROTOCOLS, ANY_INTERFACE, Duration::from_millis(100))
        })?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let listener = thread::spawn(move || {
            let (mut heard, mut frame) = (Heard::default(), [0; 2048]);
            while !over.load(Ordering::Relaxed) {
                let flags = nix::sys::socket::MsgFlags::empty();
                if let Ok(length) = nix::sys::socket::recv(socket.as_raw_fd(), &mut frame, flags) {
                    heard.take(&frame[..length]);
                }
            }
            heard
        });
        Ok(Ear { is_over, listener })
    }

    fn close(self) -> Result<Heard> {
        self.is_over.store(true, Ordering::Relaxed);
        self.listener.join().map_err(|_| anyhow::anyhow!("the ear panicked"))
    }
}

fn overheard(field: &Field, time: Duration) -> Result<Heard> {
    let ear = Ear::open(field)?;
    thread::sleep(time);
    ear.close()
}

/// Both boards reach each other this way, and wait for nobody.
fn both_ways(field: &Field, kind: &str) -> Result<bool> {
    let body = field.laptop_json(&["net"])?;
    let nodes = body["nodes"].as_array().cloned().unwrap_or_default();
    let is_settled = |node: &serde_json::Value| {
        let ways = node["ways"].as_array().cloned().unwrap_or_default();
        let waits = node["problems"].to_string().contains("waits for");
        ways.len() == 1 && ways[0]["kind"] == kind && !waits
    };
    ensure!(!body.to_string().contains("userspace"), "a tunnel that is not the kernel's: {body}");
    Ok(nodes.len() == 2 && nodes.iter().all(is_settled))
}

fn load_busybox(field: &Field) -> Result<()> {
    let busybox = Path::new("/bin/busybox");
    ensure!(busybox.exists(), "there is no /bin/busybox: apt-get install busybox-static");
    let image = lab::image_with("busy:1", &[(busybox, "/bin/busybox")], &["/bin/busybox".into()], &[])?;
    load_archive(field, &image)
}

/// Where a service's only container is.
fn endpoint_of(field: &Field, service: &str) -> Result<String> {
    let body = field.laptop_json(&["net"])?;
    let services = body["services"].as_array().cloned().unwrap_or_default();
    let service = services.iter().find(|one| one["service"] == service).context("the service is known")?;
    let address = service["endpoints"][0]["address"].as_str().context("it has an endpoint")?;
    Ok(address.to_string())
}

fn wireguard(field: &mut Field) -> Result<()> {
    form(field, 2)?;
    load_busybox(field)?;
    deploy_to(field, "talk", APP, &["pi1", "pi2"])?;
    let talk = Talk::begin(field, &endpoint_of(field, "server")?)?;
    until("the message is seen in clear", LIMIT, || {
        Ok(overheard(field, Duration::from_millis(500))?.marks > 0)
    })?;
    talk.longest();
    thread::sleep(Duration::from_secs(3));
    talk.check(field, "in clear")?;

    let (begin, ear) = (Instant::now(), Ear::open(field)?);
    field.laptop(&["settings", "encrypt", "true"])?;
    until("both are reached through the kernel's WireGuard", LIMIT, || both_ways(field, "wireguard"))?;
    field.note("changed to encryption", begin);
    talk.check(field, "changed to encryption")?;
    let change = ear.close()?;
    ensure!(change.handshakes > 0, "no handshake of WireGuard was heard: {change:?}");
    let before = overheard(field, Duration::from_secs(2))?;
    field.remark(format!("two seconds of the LAN: {before:?}"));
    ensure!(before.marks == 0 && before.clear == 0, "the containers are read on the LAN: {before:?}");
    ensure!(before.data > 0 && before.ports.len() == 1, "WireGuard's packets: {before:?}");

    let (begin, ear) = (Instant::now(), Ear::open(field)?);
    field.laptop(&["settings", "encrypt_rotation", "10"])?;
    until("the other tunnel with new keys is used", LIMIT, || {
        let heard = overheard(field, Duration::from_millis(500))?;
        Ok(heard.data > 0 && heard.ports.is_disjoint(&before.ports))
    })?;
    field.note("new keys", begin);
    let change = ear.close()?;
    ensure!(change.marks == 0 && change.clear == 0, "read on the LAN at the change of keys: {change:?}");
    field.laptop(&["settings", "encrypt_rotation", "604800"])?;
    talk.check(field, "new keys")?;
    field.laptop(&["settings", "ipv6", "true"])?;
    talks_by_ipv6(field, "encrypted")?;

    let begin = Instant::now();
    field.laptop(&["settings", "encrypt", "false"])?;
    until("everything goes in clear", LIMIT, || {
        Ok(overheard(field, Duration::from_millis(500))?.marks > 0 && both_ways(field, "direct")?)
    })?;
    field.note("changed back", begin);
    talk.check(field, "changed back")?;
    talks_by_ipv6(field, "in clear")?;
    field.laptop(&["settings", "ipv6", "false"])?;
    talk.end()?;
    refused_by_one_that_cannot(field)
}

/// By the service's IPv6 address, which is translated to the endpoint's.
fn talks_by_ipv6(field: &mut Field, how: &str) -> Result<()> {
    let body = field.laptop_json(&["net"])?;
    let services = body["services"].as_array().cloned().unwrap_or_default();
    let server = services.iter().find(|one| one["service"] == "server").context("the service is known")?;
    let address = server["vip6"].as_str().context("it has an IPv6 address")?;
    let line = format!("echo by six | /bin/busybox nc -w 5 {address} 9100");
    let begin = Instant::now();
    until(&format!("{address} answers, {how}"), LIMIT, || {
        let answer = field.laptop(&["exec", "talk/client", "--", "/bin/busybox", "sh", "-c", &line]);
        Ok(answer.is_ok_and(|text| text.trim() == "by six"))
    })?;
    field.note(&format!("by IPv6, {how}"), begin);
    Ok(())
}

/// A board whose kernel has no WireGuard and no IPv6: it says so when it is asked, and nothing changes.
fn refused_by_one_that_cannot(field: &mut Field) -> Result<()> {
    field.guests[1].type_last("poweroff")?;
    field.guests[1].wait_off(LIMIT)?;
    field.guests[1].set_kernel("module_blacklist=wireguard ipv6.disable=1", Vec::new());
    field.start(1)?;
    field.guests[1].wait_ready()?;
    until("both are up", LIMIT, || Ok(nodes_up(field)? == 2))?;
    for (setting, wanted) in
        [("encrypt", "pi2 can't encrypt"), ("ipv6", "pi2 can't have IPv6: this kernel has no IPv6")]
    {
        let refused = field.laptop(&["settings", setting, "true"]).err();
        let told = format!("{:#}", refused.with_context(|| format!("{setting} is refused"))?);
        ensure!(told.contains(wanted), "{told}");
    }
    ensure!(both_ways(field, "direct")?, "nothing has changed");
    Ok(())
}

//! Keeps the wall clock: a floor at the start, the network's time after it.
//!
//! Asking the network resolves names, which may take seconds: a child process does it (`ask`), so that the first
//! process never waits. The child sets or slews the clock itself; its exit code says whether it is right now.
//!
//! The floor is the newest time that certainly has been: that of this binary, and of the floor file on the data
//! partition. The file is written when the clock was set and at an orderly end, never periodically.

use super::sntp::{self, Correction};
use crate::linux::machine;
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::{ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const FLOOR_FILE: &str = "clock";
/// The kernel takes its word for synchronised back some hours after the last correction.
pub const ASK_EVERY: Duration = Duration::from_secs(30 * 60);
pub const RETRY_MIN: Duration = Duration::from_secs(4);
pub const RETRY_MAX: Duration = Duration::from_secs(5 * 60);
const SERVERS: [&str; 2] = ["pool.ntp.org", "time.cloudflare.com"];
const SERVERS_MAX: usize = 4;
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
const PORT: u16 = 123;

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn changed(path: &Path) -> Option<Duration> {
    fs::metadata(path).ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()
}

/// The newest time that has certainly been.
pub fn floor(data_dir: &Path) -> Duration {
    let known = [changed(Path::new("/init")), changed(&data_dir.join(FLOOR_FILE))];
    known.into_iter().flatten().max().unwrap_or_default()
}

/// Lifts a clock that stands before the floor, as one without a battery does. Returns by how much it was lifted.
pub fn lift(data_dir: &Path) -> Result<Option<Duration>> {
    let (now, floor) = (now(), floor(data_dir));
    let Some(behind) = floor.checked_sub(now).filter(|behind| !behind.is_zero()) else { return Ok(None) };
    machine::set_clock(floor).context("set the clock")?;
    Ok(Some(behind))
}

/// Notes that this time has been. The file's own time carries it.
pub fn note(data_dir: &Path) -> Result<()> {
    let path = data_dir.join(FLOOR_FILE);
    fs::write(&path, b"").with_context(|| format!("write {}", path.display()))
}

/// The child's whole run: asks each server until one answers, and corrects the clock.
pub fn ask(data_dir: &Path, servers: &[String]) -> ExitCode {
    let own: Vec<String> = SERVERS.iter().map(|server| server.to_string()).collect();
    let servers = if servers.is_empty() { &own } else { servers };
    for server in servers.iter().take(SERVERS_MAX) {
        match ask_one(data_dir, server) {
            Ok(said) => {
                println!("clock: {said}");
                return ExitCode::SUCCESS;
            }
            Err(error) => println!("clock: {error:#}"),
        }
    }
    ExitCode::FAILURE
}

fn ask_one(data_dir: &Path, server: &str) -> Result<String> {
    let mut places = (server, PORT).to_socket_addrs().with_context(|| format!("look up {server}"))?;
    let place = places.next().with_context(|| format!("{server} has no address"))?;
    let any = if place.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).context("open a socket")?;
    socket.connect(place).with_context(|| format!("reach {server}"))?;
    socket.set_read_timeout(Some(ANSWER_LIMIT)).context("set a limit")?;
    let sent = now();
    socket.send(&sntp::request(sent)).with_context(|| format!("ask {server}"))?;
    let mut reply = [0; 128];
    let length = socket.recv(&mut reply).with_context(|| format!("hear {server}"))?;
    let received = now();
    let Some(sample) = sntp::sample(&reply[..length], sent, received) else {
        bail!("{server} does not know the time itself")
    };
    let Some(correction) = sntp::correction(sample, received, floor(data_dir)) else {
        bail!("{server} tells a time that is past; it is not believed")
    };
    let said = match correction {
        Correction::Step(right) => {
            machine::set_clock(right).context("set the clock")?;
            note(data_dir)?;
            format!("set by {} s, as {server} says", sample.offset_us / 1_000_000)
        }
        Correction::Slew { offset_us } => {
            machine::slew_clock(offset_us).context("slew the clock")?;
            format!("{} ms off {server}", offset_us / 1000)
        }
    };
    let error = Duration::from_micros(sample.delay_us.unsigned_abs() / 2 + 1);
    machine::mark_synchronised(error).context("mark the clock as right")?;
    Ok(said)
}

//! What the machine is and has: size, name, fingerprint, and the figures of the moment.

use super::health::HealthWatch;
use crate::agent::Disks;
use crate::control::Figures;
use crate::linux::disk::Space;
use crate::model::{NodeSize, Timestamp};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Kept from containers for tinydc and the system: a tenth of the memory, 96 to 512 MiB.
const RESERVE_MIN: u64 = 96 << 20;
const RESERVE_MAX: u64 = 512 << 20;
const FIGURES_EVERY: Duration = Duration::from_secs(1);

pub fn size() -> NodeSize {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let total = meminfo("MemTotal:").unwrap_or(1 << 30);
    let reserve = (total / 10).clamp(RESERVE_MIN, RESERVE_MAX).min(total / 2);
    NodeSize { cpu_millis: cores * 1000, memory_bytes: total - reserve }
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// The host's name as a node's name; `node` where it can't be one.
pub fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let label: String = name
        .split('.')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(40)
        .collect();
    let label = label.trim_matches('-');
    if label.is_empty() { "node".into() } else { label.into() }
}

/// Changes when a card moves to another board.
pub fn fingerprint() -> u64 {
    let sources = ["/proc/device-tree/serial-number", "/sys/class/dmi/id/product_uuid", "/etc/machine-id"];
    let text = sources.iter().find_map(|path| fs::read(path).ok().filter(|bytes| !bytes.is_empty()));
    text.unwrap_or_default().iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

pub fn wall_now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_millis() as u64)
}

/// The wall clock if something keeps it; or, before there is any cluster time, whatever it says.
pub fn believable_wall(must_have: bool) -> Option<Timestamp> {
    (must_have || crate::linux::clock::is_synchronised()).then(wall_now)
}

/// Figures, read at most once a second.
pub struct Gauge {
    data_dir: PathBuf,
    last: Mutex<Option<(Instant, Figures)>>,
    holdable: Arc<AtomicU16>,
    health: Arc<HealthWatch>,
    disks: Disks,
}

impl Gauge {
    pub fn new(data_dir: PathBuf, holdable: Arc<AtomicU16>, health: Arc<HealthWatch>, disks: Disks) -> Gauge {
        Gauge { data_dir, last: Mutex::new(None), holdable, health, disks }
    }

    pub fn read(&self) -> Figures {
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((at, figures)) = *last
            && at.elapsed() < FIGURES_EVERY
        {
            return figures;
        }
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split_whitespace().next().and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        let figures = Figures {
            fsync_age_ms: 0,
            load_percent: (load * 100.0) as u32,
            memory_available_bytes: meminfo("MemAvailable:").unwrap_or(0),
            is_disk_full: Space::of(&self.data_dir).is_some_and(Space::is_low),
            holdable: self.holdable.load(Ordering::Relaxed),
            health: self.health.health(),
            absent_disks: self.disks.absent(),
        };
        *last = Some((Instant::now(), figures));
        figures
    }
}

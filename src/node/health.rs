//! Watches the condition of the machine: its temperature, its power, its disk, and how much that has been written.
//!
//! Everything is read from files of the kernel, below a root that tests replace; what a machine does not have is not
//! told. What was written is counted from the kernel's own counter of the whole disk and kept in `wear` in the data
//! directory: written at a clean stop, and after 16 MiB once in ten minutes, so that keeping count adds nothing to an idle
//! disk. A power cut takes from the count what came since.

use crate::linux::disk;
use crate::model::health::{DiskWear, MachineHealth, Trouble, Troubles};
use crate::tasks::lock;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Boards slow down from 80 or 85 °C on; a little less ends it, so that it does not come and go.
const HOT_CELSIUS: i16 = 80;
const COOL_CELSIUS: i16 = 75;
const KEEP_EVERY_BYTES: u64 = 16 << 20;
const KEEP_EVERY: Duration = Duration::from_secs(600);
const SECTOR_BYTES: u64 = 512;
const FILE: &str = "wear";

/// What a node remembers of its disk across restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    written_bytes: u64,
    day: u64,
    written_today_bytes: u64,
    counted_s: u64,
    /// The kernel's counter begins anew with each boot.
    boot: String,
    counter_bytes: u64,
}

pub struct HealthWatch {
    root: PathBuf,
    data_dir: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    health: MachineHealth,
    kept: Kept,
    /// What the file has, and since when.
    on_disk_bytes: u64,
    kept_at: Instant,
    looked_at: Instant,
    slowdowns: Option<u64>,
}

impl HealthWatch {
    pub fn start(data_dir: &Path) -> Arc<HealthWatch> {
        Arc::new(HealthWatch::at(Path::new("/"), data_dir, today()))
    }

    fn at(root: &Path, data_dir: &Path, day: u64) -> HealthWatch {
        let kept = fs::read(data_dir.join(FILE)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let kept: Kept = kept.unwrap_or_default();
        let inner = Inner {
            health: MachineHealth::default(),
            on_disk_bytes: kept.written_bytes,
            kept_at: Instant::now(),
            kept,
            looked_at: Instant::now(),
            slowdowns: None,
        };
        let watch = HealthWatch { root: root.into(), data_dir: data_dir.into(), inner: Mutex::new(inner) };
        watch.look(day, Duration::ZERO);
        watch
    }

    pub fn health(&self) -> MachineHealth {
        lock(&self.inner).health
    }

    pub async fn run(self: Arc<HealthWatch>) {
        loop {
            async_io::Timer::after(LOOK_EVERY).await;
            let watch = self.clone();
            smol::unblock(move || {
                let since = lock(&watch.inner).looked_at.elapsed();
                watch.look(today(), since);
                if watch.is_keeping_due() {
                    watch.keep();
                }
            })
            .await;
        }
    }

    fn look(&self, day: u64, since: Duration) {
        let mut inner = lock(&self.inner);
        inner.looked_at = Instant::now();
        let temperature = self.temperature();
        let mut troubles = self.power_troubles(&mut inner.slowdowns);
        let was_hot = inner.health.troubles.has(Trouble::Hot);
        let hot_from = if was_hot { COOL_CELSIUS } else { HOT_CELSIUS };
        troubles.set(Trouble::Hot, temperature.is_some_and(|celsius| celsius >= hot_from));
        let partition = self.partition();
        troubles.set(Trouble::DiskErrors, partition.as_deref().is_some_and(|path| self.has_errors(path)));
        troubles.set(Trouble::DiskReadOnly, disk::is_read_only(&self.data_dir));
        troubles.set(Trouble::NoMemoryLimits, self.lacks_memory_controller());
        let disk = partition.and_then(|path| self.count(&path, &mut inner.kept, day, since));
        inner.health = MachineHealth { troubles, temperature_celsius: temperature, disk };
    }

    /// Adds what was written since the last look.
    fn count(&self, partition: &Path, kept: &mut Kept, day: u64, since: Duration) -> Option<DiskWear> {
        // A partition lies within its disk; what has no parent with a counter is a disk itself.
        let whole = partition.parent().filter(|_| partition.join("partition").exists()).unwrap_or(partition);
        let stat = fs::read_to_string(whole.join("stat")).ok()?;
        let counter_bytes = stat.split_whitespace().nth(6)?.parse::<u64>().ok()? * SECTOR_BYTES;
        let disk_bytes = number(&whole.join("size"))? * SECTOR_BYTES;
        let boot = fs::read_to_string(self.root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
        let before = match kept.boot.as_str() {
            // What was written before tinydc came is not its own.
            "" => counter_bytes,
            known if known == boot => kept.counter_bytes,
            _ => 0,
        };
        let new = counter_bytes.saturating_sub(before);
        if kept.day != day {
            kept.day = day;
            kept.written_today_bytes = 0;
        }
        kept.boot = boot;
        kept.counter_bytes = counter_bytes;
        kept.written_bytes += new;
        kept.written_today_bytes += new;
        kept.counted_s += since.as_secs();
        Some(DiskWear {
            disk_bytes,
            written_bytes: kept.written_bytes,
            written_today_bytes: kept.written_today_bytes,
            counted_s: kept.counted_s,
        })
    }

    fn is_keeping_due(&self) -> bool {
        let inner = lock(&self.inner);
        let new = inner.kept.written_bytes - inner.on_disk_bytes;
        new >= KEEP_EVERY_BYTES && inner.kept_at.elapsed() >= KEEP_EVERY
    }

    /// For the next run: at a clean stop, and now and then while much is written.
    pub fn keep(&self) {
        let mut inner = lock(&self.inner);
        inner.on_disk_bytes = inner.kept.written_bytes;
        inner.kept_at = Instant::now();
        let bytes = serde_json::to_vec(&inner.kept).unwrap_or_default();
        let new = self.data_dir.join("wear.new");
        // Lost, the count goes on from what was kept last.
        let _ = fs::write(&new, bytes).and_then(|()| fs::rename(new, self.data_dir.join(FILE)));
    }

    fn temperature(&self) -> Option<i16> {
        let zones = entries(&self.root.join("sys/class/thermal"), "thermal_zone");
        let is_processor = |zone: &PathBuf| {
            let kind = fs::read_to_string(zone.join("type")).unwrap_or_default().to_lowercase();
            ["cpu", "soc", "x86_pkg_temp", "bigcore", "package"].iter().any(|part| kind.contains(part))
        };
        let celsius = |zone: PathBuf| {
            let text = fs::read_to_string(zone.join("temp")).ok()?;
            i16::try_from(text.trim().parse::<i32>().ok()? / 1000).ok()
        };
        zones.into_iter().filter(is_processor).filter_map(celsius).max()
    }

    /// What the board's firmware says of its supply; elsewhere whether the processor was slowed down since the last look.
    fn power_troubles(&self, slowdowns: &mut Option<u64>) -> Troubles {
        let mut troubles = Troubles::default();
        let firmware = self.root.join("sys/devices/platform/soc/soc:firmware/get_throttled");
        let bits = fs::read_to_string(firmware).ok();
        let bits = bits.and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
        if let Some(bits) = bits {
            troubles.set(Trouble::UnderVoltage, bits & 1 != 0);
            troubles.set(Trouble::Throttled, bits & 0b1110 != 0);
        }
        let is_low = |sensor: &PathBuf| {
            fs::read_to_string(sensor.join("name")).is_ok_and(|name| name.trim() == "rpi_volt")
                && number(&sensor.join("in0_lcrit_alarm")) == Some(1)
        };
        if entries(&self.root.join("sys/class/hwmon"), "hwmon").iter().any(is_low) {
            troubles.set(Trouble::UnderVoltage, true);
        }
        let processor = self.root.join("sys/devices/system/cpu/cpu0/thermal_throttle");
        if let Some(count) = number(&processor.join("package_throttle_count")) {
            troubles.set(Trouble::Throttled, slowdowns.is_some_and(|before| count > before));
            *slowdowns = Some(count);
        }
        troubles
    }

    /// Of the data directory's file system, in sysfs; `None` where that is no disk.
    fn partition(&self) -> Option<PathBuf> {
        let device = fs::metadata(&self.data_dir).ok()?.st_dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        fs::canonicalize(self.root.join(format!("sys/dev/block/{major}:{minor}"))).ok()
    }

    fn has_errors(&self, partition: &Path) -> bool {
        let Some(name) = partition.file_name() else { return false };
        number(&self.root.join("sys/fs/ext4").join(name).join("errors_count")).is_some_and(|count| count > 0)
    }

    fn lacks_memory_controller(&self) -> bool {
        let unified = fs::read_to_string(self.root.join("sys/fs/cgroup/cgroup.controllers"));
        if let Ok(controllers) = unified {
            return !controllers.split_whitespace().any(|name| name == "memory");
        }
        let Ok(all) = fs::read_to_string(self.root.join("proc/cgroups")) else { return false };
        let mut rows = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        !rows.any(|row| row.first() == Some(&"memory") && row.get(3) == Some(&"1"))
    }
}

fn today() -> u64 {
    super::machine::wall_now().0 / 86_400_000
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(folder).into_iter().flatten().flatten();
    all.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        root: PathBuf,
        data_dir: PathBuf,
    }

    impl Machine {
        fn new(name: &str) -> Machine {
            let root = std::env::temp_dir().join(format!("tinydc-health-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            let data_dir = root.join("data");
            fs::create_dir_all(&data_dir).unwrap();
            let machine = Machine { root, data_dir };
            let device = fs::metadata(&machine.data_dir).unwrap().st_dev();
            let link = format!("sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
            machine.put("sys/block/mmcblk0/mmcblk0p3/partition", "3");
            machine.put("sys/block/mmcblk0/size", "62333952");
            fs::create_dir_all(machine.root.join("sys/dev/block")).unwrap();
            std::os::unix::fs::symlink(
                machine.root.join("sys/block/mmcblk0/mmcblk0p3"),
                machine.root.join(link),
            )
            .unwrap();
            machine.put("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids");
            machine.boot("one", 0);
            machine
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn boot(&self, id: &str, sectors: u64) {
            self.put("proc/sys/kernel/random/boot_id", id);
            self.wrote(sectors);
        }

        fn wrote(&self, sectors: u64) {
            self.put("sys/block/mmcblk0/stat", &format!("  10 0 80 5  20 0 {sectors} 9 0 12 14"));
        }

        fn watch(&self, day: u64) -> HealthWatch {
            HealthWatch::at(&self.root, &self.data_dir, day)
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    #[test]
    fn what_is_written_is_counted_across_restarts_boots_and_midnight() {
        let machine = Machine::new("wear");
        machine.wrote(100);
        let watch = machine.watch(7);
        machine.wrote(300);
        watch.look(7, Duration::from_secs(10));
        let disk = watch.health().disk.unwrap();
        assert_eq!(
            (disk.written_bytes, disk.written_today_bytes, disk.counted_s),
            (200 * 512, 200 * 512, 10)
        );
        assert_eq!(disk.disk_bytes, 62_333_952 * 512);
        watch.keep();
        // The daemon was away while others wrote; then the machine was booted.
        machine.wrote(350);
        let watch = machine.watch(7);
        assert_eq!(watch.health().disk.unwrap().written_bytes, 250 * 512);
        watch.keep();
        machine.boot("two", 50);
        let watch = machine.watch(8);
        let disk = watch.health().disk.unwrap();
        assert_eq!((disk.written_bytes, disk.written_today_bytes), (300 * 512, 50 * 512));
    }

    #[test]
    fn a_file_of_nonsense_begins_the_count_anew() {
        let machine = Machine::new("nonsense");
        fs::write(machine.data_dir.join(FILE), b"\x00\xffwear").unwrap();
        assert_eq!(machine.watch(1).health().disk.unwrap().written_bytes, 0);
    }

    #[test]
    fn a_board_tells_its_troubles() {
        let machine = Machine::new("troubles");
        let check = |watch: &HealthWatch, expected: &[&str]| {
            watch.look(1, Duration::ZERO);
            let found: Vec<_> = watch.health().troubles.iter().map(Trouble::code).collect();
            assert_eq!(found, expected);
        };
        let watch = machine.watch(1);
        check(&watch, &[]);
        machine.put("sys/class/thermal/thermal_zone0/type", "cpu-thermal");
        machine.put("sys/class/thermal/thermal_zone0/temp", "81200");
        machine.put("sys/class/thermal/thermal_zone1/type", "battery");
        machine.put("sys/class/thermal/thermal_zone1/temp", "99000");
        check(&watch, &["hot"]);
        assert_eq!(watch.health().temperature_celsius, Some(81));
        machine.put("sys/class/thermal/thermal_zone0/temp", "77000");
        check(&watch, &["hot"]);
        machine.put("sys/class/thermal/thermal_zone0/temp", "74000");
        check(&watch, &[]);
        machine.put("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n");
        check(&watch, &["throttled", "under_voltage"]);
        machine.put("sys/devices/platform/soc/soc:firmware/get_throttled", "50000\n");
        check(&watch, &[]);
        machine.put("sys/fs/ext4/mmcblk0p3/errors_count", "2");
        machine.put("sys/fs/cgroup/cgroup.controllers", "cpu pids");
        check(&watch, &["disk_errors", "no_memory_limits"]);
        fs::remove_file(machine.root.join("sys/fs/cgroup/cgroup.controllers")).unwrap();
        machine.put("proc/cgroups", "#subsys_name hierarchy num_cgroups enabled\ncpu 2 1 1\nmemory 0 1 0\n");
        check(&watch, &["disk_errors", "no_memory_limits"]);
        machine.put("proc/cgroups", "#subsys_name hierarchy num_cgroups enabled\nmemory 5 9 1\n");
        check(&watch, &["disk_errors"]);
    }
}

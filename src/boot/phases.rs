//! The way from a kernel to a running supervisor: phases as data, one after the other, each with its time.
//!
//! Input: the machine. Output: a `Board`, always: a phase that fails is shown with why and with what the board then
//! lacks, and the next one runs. Only the first mounts must work.

use super::attach;
use super::buttons::Buttons;
use super::card;
use super::clock;
use super::console::Console;
use super::devices::Drivers;
use super::disks::{self, Access, FileSystem, Volume};
use super::ground;
use super::network::{self, Network};
use super::report::{Outcome, Report};
use super::settings::Settings;
use super::watchdog::Watchdog;
use crate::linux::clock::boot_ms;
use crate::linux::{machine, process};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// What the image builder says of the board: its name and the modules to load whatever the devices.
pub const BOARD_FOLDER: &str = "/lib/board";
pub const DATA_DIR: &str = "/var/lib/tinydc";
/// The data partition of the card, and the label of one on a disk, which is preferred.
pub const DATA_LABEL_CARD: &str = "tinydc";
pub const DATA_LABEL_DISK: &str = "tinydc-data";
/// Slow cards and USB disks show up seconds after the kernel.
const DISK_LIMIT_MS: u64 = 15_000;
/// After the card's data partition is there, a disk with a better one may be about to be.
const BETTER_DISK_MS: u64 = 3_000;
/// Its problem ends when the disks are there.
pub const DISKS_PHASE: &str = "disks";
const NODE_CONFIG: &str = "/etc/tinydc.toml";

/// Everything that the supervisor goes on with.
pub struct Board {
    pub console: Console,
    pub report: Report,
    pub drivers: Drivers,
    pub settings: Settings,
    /// Where `tinydc.toml` lies.
    pub card: Option<Volume>,
    pub name: String,
    /// False: everything is in memory and lost at the next start.
    pub has_data_disk: bool,
    pub network: Option<Network>,
    pub watchdog: Option<Watchdog>,
    pub buttons: Buttons,
    pub events: Option<OwnedFd>,
    /// Words of the kernel's command line.
    pub words: Vec<String>,
}

struct Phase {
    name: &'static str,
    run: fn(&mut Board) -> Result<String>,
    /// What is missing when it fails.
    lack: &'static str,
}

const PHASES: [Phase; 11] = [
    Phase { name: "mounts", run: mounts, lack: "parts of the system are missing" },
    Phase { name: "console", run: console, lack: "nothing is shown" },
    Phase {
        name: "cgroups",
        run: |_| ground::open_cgroups(),
        lack: "containers run without limits, or not at all",
    },
    Phase { name: "modules", run: load_modules, lack: "some devices or features are missing" },
    Phase { name: "settings", run: read_settings, lack: "defaults are used" },
    Phase {
        name: "data",
        run: mount_data,
        lack: "NOTHING IS KEPT: data lies in memory and is lost at the next start",
    },
    Phase { name: DISKS_PHASE, run: cover_disks, lack: "what is written where a disk is to be may be lost" },
    Phase { name: "clock", run: lift_clock, lack: "the clock is wrong until the network tells the time" },
    Phase { name: "name", run: set_name, lack: "the board has no name of its own" },
    Phase { name: "network", run: open_network, lack: "the board is alone" },
    Phase { name: "watchdog", run: open_watchdog, lack: "a hang has to be ended by hand" },
];

pub fn run() -> Board {
    let mut board = Board::new();
    for phase in &PHASES {
        let began_ms = boot_ms();
        let result = (phase.run)(&mut board).map_err(|error| format!("{error:#}"));
        let outcome = Outcome { name: phase.name, began_ms, took_ms: boot_ms() - began_ms, result };
        board.console.say(&outcome.line());
        if let Err(why) = &outcome.result {
            let problem = format!("{}: {why}; {}", phase.name, phase.lack);
            board.console.say(&format!("         so {}", phase.lack));
            board.report.add_problem(&problem);
        }
        board.report.add_outcome(outcome);
    }
    board
}

impl Board {
    /// Before its first phase.
    fn new() -> Board {
        Board {
            console: Console::default(),
            report: Report::default(),
            drivers: Drivers::default(),
            settings: Settings::default(),
            card: None,
            name: "tinydc".into(),
            has_data_disk: false,
            network: None,
            watchdog: None,
            buttons: Buttons::default(),
            events: None,
            words: Vec::new(),
        }
    }

    /// A problem, on the console and in the report.
    pub fn complain(&mut self, problem: &str) {
        self.console.say(&format!("problem: {problem}"));
        self.report.add_problem(problem);
    }
}

fn mounts(board: &mut Board) -> Result<String> {
    ground::make_root()?;
    let said = ground::mount_all()?;
    let line = fs::read_to_string("/proc/cmdline").context("read the kernel's command line")?;
    board.words = line.split_whitespace().map(String::from).collect();
    machine::take_ctrl_alt_del().context("take Ctrl-Alt-Del")?;
    process::raise_open_files_hard_limit().context("raise the limit of open files")?;
    Ok(said)
}

fn console(board: &mut Board) -> Result<String> {
    board.console = Console::open();
    let text = fs::read_to_string(Path::new(BOARD_FOLDER).join("name")).unwrap_or_default();
    let version = env!("CARGO_PKG_VERSION");
    Ok(format!("tinydc {version} on {}", if text.is_empty() { "a machine" } else { text.trim() }))
}

fn load_modules(board: &mut Board) -> Result<String> {
    board.events = Some(machine::device_events().context("listen for devices")?);
    board.drivers = Drivers::read()?;
    let list = fs::read_to_string(Path::new(BOARD_FOLDER).join("modules")).unwrap_or_default();
    let names: Vec<&str> = list.split_whitespace().collect();
    board.drivers.load(&names);
    board.drivers.settle();
    board.buttons.look();
    let failures = board.drivers.take_failures();
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(format!("{} loaded", board.drivers.count()))
}

/// Serves devices that come until `is_there`, at most for a while. Returns whether it is.
fn await_devices(board: &mut Board, limit_ms: u64, is_there: impl Fn(&[Volume]) -> bool) -> bool {
    let begin = boot_ms();
    loop {
        if is_there(&disks::volumes()) {
            return true;
        }
        if boot_ms() - begin >= limit_ms {
            return false;
        }
        hear_devices(board, Duration::from_millis(100));
    }
}

/// Waits for events of devices and loads drivers for what came.
pub fn hear_devices(board: &mut Board, limit: Duration) {
    let Some(events) = &board.events else {
        std::thread::sleep(limit);
        return;
    };
    // A failed wait is a short one.
    let _ = crate::linux::process::poll_readable(events.as_fd(), limit);
    let mut buffer = vec![0; 8 << 10];
    while let Ok(Some(length)) = machine::read_waiting(events.as_fd(), &mut buffer) {
        board.drivers.hear(&buffer[..length]);
    }
}

fn has_label(volumes: &[Volume], label: &str) -> bool {
    volumes.iter().any(|volume| volume.label == label)
}

fn read_settings(board: &mut Board) -> Result<String> {
    await_devices(board, DISK_LIMIT_MS, |volumes| has_label(volumes, card::LABEL));
    let (volume, settings, problem) = card::read(&disks::volumes());
    (board.card, board.settings) = (volume, settings);
    match problem {
        Some(problem) => bail!(problem),
        None => Ok(format!("{} of the card", super::settings::FILE)),
    }
}

fn data_volume(volumes: &[Volume]) -> Option<Volume> {
    let labelled = |label: &str| {
        let fits = |volume: &&Volume| volume.label == label && volume.file_system == FileSystem::Ext4;
        volumes.iter().find(fits).cloned()
    };
    labelled(DATA_LABEL_DISK).or_else(|| labelled(DATA_LABEL_CARD))
}

fn mount_data(board: &mut Board) -> Result<String> {
    let has_plugs = ["/sys/bus/usb/devices/usb1", "/sys/class/nvme/nvme0"].map(Path::new);
    let may_come = has_plugs.iter().any(|path| path.exists());
    await_devices(board, DISK_LIMIT_MS, |volumes| data_volume(volumes).is_some());
    // A disk that spins up is worth a wait, where one may be plugged in.
    if may_come && !has_label(&disks::volumes(), DATA_LABEL_DISK) {
        await_devices(board, BETTER_DISK_MS, |volumes| has_label(volumes, DATA_LABEL_DISK));
    }
    let Some(volume) = data_volume(&disks::volumes()) else {
        bail!("no ext4 partition is labelled {DATA_LABEL_CARD} or {DATA_LABEL_DISK}")
    };
    let mut said = format!("{} ({})", volume.name, volume.label);
    match disks::grow_partition(&volume) {
        Ok(Some(bytes)) => said += &format!(", partition grown to {} MiB", bytes >> 20),
        Ok(None) => {}
        Err(error) => board.complain(&format!("grow {}: {error:#}", volume.name)),
    }
    disks::mount(&volume, Path::new(DATA_DIR), Access::ReadWrite)?;
    board.has_data_disk = true;
    match disks::grow_file_system(&volume, Path::new(DATA_DIR)) {
        Ok(Some(bytes)) => said += &format!(", file system grown to {} MiB", bytes >> 20),
        Ok(None) => {}
        Err(error) => board.complain(&format!("grow {}: {error:#}", volume.name)),
    }
    Ok(said)
}

/// A disk beside the data may be dying: a child of the supervisor reads and mounts them, while the rest goes on.
fn cover_disks(board: &mut Board) -> Result<String> {
    let wanted = &board.settings.disks;
    attach::cover_all(wanted)?;
    Ok(format!("{} awaited beside the data", wanted.len()))
}

fn lift_clock(_: &mut Board) -> Result<String> {
    Ok(match clock::lift(Path::new(DATA_DIR))? {
        Some(behind) => {
            format!("stood {} h before a time that has been; lifted to it", behind.as_secs() / 3600)
        }
        None => "from the hardware clock".into(),
    })
}

fn set_name(board: &mut Board) -> Result<String> {
    board.name = match (&board.settings.name, network::board_hardware()) {
        (Some(name), _) => name.clone(),
        (None, Some(hardware)) => {
            format!("tinydc-{:02x}{:02x}{:02x}", hardware[3], hardware[4], hardware[5])
        }
        (None, None) => "tinydc".into(),
    };
    nix::unistd::sethostname(&board.name).context("set the host name")?;
    let hosts = format!("127.0.0.1 localhost {}\n::1 localhost\n", board.name);
    fs::write("/etc/hosts", hosts).context("write /etc/hosts")?;
    fs::write(NODE_CONFIG, board.settings.node_config(&board.name))
        .context("write the daemon's configuration")?;
    Ok(board.name.clone())
}

fn open_network(board: &mut Board) -> Result<String> {
    let mut network = Network::open()?;
    network.look(&board.settings, &board.name, boot_ms());
    let said = network.addresses().join(", ");
    board.network = Some(network);
    anyhow::ensure!(!said.is_empty(), "no network interface was found");
    Ok(said)
}

fn open_watchdog(board: &mut Board) -> Result<String> {
    match Watchdog::open(boot_ms()) {
        Some((watchdog, seconds)) => {
            board.watchdog = Some(watchdog);
            Ok(format!("bites after {seconds} s"))
        }
        None => Ok("this board has none".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeDisk;

    #[test]
    fn no_phase_waits_for_a_disk_beside_the_data() {
        let mut board = Board::new();
        // Something is mounted there: nothing is to be covered.
        board.settings.disks = vec![NodeDisk { label: "tinydc no such".into(), target: "/proc".into() }];
        let phase = PHASES.iter().find(|phase| phase.name == DISKS_PHASE).unwrap();
        let began_ms = boot_ms();
        assert_eq!((phase.run)(&mut board).unwrap(), "1 awaited beside the data");
        assert!(boot_ms() - began_ms < BETTER_DISK_MS / 2);
    }
}

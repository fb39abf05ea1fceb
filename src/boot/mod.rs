//! tinydc as the first process of a machine: a small supervisor of one thread whose child is the daemon.
//!
//! Input: the kernel, a card, cables, a button. Output: mounts, drivers, addresses, a clock, a fed watchdog, and one
//! `tinydc node run` that is started again when it ends. It opens no database and speaks to no peer; it must never end.
//!
//! `phases` brings the machine up, one after the other, each with its time; `supervisor` then turns one loop that waits
//! for whatever happens first; `shutdown` takes everything down in order. What decides (`dhcp`, `sntp`, `settings`,
//! `partitions`, `modules`, `backoff`) is pure and tested as such; the whole is tested in guests (`tests/guests`).

mod attach;
mod backoff;
mod buttons;
mod card;
mod child;
mod clock;
mod console;
mod devices;
mod dhcp;
mod disks;
mod flash;
mod ground;
pub mod modules;
mod network;
mod node_watch;
pub mod partitions;
mod phases;
mod report;
pub mod settings;
mod shutdown;
mod slots;
mod sntp;
mod supervisor;
mod trial;
mod watchdog;

pub use card::LABEL as CARD_LABEL;
pub use child::LOG_FILE;
pub use flash::{BOARD_FILE, flash};
pub use phases::{BOARD_FOLDER, DATA_LABEL_CARD, DATA_LABEL_DISK};
pub use report::FILE as REPORT_FILE;

use std::ffi::OsString;
use std::process::ExitCode;

/// The kernel starts the first process under this name; a container's first process has another.
const INIT: &str = "/init";

/// Whether this process is a machine's first one.
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == INIT)
}

/// Brings the machine up and keeps it up. Never returns.
pub fn main() -> ! {
    let board = phases::run();
    supervisor::Supervisor::new(board).run()
}

/// The words with which the first process starts its helper for the time.
const CLOCK_WORD: &str = "boot-clock";

/// And the one that touches disks.
const DISKS_WORD: &str = "boot-disks";

/// Runs a helper of the first process, if these are its words: `boot-clock DATA_DIR [SERVER…]`, `boot-disks DISK…`, or the
/// kernel's `-q -- MODULE`.
pub fn helper(args: &[OsString]) -> Option<ExitCode> {
    let words: Vec<String> = args.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [CLOCK_WORD, data_dir, ..] => {
            let servers: Vec<String> = words[2..].iter().map(|word| word.to_string()).collect();
            Some(clock::ask(std::path::Path::new(data_dir), &servers))
        }
        [DISKS_WORD, ..] => Some(attend_disks(&words[1..])),
        ["-q", "--", module] => Some(load_module(module)),
        _ => None,
    }
}

fn attend_disks(words: &[&str]) -> ExitCode {
    let problems = attach::attend(&attach::parse_words(words));
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn load_module(name: &str) -> ExitCode {
    match devices::Drivers::read() {
        Ok(mut drivers) => {
            drivers.load_for(name);
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

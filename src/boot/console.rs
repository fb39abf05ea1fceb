//! What the board says on its screen and its serial lines, and the prompts that run there.
//!
//! Input: lines. Output: each line on every console that the kernel uses, and in the kernel's own log, where it outlives
//! the screen. A console that can't be written to is left out: nobody may be there.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

#[derive(Default)]
pub struct Console {
    terminals: Vec<(PathBuf, Option<File>)>,
}

fn open(path: &Path) -> Option<File> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    File::options().write(true).custom_flags(flags).open(path).ok()
}

impl Console {
    /// Every console of the kernel's command line.
    pub fn open() -> Console {
        let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        // tty0 is whichever screen is shown; a prompt needs one of its own.
        let names = active.split_whitespace().map(|name| if name == "tty0" { "tty1" } else { name });
        let paths = names.map(|name| Path::new("/dev").join(name));
        Console { terminals: paths.map(|path| (path.clone(), open(&path))).collect() }
    }

    pub fn say(&mut self, line: &str) {
        let text = format!("\r{line}\r\n");
        for (path, terminal) in &mut self.terminals {
            let is_written = |terminal: &mut Option<File>| {
                terminal.as_mut().is_some_and(|terminal| terminal.write_all(text.as_bytes()).is_ok())
            };
            // When a prompt ends the kernel hangs its terminal up, for everybody who had it open.
            if !is_written(terminal) {
                *terminal = open(path);
                // A serial line whose other end is gone takes nothing; its words are lost.
                is_written(terminal);
            }
        }
        if let Ok(mut log) = File::options().write(true).open("/dev/kmsg") {
            // Level 6: kept, and not printed a second time where the command line says `quiet`.
            let _ = log.write_all(format!("<6>tinydc: {line}\n").as_bytes());
        }
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        self.terminals.iter().map(|(path, _)| path.clone()).collect()
    }
}

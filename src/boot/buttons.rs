//! The power button: ACPI's and those on GPIO pins, as the kernel's input events.

use crate::linux::machine;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// struct input_event on machines of 64 bit: two words of time, type, code, value.
const EVENT_BYTES: usize = 24;
const KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const KEY_SLEEP: u16 = 142;
const PRESSED: i32 = 1;
const DEVICES_MAX: usize = 32;

#[derive(Default)]
pub struct Buttons {
    devices: Vec<(PathBuf, File)>,
}

fn is_power_pressed(event: &[u8]) -> bool {
    let number = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    number(16) == KEY && matches!(number(18), KEY_POWER | KEY_SLEEP) && value == PRESSED
}

impl Buttons {
    /// Opens input devices that have come.
    pub fn look(&mut self) {
        for entry in fs::read_dir("/dev/input").into_iter().flatten().flatten() {
            let path = entry.path();
            let is_event = entry.file_name().to_string_lossy().starts_with("event");
            let is_known = self.devices.iter().any(|(known, _)| *known == path);
            if is_event && !is_known && self.devices.len() < DEVICES_MAX {
                let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
                self.devices.extend(opened.ok().map(|file| (path, file)));
            }
        }
    }

    pub fn waits_on(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.devices.iter().map(|(_, file)| file.as_fd())
    }

    /// Reads what was pressed; true for the power button.
    pub fn is_pressed(&mut self) -> bool {
        let mut is_pressed = false;
        let mut buffer = [0; EVENT_BYTES * 16];
        // A device that is gone answers with an error.
        self.devices.retain(|(_, file)| {
            loop {
                match machine::read_waiting(file.as_fd(), &mut buffer) {
                    Ok(Some(length)) if length >= EVENT_BYTES => {
                        is_pressed |= buffer[..length].chunks_exact(EVENT_BYTES).any(is_power_pressed);
                    }
                    Ok(_) => return true,
                    Err(_) => return false,
                }
            }
        });
        is_pressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pressing_the_power_key_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            is_power_pressed(&bytes)
        };
        assert!(event(KEY, KEY_POWER, 1));
        assert!(!event(KEY, KEY_POWER, 0), "let go");
        assert!(!event(KEY, 30, 1), "another key");
        assert!(!event(4, KEY_POWER, 1), "another kind");
    }
}

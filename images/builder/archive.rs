//! An archive that the kernel unpacks into its first root: cpio in the "new ASCII" form.
//!
//! Input: files in memory. Output: bytes, the same for the same files: no times, no owners.

use std::collections::BTreeSet;

const FOLDER_MODE: u32 = 0o40_755;
const PROGRAM_MODE: u32 = 0o100_755;
const FILE_MODE: u32 = 0o100_644;
const DEVICE_MODE: u32 = 0o20_600;

pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    number: u32,
    /// Of every file, since 1970: a clock without a battery starts there.
    time_s: u32,
}

impl Archive {
    pub fn new(time_s: u32) -> Archive {
        Archive { bytes: Vec::new(), folders: BTreeSet::new(), number: 0, time_s }
    }

    fn entry(&mut self, name: &str, mode: u32, body: &[u8], device: (u32, u32)) {
        self.number += 1;
        let links = if mode & 0o170_000 == 0o40_000 { 2 } else { 1 };
        let fields = [
            self.number,
            mode,
            0,
            0,
            links,
            self.time_s,
            body.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(body);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub fn folder(&mut self, path: &str) {
        let mut so_far = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far += part;
            if self.folders.insert(so_far.clone()) {
                self.entry(&so_far.clone(), FOLDER_MODE, &[], (0, 0));
            }
        }
    }

    fn parents(&mut self, path: &str) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
    }

    pub fn program(&mut self, path: &str, body: &[u8]) {
        self.parents(path);
        self.entry(path, PROGRAM_MODE, body, (0, 0));
    }

    pub fn file(&mut self, path: &str, body: &[u8]) {
        self.parents(path);
        self.entry(path, FILE_MODE, body, (0, 0));
    }

    /// A character device, such as the console that the kernel opens for the first process.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, DEVICE_MODE, &[], (major, minor));
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.time_s = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

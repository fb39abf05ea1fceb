//! What differs per board: `board/NAME/board.toml` and the files beside it.

use crate::kernel::Kernel;
use crate::packages::Packages;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

const FOLDER: &str = "board";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    /// Reads `autoboot.txt`, then `config.txt` of the slot that it names.
    RaspberryPi,
    /// Starts systemd-boot from the first partition, which finds the slots' entries there.
    Uefi,
    /// A script that U-Boot runs, or whoever starts a guest with the slot's own kernel.
    Direct,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// What a person calls it.
    pub title: String,
    pub architecture: String,
    pub firmware: Firmware,
    /// Debian's package of the kernel.
    pub kernel: String,
    pub command_line: String,
    /// Modules that are loaded whatever the devices.
    #[serde(default)]
    pub load: Vec<String>,
    /// Modules, or folders of them, that devices may ask for.
    #[serde(default)]
    pub carry: Vec<String>,
    #[serde(default)]
    pub device_trees: Vec<String>,
    /// Files of the vendor's firmware, for the slots.
    #[serde(default)]
    pub vendor_files: Vec<String>,
    /// The same for the first partition, where a boot ROM looks.
    #[serde(default)]
    pub first_files: Vec<String>,
    #[serde(skip)]
    pub name: String,
}

/// What goes onto the boot partitions: where, and from where.
#[derive(Default)]
pub struct BootFiles {
    pub first: Vec<(String, PathBuf)>,
    pub slot: Vec<(String, PathBuf)>,
}

/// The boards that can be built.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    let boards = entries.filter(|entry| entry.path().join("board.toml").exists());
    let mut names: Vec<String> = boards.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Names in a list of modules: one a line, remarks after `#`.
fn list(text: &str) -> impl Iterator<Item = String> + '_ {
    let names = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    names.filter(|name| !name.is_empty()).map(String::from)
}

impl Board {
    pub fn read(name: &str) -> Result<Board> {
        let path = Path::new(FOLDER).join(name).join("board.toml");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("no board is called {name}; there are: {}", names().join(", ")))?;
        let mut board: Board = toml::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        board.name = name.into();
        let of_all = |name: &str| {
            let path = Path::new(FOLDER).join(name);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        board.load.splice(0..0, list(&of_all("modules")?));
        board.carry.extend(list(&of_all("modules-when-used")?));
        ensure!(
            ["aarch64", "x86_64"].contains(&board.architecture.as_str()),
            "{}: architecture is aarch64 or x86_64, not {}",
            path.display(),
            board.architecture
        );
        Ok(board)
    }

    /// Debian's word for the architecture.
    pub fn debian_architecture(&self) -> &'static str {
        if self.architecture == "aarch64" { "arm64" } else { "amd64" }
    }

    /// A file beside `board.toml`, or the builder's word for all boards.
    fn own_file(&self, name: &str) -> PathBuf {
        Path::new(FOLDER).join(&self.name).join(name)
    }

    pub fn boot_files(&self, packages: &Packages, kernel: &Kernel) -> Result<BootFiles> {
        let mut files = BootFiles::default();
        files.slot.push(("kernel.img".into(), kernel.image.clone()));
        files.slot.push(("initramfs.img".into(), kernel.initramfs.clone()));
        files.slot.push(("cmdline.txt".into(), kernel.command_line.clone()));
        files.slot.push((tinydc::boot::BOARD_FILE.into(), kernel.board.clone()));
        for name in &self.device_trees {
            let path = packages.find(&format!("dtb/{name}"))?;
            let last = name.rsplit('/').next().unwrap_or(name);
            files.slot.push((last.into(), path));
        }
        for name in &self.vendor_files {
            files.slot.push((name.clone(), packages.find(&format!("raspi-firmware/{name}"))?));
        }
        for name in &self.first_files {
            files.first.push((name.clone(), packages.find(&format!("raspi-firmware/{name}"))?));
        }
        match self.firmware {
            Firmware::RaspberryPi => {
                files.slot.push(("config.txt".into(), self.own_file("config.txt")));
                files.first.push(("autoboot.txt".into(), Path::new(FOLDER).join("autoboot.txt")));
            }
            Firmware::Direct => {
                files.first.push(("autoboot.txt".into(), Path::new(FOLDER).join("autoboot.txt")));
            }
            Firmware::Uefi => {
                let loader = if self.architecture == "aarch64" { "aa64" } else { "x64" };
                let program = packages.find(&format!("boot/efi/systemd-boot{loader}.efi"))?;
                files.first.push((format!("EFI/BOOT/BOOT{}.EFI", loader.to_uppercase()), program));
            }
        }
        Ok(files)
    }
}

//! Debian's packages: looked up, fetched and unpacked below `target/`, apart from those of the machine that builds.
//!
//! Input: a board. Output: folders with what its packages hold. Needs apt and its keyring, no root: the lists and the
//! cache are own ones. Nothing is fetched twice.

use crate::board::{Board, Firmware};
use crate::run;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = "target/images/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const MIRROR: &str = "http://deb.debian.org/debian";
/// Its kernel knows the newest boards.
const SUITES: [&str; 2] = ["trixie", "trixie-backports"];

pub struct Packages {
    /// Each package's own folder.
    folders: Vec<PathBuf>,
    /// Of the kernel: `7.3.4+deb13-arm64`.
    pub release: String,
}

struct Apt {
    folder: PathBuf,
    architecture: &'static str,
}

impl Apt {
    fn open(architecture: &'static str) -> Result<Apt> {
        let folder = std::path::absolute(FOLDER).context("find the folder of packages")?;
        let apt = Apt { folder, architecture };
        for name in [
            "lists/partial",
            "cache/archives/partial",
            "etc/preferences.d",
            "etc/apt.conf.d",
            "etc/trusted.gpg.d",
        ] {
            fs::create_dir_all(apt.folder.join(name)).with_context(|| format!("create {name}"))?;
        }
        let sources: String = SUITES
            .iter()
            .map(|suite| format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main non-free-firmware\n"))
            .collect();
        fs::write(apt.folder.join("sources.list"), sources).context("write sources.list")?;
        fs::write(apt.folder.join("status"), "").context("write status")?;
        let has_lists = fs::read_dir(apt.folder.join("lists")).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("Packages"))
            })
        });
        if !has_lists {
            println!("fetching the lists of Debian {}", SUITES.join(" and "));
            apt.run("apt-get", &["update"]).context("fetch Debian's lists of packages")?;
        }
        Ok(apt)
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        let folder = self.folder.display();
        let options = [
            format!("Dir::State={folder}"),
            format!("Dir::State::status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            format!("Dir::Etc={folder}/etc"),
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            format!("APT::Architecture={}", self.architecture),
            "APT::Architectures=arm64,amd64".into(),
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
        ];
        let mut command = Command::new(program);
        command.arg("-q").current_dir(&self.folder);
        for option in options {
            command.args(["-o", &option]);
        }
        let output = run(command.args(words))?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// A field of the newest version of a package.
    fn field(&self, package: &str, field: &str) -> Result<String> {
        let text = self.run("apt-cache", &["show", package]).with_context(|| format!("look up {package}"))?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "));
        Ok(value.with_context(|| format!("{package} has no {field}"))?.to_string())
    }

    /// The folder of an unpacked package.
    fn unpack(&self, package: &str) -> Result<PathBuf> {
        let version = self.field(package, "Version")?;
        let target = self.folder.join("unpacked").join(format!("{package}_{version}_{}", self.architecture));
        if target.exists() {
            return Ok(target);
        }
        println!("fetching {package} {version}");
        let fetched = self.folder.join("fetched");
        fs::create_dir_all(&fetched).context("create a folder for packages")?;
        let wanted = format!("{package}={version}");
        let address = self.run("apt-get", &["--print-uris", "download", &wanted])?;
        // 'http://…' FILE SIZE SHA256:…
        let file =
            address.split_whitespace().nth(1).with_context(|| format!("where is {package}?"))?.to_string();
        self.run("apt-get", &["download", &wanted]).with_context(|| format!("fetch {package}"))?;
        let archive = self.folder.join(&file);
        let partial = target.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).context("remove what was half unpacked")?;
        }
        fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&partial))
            .with_context(|| format!("unpack {package}"))?;
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
        fs::rename(&partial, &target).with_context(|| format!("keep {}", target.display()))?;
        Ok(target)
    }
}

pub fn fetch(board: &Board) -> Result<Packages> {
    let apt = Apt::open(board.debian_architecture())?;
    let needs = apt.field(&board.kernel, "Depends")?;
    let named = needs.split(|c: char| c == ',' || c.is_whitespace());
    // linux-image-7.3.4+deb13-arm64; the others that it names have no version in their names.
    let image = named.filter_map(|word| word.strip_prefix("linux-image-"));
    let release = image
        .filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        .map(String::from)
        .next()
        .with_context(|| format!("{} names no kernel: {needs}", board.kernel))?;
    let mut folders = Vec::new();
    for kind in ["binary", "modules", "base"] {
        folders.push(apt.unpack(&format!("linux-{kind}-{release}"))?);
    }
    if board.firmware == Firmware::RaspberryPi {
        folders.push(apt.unpack("raspi-firmware")?);
    }
    if board.firmware == Firmware::Uefi {
        folders.push(apt.unpack("systemd-boot-efi")?);
    }
    Ok(Packages { folders, release })
}

impl Packages {
    /// A file by the end of its path.
    pub fn find(&self, ending: &str) -> Result<PathBuf> {
        let ending = Path::new(ending);
        let mut folders = self.folders.clone();
        while let Some(folder) = folders.pop() {
            let mut entries: Vec<PathBuf> =
                fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            entries.sort();
            for path in entries {
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if path.ends_with(ending) {
                    return Ok(path);
                }
            }
        }
        anyhow::bail!("no package of this board has {}", ending.display())
    }

    /// The folder with the kernel's modules of a package that has one.
    pub fn modules(&self) -> Result<PathBuf> {
        let folder = Path::new("usr/lib/modules").join(&self.release);
        let mut candidates = self.folders.iter().map(|package| package.join(&folder));
        candidates
            .find(|folder| folder.join("kernel").exists())
            .context("no package has the kernel's modules")
    }
}

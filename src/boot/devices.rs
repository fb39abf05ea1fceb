//! Drivers for the devices that are there, and for those that come later.
//!
//! Input: the catalogue of modules, `modalias` files below `/sys/devices`, the kernel's device events. Output: loaded
//! modules. The file of a loaded module is removed: the root is memory, and a module that is loaded is never read again.

use super::modules::Catalogue;
use crate::linux::machine;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Buses reveal devices when their driver is there; deeper than this none nests.
const ROUNDS_MAX: usize = 8;
const DEPTH_MAX: usize = 24;

#[derive(Default)]
pub struct Drivers {
    folder: PathBuf,
    catalogue: Catalogue,
    loaded: BTreeSet<String>,
    /// Modules that could not be loaded, with why; each is told once.
    failed: Vec<String>,
    seen: BTreeSet<String>,
}

impl Drivers {
    /// The modules of the running kernel; none when the kernel has none.
    pub fn read() -> Result<Drivers> {
        let release =
            fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's version")?;
        let folder = Path::new("/lib/modules").join(release.trim());
        let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let catalogue =
            Catalogue::parse(&text("modules.dep"), &text("modules.softdep"), &text("modules.alias"));
        Ok(Drivers { folder, catalogue, ..Drivers::default() })
    }

    /// Loads these and what they need. What is not a module of this kernel is built in, or missing: the first use of
    /// it tells.
    pub fn load(&mut self, names: &[&str]) {
        for name in self.catalogue.order(names) {
            if !self.loaded.insert(name.clone()) {
                continue;
            }
            if let Err(error) = self.load_one(&name) {
                self.failed.push(format!("{error:#}"));
            }
        }
    }

    fn load_one(&self, name: &str) -> Result<()> {
        let Some(file) = self.catalogue.file(name) else { return Ok(()) };
        let path = self.folder.join(file);
        // Loaded by another process of this program, whose memory is not this one's.
        if Path::new("/sys/module").join(name).exists() {
            return Ok(());
        }
        let module = File::open(&path).with_context(|| format!("open module {name}"))?;
        machine::load_module(&module, c"").with_context(|| format!("load module {name}"))?;
        // Only memory is lost if it stays.
        let _ = fs::remove_file(&path);
        Ok(())
    }

    /// A module by its name or by an alias, such as the kernel asks for when a feature is first used.
    pub fn load_for(&mut self, wanted: &str) {
        let mut names: Vec<String> = self.catalogue.for_alias(wanted).into_iter().map(String::from).collect();
        names.push(wanted.into());
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.load(&names);
    }

    /// Loads drivers for all devices, until no driver reveals another device.
    pub fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            let mut found = BTreeSet::new();
            collect(Path::new("/sys/devices"), 0, &mut found);
            let fresh: Vec<String> = found.difference(&self.seen).cloned().collect();
            if fresh.is_empty() {
                return;
            }
            for alias in fresh {
                self.serve(&alias);
            }
        }
    }

    /// One device, by its alias.
    pub fn serve(&mut self, alias: &str) {
        if !self.seen.insert(alias.into()) {
            return;
        }
        let names: Vec<String> = self.catalogue.for_alias(alias).into_iter().map(String::from).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.load(&names);
    }

    /// An event of the kernel; true when a device came.
    pub fn hear(&mut self, event: &[u8]) -> bool {
        let mut parts = event.split(|byte| *byte == 0);
        let is_new = parts.next().is_some_and(|head| head.starts_with(b"add@"));
        if is_new {
            for part in parts {
                if let Some(alias) = part.strip_prefix(b"MODALIAS=") {
                    self.serve(&String::from_utf8_lossy(alias));
                }
            }
        }
        is_new
    }

    pub fn count(&self) -> usize {
        self.loaded.len()
    }

    pub fn take_failures(&mut self) -> Vec<String> {
        std::mem::take(&mut self.failed)
    }
}

/// Aliases of all devices below a folder. Links are not followed: each device has one place.
fn collect(folder: &Path, depth: usize, found: &mut BTreeSet<String>) {
    if depth > DEPTH_MAX {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&entry.path(), depth + 1, found);
        } else if kind.is_file() && entry.file_name() == "modalias" {
            let alias = fs::read_to_string(entry.path()).unwrap_or_default();
            found.extend(Some(alias.trim().to_string()).filter(|alias| !alias.is_empty()));
        }
    }
}

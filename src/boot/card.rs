//! The card's FAT partition as a person sees it: `tinydc.toml` read, and its token taken out once it was used.

use super::disks::{self, Access, FileSystem, Volume};
use super::settings::{self, Settings};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

pub const LABEL: &str = "TINYDC";
/// What no editor's file exceeds.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The volume that holds the file, and what it says; the error tells why defaults are used.
pub fn read(volumes: &[Volume]) -> (Option<Volume>, Settings, Option<String>) {
    let is_ours = |volume: &&Volume| volume.file_system == FileSystem::Fat && volume.label == LABEL;
    let Some(volume) = volumes.iter().find(is_ours).cloned() else {
        return (
            None,
            Settings::default(),
            Some(format!("no FAT partition is labelled {LABEL}; defaults are used")),
        );
    };
    let text = disks::with_mounted(&volume, Access::ReadOnly, read_file);
    let text = match text {
        Ok(Some(text)) => text,
        Ok(None) => return (Some(volume), Settings::default(), None),
        Err(error) => {
            return (Some(volume), Settings::default(), Some(format!("{error:#}; defaults are used")));
        }
    };
    match settings::parse(&text) {
        Ok(settings) => (Some(volume), settings, None),
        Err(problem) => (Some(volume), Settings::default(), Some(format!("{problem}; defaults are used"))),
    }
}

fn read_file(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(settings::FILE);
    let bytes = match fs::metadata(&path) {
        Ok(file) if file.len() > FILE_BYTES_MAX => bail!("{} is longer than 64 KiB", settings::FILE),
        Ok(_) => fs::read(&path).with_context(|| format!("read {}", settings::FILE))?,
        Err(_) => return Ok(None),
    };
    let text = String::from_utf8(bytes);
    Ok(Some(text.with_context(|| format!("{} is not UTF-8 text; save it as such", settings::FILE))?))
}

/// Takes the token out of the file: it was used, and a card may be lost. The new text is whole on the card before the
/// old one goes.
pub fn wipe_token(volume: &Volume, remark: &str) -> Result<bool> {
    disks::with_mounted(volume, Access::ReadWrite, |folder| {
        let path = folder.join(settings::FILE);
        let text = read_file(folder)?.unwrap_or_default();
        let Some(text) = settings::without_token(&text, remark) else { return Ok(false) };
        let fresh = folder.join("tinydc.new");
        fs::write(&fresh, text).context("write tinydc.new")?;
        rustix::fs::sync();
        fs::rename(&fresh, &path).with_context(|| format!("replace {}", settings::FILE))?;
        Ok(true)
    })
}

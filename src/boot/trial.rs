//! A start from the slot on trial: kept or left.
//!
//! Input: the card's `autoboot.txt`, the partition that the firmware says it started from. Output: the file with the
//! numbers exchanged once the slot has proved itself; or a word that the board must go back, by an ordinary restart.

use super::disks::{self, Access, Volume};
use super::phases::Board;
use super::slots::{self, Slots, Standing, Verdict};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Four bytes, of which the first is the highest, in the tree that the Raspberry Pi's firmware hands over.
const TOLD_BY_FIRMWARE: &str = "/proc/device-tree/chosen/bootloader/partition";
const WORD: &str = "tinydc.partition=";
/// Shortens the window, for tests of a slot that is no good.
const WINDOW_WORD: &str = "tinydc.trial_ms=";

pub struct Trial {
    card: Volume,
    slots: Slots,
    before: Standing,
    window_ms: u64,
}

fn started_from(words: &[String]) -> Option<u32> {
    let told = words.iter().find_map(|word| word.strip_prefix(WORD)?.parse().ok());
    told.or_else(|| Some(u32::from_be_bytes(fs::read(TOLD_BY_FIRMWARE).ok()?.try_into().ok()?)))
}

impl Trial {
    /// `None`: this is the usual slot, or the board has no two.
    pub fn of(board: &Board) -> Option<Trial> {
        let card = board.card.clone()?;
        let from = started_from(&board.words)?;
        let text = disks::with_mounted(&card, Access::ReadOnly, |folder| {
            let standing = fs::read_to_string(folder.join(slots::STANDING_FILE)).unwrap_or_default();
            let text = fs::read_to_string(folder.join(slots::FILE)).context("read the slots")?;
            Ok((text, standing))
        });
        let (text, standing) = text.ok()?;
        let (slots, before) = (Slots::parse(&text)?, Standing::parse(&standing));
        let given = board.words.iter().find_map(|word| word.strip_prefix(WINDOW_WORD)?.parse().ok());
        let window_ms = given.unwrap_or(slots::WINDOW_MS);
        (from == slots.trial).then_some(Trial { card, slots, before, window_ms })
    }

    /// What the board had before and has no more.
    pub fn lack(&self, now: Standing) -> Option<&'static str> {
        now.lack(self.before)
    }

    pub fn judge(&self, since_start_ms: u64, well_ms: Option<u64>) -> Verdict {
        slots::judge(since_start_ms, well_ms, self.window_ms)
    }

    /// From now on every start is from this slot. Returns its number.
    pub fn keep(&self) -> Result<u32> {
        disks::with_mounted(&self.card, Access::ReadWrite, |folder| {
            let fresh = folder.join("autoboot.new");
            fs::write(&fresh, self.slots.exchanged().text()).context("write autoboot.new")?;
            rustix::fs::sync();
            let path: &Path = &folder.join(slots::FILE);
            fs::rename(&fresh, path).context("replace autoboot.txt")
        })?;
        Ok(self.slots.trial)
    }
}

//! Writes an image's boot slot into the slot that is not in use, and asks for one start from it.
//!
//! Input: an image as `images/build` made it, from a file or by HTTP, with its checksum beside it. Output: the other
//! slot, and a restart. Settings, identity and data lie on other partitions and are not touched. Only blocks that differ
//! are written. Nothing is asked for before the checksum holds and the slot names this very board.

use super::card;
use super::disks::{self, Access, FileSystem, Volume};
use super::partitions::{self, SECTOR};
use super::phases::BOARD_FOLDER;
use super::report;
use super::slots::{self, Slots};
use crate::runtime::images::decompress::decompress;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Of an image's partitions, the slot that holds what is new.
const SLOT_NUMBER: u32 = 2;
const BLOCK_BYTES: usize = 64 << 10;
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const SUM_BYTES_MAX: u64 = 4 << 10;
/// In each slot: the board that it was built for.
pub const BOARD_FILE: &str = "board.txt";

/// Counts and sums what passes.
struct Summing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Summing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}

fn open(source: &str) -> Result<Box<dyn Read>> {
    if source.starts_with("http://") || source.starts_with("https://") {
        let config = ureq::Agent::config_builder().timeout_recv_response(Some(ANSWER_LIMIT)).build();
        let answer = ureq::Agent::from(config).get(source).call();
        let answer = answer.with_context(|| format!("fetch {source}"))?;
        return Ok(Box::new(answer.into_body().into_reader()));
    }
    Ok(Box::new(File::open(source).with_context(|| format!("open {source}"))?))
}

/// The first word of the checksum's file.
fn expected_sum(source: &str) -> Result<String> {
    let place = format!("{source}.sha256");
    let mut text = String::new();
    open(&place)?.take(SUM_BYTES_MAX).read_to_string(&mut text).with_context(|| format!("read {place}"))?;
    let sum = text.split_whitespace().next().unwrap_or_default().to_string();
    ensure!(sum.len() == 64, "{place} holds no SHA-256; images/build writes it beside the image");
    Ok(sum)
}

/// The slots as the card names them, and the device of the other one.
fn other_slot(card: &Volume) -> Result<PathBuf> {
    let text = disks::with_mounted(card, Access::ReadOnly, |folder| {
        fs::read_to_string(folder.join(slots::FILE)).with_context(|| format!("read {}", slots::FILE))
    });
    let text =
        text.context("this board's slots are not partitions of their own; write its image anew instead")?;
    let slots = Slots::parse(&text).with_context(|| format!("{} names no two slots", slots::FILE))?;
    let (disk, _) = card.partition.clone().context("the card's first partition lies on a disk")?;
    // mmcblk0p3, but sda3.
    let between = if disk.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
    let device = Path::new("/dev").join(format!("{disk}{between}{}", slots.trial));
    ensure!(device.exists(), "{} is not there", device.display());
    Ok(device)
}

/// Writes, checks, and asks for the start. `say` gets a line at each step.
pub fn flash(source: &str, say: &dyn Fn(&str)) -> Result<()> {
    let is_board = fs::read("/proc/1/cmdline").is_ok_and(|line| line.starts_with(super::INIT.as_bytes()));
    ensure!(is_board, "only a board that tinydc itself has started can be flashed; type this at its prompt");
    let is_ours = |volume: &Volume| volume.file_system == FileSystem::Fat && volume.label == card::LABEL;
    let card = disks::volumes().into_iter().find(is_ours);
    let card = card.with_context(|| format!("no FAT partition is labelled {}", card::LABEL))?;
    let device = other_slot(&card)?;
    let expected = expected_sum(source)?;
    say(&format!("writing {} from {source}", device.display()));
    let mut summing = Summing { inner: open(source)?, hash: Sha256::new() };
    let written = {
        let mut image = decompress(BufReader::new(&mut summing)).context("unpack the image")?;
        let written = write_slot(&mut image, &device)?;
        // The sum is that of the whole file.
        std::io::copy(&mut image, &mut std::io::sink()).context("read the image to its end")?;
        written
    };
    std::io::copy(&mut summing, &mut std::io::sink()).context("read the image to its end")?;
    let actual: String = summing.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(
        actual == expected,
        "the image's SHA-256 is {actual}, {source}.sha256 says {expected}; fetch it again"
    );
    check_board(&device)?;
    say(&format!("{} KiB differed and were written; the checksum holds", written >> 10));
    let standing = fs::read_to_string(report::FILE).context("read how this board is")?;
    disks::with_mounted(&card, Access::ReadWrite, |folder| {
        fs::write(folder.join(slots::STANDING_FILE), standing).context("note what the slot is to have")?;
        fs::write(folder.join(slots::TRY_FILE), b"").context("ask for one start from the other slot")
    })?;
    say("restarting from the other slot; if that is not well, the board comes back to this one");
    kill(Pid::from_raw(1), Signal::SIGUSR1).context("ask the first process to restart")
}

/// Copies the image's slot. Returns how many bytes differed.
fn write_slot(image: &mut dyn Read, device: &Path) -> Result<u64> {
    let mut head = vec![0; partitions::HEAD_BYTES];
    image.read_exact(&mut head).context("read the image's begin")?;
    let table = partitions::read(&head).context("the image has no partition table")?;
    let slot = table.partitions.iter().find(|one| one.number == SLOT_NUMBER);
    let slot = slot.context("the image has no slot; is it one of images/build for this board?")?;
    let target = File::options().read(true).write(true).open(device);
    let target = target.with_context(|| format!("open {}", device.display()))?;
    let room = crate::linux::machine::device_bytes(&target).context("ask the slot's size")?;
    let length = slot.sectors * SECTOR;
    ensure!(length <= room, "the image's slot has {length} bytes, this board's {room}");
    let gap = (slot.start * SECTOR).checked_sub(partitions::HEAD_BYTES as u64);
    let gap = gap.context("the image's slot begins within its partition table")?;
    std::io::copy(&mut image.take(gap), &mut std::io::sink()).context("read up to the slot")?;
    let (mut fresh, mut old) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    let (mut at, mut written) = (0, 0);
    while at < length {
        let part = BLOCK_BYTES.min((length - at) as usize);
        image.read_exact(&mut fresh[..part]).context("read the image's slot")?;
        target.read_exact_at(&mut old[..part], at).context("read the slot")?;
        if fresh[..part] != old[..part] {
            target.write_all_at(&fresh[..part], at).context("write the slot")?;
            written += part as u64;
        }
        at += part as u64;
    }
    target.sync_all().context("write the slot")?;
    Ok(written)
}

fn check_board(device: &Path) -> Result<()> {
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let volume = disks::volumes().into_iter().find(|volume| volume.name == name);
    let volume = volume.with_context(|| format!("what was written to {name} is no boot partition"))?;
    let said = disks::with_mounted(&volume, Access::ReadOnly, |folder| {
        fs::read_to_string(folder.join(BOARD_FILE)).with_context(|| format!("read {BOARD_FILE}"))
    })?;
    let own = fs::read_to_string(Path::new(BOARD_FOLDER).join("board")).context("read this board's name")?;
    if said.trim() != own.trim() {
        bail!("the image is for the board {}, this is {}", said.trim(), own.trim());
    }
    Ok(())
}

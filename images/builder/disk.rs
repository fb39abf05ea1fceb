//! The disk: a first FAT partition that a person edits, two boot slots, and the data partition that grows.
//!
//! Input: files for the partitions. Output: one sparse file, its block map, its checksum. Made with mtools and mke2fs on
//! plain files: nothing is mounted.
//!
//! Boards whose firmware is UEFI have both slots as folders of the first partition, because systemd-boot looks nowhere
//! else; the others have a partition for each.

use crate::board::{Board, BootFiles, Firmware};
use crate::{Part, run};
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tinydc::boot::partitions::{Kind, Partition, SECTOR, Scheme, Table};
use tinydc::boot::{CARD_LABEL, DATA_LABEL_CARD};

const MIB: u64 = 1 << 20;
const START_MIB: u64 = 4;
/// The least that is a FAT32 with clusters of one sector.
const FIRST_MIB: u64 = 36;
const FIRST_WITH_SLOTS_MIB: u64 = 256;
const SLOT_MIB: u64 = 96;
/// Room for a node to start where the partition can't grow.
const DATA_MIB: u64 = 64;
/// Does not grow with the file system, so it is made for a card at once.
const JOURNAL_MIB: u64 = 16;
const BLOCK_BYTES: usize = 4096;

struct Area {
    kind: Kind,
    mib: u64,
    image: PathBuf,
}

pub fn build(
    board: &Board,
    files: &BootFiles,
    settings: &str,
    work: &Path,
    output: &Path,
) -> Result<Vec<Part>> {
    let settings_path = work.join("tinydc.toml");
    fs::write(&settings_path, settings).context("write tinydc.toml")?;
    let mut first = files.first.clone();
    first.push(("tinydc.toml".into(), settings_path));
    let mut areas = Vec::new();
    if board.firmware == Firmware::Uefi {
        first.extend(uefi_slot(board, files, work)?);
        areas.push(fat(work, CARD_LABEL, FIRST_WITH_SLOTS_MIB, &first)?);
    } else {
        areas.push(fat(work, CARD_LABEL, FIRST_MIB, &first)?);
        areas.push(fat(work, "TINYDC-A", SLOT_MIB, &files.slot)?);
        areas.push(fat(work, "TINYDC-B", SLOT_MIB, &[])?);
    }
    areas.push(ext4(work)?);
    assemble(board, &areas, output)?;
    let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    let boot_bytes = files.slot.iter().chain(&first).map(|(_, path)| size(path)).sum();
    let mut parts = vec![Part { name: "files of the boot partitions".into(), bytes: boot_bytes }];
    let disk = fs::metadata(output).context("look at the disk")?.len();
    parts.push(Part { name: "disk, mostly empty".into(), bytes: disk });
    Ok(parts)
}

/// systemd-boot's entry for slot A, and the slot's files beside it.
fn uefi_slot(board: &Board, files: &BootFiles, work: &Path) -> Result<Vec<(String, PathBuf)>> {
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let path = work.join(name.replace('/', "_"));
        fs::write(&path, text).with_context(|| format!("write {name}"))?;
        Ok(path)
    };
    let entry = format!(
        "title tinydc A\nsort-key tinydc\nversion 1\nlinux /a/kernel.img\ninitrd /a/initramfs.img\noptions {} tinydc.slot=a\n",
        board.command_line
    );
    let mut placed = vec![
        ("loader/loader.conf".to_string(), write("loader/loader.conf", "timeout 0\neditor no\n".into())?),
        ("loader/entries/tinydc-a.conf".to_string(), write("loader/entries/tinydc-a.conf", entry)?),
    ];
    placed.extend(files.slot.iter().map(|(name, path)| (format!("a/{name}"), path.clone())));
    Ok(placed)
}

/// A FAT32 with these files.
fn fat(work: &Path, label: &str, mib: u64, files: &[(String, PathBuf)]) -> Result<Area> {
    let image = work.join(format!("{label}.fat"));
    File::create(&image)
        .and_then(|file| file.set_len(mib * MIB))
        .with_context(|| format!("create {}", image.display()))?;
    let mkfs = ["/usr/sbin/mkfs.vfat", "/sbin/mkfs.vfat"].into_iter().find(|path| Path::new(path).exists());
    let mkfs = mkfs.context("mkfs.vfat is missing; install dosfstools")?;
    // The label's sum tells the volumes of one disk apart, and is the same in each build.
    let id = label.bytes().fold(0x7d0c_0000u32, |id, byte| id.wrapping_mul(31).wrapping_add(byte.into()));
    let mut command = Command::new(mkfs);
    command.args(["-F", "32", "-s", if mib > 128 { "4" } else { "1" }, "--invariant", "-n", label, "-i"]);
    run(command.arg(format!("{id:08x}")).arg(&image))?;
    let mut made = std::collections::BTreeSet::new();
    for (name, from) in files {
        let mut folder = String::new();
        let parts: Vec<&str> = name.split('/').collect();
        for part in &parts[..parts.len() - 1] {
            folder = format!("{folder}/{part}");
            if made.insert(folder.clone()) {
                run(mtools("mmd").arg("-i").arg(&image).arg(format!("::{folder}")))?;
            }
        }
        // Copied with the time of the file, which is set to one that is the same in each build.
        run(mtools("mcopy").arg("-m").arg("-i").arg(&image).arg(dated(work, from)?).arg(format!("::{name}")))
            .with_context(|| format!("put {name} on {label}"))?;
    }
    Ok(Area { kind: Kind::Boot, mib, image })
}

fn mtools(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("MTOOLS_SKIP_CHECK", "1").env("TZ", "UTC").env("SOURCE_DATE_EPOCH", "1735689600");
    command
}

/// A copy whose time is the first of January 2025.
fn dated(work: &Path, from: &Path) -> Result<PathBuf> {
    let copy = work.join("dated");
    fs::copy(from, &copy).with_context(|| format!("copy {}", from.display()))?;
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_735_689_600);
    File::options()
        .write(true)
        .open(&copy)
        .and_then(|file| file.set_modified(time))
        .context("date a file")?;
    Ok(copy)
}

fn ext4(work: &Path) -> Result<Area> {
    let image = work.join("data.ext4");
    let mke2fs = ["/usr/sbin/mke2fs", "/sbin/mke2fs"].into_iter().find(|path| Path::new(path).exists());
    let mut command = Command::new(mke2fs.context("mke2fs is missing; install e2fsprogs")?);
    command.env("E2FSPROGS_FAKE_TIME", "1735689600").args([
        "-q",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-L",
        DATA_LABEL_CARD,
    ]);
    command.args(["-U", "7d0c7d0c-0000-4000-8000-000000000004", "-J", &format!("size={JOURNAL_MIB}")]);
    command.args([
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0,hash_seed=7d0c7d0c-0000-4000-8000-000000000005",
    ]);
    run(command.arg("-m").arg("1").arg(&image).arg(format!("{DATA_MIB}M")))?;
    Ok(Area { kind: Kind::Linux, mib: DATA_MIB, image })
}

fn assemble(board: &Board, areas: &[Area], output: &Path) -> Result<()> {
    let scheme = if board.firmware == Firmware::Uefi { Scheme::Gpt } else { Scheme::Mbr };
    let mut disk = File::create(output).with_context(|| format!("create {}", output.display()))?;
    let mut start_mib = START_MIB;
    let mut partitions = Vec::new();
    for (index, area) in areas.iter().enumerate() {
        partitions.push(Partition {
            number: index as u32 + 1,
            start: start_mib * MIB / SECTOR,
            sectors: area.mib * MIB / SECTOR,
            kind: area.kind,
        });
        copy_sparse(&area.image, &mut disk, start_mib * MIB)?;
        fs::remove_file(&area.image).with_context(|| format!("remove {}", area.image.display()))?;
        start_mib += area.mib;
    }
    // A GPT ends with its copy.
    let bytes = (start_mib + if scheme == Scheme::Gpt { 4 } else { 0 }) * MIB;
    disk.set_len(bytes).context("size the disk")?;
    let id = Sha256::digest(format!("tinydc {}", board.name));
    let table = Table { scheme, id: id[..16].try_into().context("16 bytes")?, partitions };
    for (at, sectors) in table.write(bytes / SECTOR) {
        disk.write_all_at(&sectors, at).context("write the partition table")?;
    }
    Ok(())
}

/// Only blocks that are not all zero are written.
fn copy_sparse(from: &Path, to: &mut File, at: u64) -> Result<()> {
    let mut source = File::open(from).with_context(|| format!("open {}", from.display()))?;
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut offset = at;
    to.seek(SeekFrom::Start(at)).context("seek")?;
    loop {
        let length = source.read(&mut buffer).with_context(|| format!("read {}", from.display()))?;
        if length == 0 {
            return Ok(());
        }
        if buffer[..length].iter().any(|byte| *byte != 0) {
            to.write_all_at(&buffer[..length], offset).context("write the disk")?;
        }
        offset += length as u64;
    }
}

pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer).with_context(|| format!("read {}", path.display()))?;
        if length == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..length]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Which blocks of the image hold anything, as bmaptool reads it: it writes only those.
pub fn write_block_map(image: &Path, output: &Path) -> Result<()> {
    let mut file = File::open(image).with_context(|| format!("open {}", image.display()))?;
    let bytes = file.metadata().context("look at the image")?.len();
    let mut ranges: Vec<(u64, u64, Sha256)> = Vec::new();
    let mut buffer = vec![0; BLOCK_BYTES];
    for block in 0..bytes / BLOCK_BYTES as u64 {
        file.read_exact(&mut buffer).context("read the image")?;
        if buffer.iter().all(|byte| *byte == 0) {
            continue;
        }
        match ranges.last_mut() {
            Some((_, last, hash)) if *last + 1 == block => {
                *last = block;
                hash.update(&buffer);
            }
            _ => ranges.push((block, block, Sha256::new_with_prefix(&buffer))),
        }
    }
    let mapped: u64 = ranges.iter().map(|(first, last, _)| last - first + 1).sum();
    let mut text = format!(
        "<?xml version=\"1.0\" ?>\n<bmap version=\"2.0\">\n<ImageSize> {bytes} </ImageSize>\n\
         <BlockSize> {BLOCK_BYTES} </BlockSize>\n<BlocksCount> {} </BlocksCount>\n\
         <MappedBlocksCount> {mapped} </MappedBlocksCount>\n<ChecksumType> sha256 </ChecksumType>\n\
         <BmapFileChecksum> {} </BmapFileChecksum>\n<BlockMap>\n",
        bytes / BLOCK_BYTES as u64,
        "0".repeat(64)
    );
    for (first, last, hash) in ranges {
        let range = if first == last { format!("{first}") } else { format!("{first}-{last}") };
        writeln!(text, "<Range chksum=\"{}\"> {range} </Range>", hex(&hash.finalize()))?;
    }
    text += "</BlockMap>\n</bmap>\n";
    // Over the text with zeros in its place.
    let own = hex(&Sha256::digest(text.as_bytes()));
    let text = text.replacen(&"0".repeat(64), &own, 1);
    File::create(output)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("write {}", output.display()))
}

//! What a board's firmware does with an image, for guests: which slot, and its files; and what a person does with the
//! card in a PC: editing `tinydc.toml`.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use tinydc::boot::partitions::{self, SECTOR};

/// The image of a board as `images/build BOARD --plain` left it.
pub fn of_board(board: &str) -> PathBuf {
    PathBuf::from(format!("target/images/tinydc-{board}.img"))
}

/// Where a partition begins and how long it is, in bytes.
pub fn partition_span(disk: &Path, number: u32) -> Result<(u64, u64)> {
    let mut head = vec![0; partitions::HEAD_BYTES];
    File::open(disk)
        .and_then(|mut file| file.read_exact(&mut head))
        .with_context(|| format!("read {}", disk.display()))?;
    let table = partitions::read(&head).with_context(|| format!("{} has no partitions", disk.display()))?;
    let partition = table.partitions.iter().find(|one| one.number == number);
    let partition = partition.with_context(|| format!("{} has no partition {number}", disk.display()))?;
    Ok((partition.start * SECTOR, partition.sectors * SECTOR))
}

/// A part of a disk as a file of its own.
pub fn copy_part(disk: &Path, start: u64, bytes: u64, to: &Path) -> Result<()> {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", disk.display())).arg(format!("of={}", to.display()));
    command.args(["bs=1M", "conv=sparse", "status=none", "iflag=skip_bytes,count_bytes"]);
    let status =
        command.arg(format!("skip={start}")).arg(format!("count={bytes}")).status().context("run dd")?;
    ensure!(status.success(), "copy a partition of {}", disk.display());
    Ok(())
}

fn mtools(program: &str, disk: &Path, number: u32) -> Result<Command> {
    let (start, _) = partition_span(disk, number)?;
    let mut command = Command::new(program);
    command.env("MTOOLS_SKIP_CHECK", "1").arg("-i").arg(format!("{}@@{start}", disk.display()));
    Ok(command)
}

pub fn read_file(disk: &Path, number: u32, name: &str) -> Result<String> {
    let output = mtools("mtype", disk, number)?.arg(format!("::{name}")).output().context("run mtype")?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub fn write_file(disk: &Path, number: u32, name: &str, text: &str) -> Result<()> {
    let from = disk.with_extension("edit");
    fs::write(&from, text)?;
    let mut command = mtools("mcopy", disk, number)?;
    let status = command.arg("-o").arg(&from).arg(format!("::{name}")).status().context("run mcopy")?;
    ensure!(status.success(), "write {name} to {}", disk.display());
    Ok(fs::remove_file(&from)?)
}

/// Kernel, initramfs and command line of the slot that the firmware takes.
pub struct Slot {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub command_line: String,
}

/// As the Raspberry Pi's firmware reads `autoboot.txt`; the word for one try lies in a file where there is no firmware
/// that keeps it, and goes with being read.
pub fn slot_of(disk: &Path, folder: &Path) -> Result<Slot> {
    let text = read_file(disk, 1, "autoboot.txt")?;
    let is_try = read_file(disk, 1, "tryboot").is_ok();
    if is_try {
        let status = mtools("mdel", disk, 1)?.arg("::tryboot").status().context("run mdel")?;
        ensure!(status.success(), "forget the try");
    }
    let section = if is_try { "[tryboot]" } else { "[all]" };
    let mut lines = text.lines().skip_while(|line| line.trim() != section).skip(1);
    let number = lines.find_map(|line| line.trim().strip_prefix("boot_partition=")?.parse().ok());
    let number: u32 = number.with_context(|| format!("autoboot.txt names no partition in {section}"))?;
    let fetch = |name: &str| -> Result<PathBuf> {
        let to = folder.join(name);
        let status =
            mtools("mcopy", disk, number)?.args(["-n", "-o"]).arg(format!("::{name}")).arg(&to).status()?;
        ensure!(status.success(), "partition {number} has no {name}");
        Ok(to)
    };
    Ok(Slot {
        kernel: fetch("kernel.img")?,
        initramfs: fetch("initramfs.img")?,
        // The Raspberry Pi's firmware tells the kernel by the device tree.
        command_line: format!("{} tinydc.partition={number}", read_file(disk, number, "cmdline.txt")?.trim()),
    })
}

/// Overwrites the begin of a partition, where its file system is named.
pub fn wipe_partition(disk: &Path, number: u32) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let (start, _) = partition_span(disk, number)?;
    Ok(File::options().write(true).open(disk)?.write_all_at(&[0; 8192], start)?)
}

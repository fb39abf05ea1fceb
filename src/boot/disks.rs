//! Block devices: found by the label of their file system, grown to their disk, mounted.
//!
//! Input: `/sys/class/block` and the first bytes of each device. Output: mounts. It never formats or repairs anything:
//! what it can't mount it names.

use super::partitions::{self, SECTOR};
use crate::linux::machine;
use crate::model::Order;
use anyhow::{Context, Result, bail};
use nix::mount::MsFlags;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Where a label of ext4 and of FAT can be read.
const PROBE_BYTES: usize = 2048;
const EXT4_AT: usize = 1024;
/// Grown only for more than this: the rest of a disk is never quite used.
const GROW_BYTES_MIN: u64 = 8 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Fat,
}

/// What a device is plugged into; the order is the order of preference for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Fast,
    Usb,
    Card,
}

/// A file system with a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `mmcblk0p4`
    pub name: String,
    pub label: String,
    pub file_system: FileSystem,
    pub transport: Transport,
    /// The disk and the number on it, of a partition.
    pub partition: Option<(String, u32)>,
}

impl Volume {
    pub fn device(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

fn probe(bytes: &[u8]) -> Option<(FileSystem, String)> {
    let text = |at: usize, length: usize| {
        let label = bytes.get(at..at + length)?.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(label).trim_end().to_string())
    };
    if bytes.get(EXT4_AT + 0x38..EXT4_AT + 0x3a)? == [0x53, 0xef] {
        return Some((FileSystem::Ext4, text(EXT4_AT + 0x78, 16)?));
    }
    if bytes.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    if bytes.get(82..87)? == b"FAT32" {
        return Some((FileSystem::Fat, text(71, 11)?));
    }
    (bytes.get(54..58)? == b"FAT1").then(|| text(43, 11)).flatten().map(|label| (FileSystem::Fat, label))
}

fn transport_of(sys_path: &str) -> Transport {
    if sys_path.contains("/usb") {
        Transport::Usb
    } else if sys_path.contains("/mmc") {
        Transport::Card
    } else {
        Transport::Fast
    }
}

/// Every labelled file system that the kernel sees now, the preferred first.
pub fn volumes() -> Vec<Volume> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if ["loop", "ram", "zram"].iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let mut bytes = vec![0; PROBE_BYTES];
        let read =
            File::open(Path::new("/dev").join(&name)).and_then(|mut device| device.read_exact(&mut bytes));
        // A card reader without a card has a device that can't be read.
        if read.is_err() {
            continue;
        }
        let Some((file_system, label)) = probe(&bytes) else { continue };
        let path = entry.path().canonicalize().unwrap_or_default();
        let number =
            fs::read_to_string(path.join("partition")).ok().and_then(|text| text.trim().parse().ok());
        let disk = path.parent().and_then(|parent| parent.file_name()).and_then(|disk| disk.to_str());
        let partition = disk.map(String::from).zip(number);
        let transport = transport_of(&path.display().to_string());
        found.push(Volume { name, label, file_system, transport, partition });
    }
    found.order_by(|a, b| (a.transport, &a.name).cmp(&(b.transport, &b.name)));
    found
}

/// Lets the last partition of a disk reach the disk's end. Returns its new size in bytes, if it grew.
pub fn grow_partition(volume: &Volume) -> Result<Option<u64>> {
    let Some((disk_name, number)) = &volume.partition else { return Ok(None) };
    let path = Path::new("/dev").join(disk_name);
    let open = File::options().read(true).write(true).open(&path);
    let mut disk = open.with_context(|| format!("open {}", path.display()))?;
    let bytes =
        machine::device_bytes(&disk).with_context(|| format!("ask the size of {}", path.display()))?;
    let mut head = vec![0; partitions::HEAD_BYTES];
    disk.read_exact(&mut head).with_context(|| format!("read the partitions of {}", path.display()))?;
    let Some(mut table) = partitions::read(&head) else { bail!("{} has no partition table", path.display()) };
    let before = table.partitions.iter().find(|one| one.number == *number).map_or(0, |one| one.sectors);
    let Some(grown) = table.grow(*number, bytes / SECTOR) else { return Ok(None) };
    if (grown.sectors - before) * SECTOR < GROW_BYTES_MIN {
        return Ok(None);
    }
    for (at, sectors) in table.write(bytes / SECTOR) {
        let written = disk.seek(SeekFrom::Start(at)).and_then(|_| disk.write_all(&sectors));
        written.with_context(|| format!("write the partitions of {}", path.display()))?;
    }
    disk.sync_all().with_context(|| format!("write the partitions of {}", path.display()))?;
    machine::resize_partition(&disk, *number, grown.start * SECTOR, grown.sectors * SECTOR)
        .with_context(|| format!("tell the kernel of the new size of {}", volume.name))?;
    Ok(Some(grown.sectors * SECTOR))
}

/// Lets a mounted ext4 fill its device. Returns its new size in bytes, if it grew.
pub fn grow_file_system(volume: &Volume, target: &Path) -> Result<Option<u64>> {
    let device = File::open(volume.device()).with_context(|| format!("open {}", volume.name))?;
    let bytes = machine::device_bytes(&device).with_context(|| format!("ask the size of {}", volume.name))?;
    let now = rustix::fs::statvfs(target).with_context(|| format!("ask the size of {}", target.display()))?;
    // What ext4 keeps for itself is less than a twentieth.
    if bytes < now.f_blocks * now.f_frsize * 21 / 20 + GROW_BYTES_MIN {
        return Ok(None);
    }
    let folder = File::open(target).with_context(|| format!("open {}", target.display()))?;
    machine::grow_ext4(&folder, bytes / now.f_frsize).with_context(|| format!("grow {}", volume.name))?;
    Ok(Some(bytes))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

pub fn mount(volume: &Volume, target: &Path, access: Access) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("create {}", target.display()))?;
    let mut flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
    if access == Access::ReadOnly {
        flags |= MsFlags::MS_RDONLY;
    }
    let (kind, options) = match volume.file_system {
        // What damages the file system stops writes, not the machine.
        FileSystem::Ext4 => ("ext4", "errors=remount-ro"),
        FileSystem::Fat => ("vfat", "umask=077,flush"),
    };
    nix::mount::mount(Some(&volume.device()), target, Some(kind), flags, Some(options))
        .map_err(io::Error::from)
        .with_context(|| format!("mount {} ({}) at {}", volume.label, volume.name, target.display()))
}

/// Runs `work` with a FAT volume mounted, and takes it down again.
pub fn with_mounted<T>(volume: &Volume, access: Access, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let target = Path::new("/run/tinydc-boot").join(&volume.name);
    mount(volume, &target, access)?;
    let outcome = work(&target);
    if access == Access::ReadWrite {
        rustix::fs::sync();
    }
    crate::linux::mount::detach(&target).with_context(|| format!("unmount {}", target.display()))?;
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_read_where_its_file_system_keeps_it() {
        let mut bytes = vec![0; PROBE_BYTES];
        assert_eq!(probe(&bytes), None);
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(probe(&bytes), None, "a boot sector without a file system");
        bytes[82..90].copy_from_slice(b"FAT32   ");
        bytes[71..82].copy_from_slice(b"TINYDC     ");
        assert_eq!(probe(&bytes), Some((FileSystem::Fat, "TINYDC".into())));
        bytes[EXT4_AT + 0x38..EXT4_AT + 0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[EXT4_AT + 0x78..EXT4_AT + 0x7e].copy_from_slice(b"tinydc");
        assert_eq!(probe(&bytes), Some((FileSystem::Ext4, "tinydc".into())));
        assert_eq!(probe(&bytes[..1000]), None);
    }

    #[test]
    fn data_on_a_disk_comes_before_data_on_a_card() {
        assert_eq!(
            transport_of("/sys/devices/platform/soc/fe340000.mmc/mmc_host/mmc0/block"),
            Transport::Card
        );
        assert_eq!(transport_of("/sys/devices/pci0000:00/xhci/usb2/2-1/host0/block/sda"), Transport::Usb);
        assert!(transport_of("/sys/devices/pci0000:00/nvme/nvme0/nvme0n1") < Transport::Usb);
    }
}

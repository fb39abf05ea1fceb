//! Disks beside the data: mounted when they are there, at the start and later; taken out of the tree when they are pulled.
//!
//! Input: their labels and mount points, the kernel's device events, its table of mounts. Output: mounts, and news for the
//! console. The first process only reads tables of the kernel: whatever touches a disk, which may hang, is done by a child
//! (`attend`). Before its disk is there a mount point is covered by an empty file system that takes no writes.

use super::disks::{self, Access, Volume};
use crate::linux::mount::{Mount, cover, detach, mounts_of, uppermost};
use crate::model::NodeDisk;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Partitions show up one after the other.
const SETTLE_MS: u64 = 300;
/// A disk that could not be mounted is tried again after this.
const AGAIN_MS: u64 = 30_000;
/// The table of mounts is looked at this often at most, when nothing happens.
const LOOK_EVERY_MS: u64 = 1_000;

/// From the first look to the word that a disk is absent: some take a while to spin up.
const TELL_AFTER_MS: u64 = 3_000;

/// Mounts at one place, the uppermost of which count.
const LAYERS_MAX: usize = 8;

/// Whether an event of the kernel is about a disk or a partition.
pub fn is_of_disk(event: &[u8]) -> bool {
    let head = event.split(|byte| *byte == 0).next().unwrap_or_default();
    head.windows(7).any(|part| part == b"/block/")
}

fn mounted<'a>(mounts: &'a [Mount], disk: &NodeDisk) -> Option<&'a Mount> {
    uppermost(mounts, Path::new(&disk.target))
}

fn is_present(mounts: &[Mount], disk: &NodeDisk) -> bool {
    mounted(mounts, disk).is_some_and(Mount::is_alive)
}

/// Nothing is written to a mount point while its disk is absent.
pub fn cover_all(wanted: &[NodeDisk]) -> Result<()> {
    let mounts = mounts_of("self").context("read the table of mounts")?;
    for disk in wanted.iter().filter(|disk| mounted(&mounts, disk).is_none()) {
        let target = Path::new(&disk.target);
        fs::create_dir_all(target).with_context(|| format!("create {}", disk.target))?;
        cover(target).with_context(|| format!("cover {}", disk.target))?;
    }
    Ok(())
}

/// Takes away what was pulled and mounts what is there. Returns what went wrong.
pub fn attend(wanted: &[NodeDisk]) -> Vec<String> {
    let mut problems = Vec::new();
    for disk in wanted {
        if let Err(error) = detach_pulled(disk) {
            problems.push(format!("{error:#}"));
        }
    }
    let mounts = mounts_of("self").unwrap_or_default();
    let absent: Vec<&NodeDisk> = wanted.iter().filter(|disk| !is_present(&mounts, disk)).collect();
    if absent.is_empty() {
        return problems;
    }
    let volumes = disks::volumes();
    for disk in absent {
        let found: Option<&Volume> = volumes.iter().find(|volume| volume.label == disk.label);
        let outcome = found.map(|volume| disks::mount(volume, Path::new(&disk.target), Access::ReadWrite));
        if let Some(Err(error)) = outcome {
            problems.push(format!("{error:#}"));
        }
    }
    problems
}

/// Out of the tree at once; it ends when the last container that holds on to it has.
fn detach_pulled(disk: &NodeDisk) -> Result<()> {
    for _ in 0..LAYERS_MAX {
        let mounts = mounts_of("self").context("read the table of mounts")?;
        let is_pulled = |mount: &Mount| !mount.is_cover() && !mount.is_alive();
        if !mounted(&mounts, disk).is_some_and(is_pulled) {
            break;
        }
        detach(Path::new(&disk.target)).with_context(|| format!("unmount {}", disk.target))?;
    }
    Ok(())
}

/// The disks that a child's words name.
pub fn parse_words(words: &[&str]) -> Vec<NodeDisk> {
    words.iter().filter_map(|word| NodeDisk::parse(word).ok()).collect()
}

/// What the first process knows of them.
pub struct Attached {
    wanted: Vec<NodeDisk>,
    present: Vec<bool>,
    child: Option<i32>,
    /// When a child is to look at the disks.
    look_at_ms: Option<u64>,
    judged_ms: u64,
    /// When it is told what the start did not find; `None` once that is done.
    tell_at_ms: Option<u64>,
}

impl Attached {
    pub fn new(wanted: Vec<NodeDisk>) -> Attached {
        let mounts = mounts_of("self").unwrap_or_default();
        let present: Vec<bool> = wanted.iter().map(|disk| is_present(&mounts, disk)).collect();
        // Events of the start were not heard here.
        let look_at_ms = present.contains(&false).then_some(0);
        let tell_at_ms = look_at_ms.map(|_| u64::MAX);
        Attached { wanted, present, child: None, look_at_ms, judged_ms: 0, tell_at_ms }
    }

    /// A device came, went or changed.
    pub fn heard(&mut self, now_ms: u64) {
        if !self.wanted.is_empty() {
            self.judged_ms = 0;
            self.look_at_ms.get_or_insert(now_ms + SETTLE_MS);
        }
    }

    /// What has come or gone since the last call, each in a line.
    pub fn news(&mut self, now_ms: u64) -> Vec<String> {
        if self.wanted.is_empty() || (now_ms < self.judged_ms + LOOK_EVERY_MS && self.judged_ms > 0) {
            return Vec::new();
        }
        self.judged_ms = now_ms;
        let mounts = mounts_of("self").unwrap_or_default();
        let mut news = Vec::new();
        for (disk, was_present) in self.wanted.iter().zip(&mut self.present) {
            let is_present = is_present(&mounts, disk);
            match (*was_present, is_present) {
                (true, false) => news.push(format!("disk {disk} is gone: what binds it is stopped")),
                (false, true) => news.push(format!("disk {disk} is there")),
                _ => continue,
            }
            *was_present = is_present;
            self.look_at_ms.get_or_insert(now_ms);
        }
        news
    }

    /// The words for a child that is due now.
    pub fn due(&mut self, now_ms: u64) -> Option<Vec<String>> {
        if self.child.is_some() || self.look_at_ms.is_none_or(|at| now_ms < at) {
            return None;
        }
        self.look_at_ms = None;
        Some(self.wanted.iter().map(|disk| format!("LABEL={}:{}", disk.label, disk.target)).collect())
    }

    pub fn deadline_ms(&self) -> Option<u64> {
        self.look_at_ms.filter(|_| self.child.is_none())
    }

    pub fn started(&mut self, child: Option<i32>, now_ms: u64) {
        self.child = child;
        self.tell_at_ms = self.tell_at_ms.map(|at| at.min(now_ms + TELL_AFTER_MS));
        if child.is_none() {
            self.look_at_ms = Some(now_ms + AGAIN_MS);
        }
    }

    /// True when it was this child that ended.
    pub fn ended(&mut self, pid: i32, is_well: bool, now_ms: u64) -> bool {
        if self.child != Some(pid) {
            return false;
        }
        self.child = None;
        self.judged_ms = 0;
        if !is_well {
            self.look_at_ms.get_or_insert(now_ms + AGAIN_MS);
        }
        true
    }

    /// Once, a while after the first look: the disks that the start did not find, or that hang.
    pub fn lack(&mut self, now_ms: u64) -> Option<String> {
        self.tell_at_ms.filter(|at| now_ms >= *at)?;
        self.tell_at_ms = None;
        let each = self.wanted.iter().zip(&self.present).filter(|(_, is_there)| !**is_there);
        let each: Vec<String> = each.map(|(disk, _)| format!("disk {disk} is absent")).collect();
        (!each.is_empty()).then(|| format!("{}; services that bind one don't run here", each.join(", ")))
    }

    pub fn is_complete(&self) -> bool {
        !self.present.contains(&false)
    }

    /// For the report: `media (/mnt/media) absent`.
    pub fn standing(&self) -> Option<String> {
        let word = |is_present: &bool| if *is_present { "there" } else { "ABSENT" };
        let each = self.wanted.iter().zip(&self.present);
        let each: Vec<String> = each.map(|(disk, is_there)| format!("{disk} {}", word(is_there))).collect();
        (!each.is_empty()).then(|| each.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_disks_are_told_from_others() {
        assert!(is_of_disk(b"add@/devices/pci0000:00/0000:00:03.0/virtio1/block/vdb\0ACTION=add\0"));
        assert!(is_of_disk(b"remove@/devices/pci0/usb2/2-1/host0/block/sda/sda1\0"));
        assert!(!is_of_disk(b"add@/devices/pci0000:00/0000:00:03.0/virtio1\0SUBSYSTEM=/block/\0"));
        assert!(!is_of_disk(b""));
    }

    #[test]
    fn a_child_looks_after_an_event_and_again_after_a_failure() {
        let disk = NodeDisk { label: "media".into(), target: "/mnt/tinydc-no-such-mount".into() };
        let mut attached = Attached::new(vec![disk]);
        assert_eq!(attached.standing().as_deref(), Some("media (/mnt/tinydc-no-such-mount) ABSENT"));
        let words = attached.due(1_000).expect("what is absent at the start is looked for");
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(parse_words(&words), attached.wanted);
        attached.started(Some(7), 1_000);
        assert_eq!(attached.lack(1_000 + TELL_AFTER_MS - 1), None, "it may be spinning up");
        let told = attached.lack(1_000 + TELL_AFTER_MS).expect("whatever the child does");
        assert!(told.starts_with("disk media (/mnt/tinydc-no-such-mount) is absent;"), "{told}");
        assert_eq!(attached.lack(9_000), None, "once");
        attached.heard(1_100);
        assert_eq!(attached.due(2_000), None, "one at a time");
        assert!(!attached.ended(8, true, 2_000) && attached.ended(7, true, 2_000));
        assert!(attached.due(2_000).is_some(), "an event meanwhile counts");
        attached.started(Some(9), 2_000);
        assert!(attached.ended(9, false, 3_000));
        assert_eq!(attached.due(3_000 + AGAIN_MS - 1), None);
        assert!(attached.due(3_000 + AGAIN_MS).is_some());
        attached.started(Some(10), 40_000);
        assert!(attached.ended(10, true, 40_000) && attached.deadline_ms().is_none(), "then nothing is due");
        assert!(attached.news(50_000).is_empty());
    }
}

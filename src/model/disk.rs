//! The disks that a node mounts beside its data, and which of them are absent.
//!
//! A node names them in its configuration, by label: `LABEL=media:/mnt/media`. What a service binds at or below a mount
//! point lies on that disk, and nowhere else.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// Of one node: a bit each in `DiskSet`.
pub const DISKS_MAX: usize = 16;
/// As long as ext4 has room for.
const LABEL_BYTES_MAX: usize = 16;
const TARGET_BYTES_MAX: usize = 128;
/// Elsewhere it would hide what the machine lives on.
const FOLDERS: [&str; 3] = ["/mnt/", "/media/", "/srv/"];

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeDisk {
    pub label: String,
    /// Where it is mounted.
    pub target: String,
}

impl NodeDisk {
    /// `LABEL=media:/mnt/media`
    pub fn parse(text: &str) -> Result<NodeDisk, String> {
        let bad = || format!("{text:?} is no disk: use \"LABEL=media:/mnt/media\"");
        let parts = text.strip_prefix("LABEL=").and_then(|rest| rest.split_once(':'));
        let (label, target) = parts.ok_or_else(bad)?;
        let is_label = (1..=LABEL_BYTES_MAX).contains(&label.len()) && !label.contains(char::is_control);
        let is_plain = target.bytes().all(|byte| byte.is_ascii_graphic()) && target.len() <= TARGET_BYTES_MAX;
        let is_path = target.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."));
        if !is_label || !is_plain || !is_path {
            return Err(bad());
        }
        if !FOLDERS.iter().any(|folder| target.starts_with(folder)) {
            return Err(format!("{target} must lie below /mnt, /media or /srv"));
        }
        Ok(NodeDisk { label: label.into(), target: target.into() })
    }

    /// Whether it could stand in a configuration: what a peer sends was not parsed.
    fn is_sound(&self) -> bool {
        NodeDisk::parse(&format!("LABEL={}:{}", self.label, self.target)).as_ref() == Ok(self)
    }

    /// Why these can't be the disks of one node; the index of the one at fault.
    pub fn conflict(disks: &[NodeDisk]) -> Option<(usize, String)> {
        if disks.len() > DISKS_MAX {
            return Some((DISKS_MAX, format!("{} disks; at most {DISKS_MAX} are mounted", disks.len())));
        }
        // Its words are not repeated: they may be long, or steer a terminal.
        if let Some(index) = disks.iter().position(|disk| !disk.is_sound()) {
            return Some((index, format!("number {} of the disks is none", index + 1)));
        }
        disks.iter().enumerate().find_map(|(index, disk)| {
            let other = disks[..index].iter().find(|other| {
                other.label == disk.label || other.holds(&disk.target) || disk.holds(&other.target)
            })?;
            let what = if other.label == disk.label { "the label of" } else { "the place of" };
            Some((index, format!("{disk} has {what} {other}")))
        })
    }

    /// Whether a path lies on it.
    pub fn holds(&self, path: &str) -> bool {
        Path::new(path).starts_with(&self.target)
    }
}

/// As the configuration has it.
impl fmt::Display for NodeDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.label, self.target)
    }
}

/// Some of a node's disks, by their place in its list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskSet(u16);

const _: () = assert!(DISKS_MAX <= u16::BITS as usize);

impl DiskSet {
    pub fn insert(&mut self, index: usize) {
        if index < DISKS_MAX {
            self.0 |= 1 << index;
        }
    }

    pub fn has(self, index: usize) -> bool {
        index < DISKS_MAX && self.0 & (1 << index) != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Without what is not in a list of this length.
    pub fn within(self, length: usize) -> DiskSet {
        DiskSet(self.0 & ((1u32 << length.min(DISKS_MAX)) - 1) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_label_and_a_place_of_its_own() {
        let disk = NodeDisk::parse("LABEL=media:/mnt/media").unwrap();
        assert!(disk.holds("/mnt/media") && disk.holds("/mnt/media/films/"));
        assert!(!disk.holds("/mnt/media2") && !disk.holds("/mnt") && !disk.holds("/"));
        for bad in [
            "media:/mnt/media",
            "LABEL=:/mnt/media",
            "LABEL=a:",
            "LABEL=a:/mnt/",
            "LABEL=a:/mnt/a/",
            "LABEL=a:/mnt//a",
            "LABEL=a:/mnt/../etc",
            "LABEL=a:mnt/a",
            "LABEL=a:/etc/a",
            "LABEL=seventeen-letters:/mnt/a",
            "LABEL=a\u{1b}[2J:/mnt/a",
            "LABEL=a\nb:/mnt/a",
            "LABEL=a\u{9b}:/mnt/a",
        ] {
            assert!(NodeDisk::parse(bad).is_err(), "{bad}");
        }
        let disks = |texts: &[&str]| -> Vec<NodeDisk> {
            texts.iter().map(|text| NodeDisk::parse(text).unwrap()).collect()
        };
        assert_eq!(NodeDisk::conflict(&disks(&["LABEL=a:/mnt/a", "LABEL=b:/mnt/b"])), None);
        for bad in [["LABEL=a:/mnt/a", "LABEL=a:/mnt/b"], ["LABEL=a:/mnt/a", "LABEL=b:/mnt/a/b"]] {
            assert_eq!(NodeDisk::conflict(&disks(&bad)).map(|(index, _)| index), Some(1), "{bad:?}");
        }
    }

    #[test]
    fn a_set_has_a_bit_for_each_disk() {
        let mut set = DiskSet::default();
        set.insert(0);
        set.insert(15);
        set.insert(16);
        assert!(set.has(0) && set.has(15) && !set.has(1) && !set.has(16));
        assert!(set.within(16) == set && !set.within(15).has(15) && set.within(0).is_empty());
    }
}

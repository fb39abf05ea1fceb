//! Watches the disks that this node's configuration names: nobody serves from a disk that is not there.
//!
//! Input: the configuration, the kernel's table of mounts, its list of devices. Output: which disks are absent, and why a
//! service can't run here because of it. Whoever mounts them (a board's first process, or the system) is not this one; no
//! disk is read or written to find out.

use crate::linux::mount::{mounts_of, uppermost};
use crate::model::{DiskSet, NodeDisk, ServiceSpec};
use crate::planner::absent_sentence;
use std::path::Path;

#[derive(Debug, Default)]
pub struct Disks {
    named: Vec<NodeDisk>,
}

impl Disks {
    pub fn new(named: Vec<NodeDisk>) -> Disks {
        Disks { named }
    }

    pub fn named(&self) -> &[NodeDisk] {
        &self.named
    }

    /// Those that are not mounted, or whose device is gone.
    pub fn absent(&self) -> DiskSet {
        let mut absent = DiskSet::default();
        if self.named.is_empty() {
            return absent;
        }
        // A table that can't be read says nothing: whoever binds a disk waits.
        let mounts = mounts_of("self").unwrap_or_default();
        for (index, disk) in self.named.iter().enumerate() {
            let mounted = uppermost(&mounts, Path::new(&disk.target));
            if !mounted.is_some_and(|mount| mount.is_alive()) {
                absent.insert(index);
            }
        }
        absent
    }

    fn bound_by<'a>(&'a self, spec: &'a ServiceSpec) -> impl Iterator<Item = (usize, &'a NodeDisk)> {
        let is_bound = |disk: &NodeDisk| spec.host_paths().any(|path| disk.holds(path));
        self.named.iter().enumerate().filter(move |(_, disk)| is_bound(disk))
    }

    pub fn is_bound_by(&self, spec: &ServiceSpec) -> bool {
        self.bound_by(spec).next().is_some()
    }

    /// The absent disk that keeps a service from running here, in a sentence.
    pub fn lack(&self, spec: &ServiceSpec, absent: DiskSet, node: &str) -> Option<String> {
        let (_, disk) = self.bound_by(spec).find(|(index, _)| absent.has(*index))?;
        Some(absent_sentence(&disk.to_string(), node))
    }

    /// Why a container that runs must be started anew though its disks are there: it holds on to one that was pulled.
    pub fn holds_gone(&self, spec: &ServiceSpec, pid: i32) -> Option<String> {
        let (_, disk) = self.bound_by(spec).next()?;
        let mounts = mounts_of(&pid.to_string()).ok()?;
        let is_gone = mounts.iter().any(|mount| !mount.is_alive());
        is_gone.then(|| format!("disk {disk} was pulled and plugged in again: it is started anew"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ImageSpec, MountSource, MountSpec};

    #[test]
    fn only_what_binds_an_absent_disk_lacks_it() {
        let disks = Disks::new(vec![
            NodeDisk { label: "tmp".into(), target: "/proc".into() },
            NodeDisk { label: "media".into(), target: "/mnt/tinydc-no-such-mount".into() },
        ]);
        let spec = |paths: &[&str]| {
            let mut spec = ServiceSpec::new(ImageSpec { reference: "a".into(), digest: None });
            spec.mounts = paths
                .iter()
                .map(|path| MountSpec {
                    target: "/data".into(),
                    is_read_only: false,
                    source: MountSource::HostPath { path: (*path).into() },
                })
                .collect();
            spec
        };
        let absent = disks.absent();
        assert!(!absent.has(0) && absent.has(1), "what is mounted is there, whatever it is");
        let lack = |paths: &[&str]| disks.lack(&spec(paths), absent, "pi2");
        assert_eq!(lack(&[]), None);
        assert_eq!(lack(&["/proc/x", "/mnt"]), None);
        let why = lack(&["/proc/x", "/mnt/tinydc-no-such-mount/films"]).unwrap();
        assert!(
            why.starts_with("disk media (/mnt/tinydc-no-such-mount) is absent on pi2: plug it in"),
            "{why}"
        );
        assert_eq!(Disks::default().absent(), DiskSet::default());
    }
}

//! Watches the disks that this node's configuration names: nobody serves from a disk that is not there.
//!
//! Input: the configuration, the kernel's table of mounts, its list of devices. Output: which disks are absent, and why a
//! service can't run here because of it. Whoever mounts them (a board's first process, or the system) is not this one; no
//! disk is read or written to find out.

use crate::linux::mount::{Mount, mount_of, mounts_of, uppermost};
use crate::model::{DiskSet, MountSource, NodeDisk, ServiceSpec};
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
        let (host, held) = (mounts_of("self").ok()?, mounts_of(&pid.to_string()).ok()?);
        self.held_gone(spec, &host, &held)
    }

    /// Only the service's own binds of a disk count, each at its place in the container: what came with a bind of a
    /// folder above, such as covers of other disks, says nothing. A place that the image makes a link is not found here,
    /// and its container not restarted.
    fn held_gone(&self, spec: &ServiceSpec, host: &[Mount], held: &[Mount]) -> Option<String> {
        // A bind may lead off its disk through a link: then it holds another device that the host has.
        let is_current =
            |mount: &Mount| mount.is_alive() && host.iter().any(|has| has.device == mount.device);
        spec.mounts.iter().find_map(|bind| {
            let MountSource::HostPath { path } = &bind.source else { return None };
            let disk = self.named.iter().find(|disk| disk.holds(path))?;
            // A start would bind nothing better.
            mount_of(host, Path::new(path)).filter(|mount| mount.is_alive())?;
            let mut at = held.iter().filter(|mount| mount.point == Path::new(&bind.target)).peekable();
            let is_gone = at.peek().is_some() && !at.any(is_current);
            is_gone.then(|| format!("disk {disk} was pulled and plugged in again: it is started anew"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::mount::parse_mounts;
    use crate::model::{ImageSpec, MountSpec};

    /// Of binds: the host's path, the place in the container.
    fn binding(binds: &[(&str, &str)]) -> ServiceSpec {
        let mut spec = ServiceSpec::new(ImageSpec { reference: "a".into(), digest: None });
        spec.mounts = binds
            .iter()
            .map(|(path, target)| MountSpec {
                target: (*target).into(),
                is_read_only: false,
                source: MountSource::HostPath { path: (*path).into() },
            })
            .collect();
        spec
    }

    #[test]
    fn only_a_bind_of_a_pulled_disk_starts_a_container_anew() {
        let disks = Disks::new(vec![
            NodeDisk { label: "media".into(), target: "/mnt/media".into() },
            NodeDisk { label: "backup".into(), target: "/mnt/backup".into() },
        ]);
        // A line each: device, place, source. Number 4095 is of no device: pulled.
        let table = |lines: &[(&str, &str, &str)]| {
            let line = |(device, point, source): &(&str, &str, &str)| {
                format!("9 1 {device} / {point} rw - ext4 {source} rw\n")
            };
            parse_mounts(lines.iter().map(line).collect::<String>().as_bytes())
        };
        let host = [
            ("0:20", "/", "x"),
            ("4095:9", "/var/stale", "/dev/sdx"),
            ("0:30", "/mnt/media", "tinydc-absent"),
            ("0:41", "/mnt/backup", "x"),
            ("0:50", "/mnt/backup/nested", "x"),
        ];
        let gone = |binds: &[(&str, &str)], held: &[(&str, &str, &str)]| {
            disks.held_gone(&binding(binds), &table(&host), &table(held))
        };
        let source = [("0:20", "/source", "x"), ("0:30", "/source/media", "tinydc-absent")];
        let both = [("/mnt", "/source"), ("/mnt/backup", "/dest")];
        let with_dest = |device, name| [source.as_slice(), &[(device, "/dest", name)]].concat();
        assert_eq!(gone(&both, &with_dest("0:41", "x")), None, "the cover is another disk's");
        let why = gone(&both, &with_dest("4095:7", "/dev/sdb1")).unwrap();
        assert!(why.starts_with("disk backup (/mnt/backup) was pulled"), "{why}");
        assert!(gone(&both, &with_dest("0:40", "x")).is_some(), "a device that the host has no more");
        assert!(gone(&both, &with_dest("0:30", "tinydc-absent")).is_some(), "begun as the disk went");
        let whole = [("/", "/host"), ("/mnt/backup", "/dest/")];
        let stale = [("4095:9", "/host/var/stale", "/dev/sdx"), ("0:41", "/dest", "x")];
        assert_eq!(gone(&whole, &stale), None, "a stale mount of the machine");
        let nested = [("/mnt/backup/nested/a", "/dest")];
        assert_eq!(gone(&nested, &[("0:50", "/dest", "x")]), None, "on what is mounted below the disk");
        assert_eq!(gone(&nested, &[("0:20", "/dest", "x")]), None, "a link led off the disk");
        assert_eq!(gone(&nested, &[("4095:7", "/other", "x")]), None, "not at its place");
        let absent = [("/mnt/media", "/dest")];
        assert_eq!(gone(&absent, &[("4095:7", "/dest", "x")]), None, "a start would not help");
    }

    #[test]
    fn only_what_binds_an_absent_disk_lacks_it() {
        let disks = Disks::new(vec![
            NodeDisk { label: "tmp".into(), target: "/proc".into() },
            NodeDisk { label: "media".into(), target: "/mnt/tinydc-no-such-mount".into() },
        ]);
        let spec = |paths: &[&str]| binding(&paths.iter().map(|path| (*path, "/data")).collect::<Vec<_>>());
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

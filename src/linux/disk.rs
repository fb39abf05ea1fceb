//! How full the disk below a folder is, and the marks at which apps must give way to the cluster.

use std::path::Path;

/// Free below the larger of this and 5 %: nothing new is put there.
const LOW_BYTES: u64 = 256 << 20;
/// What a container's writable layer may take of a disk that is all but full, if 5 % of it is less.
const WRITABLE_BYTES_MIN: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl Space {
    /// `None` when the file system does not say.
    pub fn of(folder: &Path) -> Option<Space> {
        let disk = rustix::fs::statvfs(folder).ok()?;
        Some(Space { free_bytes: disk.f_bavail * disk.f_frsize, total_bytes: disk.f_blocks * disk.f_frsize })
    }

    /// A disk smaller than twice the mark is judged by its half.
    pub fn low_mark_bytes(self) -> u64 {
        (self.total_bytes / 20).max(LOW_BYTES).min(self.total_bytes / 2)
    }

    /// What may be written before it counts as low.
    pub fn spare_bytes(self) -> u64 {
        self.free_bytes.saturating_sub(self.low_mark_bytes())
    }

    /// No pulls, no placements.
    pub fn is_low(self) -> bool {
        self.free_bytes < self.low_mark_bytes()
    }

    /// Containers that wrote much are stopped.
    pub fn is_critical(self) -> bool {
        self.free_bytes < self.low_mark_bytes() / 2
    }

    pub fn writable_bytes_max(self) -> u64 {
        (self.total_bytes / 20).max(WRITABLE_BYTES_MIN)
    }
}

/// Whether the file system below a folder takes no writes.
pub fn is_read_only(folder: &Path) -> bool {
    rustix::fs::statvfs(folder).is_ok_and(|disk| disk.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_follow_the_size_of_the_disk() {
        let mib = |free: u64, total: u64| Space { free_bytes: free << 20, total_bytes: total << 20 };
        // A card of 32 GiB: 5 %.
        assert!(mib(1_600, 32_768).is_low() && !mib(1_700, 32_768).is_low());
        assert!(mib(800, 32_768).is_critical() && !mib(900, 32_768).is_critical());
        // One of 4 GiB: 256 MiB.
        assert!(mib(255, 4_096).is_low() && !mib(256, 4_096).is_low());
        assert!(mib(127, 4_096).is_critical() && !mib(128, 4_096).is_critical());
        assert_eq!(mib(300, 4_096).spare_bytes() >> 20, 44);
        assert_eq!(mib(200, 4_096).spare_bytes(), 0);
        assert_eq!(mib(0, 4_096).writable_bytes_max() >> 20, 204);
        assert_eq!(mib(0, 900).writable_bytes_max() >> 20, 64);
    }
}

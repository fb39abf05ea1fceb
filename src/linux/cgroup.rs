//! Control groups by path, on the two layouts that exist: hybrid or pure v1 (one tree per controller) and v2.
//!
//! Input: a path below the root such as `tinydc-1a2b3c4d/web-1`. Output: files written and read there.
//! It touches no path but the one it is given, and never the root's own files except to enable v2 controllers.

use crate::model::Order;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Controllers that tinydc relies on.
const NEEDED: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];
const UNIFIED_ROOT: &str = "/sys/fs/cgroup";

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("no cgroup is mounted; mount cgroup2 at /sys/fs/cgroup")]
    NotMounted,
    #[error("the kernel lacks the cgroup controller `{0}`; enable it in the kernel or on its command line")]
    ControllerMissing(&'static str),
    #[error("{action} {path}")]
    Access {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("processes in {path} do not end after SIGKILL")]
    StillPopulated { path: PathBuf },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Layout {
    /// Mount point of each v1 controller, co-mounted ones once.
    Trees {
        memory: PathBuf,
        cpu_account: Option<PathBuf>,
        all: Vec<PathBuf>,
    },
    Unified {
        root: PathBuf,
    },
}

/// The machine's cgroup layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    layout: Layout,
}

/// What a cgroup uses now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Without the page cache that can be dropped at once.
    pub memory_bytes: u64,
    pub cpu_usec: u64,
    pub processes: u64,
}

impl Cgroups {
    pub fn detect() -> Result<Cgroups, CgroupError> {
        let path = PathBuf::from("/proc/self/mountinfo");
        let table = fs::read_to_string(&path).map_err(|source| CgroupError::Access {
            action: "read",
            path,
            source,
        })?;
        Cgroups::from_mount_table(&table)
    }

    fn from_mount_table(table: &str) -> Result<Cgroups, CgroupError> {
        let mut trees: Vec<(PathBuf, Vec<String>)> = Vec::new();
        let mut unified = None;
        for line in table.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let (Some(point), mut right) = (left.split(' ').nth(4), right.split(' ')) else { continue };
            match right.next() {
                Some("cgroup") => {
                    let options = right.nth(1).unwrap_or_default();
                    trees.push((PathBuf::from(point), options.split(',').map(str::to_owned).collect()));
                }
                Some("cgroup2") => {
                    unified.get_or_insert_with(|| PathBuf::from(point));
                }
                _ => {}
            }
        }
        let tree_of = |name: &str| {
            trees.iter().find(|(_, names)| names.iter().any(|n| n == name)).map(|(point, _)| point.clone())
        };
        if let Some(memory) = tree_of("memory") {
            let all = trees.iter().map(|(point, _)| point.clone()).collect();
            return Ok(Cgroups { layout: Layout::Trees { memory, cpu_account: tree_of("cpuacct"), all } });
        }
        match unified {
            Some(root) if trees.is_empty() || root == Path::new(UNIFIED_ROOT) => {
                Ok(Cgroups { layout: Layout::Unified { root } })
            }
            Some(_) => Err(CgroupError::ControllerMissing("memory")),
            None => Err(CgroupError::NotMounted),
        }
    }

    pub fn is_unified(&self) -> bool {
        matches!(self.layout, Layout::Unified { .. })
    }

    /// Makes `path` in every tree, and on v2 hands the needed controllers down to its children.
    pub fn create(&self, path: &str) -> Result<(), CgroupError> {
        for folder in self.folders(path) {
            // A v1 tree may refuse (cpuset of a foreign layout); memory must not.
            match fs::create_dir_all(&folder) {
                Ok(()) => {}
                Err(_) if !self.is_unified() && folder != self.memory_folder(path) => {}
                Err(source) => return Err(access("create", folder, source)),
            }
        }
        let Layout::Unified { root } = &self.layout else { return Ok(()) };
        for folder in [root.clone(), root.join(path)] {
            for name in NEEDED {
                let file = folder.join("cgroup.subtree_control");
                let required = name != "cpuset";
                if let Err(source) = fs::write(&file, format!("+{name}"))
                    && required
                {
                    return Err(match source.raw_os_error() {
                        Some(libc::ENOENT) => CgroupError::ControllerMissing(name),
                        _ => access("enable controllers in", file, source),
                    });
                }
            }
        }
        Ok(())
    }

    /// Caps the memory of everything in `path` together. `None` lifts the cap.
    pub fn set_memory_max(&self, path: &str, bytes: Option<u64>) -> Result<(), CgroupError> {
        let (name, none) =
            if self.is_unified() { ("memory.max", "max") } else { ("memory.limit_in_bytes", "-1") };
        let file = self.memory_folder(path).join(name);
        let value = bytes.map_or_else(|| none.to_owned(), |bytes| bytes.to_string());
        fs::write(&file, value).map_err(|source| access("write", file, source))
    }

    /// What a runtime spec cannot say: no swap for a limited container, and (v2) an OOM kill takes the whole of it,
    /// so that no half-dead application stays. Files that the kernel lacks are left out.
    pub fn forbid_swap(&self, path: &str) -> Result<(), CgroupError> {
        let folder = self.memory_folder(path);
        let writes = if self.is_unified() {
            vec![("memory.swap.max", "0".to_owned()), ("memory.oom.group", "1".to_owned())]
        } else {
            let limit = folder.join("memory.limit_in_bytes");
            let limit = fs::read_to_string(&limit).map_err(|source| access("read", limit, source))?;
            vec![("memory.memsw.limit_in_bytes", limit.trim().to_owned())]
        };
        for (name, value) in writes {
            let file = folder.join(name);
            if file.exists() {
                fs::write(&file, value).map_err(|source| access("write", file, source))?;
            }
        }
        Ok(())
    }

    /// How many processes the OOM killer took in `path` since it was made. 0 when it is gone.
    pub fn oom_kills(&self, path: &str) -> u64 {
        let name = if self.is_unified() { "memory.events" } else { "memory.oom_control" };
        keyed_number(&self.memory_folder(path).join(name), "oom_kill").unwrap_or(0)
    }

    /// `None`: there is no such cgroup.
    pub fn usage(&self, path: &str) -> Option<Usage> {
        let memory = self.memory_folder(path);
        let (now, cache) = if self.is_unified() {
            ("memory.current", "inactive_file")
        } else {
            ("memory.usage_in_bytes", "total_inactive_file")
        };
        let cache = keyed_number(&memory.join("memory.stat"), cache).unwrap_or(0);
        let memory_bytes = number(&memory.join(now))?.saturating_sub(cache);
        let cpu_usec = match &self.layout {
            Layout::Unified { root } => keyed_number(&root.join(path).join("cpu.stat"), "usage_usec"),
            Layout::Trees { cpu_account, .. } => {
                let tree = cpu_account.as_ref().map(|tree| tree.join(path).join("cpuacct.usage"));
                tree.and_then(|file| number(&file)).map(|nanoseconds| nanoseconds / 1000)
            }
        };
        let processes = self.pids(path).len() as u64;
        Some(Usage { memory_bytes, cpu_usec: cpu_usec.unwrap_or(0), processes })
    }

    /// Every process in `path` and below, as this process's pid namespace sees them.
    pub fn pids(&self, path: &str) -> Vec<i32> {
        let mut pids = Vec::new();
        collect_pids(&self.memory_folder(path), &mut pids);
        pids
    }

    /// SIGKILLs everything in `path` and below and waits until it is empty. A missing cgroup is empty.
    pub fn kill_all(&self, path: &str, timeout: Duration) -> Result<(), CgroupError> {
        let folder = self.memory_folder(path);
        let deadline = Instant::now() + timeout;
        let mut pause = Duration::from_millis(1);
        while folder.exists() {
            // v2 kills atomically, forks included; v1 needs rounds until a round finds nobody.
            let killed_at_once = self.is_unified() && fs::write(folder.join("cgroup.kill"), "1").is_ok();
            let pids = self.pids(path);
            if pids.is_empty() {
                return Ok(());
            }
            if !killed_at_once {
                for pid in pids {
                    let _ =
                        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
                }
            }
            if Instant::now() > deadline {
                return Err(CgroupError::StillPopulated { path: folder });
            }
            // The kernel has no event for "empty" on v1; the wait is short and bounded.
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Removes `path` and everything below it in every tree; it must hold no process. A missing one is fine.
    pub fn remove(&self, path: &str) -> Result<(), CgroupError> {
        for folder in self.folders(path) {
            remove_tree(&folder).map_err(|source| access("remove", folder, source))?;
        }
        Ok(())
    }

    /// Names of the cgroups directly below `path`, sorted.
    pub fn children(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.folders(path).iter().flat_map(|folder| subfolders(folder)).collect();
        names.order();
        names.dedup();
        names
    }

    fn memory_folder(&self, path: &str) -> PathBuf {
        match &self.layout {
            Layout::Trees { memory, .. } => memory.join(path),
            Layout::Unified { root } => root.join(path),
        }
    }

    fn folders(&self, path: &str) -> Vec<PathBuf> {
        assert!(
            !path.is_empty() && !path.starts_with('/') && !path.contains(".."),
            "a path below the root: {path}"
        );
        match &self.layout {
            Layout::Trees { all, .. } => all.iter().map(|tree| tree.join(path)).collect(),
            Layout::Unified { root } => vec![root.join(path)],
        }
    }
}

fn access(action: &'static str, path: PathBuf, source: io::Error) -> CgroupError {
    CgroupError::Access { action, path, source }
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn keyed_number(file: &Path, key: &str) -> Option<u64> {
    parse_keyed_number(&fs::read_to_string(file).ok()?, key)
}

fn parse_keyed_number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

fn subfolders(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn collect_pids(folder: &Path, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for name in subfolders(folder) {
        collect_pids(&folder.join(name), pids);
    }
}

/// A cgroup folder is removed by rmdir, its files go with it; children first.
fn remove_tree(folder: &Path) -> io::Result<()> {
    for name in subfolders(folder) {
        remove_tree(&folder.join(name))?;
    }
    for attempt in 0u8.. {
        match fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // EBUSY for a moment after the last process has gone.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < 20 => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn the_layout_follows_where_memory_is_controlled() {
        let hybrid = Cgroups::from_mount_table(HYBRID).unwrap();
        assert!(!hybrid.is_unified());
        assert_eq!(hybrid.memory_folder("a/b"), Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(hybrid.folders("a").len(), 2, "co-mounted controllers are one tree");

        let pure = "29 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert!(Cgroups::from_mount_table(pure).unwrap().is_unified());

        assert!(matches!(
            Cgroups::from_mount_table("1 1 0:1 / / rw - ext4 a rw"),
            Err(CgroupError::NotMounted)
        ));
        let memoryless =
            HYBRID.lines().filter(|line| !line.contains("memory")).collect::<Vec<_>>().join("\n");
        assert!(matches!(
            Cgroups::from_mount_table(&memoryless),
            Err(CgroupError::ControllerMissing("memory"))
        ));
    }

    #[test]
    fn a_key_is_matched_whole() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 7\n";
        assert_eq!(parse_keyed_number(events, "oom_kill"), Some(2));
        assert_eq!(parse_keyed_number(events, "oom"), Some(3));
        assert_eq!(parse_keyed_number(events, "kill"), None);
    }
}

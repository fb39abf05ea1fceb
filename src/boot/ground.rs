//! The first mounts of a machine that has nothing but its kernel and this program.
//!
//! Containers change their root with `pivot_root`, which the kernel refuses while the root is its own first file system.
//! A bind mount of that same file system over itself is an ordinary root: nothing is copied.

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io;

struct Place {
    kind: &'static str,
    target: &'static str,
    options: &'static str,
}

const fn place(kind: &'static str, target: &'static str, options: &'static str) -> Place {
    Place { kind, target, options }
}

/// What every program expects, in this order.
const PLACES: [Place; 8] = [
    place("proc", "/proc", ""),
    place("sysfs", "/sys", ""),
    place("devtmpfs", "/dev", "mode=755"),
    place("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
    place("tmpfs", "/dev/shm", "mode=1777"),
    place("tmpfs", "/run", "mode=755"),
    place("tmpfs", "/tmp", "mode=1777"),
    place("cgroup2", "/sys/fs/cgroup", "nsdelegate"),
];

/// A board that is stuck starts anew by itself, and an oops counts as stuck. A feature that is used for the first time
/// may need a module: the kernel asks this program for it (`boot::helper`).
const SETTINGS: [(&str, &str); 5] = [
    ("kernel/modprobe", super::INIT),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/softlockup_panic", "1"),
    ("kernel/hung_task_timeout_secs", "240"),
];

pub fn make_root() -> Result<()> {
    let step = |what: &'static str, result: nix::Result<()>| result.map_err(io::Error::from).context(what);
    fs::create_dir_all("/root-mount").context("create /root-mount")?;
    let none = None::<&str>;
    step("bind the root", mount(Some("/"), "/root-mount", none, MsFlags::MS_BIND, none))?;
    std::env::set_current_dir("/root-mount").context("enter the new root")?;
    step("move the root", mount(Some("."), "/", none, MsFlags::MS_MOVE, none))?;
    step("change the root", nix::unistd::chroot("."))?;
    std::env::set_current_dir("/").context("enter the root")?;
    // Containers get mounts of their own and none of them comes back here.
    step("keep mounts private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
}

pub fn mount_all() -> Result<String> {
    for place in &PLACES {
        fs::create_dir_all(place.target).with_context(|| format!("create {}", place.target))?;
        let flags = MsFlags::MS_NOSUID;
        let mounted = mount(Some(place.kind), place.target, Some(place.kind), flags, Some(place.options));
        match mounted {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(errno) => {
                return Err(io::Error::from(errno)).with_context(|| format!("mount {}", place.target));
            }
        }
    }
    for folder in ["/etc", "/var/lib/tinydc", "/root", "/mnt", "/media", "/srv", "/run/tinydc-boot"] {
        fs::create_dir_all(folder).with_context(|| format!("create {folder}"))?;
    }
    for (name, value) in SETTINGS {
        // Not every kernel has each of them.
        let _ = fs::write(format!("/proc/sys/{name}"), value);
    }
    Ok(format!("{} file systems", PLACES.len()))
}

/// Every controller for everything below; says which one that limits need is missing.
pub fn open_cgroups() -> Result<String> {
    let root = "/sys/fs/cgroup";
    let controllers =
        fs::read_to_string(format!("{root}/cgroup.controllers")).context("read the controllers")?;
    for name in controllers.split_whitespace() {
        let file = format!("{root}/cgroup.subtree_control");
        fs::write(&file, format!("+{name}")).with_context(|| format!("enable the controller {name}"))?;
    }
    let has = |name: &str| controllers.split_whitespace().any(|one| one == name);
    anyhow::ensure!(
        has("memory"),
        "the kernel runs without the memory controller, so no container's memory is limited; \
         add cgroup_enable=memory to cmdline.txt"
    );
    anyhow::ensure!(has("cpu") && has("pids"), "the kernel lacks a controller; it has: {controllers}");
    Ok(controllers.trim().to_string())
}

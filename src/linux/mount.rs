//! Mounts: overlay, bind, and what is mounted below a folder.
//!
//! Overlay folders are handed to the kernel as `/proc/self/fd/N`: mount options are one page, a path of a layer is
//! some 90 bytes and may hold `:` or `,`; as descriptors, 127 layers fit and no name needs escaping.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

/// Mounts an overlay at `target`. `lowers` are ordered from the top layer down to the base.
pub fn overlay(lowers: &[PathBuf], upper: &Path, work: &Path, target: &Path) -> io::Result<()> {
    let lower_fds = lowers.iter().map(|path| open_path(path)).collect::<io::Result<Vec<File>>>()?;
    let (upper_fd, work_fd) = (open_path(upper)?, open_path(work)?);
    let named = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower_fds.iter().map(named).collect::<Vec<_>>().join(":"),
        named(&upper_fd),
        named(&work_fd)
    );
    nix::mount::mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    Ok(())
}

fn open_path(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC).open(path)
}

/// Binds `source` to `target`; both must exist and be of one kind.
pub fn bind(source: &Path, target: &Path) -> io::Result<()> {
    nix::mount::mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// A file system in memory, for root alone; never swapped where the kernel can promise that (since 6.4).
pub fn memory(target: &Path, bytes_max: u64) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mount = |options: &str| {
        nix::mount::mount(Some("tinydc-secrets"), target, Some("tmpfs"), flags, Some(options))
    };
    let options = format!("mode=0700,size={bytes_max}");
    match mount(&format!("{options},noswap")) {
        Err(nix::errno::Errno::EINVAL) => mount(&options)?,
        outcome => outcome?,
    }
    Ok(())
}

/// Takes the mount at `target` out of the tree; it ends when the last user is gone. Nothing mounted there is fine.
pub fn detach(target: &Path) -> io::Result<()> {
    match nix::mount::umount2(target, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// All mount points at or below `folder`, deepest first, so that they can be detached in this order.
pub fn mounted_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = match folder.canonicalize() {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let table = std::fs::read("/proc/self/mountinfo")?;
    let mut points: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(mount_point)
        .filter(|p| p.starts_with(&folder))
        .collect();
    points.reverse();
    Ok(points)
}

/// Covers an empty mount point: what is written there while its disk is absent must not land in memory, nor hide later
/// what is on the disk.
const COVER: &str = "tinydc-absent";

/// Covers a folder with an empty file system that takes no writes.
pub fn cover(target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some(COVER), target, Some("tmpfs"), flags, Some("mode=0555,size=4k"))?;
    Ok(())
}

/// One line of a process's table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    /// Major and minor number.
    pub device: (u32, u32),
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Cover,
    /// What would be mounted by whoever looks below it.
    Automount,
    /// On a device that the mount's own number does not tell: each btrfs has a number of its own.
    Node(PathBuf),
    Other,
}

impl Mount {
    pub fn is_cover(&self) -> bool {
        self.content == Content::Cover
    }

    /// Whether what is mounted can be read: it is no cover, and its disk has not been pulled. Of what is stacked on disks
    /// (LVM, LUKS, RAID) only the uppermost device is looked at, and of what names none (ZFS, shares) nothing.
    pub fn is_alive(&self) -> bool {
        match &self.content {
            Content::Cover | Content::Automount => false,
            Content::Node(node) => is_node_alive(node),
            // What is on no block device has major number 0.
            Content::Other => self.device.0 == 0 || is_device_alive(self.device),
        }
    }
}

/// A card's reader stays without its card, but has no size.
fn is_device_alive((major, minor): (u32, u32)) -> bool {
    let size = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"));
    size.is_ok_and(|size| size.trim() != "0")
}

/// The kernel takes away the node of a disk that is pulled. Asking for its numbers reads no disk.
fn is_node_alive(node: &Path) -> bool {
    let Ok(stat) = rustix::fs::stat(node) else { return false };
    // `/dev/fuse` is the source of file systems on no disk.
    let is_block = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice;
    !is_block || is_device_alive((rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

/// Everything that a process has mounted, as `/proc/PID/mountinfo` says; of two at one place the later is the upper.
pub fn mounts_of(process: &str) -> io::Result<Vec<Mount>> {
    Ok(parse_mounts(&std::fs::read(format!("/proc/{process}/mountinfo"))?))
}

pub fn parse_mounts(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// What is uppermost at a place.
pub fn uppermost<'a>(mounts: &'a [Mount], target: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.point == target)
}

fn mount(line: &[u8]) -> Option<Mount> {
    let point = mount_point(line)?;
    let text = std::str::from_utf8(line).ok()?;
    let (major, minor) = text.split(' ').nth(2)?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    // After the dash: kind, source, options.
    let mut words = text.split(" - ").nth(1)?.split(' ');
    let (kind, source) = (words.next()?, words.next()?);
    let content = match (kind, source) {
        (_, COVER) => Content::Cover,
        ("autofs", _) => Content::Automount,
        _ if device.0 == 0 && source.starts_with("/dev/") => Content::Node(source.into()),
        _ => Content::Other,
    };
    Some(Mount { point, device, content })
}

/// The mount that a path lies on: the deepest at or above it.
pub fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    path.ancestors().find_map(|folder| uppermost(mounts, folder))
}

pub fn is_mounted(target: &Path) -> io::Result<bool> {
    let Ok(target) = target.canonicalize() else { return Ok(false) };
    Ok(mounted_below(&target)?.contains(&target))
}

/// Field 5 of a mountinfo line. The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        if let Some(digits) = octal {
            path.push(
                digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
            );
            rest = &tail[3..];
        } else {
            path.push(byte);
            rest = tail;
        }
    }
    Some(PathBuf::from(OsString::from_vec(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read_back() {
        let line = br"36 35 98:0 / /mnt/a\040b\134c rw,noatime master:1 - ext3 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from("/mnt/a b\\c")));
        assert_eq!(mount_point(b""), None);
    }

    #[test]
    fn the_uppermost_mount_counts_and_a_cover_is_no_disk() {
        let lines: [&[u8]; 3] = [
            b"30 1 0:25 / /mnt/media ro,nosuid - tmpfs tinydc-absent ro,size=4k",
            b"31 30 4095:77 / /mnt/media rw,noatime - ext4 /dev/vdb rw",
            b"32 1 0:26 / /mnt/share rw - nfs4 nas:/share rw",
        ];
        let mounts: Vec<Mount> = lines.iter().filter_map(|line| mount(line)).collect();
        let at = |count: usize, target: &str| uppermost(&mounts[..count], Path::new(target)).cloned();
        let covered = at(1, "/mnt/media").unwrap();
        assert!(covered.is_cover() && !covered.is_alive());
        let disk = at(3, "/mnt/media").unwrap();
        assert_eq!((disk.device, disk.is_cover()), ((4095, 77), false));
        assert!(!disk.is_alive(), "there is no such device");
        assert!(at(3, "/mnt/share").unwrap().is_alive());
        assert_eq!(at(3, "/mnt"), None);
        assert!(!mounts_of("self").unwrap().is_empty());
    }
    #[test]
    fn a_file_system_with_a_number_of_its_own_is_as_alive_as_its_node() {
        let is_alive = |kind: &str, source: &str| {
            mount(format!("40 1 0:45 / /mnt/a rw shared:9 - {kind} {source} rw").as_bytes())
                .unwrap()
                .is_alive()
        };
        assert!(!is_alive("btrfs", "/dev/tinydc-no-such-disk"), "its disk was pulled");
        assert!(is_alive("fuse.x", "/dev/null"), "the node is no disk");
        assert!(is_alive("zfs", "tank/media") && is_alive("nfs4", "nas:/dev/x"));
        assert!(!is_alive("autofs", "systemd-1"), "nothing is mounted until somebody looks");
    }

    #[test]
    fn a_path_lies_on_the_deepest_mount_above_it() {
        let lines: [&[u8]; 3] = [
            b"1 0 0:20 / / rw - ext4 x rw",
            b"2 1 0:21 / /mnt/a rw - ext4 x rw",
            b"3 2 0:22 / /mnt/a/b rw - ext4 x rw",
        ];
        let mounts: Vec<Mount> = lines.iter().filter_map(|line| mount(line)).collect();
        let on = |path: &str| mount_of(&mounts, Path::new(path)).map(|mount| mount.device.1);
        assert_eq!(
            [on("/mnt/a/c/d"), on("/mnt/a/b/c"), on("/mnt/a/b"), on("/mnt")],
            [Some(21), Some(22), Some(22), Some(20)]
        );
    }
}

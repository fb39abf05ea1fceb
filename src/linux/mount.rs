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
}

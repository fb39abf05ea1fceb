//! A container's root: an overlay of its image's layers, and what is put into it before the start.
//!
//! Input: layers and folders. Output: a mount. Paths inside the image are resolved inside its root only.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::images::tree;
use crate::linux::mount;

/// Deeper trees in an image are no data that a volume could be seeded with.
const SEED_DEPTH_MAX: u32 = 128;

#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("layer {0} is not unpacked; fetch the image again")]
    MissingLayer(PathBuf),
    #[error(
        "mount the overlay at {path}; the kernel needs CONFIG_OVERLAY_FS and upper folders on a real file system"
    )]
    Mount {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("fill volume {volume} with `{path}` of the image")]
    Seed {
        volume: PathBuf,
        path: String,
        #[source]
        source: io::Error,
    },
}

/// The folders of one container's root, all in one parent.
#[derive(Clone, Debug)]
pub struct Rootfs {
    parent: PathBuf,
}

impl Rootfs {
    pub fn new(parent: &Path) -> Rootfs {
        Rootfs { parent: parent.to_owned() }
    }

    pub fn path(&self) -> PathBuf {
        self.parent.join("rootfs")
    }

    /// What the container has written.
    pub fn upper(&self) -> PathBuf {
        self.parent.join("upper")
    }

    /// Mounts `layers` (base first) with a writable layer on top. A mounted one is fine.
    pub fn mount(&self, layers: &[PathBuf]) -> Result<(), RootfsError> {
        let (root, upper, work, empty) =
            (self.path(), self.upper(), self.parent.join("work"), self.parent.join("empty"));
        for path in [&root, &upper, &work] {
            create_folder(path)?;
        }
        let is_mounted = mount::is_mounted(&root).map_err(|source| RootfsError::Io {
            action: "look up the mount at",
            path: root.clone(),
            source,
        })?;
        if is_mounted {
            return Ok(());
        }
        let mut lowers: Vec<PathBuf> = layers.iter().rev().cloned().collect();
        if let Some(missing) = lowers.iter().find(|path| !path.is_dir()) {
            return Err(RootfsError::MissingLayer(missing.clone()));
        }
        if lowers.is_empty() {
            // An image without layers; overlayfs wants one.
            create_folder(&empty)?;
            lowers.push(empty);
        }
        // The image's own root folder decides who may enter.
        if let (Some(top), true) = (lowers.first(), is_empty(&upper)) {
            copy_owner_and_mode(top, &upper).map_err(|source| RootfsError::Io {
                action: "prepare",
                path: upper.clone(),
                source,
            })?;
        }
        mount::overlay(&lowers, &upper, &work, &root)
            .map_err(|source| RootfsError::Mount { path: root, source })
    }

    pub fn unmount(&self) -> Result<(), RootfsError> {
        let path = self.path();
        mount::detach(&path).map_err(|source| RootfsError::Io { action: "unmount", path, source })
    }

    /// Bytes on disk that the container has written into its root.
    pub fn upper_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let (mut total, mut folders) = (0, vec![self.upper()]);
        while let Some(folder) = folders.pop() {
            let Ok(entries) = fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                total += metadata.blocks() * 512;
                if metadata.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        total
    }

    /// Makes the working folder if the image lacks it, as Docker does.
    pub fn make_working_dir(&self, path: &str) -> Result<(), RootfsError> {
        let failed =
            |source| RootfsError::Io { action: "make the working folder", path: path.into(), source };
        let clean = tree::below(Path::new(path)).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let root = tree::open_root(&self.path()).map_err(failed)?;
        tree::make_folder(root.as_fd(), &clean).map(|_| ()).map_err(failed)
    }

    /// Copies what the image has at `path` into `volume` if that folder is empty: once, whole or not at all, with
    /// owners, modes, times and attributes. The volume's folder itself takes the owner and mode of `path`.
    pub fn seed_volume(&self, path: &str, volume: &Path) -> Result<(), RootfsError> {
        let failed = |source| RootfsError::Seed { volume: volume.to_owned(), path: path.to_owned(), source };
        if !is_empty(volume) {
            return Ok(());
        }
        let clean = tree::below(Path::new(path)).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let root = tree::open_root(&self.path()).map_err(failed)?;
        let source = match tree::open_folder(root.as_fd(), &clean) {
            Ok(source) => source,
            // Nothing there, or a file: the volume stays empty.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        };
        let mut name = volume.file_name().unwrap_or_default().to_owned();
        name.push(".seeding");
        let staging = volume.with_file_name(name);
        tree::remove(&staging).map_err(failed)?;
        fs::create_dir(&staging).map_err(failed)?;
        let result = fill(source.as_fd(), &staging).and_then(|()| fs::rename(&staging, volume));
        if result.is_err() {
            let _ = tree::remove(&staging);
        }
        result.map_err(failed)
    }
}

fn create_folder(path: &Path) -> Result<(), RootfsError> {
    fs::create_dir_all(path).map_err(|source| RootfsError::Io {
        action: "create",
        path: path.to_owned(),
        source,
    })
}

/// A missing folder is empty.
fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

fn copy_owner_and_mode(from: &Path, to: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(from)?;
    rustix::fs::chown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    Ok(rustix::fs::chmod(to, Mode::from_raw_mode(stat.st_mode))?)
}

fn fill(source: BorrowedFd<'_>, staging: &Path) -> io::Result<()> {
    let target = tree::open_root(staging)?;
    copy_folder(source, target.as_fd(), 0)?;
    // Once, before the name: a power cut must not leave a half-filled volume that counts as seeded.
    Ok(rustix::fs::syncfs(&target)?)
}

fn copy_folder(source: BorrowedFd<'_>, target: BorrowedFd<'_>, depth: u32) -> io::Result<()> {
    if depth > SEED_DEPTH_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the folders are nested too deep"));
    }
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(source, target, name, depth)?;
        }
    }
    let stat = rustix::fs::fstat(source)?;
    describe(source, target, &stat)
}

fn copy_entry(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    depth: u32,
) -> io::Result<()> {
    let stat = rustix::fs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
    let open_flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let from = rustix::fs::openat(source, name, open_flags | OFlags::DIRECTORY, Mode::empty())?;
            rustix::fs::mkdirat(target, name, Mode::from(0o700))?;
            let to = rustix::fs::openat(target, name, open_flags | OFlags::DIRECTORY, Mode::empty())?;
            copy_folder(from.as_fd(), to.as_fd(), depth + 1)
        }
        FileType::RegularFile => {
            let from = File::from(rustix::fs::openat(source, name, open_flags, Mode::empty())?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let to = File::from(rustix::fs::openat(target, name, flags, Mode::from(0o600))?);
            io::copy(&mut &from, &mut &to)?;
            describe(from.as_fd(), to.as_fd(), &stat)
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(source, name, Vec::new())?;
            rustix::fs::symlinkat(link.as_c_str(), target, name)?;
            Ok(rustix::fs::chownat(target, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?)
        }
        FileType::Fifo => {
            rustix::fs::mknodat(target, name, FileType::Fifo, Mode::from_raw_mode(stat.st_mode), 0)?;
            Ok(rustix::fs::chownat(target, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?)
        }
        // Devices and sockets are no content.
        _ => Ok(()),
    }
}

/// Owner before mode and attributes: chown clears set-id bits and file capabilities.
fn describe(source: BorrowedFd<'_>, target: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    rustix::fs::fchown(target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(target, Mode::from_raw_mode(stat.st_mode))?;
    copy_attributes(source, target)?;
    let modified = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as i64 };
    Ok(rustix::fs::futimens(target, &Timestamps { last_access: modified, last_modification: modified })?)
}

fn copy_attributes(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0u8; 64 * 1024];
    let length = match rustix::fs::flistxattr(source, names.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let mut value = vec![0u8; 64 * 1024];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.") {
            continue;
        }
        let length = rustix::fs::fgetxattr(source, name, value.as_mut_slice())?;
        match rustix::fs::fsetxattr(target, name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

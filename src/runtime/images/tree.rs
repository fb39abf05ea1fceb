//! File trees of unknown origin: opened, made and removed without ever leaving their root.
//!
//! Every path is resolved by the kernel beneath a root descriptor (`openat2`, RESOLVE_IN_ROOT), as in a chroot:
//! links inside the tree work, links out of it end at its root.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// How many folders deep a removal descends before it moves what is below to the top: bounds stack and descriptors.
const REMOVE_DEPTH_MAX: u32 = 64;
const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);

/// Opens the root of a tree.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, FOLDER, Mode::empty())?)
}

/// A path of an archive or a spec as one below a root: no `..`, a leading `/` is dropped.
pub fn below(path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(clean)
}

/// Opens what `path` means inside the tree.
pub fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: a rename elsewhere raced with the resolution; the kernel asks to try again.
    for _ in 0..16 {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => continue,
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// Opens the folder `path` inside the tree.
pub fn open_folder(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_in(root, path, FOLDER)
}

/// Opens the folder `path` inside the tree, making it and its missing parents with mode 0755.
pub fn make_folder(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    match open_folder(root, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let mut made = PathBuf::new();
    let mut parent = open_folder(root, Path::new(""))?;
    for name in path.iter() {
        made.push(name);
        parent = match open_folder(root, &made) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match rustix::fs::mkdirat(&parent, name, Mode::from(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => open_folder(root, &made)?,
                    Err(errno) => return Err(errno.into()),
                }
            }
            other => other?,
        };
    }
    Ok(parent)
}

/// Reads a whole file inside the tree; more than `bytes_max` is an error.
pub fn read_file(root: BorrowedFd<'_>, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    use std::io::Read;
    // O_NONBLOCK: a FIFO planted at the path must not block.
    let file = std::fs::File::from(open_in(root, path, OFlags::RDONLY | OFlags::NONBLOCK)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// `/proc/self/fd/N/name`: for calls that exist only by path. The last component is not followed by `l…` calls.
pub fn path_of(folder: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name)
}

/// Removes the tree at `path`, however deep. A missing one is fine. Links are removed, not followed.
pub fn remove(path: &Path) -> io::Result<()> {
    let top = match rustix::fs::open(path, FOLDER | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return std::fs::remove_file(path),
        Err(errno) => return Err(errno.into()),
    };
    let mut moved = 0u64;
    loop {
        let moved_before = moved;
        clear(top.as_fd(), top.as_fd(), 0, &mut moved)?;
        if moved == moved_before {
            return std::fs::remove_dir(path);
        }
    }
}

/// Removes one entry of a folder, with everything below it.
pub fn remove_entry(folder: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    remove(&path_of(folder, name))
}

fn clear(top: BorrowedFd<'_>, folder: BorrowedFd<'_>, depth: u32, moved: &mut u64) -> io::Result<()> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
        if depth < REMOVE_DEPTH_MAX {
            let inner = rustix::fs::openat(folder, name, FOLDER | OFlags::NOFOLLOW, Mode::empty())?;
            clear(top, inner.as_fd(), depth + 1, moved)?;
            rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?;
        } else {
            *moved += 1;
            let place = format!(".removed-{}-{moved}", std::process::id());
            rustix::fs::renameat_with(folder, name, top, place.as_str(), RenameFlags::NOREPLACE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::scratch::Scratch;

    #[test]
    fn a_path_with_a_parent_component_is_refused() {
        assert_eq!(below(Path::new("/a/./b")), Some(PathBuf::from("a/b")));
        assert_eq!(below(Path::new("./")), Some(PathBuf::new()));
        for path in ["..", "a/../b", "/../etc"] {
            assert_eq!(below(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_link_out_of_the_tree_ends_at_its_root() {
        let scratch = Scratch::new("tree-link");
        std::fs::create_dir(scratch.path().join("etc")).unwrap();
        std::fs::write(scratch.path().join("etc/passwd"), "inside").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", scratch.path().join("link")).unwrap();
        std::os::unix::fs::symlink("../../../etc", scratch.path().join("up")).unwrap();
        let root = open_root(scratch.path()).unwrap();
        for path in ["link", "up/passwd"] {
            assert_eq!(read_file(root.as_fd(), Path::new(path), 100).unwrap(), b"inside", "{path}");
        }
        make_folder(root.as_fd(), Path::new("up/deep/er")).unwrap();
        assert!(scratch.path().join("etc/deep/er").is_dir());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_removed() {
        let scratch = Scratch::new("tree-deep");
        let top = scratch.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let mut folder = open_root(&top).unwrap();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&folder, "d", Mode::from(0o755)).unwrap();
            folder = rustix::fs::openat(&folder, "d", FOLDER, Mode::empty()).unwrap();
        }
        drop(folder);
        remove(&top).unwrap();
        assert!(!top.exists());
        remove(&top).unwrap();
    }
}

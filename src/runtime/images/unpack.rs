//! Unpacks one layer's tar into a folder that becomes an overlay lower folder.
//!
//! Input: an untrusted tar stream. Output: files with owner, mode, xattrs and times; deletions as overlay whiteouts.
//! Never writes outside the folder, follows no link out of it, makes no device, and stops at the caps below.
//!
//! Invariant: nothing in a layer can reach a path outside its root (`tests/runtime`, hostile layers).

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use super::tree;

/// Files, folders and links in one layer. The largest public images stay below 300,000.
const ENTRIES_MAX: u64 = 1_000_000;
/// Long names and extended headers are held in memory.
const HEADER_BYTES_MAX: u64 = 1024 * 1024;
const PATH_BYTES_MAX: usize = 4096;
/// Dirty pages are flushed in steps so that another file's fdatasync never waits for a whole layer.
const FLUSH_STEP_BYTES: u64 = 4 * 1024 * 1024;
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("read the layer's tar")]
    ReadTar(#[source] io::Error),
    #[error("`{0}` is no path inside an image")]
    BadPath(String),
    #[error("unpack `{path}`")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{path}` is a {kind:?} entry, which images do not hold")]
    BadKind { path: PathBuf, kind: EntryType },
    #[error("a header of `{0}` exceeds {HEADER_BYTES_MAX} bytes")]
    HeaderTooLong(PathBuf),
    #[error("more than {ENTRIES_MAX} entries in one layer")]
    TooManyEntries,
    #[error("open the folder of the layer")]
    OpenRoot(#[source] io::Error),
}

/// One entry with its extended headers applied.
struct Entry {
    path: PathBuf,
    link: Option<PathBuf>,
    kind: EntryType,
    mode: u32,
    owner: (u32, u32),
    times: Timestamps,
    xattrs: Vec<(String, Vec<u8>)>,
}

/// Headers that describe the entry after them.
#[derive(Default)]
struct Extended {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Vec<(String, Vec<u8>)>,
}

/// Unpacks `stream` into the empty folder `folder`. Devices are left out; the number of them is returned.
pub fn unpack(stream: impl Read, folder: &Path) -> Result<u64, UnpackError> {
    let root = tree::open_root(folder).map_err(UnpackError::OpenRoot)?;
    let mut unpacker =
        Unpacker { root: root.as_fd(), folder_times: Vec::new(), unflushed_bytes: 0, skipped: 0 };
    // Some builders leave out the padding and the end blocks: two blocks of zeros end any archive, and the digest
    // still tells a cut one.
    let mut archive = tar::Archive::new(stream.chain(io::repeat(0).take(1536)));
    let mut extended = Extended::default();
    let mut count = 0u64;
    // Raw: the crate would hold extended headers of any length in memory.
    for raw in archive.entries().map_err(UnpackError::ReadTar)?.raw(true) {
        let mut raw = raw.map_err(UnpackError::ReadTar)?;
        count += 1;
        if count > ENTRIES_MAX {
            return Err(UnpackError::TooManyEntries);
        }
        if extended.take_header(&mut raw)? {
            continue;
        }
        let entry = Entry::read(&raw, std::mem::take(&mut extended))?;
        unpacker.place(&entry, &mut raw)?;
    }
    unpacker.finish();
    Ok(unpacker.skipped)
}

impl Extended {
    /// Keeps `raw` if it describes the entry that follows.
    fn take_header(&mut self, raw: &mut tar::Entry<'_, impl Read>) -> Result<bool, UnpackError> {
        let kind = raw.header().entry_type();
        let wanted = kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions();
        if !wanted {
            return Ok(kind.is_pax_global_extensions());
        }
        let mut bytes = Vec::new();
        raw.take(HEADER_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(UnpackError::ReadTar)?;
        if bytes.len() as u64 > HEADER_BYTES_MAX {
            let path = raw.path().map(|path| path.into_owned()).unwrap_or_default();
            return Err(UnpackError::HeaderTooLong(path));
        }
        if kind.is_pax_local_extensions() {
            for record in tar::PaxExtensions::new(&bytes) {
                let record = record.map_err(UnpackError::ReadTar)?;
                let key = String::from_utf8_lossy(record.key_bytes()).into_owned();
                self.pax.push((key, record.value_bytes().to_vec()));
            }
            return Ok(true);
        }
        if bytes.last() == Some(&0) {
            bytes.pop();
        }
        let place = if kind.is_gnu_longname() { &mut self.long_path } else { &mut self.long_link };
        *place = Some(bytes);
        Ok(true)
    }

    fn pax(&self, key: &str) -> Option<&[u8]> {
        self.pax.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_slice())
    }

    fn pax_number(&self, key: &str) -> Option<u64> {
        std::str::from_utf8(self.pax(key)?).ok()?.parse().ok()
    }
}

impl Entry {
    fn read(raw: &tar::Entry<'_, impl Read>, extended: Extended) -> Result<Entry, UnpackError> {
        let header = raw.header();
        let path = extended.pax("path").map(<[u8]>::to_vec).or(extended.long_path.clone());
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extended.pax("linkpath").map(<[u8]>::to_vec).or(extended.long_link.clone());
        let link = link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let bad_path = || UnpackError::BadPath(String::from_utf8_lossy(&path).chars().take(200).collect());
        if path.len() > PATH_BYTES_MAX || path.contains(&0) {
            return Err(bad_path());
        }
        let size = header.entry_size().map_err(UnpackError::ReadTar)?;
        if extended.pax_number("size").is_some_and(|pax_size| pax_size != size) {
            let message = format!("`{}` has two sizes", String::from_utf8_lossy(&path));
            return Err(UnpackError::ReadTar(io::Error::new(io::ErrorKind::InvalidData, message)));
        }
        let number = |pax: &str, header: io::Result<u64>| match extended.pax_number(pax) {
            Some(number) => Ok(number),
            None => header.map_err(UnpackError::ReadTar),
        };
        let owner = (number("uid", header.uid())? as u32, number("gid", header.gid())? as u32);
        let modified = extended.pax("mtime").and_then(parse_time);
        let modified = match modified {
            Some(time) => time,
            None => Timespec { tv_sec: header.mtime().map_err(UnpackError::ReadTar)? as i64, tv_nsec: 0 },
        };
        let clean = tree::below(Path::new(OsStr::from_bytes(&path))).ok_or_else(bad_path)?;
        let xattrs = extended.pax.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix("SCHILY.xattr.")?;
            allowed_xattr(name).then(|| (name.to_owned(), value.clone()))
        });
        Ok(Entry {
            path: clean,
            link: link.map(|link| PathBuf::from(OsString::from_vec(link))),
            kind: header.entry_type(),
            mode: header.mode().map_err(UnpackError::ReadTar)? & 0o7777,
            owner,
            times: Timestamps { last_access: modified, last_modification: modified },
            xattrs: xattrs.collect(),
        })
    }

    fn failed(&self, source: io::Error) -> UnpackError {
        UnpackError::Write { path: self.path.clone(), source }
    }
}

/// `trusted.` would let an image speak to overlayfs; SELinux labels belong to the builder's machine.
fn allowed_xattr(name: &str) -> bool {
    !name.starts_with("trusted.") && name != "security.selinux" && !name.contains('\0')
}

/// Seconds and an optional fraction, as PAX writes them.
fn parse_time(text: &[u8]) -> Option<Timespec> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some(Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: digits.parse().ok()? })
}

struct Unpacker<'root> {
    root: BorrowedFd<'root>,
    /// Set last: making a file inside changes its folder's time.
    folder_times: Vec<(PathBuf, Timestamps)>,
    unflushed_bytes: u64,
    skipped: u64,
}

impl Unpacker<'_> {
    fn place(&mut self, entry: &Entry, content: &mut impl Read) -> Result<(), UnpackError> {
        let Some(name) = entry.path.file_name() else {
            return self.place_root(entry).map_err(|error| entry.failed(error));
        };
        if !matches!(
            entry.kind,
            EntryType::Regular
                | EntryType::Continuous
                | EntryType::Directory
                | EntryType::Symlink
                | EntryType::Link
                | EntryType::Fifo
                | EntryType::Char
                | EntryType::Block
        ) {
            return Err(UnpackError::BadKind { path: entry.path.clone(), kind: entry.kind });
        }
        let parent = tree::make_folder(self.root, entry.path.parent().unwrap_or(Path::new("")));
        let parent = parent.map_err(|error| entry.failed(error))?;
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self.white_out(&parent, hidden, entry);
        }
        self.place_entry(&parent, name, entry, content).map_err(|error| entry.failed(error))
    }

    fn place_root(&mut self, entry: &Entry) -> io::Result<()> {
        let (uid, gid) = entry.owner;
        rustix::fs::fchown(self.root, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        rustix::fs::fchmod(self.root, Mode::from(entry.mode))?;
        self.folder_times.push((PathBuf::new(), entry.times.clone()));
        Ok(())
    }

    /// A whiteout hides what lower layers hold, never an entry of its own layer, whatever their order.
    fn white_out(&mut self, parent: &OwnedFd, hidden: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let failed = |errno: Errno| entry.failed(errno.into());
        if hidden == b".wh..opq" {
            return rustix::fs::fsetxattr(parent, OPAQUE_XATTR, b"y", XattrFlags::empty()).map_err(failed);
        }
        if hidden.starts_with(b".wh.") {
            // Left over from aufs: its own bookkeeping, no whiteout.
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(UnpackError::BadPath(entry.path.display().to_string()));
        }
        let hidden = OsStr::from_bytes(hidden);
        match rustix::fs::statat(parent, hidden, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_dir() => {
                make_opaque(parent.as_fd(), hidden).map_err(|error| entry.failed(error))
            }
            Ok(_) => Ok(()),
            Err(Errno::NOENT) => {
                rustix::fs::mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(failed)
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    fn place_entry(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        entry: &Entry,
        content: &mut impl Read,
    ) -> io::Result<()> {
        let replaced_whiteout = clear_the_way(parent.as_fd(), name, entry.kind.is_dir())?;
        match entry.kind {
            EntryType::Directory => {
                match rustix::fs::mkdirat(parent, name, Mode::from(0o700)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if replaced_whiteout {
                    make_opaque(parent.as_fd(), name)?;
                }
            }
            EntryType::Symlink => {
                let link = entry.link.as_deref().ok_or_else(missing_link)?;
                rustix::fs::symlinkat(link, parent, name)?;
            }
            EntryType::Link => return self.place_hard_link(parent.as_fd(), name, entry),
            EntryType::Fifo => rustix::fs::mknodat(parent, name, FileType::Fifo, Mode::from(0o600), 0)?,
            EntryType::Char | EntryType::Block => {
                self.skipped += 1;
                return Ok(());
            }
            _ => self.write_file(parent.as_fd(), name, content)?,
        }
        self.describe(parent.as_fd(), name, entry)
    }

    fn write_file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        content: &mut impl Read,
    ) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::openat(parent, name, flags, Mode::from(0o600))?);
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            let count = content.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..count])?;
            self.unflushed_bytes += count as u64;
            if self.unflushed_bytes >= FLUSH_STEP_BYTES {
                file.sync_data()?;
                self.unflushed_bytes = 0;
            }
        }
    }

    /// The target is a path in the image. A link is linked, not followed, and nothing outside the root can be named.
    fn place_hard_link(&self, parent: BorrowedFd<'_>, name: &OsStr, entry: &Entry) -> io::Result<()> {
        let target = tree::below(entry.link.as_deref().ok_or_else(missing_link)?).ok_or_else(missing_link)?;
        let target_name = target.file_name().ok_or_else(missing_link)?;
        let folder = tree::open_folder(self.root, target.parent().unwrap_or(Path::new("")))?;
        Ok(rustix::fs::linkat(&folder, target_name, parent, name, AtFlags::empty())?)
    }

    /// In this order: chown clears set-id bits and file capabilities, so modes and xattrs come after it.
    fn describe(&mut self, parent: BorrowedFd<'_>, name: &OsStr, entry: &Entry) -> io::Result<()> {
        let owner = (Some(Uid::from_raw(entry.owner.0)), Some(Gid::from_raw(entry.owner.1)));
        rustix::fs::chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        if entry.kind != EntryType::Symlink {
            // The entry was made by us just now, so it is no link that chmod could follow.
            rustix::fs::chmodat(parent, name, Mode::from(entry.mode), AtFlags::empty())?;
        }
        for (key, value) in &entry.xattrs {
            let path = tree::path_of(parent, name);
            match rustix::fs::lsetxattr(&path, key.as_str(), value, XattrFlags::empty()) {
                // `user.` on a link or a FIFO, or a file system without them: an image works without.
                Ok(()) | Err(Errno::PERM | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if entry.kind.is_dir() {
            self.folder_times.push((entry.path.clone(), entry.times.clone()));
            return Ok(());
        }
        Ok(rustix::fs::utimensat(parent, name, &entry.times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn finish(&mut self) {
        for (path, times) in self.folder_times.drain(..).rev() {
            if let Ok(folder) = tree::open_folder(self.root, &path) {
                // A folder replaced later in the layer keeps its own time; nothing depends on it.
                let _ = rustix::fs::futimens(&folder, &times);
            }
        }
    }
}

/// Removes what stands at `name`, unless a folder meets a folder. Tells whether it was a whiteout of this layer.
fn clear_the_way(parent: BorrowedFd<'_>, name: &OsStr, is_folder: bool) -> io::Result<bool> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    if is_folder && kind.is_dir() {
        return Ok(false);
    }
    tree::remove_entry(parent, name)?;
    Ok(kind.is_char_device() && stat.st_rdev == 0)
}

fn make_opaque(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    Ok(rustix::fs::fsetxattr(&folder, OPAQUE_XATTR, b"y", XattrFlags::empty())?)
}

fn missing_link() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the link has no target inside the image")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_times_keep_their_fraction() {
        let time = |text: &str| parse_time(text.as_bytes()).map(|time| (time.tv_sec, time.tv_nsec));
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("1.0000000019"), Some((1, 1)));
        assert_eq!(time("x"), None);
        assert_eq!(time("1.-5"), None);
    }

    #[test]
    fn an_image_cannot_set_the_overlays_own_attributes() {
        assert!(allowed_xattr("user.note") && allowed_xattr("security.capability"));
        assert!(!allowed_xattr("trusted.overlay.redirect") && !allowed_xattr("security.selinux"));
    }
}

//! Packs the files that a Compose file mounts, so that they can be sent along.
//!
//! A file or directory → a tar whose bytes depend only on what is in it (`compose::archive`), and its digest. Sockets
//! and devices are skipped with a note. What exceeds 64 MiB in all is refused before anything is sent.
//!
//! Invariant: unchanged files give the same digest (`unchanged_files_give_the_same_digest`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest as _, Sha256};

use super::failure::Failure;
use super::figures::size;
use crate::compose::archive::{Entry, EntryKind, build_archive};
use crate::compose::{ContentKind, ContentWish};
use crate::model::Digest;
use crate::model::limits::CONTENT_BYTES_MAX;

/// More entries than this is a directory that should be an image.
const ENTRIES_MAX: usize = 20_000;

#[derive(Debug, Default)]
pub struct Packed {
    /// By the wishes' paths.
    pub digests: BTreeMap<String, Digest>,
    pub archives: BTreeMap<Digest, Vec<u8>>,
    /// What was skipped, one sentence each.
    pub notes: Vec<String>,
}

struct Walk<'a> {
    keeps_owners: bool,
    entries: Vec<Entry>,
    bytes: &'a mut u64,
    notes: &'a mut Vec<String>,
}

/// `folder`: of the Compose file.
pub fn pack(folder: &Path, wishes: &[ContentWish]) -> anyhow::Result<Packed> {
    let mut packed = Packed::default();
    let mut bytes = 0;
    for wish in wishes {
        if packed.digests.contains_key(&wish.path) {
            continue;
        }
        let path = folder.join(&wish.path);
        let keeps_owners = matches!(wish.kind, ContentKind::SeedOfVolume { .. });
        let mut walk =
            Walk { keeps_owners, entries: Vec::new(), bytes: &mut bytes, notes: &mut packed.notes };
        match wish.kind {
            ContentKind::File => walk.add_file(&path, &wish.path)?,
            ContentKind::ReadOnlyDirectory | ContentKind::SeedOfVolume { .. } => {
                walk.add_folder(&path, &wish.path)?;
            }
        }
        let archive = build_archive(walk.entries)?;
        let hash: [u8; 32] = Sha256::digest(&archive).into();
        let digest = Digest::of_sha256(&hash);
        packed.digests.insert(wish.path.clone(), digest.clone());
        packed.archives.insert(digest, archive);
    }
    Ok(packed)
}

impl Walk<'_> {
    fn add_file(&mut self, path: &Path, shown: &str) -> anyhow::Result<()> {
        let metadata = fs::metadata(path).with_context(|| format!("read {shown}"))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.add(path, name.unwrap_or_else(|| "file".into()), shown, &metadata)
    }

    fn add_folder(&mut self, root: &Path, shown: &str) -> anyhow::Result<()> {
        let mut folders: Vec<(PathBuf, String)> = vec![(root.into(), String::new())];
        while let Some((folder, inside)) = folders.pop() {
            let place = || format!("read {shown}/{inside}");
            for entry in fs::read_dir(&folder).with_context(place)? {
                let entry = entry.with_context(place)?;
                let name = entry.file_name();
                let Some(name) = name.to_str() else {
                    let shown = format!("{shown}/{inside}");
                    return Err(Failure::usage(format!("{name:?} in {shown} is not UTF-8"))
                        .hint("rename it")
                        .into());
                };
                let inside = if inside.is_empty() { name.to_owned() } else { format!("{inside}/{name}") };
                let metadata = entry.metadata().with_context(|| format!("read {shown}/{inside}"))?;
                if metadata.is_dir() {
                    folders.push((entry.path(), inside.clone()));
                }
                let shown = format!("{shown}/{inside}");
                self.add(&entry.path(), inside, &shown, &metadata)?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        path: &Path,
        inside: String,
        shown: &str,
        metadata: &fs::Metadata,
    ) -> anyhow::Result<()> {
        let file_type = metadata.file_type();
        let kind = if file_type.is_dir() {
            EntryKind::Directory
        } else if file_type.is_symlink() {
            let target = fs::read_link(path).with_context(|| format!("read the link {shown}"))?;
            EntryKind::Symlink(target.to_string_lossy().into_owned())
        } else if file_type.is_file() {
            // Checked before it is read: it may be larger than this machine's memory.
            self.count(metadata.len())?;
            EntryKind::File(fs::read(path).with_context(|| format!("read {shown}"))?)
        } else {
            let what = if file_type.is_socket() {
                "a socket"
            } else if file_type.is_fifo() {
                "a pipe"
            } else {
                "a device"
            };
            self.notes.push(format!("{shown} is {what} and is not sent along"));
            return Ok(());
        };
        if self.entries.len() >= ENTRIES_MAX {
            return Err(Failure::usage(format!("more than {ENTRIES_MAX} files would be sent along"))
                .hint("put them into an image")
                .into());
        }
        let owner = if self.keeps_owners { (metadata.uid(), metadata.gid()) } else { (0, 0) };
        self.entries.push(Entry { path: inside, kind, mode: metadata.mode() & 0o7777, owner });
        Ok(())
    }

    fn count(&mut self, bytes: u64) -> Result<(), Failure> {
        *self.bytes = self.bytes.saturating_add(bytes);
        match *self.bytes <= CONTENT_BYTES_MAX {
            true => Ok(()),
            false => Err(Failure::usage(format!(
                "the files that the Compose file mounts are larger than {} in all",
                size(CONTENT_BYTES_MAX)
            ))
            .hint("put them into an image, or mount an absolute path that lies on the node")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::cli::contexts::tests::Folder;

    fn wish(path: &str, kind: ContentKind) -> ContentWish {
        ContentWish {
            service: "web".into(),
            target: "/x".into(),
            path: path.into(),
            kind,
            is_read_only: true,
        }
    }

    #[test]
    fn unchanged_files_give_the_same_digest() {
        let folder = Folder::create();
        let site = folder.0.join("site");
        fs::create_dir_all(site.join("a/b")).unwrap();
        fs::write(site.join("a/b/c"), "1").unwrap();
        std::os::unix::fs::symlink("a/b", site.join("link")).unwrap();
        fs::write(folder.0.join("conf"), "2").unwrap();
        let wishes = [
            wish("./site", ContentKind::ReadOnlyDirectory),
            wish("./conf", ContentKind::File),
            wish("./site", ContentKind::ReadOnlyDirectory),
        ];
        let first = pack(&folder.0, &wishes).unwrap();
        assert_eq!(first.archives.len(), 2);
        fs::write(site.join("a/b/c"), "1").unwrap();
        assert_eq!(pack(&folder.0, &wishes).unwrap().digests, first.digests);
        fs::write(site.join("a/b/c"), "3").unwrap();
        let changed = pack(&folder.0, &wishes).unwrap().digests;
        assert_ne!(changed["./site"], first.digests["./site"]);
        assert_eq!(changed["./conf"], first.digests["./conf"]);
    }

    #[test]
    fn sockets_are_skipped_and_too_much_is_refused() {
        let folder = Folder::create();
        let site = folder.0.join("site");
        fs::create_dir_all(&site).unwrap();
        let _socket = UnixListener::bind(site.join("s")).unwrap();
        let wishes = [wish("./site", ContentKind::ReadOnlyDirectory)];
        assert_eq!(pack(&folder.0, &wishes).unwrap().notes, ["./site/s is a socket and is not sent along"]);
        // Sparse: it takes no room on the disk.
        fs::File::create(site.join("big")).unwrap().set_len(CONTENT_BYTES_MAX + 1).unwrap();
        let error = pack(&folder.0, &wishes).unwrap_err();
        assert!(error.to_string().contains("64 MiB") && error.is::<Failure>(), "{error}");
    }
}

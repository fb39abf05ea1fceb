//! A tar whose bytes depend only on what is in it.
//!
//! Input: entries in any order. Output: an uncompressed GNU tar, sorted by path, with times and owners at zero
//! unless given, so that unchanged content keeps its digest (`the_order_of_entries_makes_no_difference`).

use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative, with `/` between names and without `.` or `..`.
    pub path: String,
    pub kind: EntryKind,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
    /// Owner and group; `(0, 0)` unless there is a reason.
    pub owner: (u32, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    File(Vec<u8>),
    Directory,
    /// With its target, as it stands in the link.
    Symlink(String),
}

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{0:?} is not a path inside the archive")]
    Path(String),
    #[error("{0:?} is in the archive twice")]
    Repeated(String),
    #[error("write {path:?} into the archive")]
    Write {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error("end the archive")]
    End(#[source] std::io::Error),
}

/// The archive's bytes.
pub fn build_archive(entries: Vec<Entry>) -> Result<Vec<u8>, ArchiveError> {
    let mut sorted = BTreeMap::new();
    for entry in entries {
        let is_inside = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
        if !entry.path.split('/').all(is_inside) {
            return Err(ArchiveError::Path(entry.path));
        }
        if let Some(first) = sorted.insert(entry.path.clone(), entry) {
            return Err(ArchiveError::Repeated(first.path));
        }
    }
    let mut builder = tar::Builder::new(Vec::new());
    for entry in sorted.into_values() {
        append(&mut builder, &entry).map_err(|source| ArchiveError::Write { path: entry.path, source })?;
    }
    builder.into_inner().map_err(ArchiveError::End)
}

fn append(builder: &mut tar::Builder<Vec<u8>>, entry: &Entry) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode & 0o7777);
    header.set_mtime(0);
    header.set_uid(u64::from(entry.owner.0));
    header.set_gid(u64::from(entry.owner.1));
    header.set_size(0);
    match &entry.kind {
        EntryKind::File(bytes) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, &entry.path, bytes.as_slice())
        }
        EntryKind::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            builder.append_data(&mut header, format!("{}/", entry.path), std::io::empty())
        }
        EntryKind::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            builder.append_link(&mut header, &entry.path, target)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Entry {
        let kind = EntryKind::File(text.as_bytes().to_vec());
        Entry { path: path.into(), kind, mode: 0o644, owner: (0, 0) }
    }

    fn directory(path: &str) -> Entry {
        Entry { path: path.into(), kind: EntryKind::Directory, mode: 0o755, owner: (0, 0) }
    }

    #[test]
    fn the_order_of_entries_makes_no_difference() {
        let one = build_archive(vec![directory("a"), file("a/b", "x"), file("c", "y")]).unwrap();
        let two = build_archive(vec![file("c", "y"), file("a/b", "x"), directory("a")]).unwrap();
        assert_eq!(one, two);
        assert_ne!(one, build_archive(vec![directory("a"), file("a/b", "z"), file("c", "y")]).unwrap());
    }

    #[test]
    fn an_archive_holds_what_was_put_in() {
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(150));
        let link =
            Entry { path: "l".into(), kind: EntryKind::Symlink("a".into()), mode: 0o777, owner: (7, 8) };
        let bytes = build_archive(vec![file(&long, "deep"), file("a", "x"), link]).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut found = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            found.push((path, header.entry_type(), header.mtime().unwrap(), header.uid().unwrap()));
        }
        let expected = [
            ("a".to_owned(), tar::EntryType::Regular, 0, 0),
            (long, tar::EntryType::Regular, 0, 0),
            ("l".to_owned(), tar::EntryType::Symlink, 0, 7),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_path_that_leads_out_or_comes_twice_is_refused() {
        for path in ["", "/a", "a/../b", "./a", "a//b", "a/", ".."] {
            assert!(matches!(build_archive(vec![file(path, "")]), Err(ArchiveError::Path(_))), "{path}");
        }
        let twice = build_archive(vec![file("a", "1"), file("a", "2")]);
        assert!(matches!(twice, Err(ArchiveError::Repeated(_))));
    }
}

//! The images of this node: blobs by digest, unpacked layers by the digest of their tar, one record per image.
//!
//! Input: streams of unknown origin. Output: files whose names tell their content. A file gets its name only after
//! its digest and size were checked and its bytes were flushed, so whatever has a name is whole, also after a power
//! cut. Several threads may use one store; two never write the same blob or layer.
//!
//! ```text
//! blobs/sha256/HEX   manifests, indexes, configurations, and layers that peers may ask for
//! layers/HEX/        one unpacked layer, an overlay lower folder
//! images/HEX         the record of an image: names, platform manifest; written last
//! tmp/               emptied at start
//! ```

use crate::model::Order;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, HashingReader};
use super::manifest::{
    BlobRef, ConfigDocument, DOCUMENT_BYTES_MAX, Document, Manifest, ManifestError, Platform,
};
use super::tree;

/// Data is flushed in steps, so that no other file's fdatasync waits for a whole blob.
const FLUSH_STEP_BYTES: u64 = 4 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("read {blob}")]
    ReadSource {
        blob: Digest,
        #[source]
        source: io::Error,
    },
    #[error("digest of {expected} is {actual}")]
    DigestMismatch { expected: Digest, actual: Digest },
    #[error("{blob} has {actual} bytes, its manifest says {expected}")]
    SizeMismatch { blob: Digest, expected: u64, actual: u64 },
    #[error("{0} is not on this node")]
    MissingBlob(Digest),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("the record of image {0} is damaged")]
    BadRecord(Digest),
}

/// What `images/HEX` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// As served and as deployed: the digest of an index or of a manifest.
    pub digest: Digest,
    pub names: BTreeSet<String>,
    /// The manifest for this node's platform; `None` when the image is only kept for other nodes.
    pub manifest: Option<Digest>,
    /// Unpacked layers, base first; empty without `manifest`.
    pub layers: Vec<Digest>,
    /// Compressed size of what this node's platform needs.
    pub size_bytes: u64,
}

#[derive(Debug)]
pub struct ImageStore {
    root: PathBuf,
    /// Blobs and layers being written or relied on by an operation under way.
    busy: Arc<Mutex<Busy>>,
    freed: Condvar,
    next_temporary: AtomicU64,
}

#[derive(Debug, Default)]
struct Busy {
    writing: BTreeSet<PathBuf>,
    needed: BTreeMap<PathBuf, u32>,
}

/// What a garbage collection took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub images: u64,
    pub blobs: u64,
    pub layers: u64,
    pub blob_bytes: u64,
}

impl ImageStore {
    pub fn open(data_dir: &Path) -> Result<ImageStore, StoreError> {
        let store = ImageStore {
            root: data_dir.to_owned(),
            busy: Arc::default(),
            freed: Condvar::new(),
            next_temporary: AtomicU64::new(0),
        };
        let temporary = store.root.join("tmp");
        // What a crash left. Most often there is nothing, and then the disk is not written.
        let is_empty = fs::read_dir(&temporary).is_ok_and(|mut entries| entries.next().is_none());
        if !is_empty {
            tree::remove(&temporary).map_err(|source| failed("empty", &temporary, source))?;
        }
        for name in ["tmp", "layers", "images", "blobs/sha256"] {
            let path = store.root.join(name);
            fs::create_dir_all(&path).map_err(|source| failed("create", &path, source))?;
        }
        Ok(store)
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// The overlay lower folder of an unpacked layer.
    pub fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    fn record_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("images").join(digest.hex())
    }

    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.layer_path(diff_id).is_dir()
    }

    /// For a peer: the bytes of a blob.
    pub fn open_blob(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StoreError::MissingBlob(digest.clone()),
            _ => failed("open", &path, source),
        })
    }

    /// A manifest, index or configuration, its digest checked again: a card may rot.
    pub fn read_document(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        let file = self.open_blob(digest)?.take(DOCUMENT_BYTES_MAX + 1);
        HashingReader::new(file, DOCUMENT_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(|source| failed("read", &self.blob_path(digest), source))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(StoreError::DigestMismatch { expected: digest.clone(), actual });
        }
        Ok(bytes)
    }

    /// Stores a blob unless it is there. Reads `source` to its end; wrong bytes leave nothing behind.
    pub fn write_blob(&self, expected: &BlobRef, source: impl Read) -> Result<(), StoreError> {
        let path = self.blob_path(&expected.digest);
        let Some(_claim) = self.claim(&path) else { return Ok(()) };
        let mut temporary = self.temporary_file()?;
        let mut reader = HashingReader::new(source, expected.size_bytes);
        copy_flushing(&mut reader, &mut temporary.file).map_err(|error| match error {
            CopyError::Read(source) => StoreError::ReadSource { blob: expected.digest.clone(), source },
            CopyError::Write(source) => failed("write", &temporary.path, source),
        })?;
        let (actual, bytes) = reader
            .finish()
            .map_err(|source| StoreError::ReadSource { blob: expected.digest.clone(), source })?;
        check_blob(expected, &actual, bytes)?;
        temporary.publish(&path)
    }

    /// Stores a small document under its own digest.
    pub fn write_document(&self, bytes: &[u8]) -> Result<BlobRef, StoreError> {
        let blob = BlobRef { digest: Digest::of(bytes), size_bytes: bytes.len() as u64 };
        self.write_blob(&blob, bytes)?;
        Ok(blob)
    }

    pub(super) fn temporary_file(&self) -> Result<TemporaryFile, StoreError> {
        let path = self.temporary_path("file");
        let file = File::create_new(&path).map_err(|source| failed("create", &path, source))?;
        Ok(TemporaryFile { file, path })
    }

    pub(super) fn temporary_folder(&self) -> Result<TemporaryFolder, StoreError> {
        let path = self.temporary_path("folder");
        fs::create_dir(&path).map_err(|source| failed("create", &path, source))?;
        Ok(TemporaryFolder { path })
    }

    fn temporary_path(&self, kind: &str) -> PathBuf {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.root.join("tmp").join(format!("{kind}-{number}"))
    }

    // ---- images

    pub fn image(&self, digest: &Digest) -> Result<Option<Image>, StoreError> {
        let path = self.record_path(digest);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("read", &path, source)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|_| StoreError::BadRecord(digest.clone()))
    }

    /// All images, sorted by digest. A damaged record is left out: `fetch` writes it anew.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let mut images = Vec::new();
        for digest in self.digests_in("images")? {
            if let Ok(Some(image)) = self.image(&digest) {
                images.push(image);
            }
        }
        Ok(images)
    }

    /// Writes the record of a whole image, keeping the names that it already had.
    pub(super) fn record(&self, mut image: Image) -> Result<Image, StoreError> {
        let _lock = self.lock();
        if let Ok(Some(old)) = self.image(&image.digest) {
            image.names.extend(old.names);
            // Kept for others a second time: what is unpacked here stays so.
            if image.manifest.is_none() {
                (image.manifest, image.layers, image.size_bytes) = (old.manifest, old.layers, old.size_bytes);
            }
        }
        let mut temporary = self.temporary_file()?;
        let bytes = serde_json::to_vec(&image).map_err(|_| StoreError::BadRecord(image.digest.clone()))?;
        let path = temporary.path.clone();
        temporary.file.write_all(&bytes).map_err(|source| failed("write", &path, source))?;
        temporary.publish(&self.record_path(&image.digest))?;
        Ok(image)
    }

    /// Forgets an image; its blobs and layers go with the next `collect_garbage`. `false`: it was not there.
    pub fn forget(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = self.record_path(digest);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(failed("remove", &path, source)),
        }
    }

    /// What a peer that wants `digest` could not get here: blobs that the image names and this node lacks.
    /// Of an index, only the manifests that are here count. Empty: this node can hand the image on.
    pub fn missing_blobs(&self, digest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let mut missing = Vec::new();
        for blob in self.reachable(digest)? {
            if !self.has_blob(&blob) {
                missing.push(blob);
            }
        }
        Ok(missing)
    }

    /// What the image can run on, of that of which everything is here, with the manifest of each. An index may name more
    /// than an archive holds: `docker save` writes only what was pulled.
    pub fn platforms(&self, digest: &Digest) -> Result<Vec<(Platform, Digest)>, StoreError> {
        let named = match Document::parse(digest, &self.read_document(digest)?)? {
            Document::Index(index) => {
                index.manifests.into_iter().map(|(platform, blob)| (platform, blob.digest)).collect()
            }
            Document::Manifest(Manifest { digest, config, .. }) => {
                let document = self.read_document(&config.digest)?;
                vec![(ConfigDocument::parse(&config.digest, &document)?.platform, digest)]
            }
        };
        let mut whole: Vec<(Platform, Digest)> = Vec::new();
        for (platform, manifest) in named {
            if platform.is_runnable() && self.missing_blobs(&manifest)?.is_empty() {
                whole.push((platform, manifest));
            }
        }
        Ok(whole)
    }

    /// Every blob that an image needs, as far as its documents are here; the image's own digest first.
    fn reachable(&self, digest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let mut blobs = vec![digest.clone()];
        if !self.has_blob(digest) {
            return Ok(blobs);
        }
        match Document::parse(digest, &self.read_document(digest)?)? {
            Document::Manifest(manifest) => {
                blobs.push(manifest.config.digest);
                blobs.extend(manifest.layers.into_iter().map(|layer| layer.digest));
            }
            Document::Index(index) => {
                for inner in index.all.iter().filter(|inner| self.has_blob(inner)) {
                    if let Ok(Document::Manifest(manifest)) =
                        Document::parse(inner, &self.read_document(inner)?)
                    {
                        blobs.push(inner.clone());
                        blobs.push(manifest.config.digest);
                        blobs.extend(manifest.layers.into_iter().map(|layer| layer.digest));
                    }
                }
            }
        }
        Ok(blobs)
    }

    /// Removes every image that `keep` does not name, then every blob and layer that no kept image and nothing in
    /// `layers_in_use` needs. What an operation under way relies on stays. `keep` is asked when no hold can end any more:
    /// what was held until it was in the state is in one of both.
    pub fn collect_garbage(
        &self,
        keep: impl FnOnce() -> BTreeSet<Digest>,
        layers_in_use: &BTreeSet<Digest>,
    ) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        let busy = self.lock();
        let keep = keep();
        // A digest in `keep` may also be content, which has no record.
        let (mut blobs, mut layers) = (keep.clone(), layers_in_use.clone());
        for digest in self.digests_in("images")? {
            if !keep.contains(&digest) && !busy.holds(&self.record_path(&digest)) {
                collected.images += u64::from(self.forget(&digest)?);
                continue;
            }
            // A damaged image keeps what it still names; it is fetched anew when it is needed.
            blobs.extend(self.reachable(&digest).unwrap_or_default());
            if let Ok(Some(image)) = self.image(&digest) {
                layers.extend(image.layers);
                blobs.extend(image.manifest);
            }
        }
        for digest in self.digests_in("blobs/sha256")? {
            let path = self.blob_path(&digest);
            if blobs.contains(&digest) || busy.holds(&path) {
                continue;
            }
            collected.blob_bytes += fs::metadata(&path).map(|metadata| metadata.len()).unwrap_or(0);
            fs::remove_file(&path).map_err(|source| failed("remove", &path, source))?;
            collected.blobs += 1;
        }
        for digest in self.digests_in("layers")? {
            let path = self.layer_path(&digest);
            if layers.contains(&digest) || busy.holds(&path) {
                continue;
            }
            // Renamed first: a half-removed layer must not keep its name.
            let grave = self.temporary_path("layer");
            fs::rename(&path, &grave).map_err(|source| failed("remove", &path, source))?;
            tree::remove(&grave).map_err(|source| failed("remove", &grave, source))?;
            collected.layers += 1;
        }
        Ok(collected)
    }

    fn digests_in(&self, folder: &str) -> Result<Vec<Digest>, StoreError> {
        let path = self.root.join(folder);
        let entries = fs::read_dir(&path).map_err(|source| failed("list", &path, source))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut digests: Vec<Digest> = names.filter_map(|name| Digest::from_hex(&name)).collect();
        digests.order();
        Ok(digests)
    }

    // ---- who writes what

    fn lock(&self) -> MutexGuard<'_, Busy> {
        // The map is whole between any two statements, so a panic elsewhere does not spoil it.
        self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The right to write `path`; `None` when it exists. Waits for another writer of the same path.
    pub(super) fn claim(&self, path: &Path) -> Option<Claim<'_>> {
        let mut busy = self.lock();
        loop {
            if path.exists() {
                return None;
            }
            if busy.writing.insert(path.to_owned()) {
                return Some(Claim { store: self, path: path.to_owned() });
            }
            busy = self.freed.wait(busy).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Keeps the garbage collector away from `path` until the guard is dropped.
    pub(super) fn hold(&self, path: PathBuf) -> Hold {
        *self.lock().needed.entry(path.clone()).or_default() += 1;
        Hold { busy: self.busy.clone(), path }
    }

    pub fn hold_blob(&self, digest: &Digest) -> Hold {
        self.hold(self.blob_path(digest))
    }

    /// Its record stays, and with that whatever the image needs.
    pub fn hold_image(&self, digest: &Digest) -> Vec<Hold> {
        vec![self.hold(self.record_path(digest)), self.hold(self.blob_path(digest))]
    }
}

impl Busy {
    fn holds(&self, path: &Path) -> bool {
        self.writing.contains(path) || self.needed.contains_key(path)
    }
}

pub(super) struct Claim<'store> {
    store: &'store ImageStore,
    path: PathBuf,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.store.lock().writing.remove(&self.path);
        self.store.freed.notify_all();
    }
}

/// Keeps the garbage collector away from a file until it is dropped.
#[derive(Debug)]
pub struct Hold {
    busy: Arc<Mutex<Busy>>,
    path: PathBuf,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut busy = self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(count) = busy.needed.get_mut(&self.path) {
            *count -= 1;
            if *count == 0 {
                busy.needed.remove(&self.path);
            }
        }
    }
}

/// A file in `tmp/`, removed unless it is published.
pub(super) struct TemporaryFile {
    pub file: File,
    pub path: PathBuf,
}

impl TemporaryFile {
    /// Flushes the file and gives it its name.
    pub fn publish(&self, path: &Path) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|source| failed("flush", &self.path, source))?;
        rename_durably(&self.path, path)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A folder in `tmp/`, removed unless it is published.
pub(super) struct TemporaryFolder {
    pub path: PathBuf,
}

impl TemporaryFolder {
    /// Flushes everything in the folder and gives it its name.
    pub fn publish(&self, path: &Path) -> Result<(), StoreError> {
        let folder = File::open(&self.path).map_err(|source| failed("open", &self.path, source))?;
        // Thousands of small files: one flush of the file system instead of one each.
        rustix::fs::syncfs(&folder).map_err(|errno| failed("flush", &self.path, errno.into()))?;
        rename_durably(&self.path, path)
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = tree::remove(&self.path);
    }
}

fn rename_durably(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|source| failed("rename to", to, source))?;
    let Some(folder) = to.parent() else { return Ok(()) };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| failed("flush", folder, source))
}

pub(super) fn check_blob(expected: &BlobRef, actual: &Digest, bytes: u64) -> Result<(), StoreError> {
    let blob = expected.digest.clone();
    if *actual != blob {
        // A cut transfer is the common case; its size says more than its digest.
        if bytes < expected.size_bytes {
            return Err(StoreError::SizeMismatch { blob, expected: expected.size_bytes, actual: bytes });
        }
        return Err(StoreError::DigestMismatch { expected: blob, actual: actual.clone() });
    }
    if bytes != expected.size_bytes {
        return Err(StoreError::SizeMismatch { blob, expected: expected.size_bytes, actual: bytes });
    }
    Ok(())
}

pub(super) enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

/// Copies and flushes in steps.
pub(super) fn copy_flushing(source: &mut impl Read, target: &mut File) -> Result<u64, CopyError> {
    let mut buffer = vec![0u8; 64 * 1024];
    let (mut total, mut unflushed) = (0u64, 0u64);
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        target.write_all(&buffer[..count]).map_err(CopyError::Write)?;
        total += count as u64;
        unflushed += count as u64;
        if unflushed >= FLUSH_STEP_BYTES {
            target.sync_data().map_err(CopyError::Write)?;
            unflushed = 0;
        }
    }
}

pub(super) fn failed(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_owned(), source }
}

impl ImageStore {
    /// The settings of an image that runs here.
    pub fn config(&self, image: &Image) -> Result<ConfigDocument, StoreError> {
        let manifest =
            image.manifest.as_ref().ok_or_else(|| StoreError::MissingBlob(image.digest.clone()))?;
        match Document::parse(manifest, &self.read_document(manifest)?)? {
            Document::Manifest(parsed) => {
                let digest = parsed.config.digest;
                Ok(ConfigDocument::parse(&digest, &self.read_document(&digest)?)?)
            }
            Document::Index(_) => Err(StoreError::BadRecord(image.digest.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_a_crash_left_half_done_goes_and_an_empty_folder_is_not_made_anew() {
        let folder = std::env::temp_dir().join(format!("tinydc-store-{}", std::process::id()));
        let temporary = folder.join("tmp");
        let inode = || fs::metadata(&temporary).unwrap().ino();
        ImageStore::open(&folder).unwrap();
        let first = inode();
        ImageStore::open(&folder).unwrap();
        assert_eq!(inode(), first);
        fs::create_dir(temporary.join("half")).unwrap();
        fs::write(temporary.join("half/file"), "x").unwrap();
        ImageStore::open(&folder).unwrap();
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
        fs::remove_dir_all(&folder).unwrap();
    }
}

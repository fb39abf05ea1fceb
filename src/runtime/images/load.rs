//! Loads image archives: an OCI layout in a tar, or what `docker save` wrote, from a file or a pipe, in one pass.
//!
//! Input: an untrusted stream, perhaps compressed. Output: images with their names. A `docker save` archive has no
//! OCI manifest; one is made here, always the same for the same content, so its digest is the same on every node.

use crate::model::{Gather, Order};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::decompress::decompress;
use super::digest::{Digest, HashingReader};
use super::fetch::{BlobKind, FetchError, FetchRequest, LAYER_UNPACKED_BYTES_MAX, LayerBlobs, no_source};
use super::manifest::{BlobRef, DOCUMENT_BYTES_MAX, LAYER_BYTES_MAX, ManifestError, Platform};
use super::store::{CopyError, Hold, Image, ImageStore, StoreError, copy_flushing, failed};

const ARCHIVE_ENTRIES_MAX: usize = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("read the archive")]
    ReadArchive(#[source] io::Error),
    #[error(
        "this is neither an OCI layout nor a `docker save` archive: it has no index.json and no manifest.json"
    )]
    NotAnImage,
    #[error("{file} of the archive is damaged")]
    BadDocument {
        file: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("the archive lacks `{0}`, which its manifest names")]
    MissingFile(String),
    #[error("blob `{path}` of the archive holds {actual}")]
    WrongBlob { path: String, actual: Digest },
    #[error("{0} of the archive names an unusable digest")]
    BadDigest(&'static str, #[source] super::digest::DigestError),
    #[error("the archive has more than {ARCHIVE_ENTRIES_MAX} entries")]
    TooManyEntries,
    #[error("the archive holds no image")]
    Empty,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("load {digest}")]
    Image {
        digest: Digest,
        #[source]
        source: FetchError,
    },
}

/// One image of an archive.
#[derive(Debug)]
pub struct Loaded {
    pub digest: Digest,
    /// As the archive writes them: `web:1.2`, `docker.io/library/web:1.2`; a bare tag when it knows no more.
    pub names: Vec<String>,
    /// `false`: built for other machines; kept so that they can get it from here.
    pub is_runnable_here: bool,
    /// To be dropped when something else keeps the image: what nothing names is swept away.
    pub held: Vec<Hold>,
}

/// What one pass over an archive found.
#[derive(Default)]
struct Contents {
    index: Option<Vec<u8>>,
    docker_manifest: Option<Vec<u8>>,
    files: BTreeMap<PathBuf, BlobRef>,
    links: BTreeMap<PathBuf, PathBuf>,
    held: Vec<Hold>,
}

#[derive(Deserialize)]
struct LayoutIndex {
    manifests: Vec<LayoutEntry>,
}

#[derive(Deserialize)]
struct LayoutEntry {
    digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<LayoutPlatform>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
struct LayoutPlatform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default, rename = "os.version")]
    version: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl ImageStore {
    /// Loads every image of an archive. Blocks. On an error nothing has a record; blobs go with the next collection.
    pub fn load(&self, archive: impl Read, platform: &Platform) -> Result<Vec<Loaded>, LoadError> {
        let contents = self.read_archive(archive)?;
        let tops = match (&contents.index, &contents.docker_manifest) {
            (Some(index), docker) => self.layout_images(index, docker.as_deref())?,
            (None, Some(docker)) => self.docker_images(docker, &contents)?,
            (None, None) => return Err(LoadError::NotAnImage),
        };
        if tops.is_empty() {
            return Err(LoadError::Empty);
        }
        tops.into_iter().map(|(digest, names)| self.admit(digest, names, platform)).collect()
    }

    fn read_archive(&self, archive: impl Read) -> Result<Contents, LoadError> {
        let mut contents = Contents::default();
        let stream = decompress(archive).map_err(LoadError::ReadArchive)?;
        let mut archive = tar::Archive::new(stream.chain(io::repeat(0).take(1536)));
        for (count, entry) in archive.entries().map_err(LoadError::ReadArchive)?.enumerate() {
            let entry = entry.map_err(LoadError::ReadArchive)?;
            if count >= ARCHIVE_ENTRIES_MAX {
                return Err(LoadError::TooManyEntries);
            }
            self.read_entry(entry, &mut contents)?;
        }
        Ok(contents)
    }

    fn read_entry(
        &self,
        mut entry: tar::Entry<'_, impl Read>,
        contents: &mut Contents,
    ) -> Result<(), LoadError> {
        let path = normal(&entry.path().map_err(LoadError::ReadArchive)?);
        let kind = entry.header().entry_type();
        if kind.is_symlink() || kind.is_hard_link() {
            if let Some(target) = entry.link_name().map_err(LoadError::ReadArchive)? {
                let base =
                    if kind.is_symlink() { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
                contents.links.insert(path.clone(), normal(&base.join(target)));
            }
            return Ok(());
        }
        if !kind.is_file() {
            return Ok(());
        }
        if path == Path::new("index.json") {
            contents.index = Some(small_file(&mut entry)?);
        } else if path == Path::new("manifest.json") {
            contents.docker_manifest = Some(small_file(&mut entry)?);
        } else {
            let blob = self.write_unnamed_blob(&mut entry, contents)?;
            if let Ok(hex) = path.strip_prefix("blobs/sha256")
                && hex.as_os_str().as_bytes() != blob.digest.hex().as_bytes()
            {
                let path = path.display().to_string();
                return Err(LoadError::WrongBlob { path, actual: blob.digest });
            }
            contents.files.insert(path, blob);
        }
        Ok(())
    }

    /// Stores a stream under the digest that it turns out to have.
    fn write_unnamed_blob(&self, source: impl Read, contents: &mut Contents) -> Result<BlobRef, LoadError> {
        let mut temporary = self.temporary_file()?;
        let mut reader = HashingReader::new(source, LAYER_BYTES_MAX);
        copy_flushing(&mut reader, &mut temporary.file).map_err(|error| match error {
            CopyError::Read(source) => LoadError::ReadArchive(source),
            CopyError::Write(source) => failed("write", &temporary.path, source).into(),
        })?;
        let (digest, size_bytes) = reader.finish().map_err(LoadError::ReadArchive)?;
        let path = self.blob_path(&digest);
        contents.held.push(self.hold(path.clone()));
        if let Some(_claim) = self.claim(&path) {
            temporary.publish(&path)?;
        }
        Ok(BlobRef { digest, size_bytes })
    }

    /// Makes an OCI manifest for each image of a `docker save` archive.
    fn docker_images(
        &self,
        manifest: &[u8],
        contents: &Contents,
    ) -> Result<Vec<(Digest, Vec<String>)>, LoadError> {
        let entries: Vec<DockerEntry> = parse("manifest.json", manifest)?;
        let mut images = Vec::new();
        for entry in entries {
            let config = contents.file(&entry.config)?;
            let mut layers = Vec::new();
            for layer in &entry.layers {
                let blob = contents.file(layer)?;
                let media_type = self.layer_media_type(&blob.digest)?;
                layers.push(descriptor(media_type, &blob));
            }
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
                "layers": layers,
            });
            // serde_json sorts keys, so equal content gives equal bytes.
            let blob = self.write_document(manifest.to_string().as_bytes())?;
            images.push((blob.digest, entry.repo_tags.unwrap_or_default()));
        }
        Ok(images)
    }

    /// Some tools write the index of an image of several platforms as the layout's own, instead of a blob that it names.
    fn layout_images(
        &self,
        index: &[u8],
        docker: Option<&[u8]>,
    ) -> Result<Vec<(Digest, Vec<String>)>, LoadError> {
        let LayoutIndex { mut manifests } = parse("index.json", index)?;
        let name = manifests.first().and_then(LayoutEntry::name);
        let is_part = |entry: &LayoutEntry| entry.platform.is_some() && entry.name() == name;
        // Attestations call theirs unknown, one for each platform.
        let platforms = manifests.iter().filter_map(|entry| entry.platform.as_ref());
        let mut known: Vec<_> = platforms.filter(|platform| platform.os != "unknown").collect();
        let count = known.len();
        known.order();
        known.dedup();
        let is_one = name.is_some() && known.len() == count && manifests.iter().all(is_part);
        if manifests.len() > 1 && is_one {
            let blob = self.write_document(index)?;
            manifests.truncate(1);
            manifests[0].digest = blob.digest.to_string();
        }
        named_images(manifests, docker)
    }

    fn layer_media_type(&self, digest: &Digest) -> Result<&'static str, LoadError> {
        let mut start = Vec::new();
        let file = self.open_blob(digest)?;
        file.take(4).read_to_end(&mut start).map_err(LoadError::ReadArchive)?;
        Ok(match start.as_slice() {
            [0x1f, 0x8b, ..] => "application/vnd.oci.image.layer.v1.tar+gzip",
            [0x28, 0xb5, 0x2f, 0xfd] => "application/vnd.oci.image.layer.v1.tar+zstd",
            _ => "application/vnd.oci.image.layer.v1.tar",
        })
    }

    /// Unpacks one image, or keeps it for others when it does not run here.
    fn admit(&self, digest: Digest, names: Vec<String>, platform: &Platform) -> Result<Loaded, LoadError> {
        let (held, mut is_runnable_here) = (self.hold_image(&digest), true);
        // The record takes all names; `fetch` writes the first.
        let request = FetchRequest {
            digest: &digest,
            name: names.first().map(String::as_str),
            platform,
            layer_blobs: LayerBlobs::Keep,
            layer_unpacked_bytes_max: LAYER_UNPACKED_BYTES_MAX,
        };
        match self.fetch(&request, &mut no_source, &mut |_| {}) {
            Ok(mut image) => {
                image.names.extend(names.iter().cloned());
                self.record(image)?;
            }
            Err(error) if is_for_others(&error) => {
                is_runnable_here = false;
                if self.platforms(&digest)?.is_empty() {
                    return Err(LoadError::Image { digest, source: error });
                }
                let names = names.iter().cloned().gather();
                let (digest, layers) = (digest.clone(), Vec::new());
                self.record(Image { digest, names, manifest: None, layers, size_bytes: 0 })?;
            }
            Err(source) => return Err(LoadError::Image { digest, source }),
        }
        Ok(Loaded { digest, names, is_runnable_here, held })
    }
}

impl LayoutEntry {
    fn name(&self) -> Option<String> {
        let full = self.annotations.get("io.containerd.image.name");
        full.or_else(|| self.annotations.get("org.opencontainers.image.ref.name")).cloned()
    }
}

impl Contents {
    /// A file of the archive by the name that `manifest.json` gives it, through the archive's own links.
    fn file(&self, name: &str) -> Result<BlobRef, LoadError> {
        let mut path = normal(Path::new(name));
        for _ in 0..8 {
            if let Some(blob) = self.files.get(&path) {
                return Ok(blob.clone());
            }
            match self.links.get(&path) {
                Some(target) => path = target.clone(),
                None => break,
            }
        }
        Err(LoadError::MissingFile(name.chars().take(200).collect()))
    }
}

/// Built for other platforms, or for this one too but without its part in the archive.
fn is_for_others(error: &FetchError) -> bool {
    matches!(
        error,
        FetchError::Manifest(ManifestError::NoPlatform { .. })
            | FetchError::Source { what: BlobKind::Manifest, .. }
    )
}

/// The images of an OCI layout. Docker writes the full name into an annotation of its own.
fn named_images(
    entries: Vec<LayoutEntry>,
    docker: Option<&[u8]>,
) -> Result<Vec<(Digest, Vec<String>)>, LoadError> {
    let mut images: Vec<(Digest, Vec<String>)> = Vec::new();
    for entry in entries {
        let digest =
            Digest::parse(&entry.digest).map_err(|source| LoadError::BadDigest("index.json", source))?;
        let name = entry.name();
        match images.iter_mut().find(|(known, _)| *known == digest) {
            Some((_, names)) => names.extend(name),
            None => images.push((digest, name.into_iter().collect())),
        }
    }
    // A layout of one image whose names only `manifest.json` knows.
    if let ([(_, names)], Some(docker)) = (images.as_mut_slice(), docker)
        && names.is_empty()
    {
        let entries: Vec<DockerEntry> = parse("manifest.json", docker)?;
        names.extend(entries.into_iter().flat_map(|entry| entry.repo_tags.unwrap_or_default()));
    }
    Ok(images)
}

fn parse<T: for<'a> Deserialize<'a>>(file: &'static str, bytes: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(bytes).map_err(|source| LoadError::BadDocument { file, source })
}

fn descriptor(media_type: &str, blob: &BlobRef) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size_bytes })
}

fn small_file(entry: &mut impl Read) -> Result<Vec<u8>, LoadError> {
    let mut bytes = Vec::new();
    let mut reader = HashingReader::new(entry, DOCUMENT_BYTES_MAX);
    reader.read_to_end(&mut bytes).map_err(LoadError::ReadArchive)?;
    Ok(bytes)
}

/// A key for a path of the archive: these names are only looked up, never opened.
fn normal(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_platforms_of_one_image_are_one_image() {
        let folder = std::env::temp_dir().join(format!("tinydc-layout-{}", std::process::id()));
        let store = ImageStore::open(&folder).unwrap();
        let entry = |number: u8, architecture: &str, name: &str| {
            let digest = format!("sha256:{}", format!("{number:02x}").repeat(32));
            let os = if architecture == "unknown" { "unknown" } else { "linux" };
            let annotations = match name {
                "" => json!({}),
                _ => json!({ "org.opencontainers.image.ref.name": name }),
            };
            json!({ "digest": digest, "annotations": annotations,
                "platform": { "os": os, "architecture": architecture } })
        };
        let cases = [
            ("one image", vec![entry(1, "amd64", "a"), entry(2, "arm64", "a")], 1),
            (
                "with attestations",
                vec![entry(1, "amd64", "a"), entry(2, "unknown", "a"), entry(3, "unknown", "a")],
                1,
            ),
            ("without a name", vec![entry(1, "amd64", ""), entry(2, "arm64", "")], 2),
            ("two names", vec![entry(1, "amd64", "a"), entry(2, "arm64", "b")], 2),
            ("one platform twice", vec![entry(1, "amd64", "a"), entry(2, "amd64", "a")], 2),
        ];
        for (what, manifests, images) in cases {
            let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
            assert_eq!(store.layout_images(index.as_bytes(), None).unwrap().len(), images, "{what}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

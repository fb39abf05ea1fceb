//! Brings one image to this node from any source: a registry, a peer, or the blobs that are here already.
//!
//! Input: a digest and a function that opens a blob by digest. Output: unpacked layers and a record.
//! One pass per layer: source → sha256 → decompress → sha256 → unpack; the compressed layer is kept only on request.
//!
//! Invariant: an image has a record only if every byte matched its digest (`tests/runtime`, wrong digests).

use crate::model::Gather;
use std::collections::BTreeMap;
use std::io::{self, Read};

use super::decompress::decompress;
use super::digest::{Digest, HashingReader};
use super::manifest::{
    BlobRef, ConfigDocument, DOCUMENT_BYTES_MAX, Document, Manifest, ManifestError, Platform,
};
use super::store::{Image, ImageStore, StoreError, check_blob};
use super::unpack::{UnpackError, unpack};

/// The default bound of what one layer may unpack to.
pub const LAYER_UNPACKED_BYTES_MAX: u64 = 16 * 1024 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("get {what} {digest}")]
    Source {
        what: BlobKind,
        digest: Digest,
        #[source]
        source: SourceError,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("unpack layer {layer}")]
    Unpack {
        layer: Digest,
        #[source]
        source: UnpackError,
    },
    #[error("layer {layer} unpacks to {actual}, its image says {expected}")]
    DiffIdMismatch { layer: Digest, expected: Digest, actual: Digest },
    #[error("decompress layer {layer}")]
    Decompress {
        layer: Digest,
        #[source]
        source: io::Error,
    },
    #[error("{} MiB are missing, and only {} MiB may be written", bytes.div_ceil(1 << 20), bytes_max >> 20)]
    NoSpace { bytes: u64, bytes_max: u64 },
    #[error("{0} is an index inside an index")]
    NestedIndex(Digest),
}

pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobKind {
    Manifest,
    Config,
    Layer,
}

impl std::fmt::Display for BlobKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            BlobKind::Manifest => "manifest",
            BlobKind::Config => "configuration",
            BlobKind::Layer => "layer",
        })
    }
}

/// One blob to be opened by a source.
#[derive(Clone, Debug)]
pub struct BlobRequest {
    pub digest: Digest,
    pub kind: BlobKind,
    /// Unknown for the top digest.
    pub size_bytes: Option<u64>,
}

/// Whether compressed layers stay, so that this node can hand the image to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerBlobs {
    Keep,
    Drop,
}

/// Where a fetch stands: layers done and bytes read of the one under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub layer: usize,
    pub layers: usize,
    pub bytes: u64,
    pub size_bytes: u64,
}

pub struct FetchRequest<'a> {
    pub digest: &'a Digest,
    pub name: Option<&'a str>,
    pub platform: &'a Platform,
    pub layer_blobs: LayerBlobs,
    pub layer_unpacked_bytes_max: u64,
}

/// What to hand on of an image.
pub struct KeepRequest<'a> {
    pub digest: &'a Digest,
    pub name: Option<&'a str>,
    pub manifests: &'a [Digest],
    /// Nothing is written if more is missing.
    pub bytes_max: u64,
}

/// Opens a blob. Its bytes are not trusted; its reader must not block for ever.
pub type BlobSource<'a> = dyn FnMut(&BlobRequest) -> Result<Box<dyn Read>, SourceError> + 'a;

impl ImageStore {
    /// Makes the image runnable here, taking from `source` only what is missing. Blocks.
    pub fn fetch(
        &self,
        request: &FetchRequest<'_>,
        source: &mut BlobSource<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, FetchError> {
        let mut held = self.hold_image(request.digest);
        let manifest = self.platform_manifest(request, source)?;
        held.extend(self.hold_image(&manifest.digest));
        held.push(self.hold(self.blob_path(&manifest.config.digest)));
        let config = self.document(
            &BlobRequest {
                digest: manifest.config.digest.clone(),
                kind: BlobKind::Config,
                size_bytes: Some(manifest.config.size_bytes),
            },
            source,
        )?;
        let config = ConfigDocument::parse(&manifest.config.digest, &config)?;
        config.check(&manifest, request.platform)?;
        for (layer, diff_id) in manifest.layers.iter().zip(&config.diff_ids) {
            held.push(self.hold(self.blob_path(&layer.digest)));
            held.push(self.hold(self.layer_path(diff_id)));
        }
        for (number, (layer, diff_id)) in manifest.layers.iter().zip(&config.diff_ids).enumerate() {
            let (layers, size_bytes) = (manifest.layers.len(), layer.size_bytes);
            let mut report = |bytes| progress(Progress { layer: number, layers, bytes, size_bytes });
            self.fetch_layer(request, layer, diff_id, source, &mut report)?;
        }
        let layers_bytes: u64 = manifest.layers.iter().map(|layer| layer.size_bytes).sum();
        let image = Image {
            digest: request.digest.clone(),
            names: request.name.map(str::to_owned).into_iter().gather(),
            manifest: Some(manifest.digest),
            layers: config.diff_ids,
            size_bytes: layers_bytes + manifest.config.size_bytes,
        };
        Ok(self.record(image)?)
    }

    /// Brings the blobs of these manifests of an image, to hand them on: nothing is unpacked. What can't be had does not
    /// keep the rest away; it is the error at the end. Blocks.
    pub fn keep(&self, request: &KeepRequest<'_>, source: &mut BlobSource<'_>) -> Result<(), FetchError> {
        let digest = request.digest.clone();
        let mut held = self.hold_image(&digest);
        self.document(&manifest_request(&digest, None), source)?;
        let (mut missing, mut failure) = (BTreeMap::new(), None);
        for manifest in request.manifests {
            held.push(self.hold(self.blob_path(manifest)));
            match self.parts(manifest, source) {
                Ok(parts) => missing.extend(parts),
                Err(error) => failure = Some(error),
            }
        }
        held.extend(missing.keys().map(|digest| self.hold(self.blob_path(digest))));
        missing.retain(|digest, _| !self.has_blob(digest));
        let bytes = missing.values().map(|(_, blob)| blob.size_bytes).sum();
        if bytes > request.bytes_max {
            return Err(FetchError::NoSpace { bytes, bytes_max: request.bytes_max });
        }
        for (kind, blob) in missing.values() {
            let written = open(*kind, blob, source).and_then(|reader| Ok(self.write_blob(blob, reader)?));
            failure = written.err().or(failure);
        }
        let names = request.name.map(str::to_owned).into_iter().gather();
        self.record(Image { digest, names, manifest: None, layers: Vec::new(), size_bytes: 0 })?;
        failure.map_or(Ok(()), Err)
    }

    /// The layers and the configuration that a manifest names.
    fn parts(
        &self,
        manifest: &Digest,
        source: &mut BlobSource<'_>,
    ) -> Result<BTreeMap<Digest, (BlobKind, BlobRef)>, FetchError> {
        let bytes = self.document(&manifest_request(manifest, None), source)?;
        let Document::Manifest(manifest) = Document::parse(manifest, &bytes)? else {
            return Err(FetchError::NestedIndex(manifest.clone()));
        };
        let layers = manifest.layers.into_iter().map(|layer| (BlobKind::Layer, layer));
        let parts = layers.chain([(BlobKind::Config, manifest.config)]);
        Ok(parts.map(|(kind, blob)| (blob.digest.clone(), (kind, blob))).gather())
    }

    fn platform_manifest(
        &self,
        request: &FetchRequest<'_>,
        source: &mut BlobSource<'_>,
    ) -> Result<Manifest, FetchError> {
        let bytes = self.document(&manifest_request(request.digest, None), source)?;
        let index = match Document::parse(request.digest, &bytes)? {
            Document::Manifest(manifest) => return Ok(manifest),
            Document::Index(index) => index,
        };
        let chosen = index.choose(request.platform)?;
        let bytes = self.document(&manifest_request(&chosen.digest, Some(chosen.size_bytes)), source)?;
        match Document::parse(&chosen.digest, &bytes)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => Err(FetchError::NestedIndex(chosen.digest.clone())),
        }
    }

    /// A small blob, from here or from the source, checked and stored.
    fn document(&self, request: &BlobRequest, source: &mut BlobSource<'_>) -> Result<Vec<u8>, FetchError> {
        match self.read_document(&request.digest) {
            Ok(bytes) => return Ok(bytes),
            Err(StoreError::MissingBlob(_)) => {}
            Err(StoreError::DigestMismatch { .. }) => {
                // Rotten on the card: away with it, so that the good bytes can take its name.
                let _ = std::fs::remove_file(self.blob_path(&request.digest));
            }
            Err(error) => return Err(error.into()),
        }
        let failed =
            |source| FetchError::Source { what: request.kind, digest: request.digest.clone(), source };
        let mut bytes = Vec::new();
        let reader = source(request).map_err(failed)?;
        HashingReader::new(reader, DOCUMENT_BYTES_MAX)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(Box::new(error)))?;
        let size_bytes = request.size_bytes.unwrap_or(bytes.len() as u64);
        self.write_blob(&BlobRef { digest: request.digest.clone(), size_bytes }, bytes.as_slice())?;
        Ok(bytes)
    }

    fn fetch_layer(
        &self,
        request: &FetchRequest<'_>,
        layer: &BlobRef,
        diff_id: &Digest,
        source: &mut BlobSource<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FetchError> {
        let open = |source: &mut BlobSource<'_>| open(BlobKind::Layer, layer, source);
        let wants_blob = request.layer_blobs == LayerBlobs::Keep && !self.has_blob(&layer.digest);
        let path = self.layer_path(diff_id);
        let Some(_claim) = self.claim(&path) else {
            if wants_blob {
                self.write_blob(layer, open(source)?)?;
            }
            progress(layer.size_bytes);
            return Ok(());
        };
        if wants_blob {
            // Written first and unpacked from the page cache: a broken transfer then leaves no half layer either.
            self.write_blob(layer, Counting { inner: open(source)?, bytes: 0, progress })?;
        }
        let stream: Box<dyn Read> = match self.has_blob(&layer.digest) {
            true => Box::new(self.open_blob(&layer.digest)?),
            false => open(source)?,
        };
        let folder = self.temporary_folder()?;
        let bytes_max = request.layer_unpacked_bytes_max;
        unpack_layer(
            layer,
            diff_id,
            Counting { inner: stream, bytes: 0, progress },
            &folder.path,
            bytes_max,
        )?;
        Ok(folder.publish(&path)?)
    }
}

fn manifest_request(digest: &Digest, size_bytes: Option<u64>) -> BlobRequest {
    BlobRequest { digest: digest.clone(), kind: BlobKind::Manifest, size_bytes }
}

fn open(kind: BlobKind, blob: &BlobRef, source: &mut BlobSource<'_>) -> Result<Box<dyn Read>, FetchError> {
    let digest = blob.digest.clone();
    source(&BlobRequest { digest: digest.clone(), kind, size_bytes: Some(blob.size_bytes) })
        .map_err(|source| FetchError::Source { what: kind, digest, source })
}

/// Unpacks one layer and checks both of its digests.
fn unpack_layer(
    layer: &BlobRef,
    diff_id: &Digest,
    stream: impl Read,
    folder: &std::path::Path,
    bytes_max: u64,
) -> Result<(), FetchError> {
    let broken = |source| FetchError::Decompress { layer: layer.digest.clone(), source };
    let mut compressed = HashingReader::new(stream, layer.size_bytes);
    let mut tar = HashingReader::new(decompress(&mut compressed).map_err(broken)?, bytes_max);
    unpack(&mut tar, folder).map_err(|source| FetchError::Unpack { layer: layer.digest.clone(), source })?;
    let (tar_digest, _) = tar.finish().map_err(broken)?;
    let (actual, bytes) = compressed
        .finish()
        .map_err(|source| StoreError::ReadSource { blob: layer.digest.clone(), source })?;
    check_blob(layer, &actual, bytes)?;
    if tar_digest != *diff_id {
        let (layer, expected) = (layer.digest.clone(), diff_id.clone());
        return Err(FetchError::DiffIdMismatch { layer, expected, actual: tar_digest });
    }
    Ok(())
}

/// Reports how much of a stream was read, once per MiB.
struct Counting<'progress, R> {
    inner: R,
    bytes: u64,
    progress: &'progress mut dyn FnMut(u64),
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let before = self.bytes >> 20;
        self.bytes += count as u64;
        if self.bytes >> 20 != before || count == 0 {
            (self.progress)(self.bytes);
        }
        Ok(count)
    }
}

/// A source that has nothing: `fetch` then works with what is here or fails.
pub fn no_source(request: &BlobRequest) -> Result<Box<dyn Read>, SourceError> {
    Err(Box::new(StoreError::MissingBlob(request.digest.clone())))
}

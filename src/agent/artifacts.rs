//! Brings images and content to this node: from peers that hold them, else from the registry. Blocks.
//!
//! Content is a tar by digest, unpacked once to `<data>/content/<hex>/`; images go to the runtime's store. Bytes from
//! a peer are verified like bytes from anywhere.

use crate::linux::disk::Space;
use crate::model::*;
use crate::runtime::Runtime;
use crate::runtime::images::{
    self, BlobSource, FetchError, FetchRequest, LAYER_UNPACKED_BYTES_MAX, LayerBlobs, Platform, SourceError,
    StoreError,
};
use crate::runtime::reference::{ImageReference, ReferenceError};
use crate::runtime::registry::{PullError, PullRequest, RegistryClient, RegistryConfig, TransferError};
use crate::state::State;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Opens a blob on a peer; its reader must not block for ever.
pub type PeerBlobs = dyn Fn(NodeId, &Digest) -> Result<Box<dyn Read + Send>, SourceError> + Send + Sync;

#[derive(Debug, thiserror::Error)]
pub enum FetchArtifactError {
    #[error("the image has no digest yet")]
    NoDigest,
    #[error("the disk is nearly full: {free_mib} MiB free, and below {wanted_mib} MiB nothing is fetched")]
    DiskLow { free_mib: u64, wanted_mib: u64 },
    #[error("bad image name")]
    Reference(#[from] ReferenceError),
    #[error("ask the registry")]
    Registry(#[from] TransferError),
    #[error("pull")]
    Pull(#[from] PullError),
    #[error("no node that holds it can be reached ({holders})")]
    NoHolder {
        holders: String,
        #[source]
        source: Option<SourceError>,
    },
    #[error("fetch it from a peer")]
    Fetch(#[from] FetchError),
    #[error("read the image store")]
    Store(#[from] StoreError),
    #[error("unpack")]
    Unpack(#[from] images::UnpackError),
    #[error("read or write its files")]
    Io(#[from] io::Error),
}

pub struct Artifacts {
    node: NodeId,
    runtime: Arc<Runtime>,
    data_dir: PathBuf,
    peers: Box<PeerBlobs>,
    /// PEM certificates of private registries, from `<data>/registry-ca.pem`.
    registry_ca: Option<Vec<u8>>,
    /// One unpacking of content at a time: two instances may want the same.
    unpacking: Mutex<()>,
}

impl Artifacts {
    pub fn new(node: NodeId, runtime: Arc<Runtime>, data_dir: PathBuf, peers: Box<PeerBlobs>) -> Artifacts {
        let registry_ca = fs::read(data_dir.join("registry-ca.pem")).ok();
        Artifacts { node, runtime, data_dir, peers, registry_ca, unpacking: Mutex::new(()) }
    }

    pub fn registry(&self, settings: &Settings) -> Result<RegistryClient, TransferError> {
        RegistryClient::new(RegistryConfig {
            insecure: settings.insecure_registries.clone(),
            extra_ca_pem: self.registry_ca.clone(),
            ..RegistryConfig::default()
        })
    }

    /// Settings and layers of an image, fetched if need be.
    pub fn image(
        &self,
        state: &State,
        image: &ImageSpec,
        progress: &mut dyn FnMut(String),
    ) -> Result<(images::ImageConfig, Vec<images::Digest>), FetchArtifactError> {
        let digest = image.digest.as_ref().ok_or(FetchArtifactError::NoDigest)?;
        let store = self.runtime.images();
        let known = images_digest(digest);
        let here = store.image(&known)?.filter(|here| here.manifest.is_some());
        let here = match here {
            Some(here) if here.layers.iter().all(|layer| store.has_layer(layer)) => here,
            _ => self.fetch_image(state, image, digest, progress)?,
        };
        Ok((store.config(&here)?.config, here.layers))
    }

    /// Images and content must not take what the cluster's state needs.
    fn check_space(&self) -> Result<(), FetchArtifactError> {
        match Space::of(&self.data_dir) {
            Some(space) if space.is_low() => Err(FetchArtifactError::DiskLow {
                free_mib: space.free_bytes >> 20,
                wanted_mib: space.low_mark_bytes() >> 20,
            }),
            _ => Ok(()),
        }
    }

    /// The image with everything a peer would need of it.
    fn fetch_image(
        &self,
        state: &State,
        image: &ImageSpec,
        digest: &Digest,
        progress: &mut dyn FnMut(String),
    ) -> Result<images::Image, FetchArtifactError> {
        self.check_space()?;
        let artifact = state.artifacts.find(digest);
        let must_keep = artifact.is_some_and(|artifact| artifact.kind == ArtifactKind::LoadedImage);
        let name = image.reference.as_str();
        let mut tell = |step: images::Progress| {
            let (done, all) = (step.bytes >> 20, step.size_bytes.div_ceil(1 << 20));
            progress(format!("pulling {name}: layer {} of {}, {done} of {all} MiB", step.layer, step.layers));
        };
        let (own_digest, platform) = (images_digest(digest), Platform::host());
        let request = FetchRequest {
            digest: &own_digest,
            name: Some(name),
            platform: &platform,
            layer_blobs: if must_keep { LayerBlobs::Keep } else { LayerBlobs::Drop },
            layer_unpacked_bytes_max: LAYER_UNPACKED_BYTES_MAX,
        };
        let store = self.runtime.images();
        let from_peer = self.ask_holders(state, digest, |source| store.fetch(&request, source, &mut tell));
        let peer_error = match from_peer {
            Ok(Some(image)) => return Ok(image),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if must_keep {
            return Err(peer_error.unwrap_or_else(|| no_holder(state, digest)));
        }
        let reference = ImageReference::parse(name)?;
        let registry = self.registry(&state.cluster_settings())?;
        let layer_blobs = LayerBlobs::Drop;
        let request =
            PullRequest { image: &reference, digest: &own_digest, platform: &platform, layer_blobs };
        Ok(registry.pull(store, &request, &mut tell)?)
    }

    /// `None` when no other node says that it holds the image.
    fn ask_holders<T>(
        &self,
        state: &State,
        digest: &Digest,
        mut fetch: impl FnMut(&mut BlobSource<'_>) -> Result<T, FetchError>,
    ) -> Result<Option<T>, FetchArtifactError> {
        let mut last = None;
        for holder in self.holders(state, digest) {
            let mut source = |blob: &images::BlobRequest| -> Result<Box<dyn Read>, SourceError> {
                let digest = Digest::new(&blob.digest.to_string())?;
                Ok((self.peers)(holder, &digest)?)
            };
            match fetch(&mut source) {
                Ok(fetched) => return Ok(Some(fetched)),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error.into()),
            None => Ok(None),
        }
    }

    /// Brings all of an image here, for other architectures too, because no registry can give it again.
    pub fn keep_copy(&self, state: &State, artifact: &Artifact) -> Result<(), FetchArtifactError> {
        match artifact.kind {
            ArtifactKind::Content => self.content_blob(state, &artifact.digest).map(|_| ()),
            ArtifactKind::RegistryImage => Ok(()),
            ArtifactKind::LoadedImage => self.keep_image(state, artifact),
        }
    }

    fn keep_image(&self, state: &State, artifact: &Artifact) -> Result<(), FetchArtifactError> {
        let name = artifact.names.first();
        if artifact.runs_on(Architecture::own()) {
            let reference = name.cloned().unwrap_or_default();
            let image = ImageSpec { reference, digest: Some(artifact.digest.clone()) };
            self.fetch_image(state, &image, &artifact.digest, &mut |_| {})?;
        }
        self.check_space()?;
        let digest = images_digest(&artifact.digest);
        let manifests: Vec<images::Digest> = artifact.platforms.values().map(images_digest).collect();
        let (store, name) = (self.runtime.images(), name.map(String::as_str));
        let kept = self
            .ask_holders(state, &artifact.digest, |source| store.keep(&digest, name, &manifests, source))?;
        kept.ok_or_else(|| no_holder(state, &artifact.digest))
    }

    /// The unpacked folder of content, fetched if need be.
    pub fn content(
        &self,
        state: &State,
        digest: &Digest,
        progress: &mut dyn FnMut(String),
    ) -> Result<PathBuf, FetchArtifactError> {
        let folder = self.data_dir.join("content").join(digest.hex());
        let _one = self.unpacking.lock().unwrap_or_else(PoisonError::into_inner);
        if folder.is_dir() {
            return Ok(folder);
        }
        progress("fetching files".into());
        self.content_blob(state, digest)?;
        let blob = self.runtime.images().open_blob(&images_digest(digest))?;
        let unpacking = self.data_dir.join("tmp").join(format!("content-{}", digest.hex()));
        let _ = fs::remove_dir_all(&unpacking);
        fs::create_dir_all(&unpacking)?;
        images::unpack(blob, &unpacking)?;
        fs::create_dir_all(self.data_dir.join("content"))?;
        fs::rename(&unpacking, &folder)?;
        Ok(folder)
    }

    fn content_blob(&self, state: &State, digest: &Digest) -> Result<(), FetchArtifactError> {
        let own = images_digest(digest);
        let store = self.runtime.images();
        if store.has_blob(&own) {
            return Ok(());
        }
        let size = state.artifacts.find(digest).map_or(0, |artifact| artifact.bytes);
        let mut last = None;
        for holder in self.holders(state, digest) {
            let expected = images::BlobRef { digest: own.clone(), size_bytes: size };
            let outcome = (self.peers)(holder, digest).map_err(|source| FetchArtifactError::NoHolder {
                holders: state.node_name(holder),
                source: Some(source),
            });
            match outcome.and_then(|reader| Ok(store.write_blob(&expected, reader)?)) {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| no_holder(state, digest)))
    }

    fn holders(&self, state: &State, digest: &Digest) -> Vec<NodeId> {
        let Some(artifact) = state.artifacts.find(digest) else { return Vec::new() };
        let is_up = |id: &&NodeId| state.nodes.find(id).is_some_and(|node| node.condition == Condition::Up);
        artifact.holders.iter().filter(is_up).copied().filter(|id| *id != self.node).collect()
    }

    /// Content that no service mounts any more.
    pub fn sweep_content(&self, is_needed: impl Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(self.data_dir.join("content")) else { return };
        for entry in entries.flatten() {
            if !is_needed(&entry.file_name().to_string_lossy()) {
                // Tried again at the next sweep.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }
}

/// Whether this node is the one to fetch another copy: fewer than two live holders, and it comes first of the rest.
pub fn is_keeper(state: &State, artifact: &Artifact, own: NodeId) -> bool {
    if artifact.kind == ArtifactKind::RegistryImage || artifact.holders.is_empty() {
        return false;
    }
    let live: Vec<NodeId> = state
        .nodes
        .rows()
        .filter(|node| node.condition == Condition::Up && !node.is_leaving)
        .map(|node| node.id)
        .collect();
    let holders = live.iter().filter(|id| artifact.holders.contains(id)).count();
    let first = live.iter().find(|id| !artifact.holders.contains(id));
    holders < 2 && first == Some(&own)
}

fn no_holder(state: &State, digest: &Digest) -> FetchArtifactError {
    let holders = state.artifacts.find(digest).map(|artifact| &artifact.holders);
    let names: Vec<String> = holders.into_iter().flatten().map(|id| state.node_name(*id)).collect();
    let holders = if names.is_empty() { "no node holds it".into() } else { names.join(", ") };
    FetchArtifactError::NoHolder { holders, source: None }
}

/// The runtime's own newtype of the same text.
pub fn images_digest(digest: &Digest) -> images::Digest {
    images::Digest::parse(digest.as_str()).expect("both forms are sha256 and 64 hex digits")
}

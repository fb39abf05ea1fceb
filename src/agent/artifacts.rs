//! Brings images and content to this node: from peers that hold them, else from the registry. Blocks.
//!
//! Content is a tar by digest, unpacked once to `<data>/content/<hex>/`; images go to the runtime's store. Bytes from
//! a peer are verified like bytes from anywhere.

use crate::linux::disk::Space;
use crate::model::*;
use crate::runtime::Runtime;
use crate::runtime::images::{
    self, BlobSource, FetchError, FetchRequest, KeepRequest, LAYER_UNPACKED_BYTES_MAX, LayerBlobs, Platform,
    SourceError, StoreError,
};
use crate::runtime::reference::{ImageReference, ReferenceError};
use crate::runtime::registry::{PullError, PullRequest, RegistryClient, RegistryConfig, TransferError};
use crate::state::State;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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

impl FetchArtifactError {
    /// How long to wait before the next try. A full disk empties slowly, and nothing is urgent about a second copy.
    pub fn pause(&self) -> Duration {
        let is_space = matches!(
            self,
            FetchArtifactError::DiskLow { .. } | FetchArtifactError::Fetch(FetchError::NoSpace { .. })
        );
        Duration::from_secs(if is_space { 60 } else { 2 })
    }
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
    /// One image at a time is kept for others: each counts on the space that it found.
    keeping: Mutex<()>,
}

impl Artifacts {
    pub fn new(node: NodeId, runtime: Arc<Runtime>, data_dir: PathBuf, peers: Box<PeerBlobs>) -> Artifacts {
        let registry_ca = fs::read(data_dir.join("registry-ca.pem")).ok();
        let (unpacking, keeping) = (Mutex::default(), Mutex::default());
        Artifacts { node, runtime, data_dir, peers, registry_ca, unpacking, keeping }
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

    /// `None` when no other node says that it holds the image. One that holds only a part is asked, too: each blob comes
    /// from the first that has it. A failed fetch begins again with the next node, as a peer may serve wrong bytes.
    fn ask_holders<T>(
        &self,
        state: &State,
        digest: &Digest,
        mut fetch: impl FnMut(&mut BlobSource<'_>) -> Result<T, FetchError>,
    ) -> Result<Option<T>, FetchArtifactError> {
        let mut last = None;
        let mut nodes = self.sources(state, digest);
        for _ in 0..nodes.len() {
            let mut source = |blob: &images::BlobRequest| -> Result<Box<dyn Read>, SourceError> {
                let digest = Digest::new(&blob.digest.to_string())?;
                let mut failure = None;
                for node in &nodes {
                    match (self.peers)(*node, &digest) {
                        Ok(reader) => return Ok(reader),
                        Err(error) => failure = Some(error),
                    }
                }
                Err(failure.expect("the loop runs once per node, so there is one"))
            };
            let fetched = fetch(&mut source);
            nodes.rotate_left(1);
            match fetched {
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
        let _one = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_space()?;
        let name = artifact.names.first();
        let digest = images_digest(&artifact.digest);
        let manifests: Vec<images::Digest> = artifact.platforms.values().map(images_digest).collect();
        let request = KeepRequest {
            digest: &digest,
            name: name.map(String::as_str),
            manifests: &manifests,
            bytes_max: Space::of(&self.data_dir).map_or(u64::MAX, Space::spare_bytes),
        };
        let store = self.runtime.images();
        let kept = self.ask_holders(state, &artifact.digest, |source| store.keep(&request, source))?;
        kept.ok_or_else(|| no_holder(state, &artifact.digest))?;
        if artifact.runs_on(Architecture::own()) {
            let reference = name.cloned().unwrap_or_default();
            let image = ImageSpec { reference, digest: Some(artifact.digest.clone()) };
            self.fetch_image(state, &image, &artifact.digest, &mut |_| {})?;
        }
        Ok(())
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
        for holder in self.sources(state, digest) {
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

    fn sources(&self, state: &State, digest: &Digest) -> Vec<NodeId> {
        let Some(artifact) = state.artifacts.find(digest) else { return Vec::new() };
        let is_up = |id: &NodeId| state.nodes.find(id).is_some_and(|node| node.condition == Condition::Up);
        artifact.sources().filter(|id| is_up(id) && *id != self.node).collect()
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

/// Whether this node is to fetch what it lacks: there are to be two live holders, and it comes first of the rest.
pub fn is_keeper(state: &State, artifact: &Artifact, own: NodeId) -> bool {
    if artifact.kind == ArtifactKind::RegistryImage || artifact.sources().next().is_none() {
        return false;
    }
    let live: Vec<NodeId> = state
        .nodes
        .rows()
        .filter(|node| node.condition == Condition::Up && !node.is_leaving)
        .map(|node| node.id)
        .collect();
    let holders = live.iter().filter(|id| artifact.holders.contains(id)).count();
    let rest = live.iter().filter(|id| !artifact.holders.contains(id));
    rest.take(2_usize.saturating_sub(holders)).any(|id| *id == own)
}

fn no_holder(state: &State, digest: &Digest) -> FetchArtifactError {
    let sources = state.artifacts.find(digest).into_iter().flat_map(Artifact::sources);
    let names: Vec<String> = sources.map(|id| state.node_name(id)).collect();
    let holders = if names.is_empty() { "no node holds it".into() } else { names.join(", ") };
    FetchArtifactError::NoHolder { holders, source: None }
}

/// The runtime's own newtype of the same text.
pub fn images_digest(digest: &Digest) -> images::Digest {
    images::Digest::parse(digest.as_str()).expect("both forms are sha256 and 64 hex digits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Command;
    use crate::state::tests::{Applier, spec};
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn two_live_nodes_fetch_what_no_two_hold_whole() {
        let mut applier = Applier::with_nodes(4);
        let digest = spec("1").image.digest.unwrap();
        let mut artifact = Artifact {
            kind: ArtifactKind::LoadedImage,
            names: BTreeSet::new(),
            bytes: 1,
            platforms: BTreeMap::new(),
            holders: BTreeSet::new(),
            part_holders: BTreeSet::new(),
            digest,
        };
        let start_id = applier.state.nodes.find(&NodeId(1)).unwrap().start_id;
        applier.must(Command::MarkNodeDown { node: NodeId(1), start_id });
        let cases: [(&[u64], &[u64], &[u64]); 5] = [
            (&[], &[], &[]),
            (&[], &[1, 2], &[2, 3]),
            (&[2], &[1], &[3]),
            (&[1], &[], &[2, 3]),
            (&[2, 4], &[], &[]),
        ];
        for (holders, parts, keepers) in cases {
            artifact.holders = holders.iter().copied().map(NodeId).collect();
            artifact.part_holders = parts.iter().copied().map(NodeId).collect();
            let own = (1..=4).filter(|node| is_keeper(&applier.state, &artifact, NodeId(*node)));
            assert_eq!(own.collect::<Vec<_>>(), keepers, "{holders:?} {parts:?}");
        }
    }
}

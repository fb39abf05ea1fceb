//! Images, content, and the deploy that needs both.

use super::backend::{Backend, RequestKey};
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers::{app_name, mark_of, shown, unexpected};
use super::peer::BodyReader;
use super::wire::*;
use crate::agent::artifacts::images_digest;
use crate::model::limits::CONTENT_BYTES_MAX;
use crate::model::*;
use crate::runtime::images::{Hold, Loaded, Platform};
use crate::runtime::reference::ImageReference;
use crate::state::{Command, Reply as StateReply, State};
use crate::tasks::Launch;
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A row that was removed again at once never shows.
const KNOWN_LIMIT: Duration = Duration::from_secs(5);

pub async fn list(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let shown = shown(backend, false).await?;
    let view = shown.view(backend);
    let artifacts =
        shown.reading.state.artifacts.rows().filter(|artifact| artifact.kind != ArtifactKind::Content);
    let images = artifacts.map(|artifact| view.image(artifact)).collect();
    body::ok(&ImagesBody { freshness: shown.reading.freshness.clone(), images })
}

/// The full name of an image as Docker understands it; text that is no reference stays as it is.
fn full_name(name: &str) -> String {
    match ImageReference::parse(name) {
        Ok(mut reference) => {
            reference.digest = None;
            reference.to_string()
        }
        Err(_) => name.into(),
    }
}

pub async fn load(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let key = RequestKey::of(request.headers())?;
    let reader = BodyReader::new(request.into_body());
    let runtime = backend.ground.runtime.clone();
    let loaded = crate::tasks::unblock(move || {
        let loaded = runtime.images().load(reader, &Platform::host())?;
        let describe = |image: Loaded| (describe(&runtime, &image), image.held);
        let described: (Vec<_>, Vec<_>) = loaded.into_iter().map(describe).unzip();
        Ok::<_, crate::runtime::images::LoadError>(described)
    })
    .await
    .map_err(|error| ApiError::invalid(crate::agent::chain(&error)))?;
    // Before it is in the state, a sweep here would take what was loaded.
    let (loaded, _held) = loaded;
    let mut images = Vec::new();
    for (number, mut artifact) in loaded.into_iter().enumerate() {
        artifact.holders.insert(backend.node);
        let command = Command::RegisterArtifact { artifact: Box::new(artifact.clone()) };
        // One request, one id for each image in it.
        let mark = key.map(|key| {
            RequestKey { id: RequestId(key.id.0.wrapping_add(number as u128)), ..key }.mark(&command)
        });
        backend.submit(mark, command).await?;
        until_known(backend, &artifact.digest).await;
        images.push(ImageBody {
            names: artifact.names.iter().cloned().collect(),
            digest: artifact.digest,
            bytes: artifact.bytes,
            platforms: artifact.platforms.into_keys().collect(),
            nodes: vec![backend.replica.state().node_name(backend.node)],
            part_nodes: Vec::new(),
            source: "loaded".into(),
        });
    }
    body::ok(&LoadReply { images })
}

/// The leader answers before the change is here; whoever waits for this drops what he holds afterwards.
async fn until_known(backend: &Backend, digest: &Digest) {
    let deadline = Instant::now() + KNOWN_LIMIT;
    while !backend.replica.state().artifacts.contains(digest) && Instant::now() < deadline {
        async_io::Timer::after(Duration::from_millis(20)).await;
    }
}

fn describe(runtime: &crate::runtime::Runtime, loaded: &Loaded) -> Artifact {
    let digest = Digest::new(&loaded.digest.to_string()).expect("both forms are sha256 and 64 hex digits");
    let store = runtime.images();
    let image = store.image(&loaded.digest).ok().flatten();
    Artifact {
        kind: ArtifactKind::LoadedImage,
        names: loaded.names.iter().map(|name| full_name(name)).gather(),
        bytes: image.as_ref().map_or(0, |image| image.size_bytes),
        platforms: platforms_of(runtime, &loaded.digest),
        holders: BTreeSet::new(),
        part_holders: BTreeSet::new(),
        digest,
    }
}

/// The architectures an image has here, with the manifest of each.
fn platforms_of(
    runtime: &crate::runtime::Runtime,
    digest: &crate::runtime::images::Digest,
) -> BTreeMap<String, Digest> {
    let own = |digest: &crate::runtime::images::Digest| Digest::new(&digest.to_string()).ok();
    let platforms = runtime.images().platforms(digest).unwrap_or_default();
    platforms.iter().filter_map(|(platform, blob)| Some((platform_name(platform), own(blob)?))).gather()
}

fn platform_name(platform: &Platform) -> String {
    match &platform.variant {
        Some(variant) => format!("{}/{variant}", platform.architecture),
        None => platform.architecture.clone(),
    }
}

pub async fn remove(
    backend: &Arc<Backend>,
    name: &str,
    request: &Request<Incoming>,
) -> Result<Reply, ApiError> {
    let state = backend.reading().await?.state;
    let full = full_name(name);
    let is_meant = |artifact: &&Artifact| {
        artifact.digest.as_str() == name
            || (name.len() >= 8 && artifact.digest.hex().starts_with(name))
            || artifact.names.contains(&full)
    };
    let artifact = state.artifacts.rows().find(is_meant).ok_or_else(|| ApiError::not_found("image", name))?;
    let command = Command::RemoveArtifact { digest: artifact.digest.clone() };
    let mark = mark_of(request.headers(), &command)?;
    backend.submit(mark, command).await?;
    body::done()
}

/// What is put is called by its digest: a repeat changes nothing, at any node, and needs no mark.
pub async fn put_content(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    RequestKey::of(request.headers())?;
    let reader = BodyReader::new(request.into_body());
    let runtime = backend.ground.runtime.clone();
    let (digest, bytes, _held) = crate::tasks::unblock(move || store_content(&runtime, reader)).await?;
    let artifact = Artifact {
        digest: digest.clone(),
        kind: ArtifactKind::Content,
        names: BTreeSet::new(),
        bytes,
        platforms: BTreeMap::new(),
        holders: [backend.node].into(),
        part_holders: BTreeSet::new(),
    };
    backend.submit(None, Command::RegisterArtifact { artifact: Box::new(artifact) }).await?;
    until_known(backend, &digest).await;
    body::ok(&ContentReply { digest })
}

fn store_content(
    runtime: &crate::runtime::Runtime,
    reader: impl Read,
) -> Result<(Digest, u64, Hold), ApiError> {
    let mut bytes = Vec::new();
    let read = reader.take(CONTENT_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| ApiError::invalid(format!("the body ended early: {error}")))?;
    if bytes.len() as u64 > CONTENT_BYTES_MAX {
        let message = format!("files that a Compose file mounts: at most {} MiB", CONTENT_BYTES_MAX >> 20);
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message));
    }
    let digest = crate::runtime::images::Digest::of(&bytes);
    let expected = crate::runtime::images::BlobRef { digest: digest.clone(), size_bytes: bytes.len() as u64 };
    let held = runtime.images().hold_blob(&digest);
    runtime.images().write_blob(&expected, bytes.as_slice()).map_err(|error| ApiError::internal(&error))?;
    let own = Digest::new(&digest.to_string()).expect("both forms are sha256 and 64 hex digits");
    Ok((own, bytes.len() as u64, held))
}

pub async fn deploy(
    backend: &Arc<Backend>,
    name: &str,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let app = app_name(name)?;
    let (head, content) = request.into_parts();
    let mut wish: DeployRequest = body::parse(content).await?;
    if wish.spec.name != app {
        return Err(ApiError::invalid(format!("the path names {app}, the body {}", wish.spec.name)));
    }
    // Of what was asked: a tag may name another digest by the time of a retry.
    let asked = Command::DeployApp { spec: Box::new(wish.spec.clone()), artifacts: Vec::new() };
    let mark = mark_of(&head.headers, &asked)?;
    let state = backend.reading().await?.state;
    let (images, artifacts) = resolve_images(backend, &state, &mut wish.spec).await?;
    let spec = wish.spec.clone();
    let command = Command::DeployApp { spec: Box::new(wish.spec), artifacts };
    // What the cluster itself would refuse comes first: it says more than that a port is taken.
    let would_be = dry_run(&state, name, command.clone(), images.clone(), wish.is_dry_run)?;
    super::ports::check(backend, &state, &spec).await?;
    super::certificates::check_given(backend, &state, &spec).await?;
    if wish.is_dry_run {
        return body::ok(&would_be);
    }
    let StateReply::Deployed { revision, changed, removed } = backend.submit(mark, command).await? else {
        return Err(unexpected());
    };
    body::ok(&DeployReply { app: name.into(), revision, changed, removed, images })
}

/// The same command on a copy of the state: it says what would change, and what would be refused.
fn dry_run(
    state: &State,
    name: &str,
    command: Command,
    images: BTreeMap<String, Digest>,
    is_all: bool,
) -> Result<DeployReply, ApiError> {
    let mut copy = state.clone();
    if is_all && let Command::DeployApp { spec, .. } = &command {
        // What a deploy would bring is not brought for a dry run.
        spec.secrets.iter().for_each(|name| copy.expect_secret(name));
    }
    let envelope = crate::state::Envelope {
        stamp: state.time(),
        origin: crate::state::Origin::default(),
        request: None,
        command,
    };
    match copy.apply(0, &envelope)? {
        StateReply::Deployed { revision, changed, removed } => {
            Ok(DeployReply { app: name.into(), revision, changed, removed, images })
        }
        _ => Err(unexpected()),
    }
}

type Resolved = (BTreeMap<String, Digest>, Vec<Artifact>);

/// Tags become digests once, here, so that all instances run the same image.
async fn resolve_images(
    backend: &Arc<Backend>,
    state: &Arc<State>,
    spec: &mut AppSpec,
) -> Result<Resolved, ApiError> {
    let references: BTreeSet<String> =
        spec.services.values().map(|service| service.image.reference.clone()).gather();
    let mut digests = BTreeMap::new();
    let mut artifacts = Vec::new();
    for reference in references {
        let (digest, artifact) = resolve(backend, state, &reference).await?;
        artifacts.extend(artifact);
        digests.insert(reference, digest);
    }
    for service in spec.services.values_mut() {
        service.image.digest = digests.get(&service.image.reference).cloned();
    }
    Ok((digests, artifacts))
}

async fn resolve(
    backend: &Arc<Backend>,
    state: &Arc<State>,
    reference: &str,
) -> Result<(Digest, Option<Artifact>), ApiError> {
    let parsed = ImageReference::parse(reference).map_err(|error| ApiError::invalid(error.to_string()))?;
    let full = full_name(reference);
    let wanted = parsed.digest.as_ref().and_then(|digest| Digest::new(&digest.to_string()).ok());
    // What was loaded wins: no registry needs to know it.
    let loaded = state.artifacts.rows().filter(|artifact| artifact.kind == ArtifactKind::LoadedImage).find(
        |artifact| match &wanted {
            Some(digest) => artifact.digest == *digest,
            None => artifact.names.contains(&full),
        },
    );
    if let Some(artifact) = loaded {
        check_platforms(state, reference, artifact)?;
        return Ok((artifact.digest.clone(), None));
    }
    // A registry that is away must not keep what runs from being deployed again.
    let known = state
        .artifacts
        .rows()
        .find(|artifact| artifact.kind == ArtifactKind::RegistryImage && artifact.names.contains(&full))
        .map(|artifact| artifact.digest.clone());
    let (ground, settings) = (backend.ground.clone(), state.cluster_settings());
    let resolved = crate::tasks::unblock(move || {
        let registry = ground.artifacts.registry(&settings).map_err(|error| ApiError::internal(&error))?;
        registry.resolve(&parsed).map_err(|error| {
            ApiError::rejected(crate::agent::chain(&error))
                .hint("is the name right, and can this node reach the registry? An image file goes in with tinydc image load FILE")
        })
    })
    .await;
    let resolved = match (resolved, known) {
        (Ok(resolved), _) => resolved,
        (Err(error), Some(digest)) => {
            tracing::warn!(image = reference, error = %error, "registry not asked; the known digest is used");
            return Ok((digest, None));
        }
        (Err(error), None) => return Err(error),
    };
    let digest = Digest::new(&resolved.digest.to_string()).map_err(|error| ApiError::internal(&error))?;
    let platforms =
        resolved.platforms.iter().map(|platform| (platform_name(platform), digest.clone())).gather();
    let artifact = Artifact {
        digest: digest.clone(),
        kind: ArtifactKind::RegistryImage,
        names: [full].into(),
        bytes: 0,
        platforms,
        holders: BTreeSet::new(),
        part_holders: BTreeSet::new(),
    };
    check_platforms(state, reference, &artifact)?;
    Ok((digest, Some(artifact)))
}

/// One node that can run it is enough: this one need not be it.
fn check_platforms(state: &State, reference: &str, artifact: &Artifact) -> Result<(), ApiError> {
    if state.nodes.rows().any(|node| artifact.runs_on(node.architecture)) {
        return Ok(());
    }
    let offered = artifact.platform_names();
    Err(ApiError::rejected(format!("{reference} is built for {offered}, and no node here is such a machine")))
}

/// Opens a blob for a peer.
pub async fn blob(backend: &Arc<Backend>, digest: &str) -> Result<Reply, ApiError> {
    let digest = Digest::new(digest).map_err(|error| ApiError::invalid(error.to_string()))?;
    let runtime = backend.ground.runtime.clone();
    let own = images_digest(&digest);
    let file = crate::tasks::unblock(move || runtime.images().open_blob(&own)).await;
    let file = file.map_err(|_| ApiError::not_found("blob", digest.as_str()))?;
    let (sender, chunks) = async_channel::bounded(4);
    backend
        .executor
        .launch(async move {
            crate::tasks::unblock(move || {
                let mut file = file;
                let mut buffer = vec![0; 64 << 10];
                while let Ok(count @ 1..) = file.read(&mut buffer) {
                    if sender.send_blocking(bytes::Bytes::copy_from_slice(&buffer[..count])).is_err() {
                        return;
                    }
                }
            })
            .await;
        })
        .detach();
    Ok(body::streamed("application/octet-stream", chunks))
}

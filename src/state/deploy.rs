//! Apps: deployed, scaled, removed; and the images and content they need.

use super::apply::not_found;
use super::command::{KeptVolume, Outcome, Rejection, Reply};
use super::rows::{App, PreviousSpec, Service, Update, Volume, VolumeKey};
use super::{State, certificates, secrets};
use crate::compose::ingress_labels::read_ingress_labels;
use crate::model::limits::{
    CLUSTER_PORTS, INSTANCES_MAX, REPLICAS_MAX, SERVICE_SPEC_BYTES_MAX, SERVICES_PER_APP_MAX,
};
use crate::model::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Names one image may carry; each is a row's worth of bytes on every node.
const NAMES_PER_ARTIFACT_MAX: usize = 64;

pub fn deploy(state: &mut State, spec: &AppSpec, artifacts: &[Artifact]) -> Outcome {
    check_bounds(state, spec)?;
    let mut spec = with_ports_chosen(state, spec)?;
    secrets::note_versions(state, &mut spec)?;
    let spec = &spec;
    check_ports(state, spec)?;
    check_routes(state, spec)?;
    for artifact in artifacts {
        merge_artifact(state, artifact);
    }
    let now = state.time();
    let mut changed = Vec::new();
    for (name, service) in &spec.services {
        if put_service(state, &spec.name, name, service, now)? {
            changed.push(name.clone());
        }
    }
    let gone: Vec<(ServiceId, String)> = state
        .services_of(&spec.name)
        .filter(|service| !service.is_removed && !spec.services.contains_key(&service.name))
        .map(|service| (service.id, service.name.clone()))
        .collect();
    let removed: Vec<String> = gone.iter().map(|(_, name)| name.clone()).collect();
    for (id, _) in gone {
        remove_service(state, id);
    }
    for (name, volume) in &spec.volumes {
        put_volume(state, &spec.name, name, volume, now)?;
    }
    let before = state.apps.find(&spec.name);
    let is_new = before.is_none_or(|app| app.is_removed);
    let revision = before.map_or(0, |app| app.revision);
    if is_new || !changed.is_empty() || !removed.is_empty() {
        let app =
            App { name: spec.name.clone(), deployed_at: now, revision: revision + 1, is_removed: false };
        state.apps.put(spec.name.clone(), app);
        let text = match (changed.as_slice(), removed.as_slice()) {
            ([], gone) => format!("{} deployed without {}", spec.name, gone.join(", ")),
            (changed, []) => format!("{} deployed: {}", spec.name, changed.join(", ")),
            (changed, gone) => {
                format!("{} deployed: {}; without {}", spec.name, changed.join(", "), gone.join(", "))
            }
        };
        state.note("deployed", spec.name.to_string(), text);
    }
    sweep_removed(state);
    secrets::forget_unnamed(state, spec);
    let routes = spec.services.values().flat_map(|service| read_ingress_labels(&service.labels).routes);
    certificates::try_again(state, &routes.filter_map(|route| route.host).collect::<Vec<_>>());
    let revision = state.apps.find(&spec.name).map_or(revision, |app| app.revision);
    Ok(Reply::Deployed { revision, changed, removed })
}

fn check_bounds(state: &State, spec: &AppSpec) -> Result<(), Rejection> {
    let invalid = |text: String| Err(Rejection::Invalid(text));
    if spec.services.is_empty() || spec.services.len() > SERVICES_PER_APP_MAX {
        return invalid(format!(
            "an app has 1 to {SERVICES_PER_APP_MAX} services, not {}",
            spec.services.len()
        ));
    }
    for (name, service) in &spec.services {
        let bytes = postcard::to_allocvec(service).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > SERVICE_SPEC_BYTES_MAX {
            return invalid(format!("service {name} takes {bytes} bytes; at most {SERVICE_SPEC_BYTES_MAX}"));
        }
        if service.replicas > REPLICAS_MAX {
            return invalid(format!(
                "service {name}: at most {REPLICAS_MAX} replicas, not {}",
                service.replicas
            ));
        }
        if service.image.digest.is_none() {
            return invalid(format!("service {name}: the image {} has no digest", service.image.reference));
        }
        if let Some(volume) = service.volume_names().find(|volume| !spec.volumes.contains_key(*volume)) {
            return invalid(format!("service {name} mounts a volume {volume} that the app does not name"));
        }
    }
    let others: u64 = (state.services.rows())
        .filter(|service| service.app != spec.name && !service.is_removed)
        .map(|service| u64::from(service.spec.replicas))
        .sum();
    let wanted: u64 = spec.services.values().map(|service| u64::from(service.replicas)).sum();
    if others + wanted > INSTANCES_MAX as u64 {
        return invalid(format!("{} instances in all; at most {INSTANCES_MAX}", others + wanted));
    }
    Ok(())
}

/// From which a port is taken where a service asks for any.
const FREE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// Chooses a port where none was named; a service that has one keeps it.
fn with_ports_chosen(state: &State, spec: &AppSpec) -> Result<AppSpec, Rejection> {
    let mut spec = spec.clone();
    let mut taken: BTreeSet<u16> = state
        .services
        .rows()
        .flat_map(|service| service.spec.ports.iter().filter_map(|port| port.published))
        .chain(
            spec.services.values().flat_map(|service| service.ports.iter().filter_map(|port| port.published)),
        )
        .gather();
    for (name, service) in &mut spec.services {
        let before =
            state.service_by_name(&spec.name, name).map(|row| row.spec.ports.clone()).unwrap_or_default();
        for port in service.ports.iter_mut().filter(|port| port.published.is_none()) {
            let is_same = |old: &&PortSpec| {
                old.target == port.target
                    && old.protocol == port.protocol
                    && old.published.is_some_and(|published| FREE_PORTS.contains(&published))
            };
            let kept = before.iter().find(is_same).and_then(|old| old.published);
            let chosen = kept.or_else(|| FREE_PORTS.clone().find(|candidate| !taken.contains(candidate)));
            let chosen = chosen.ok_or_else(|| Rejection::Invalid("no port is left to publish".into()))?;
            taken.insert(chosen);
            port.published = Some(chosen);
        }
    }
    Ok(spec)
}

/// A port published to all nodes has one owner in the whole cluster.
fn check_ports(state: &State, spec: &AppSpec) -> Result<(), Rejection> {
    let mut owners: BTreeMap<(Protocol, u16, Option<Ipv4Addr>), String> = BTreeMap::new();
    for service in state.services.rows().filter(|service| service.app != spec.name && !service.is_removed) {
        for port in &service.spec.ports {
            if let Some(published) = port.published {
                let owner = format!("{}/{}", service.app, service.name);
                owners.insert((port.protocol, published, port.host_address), owner);
            }
        }
    }
    for (name, service) in &spec.services {
        for port in &service.ports {
            let Some(published) = port.published else { continue };
            let owner = format!("{}/{name}", spec.name);
            if CLUSTER_PORTS.contains(&published) {
                let protocol = port.protocol.name().into();
                return Err(Rejection::PortTaken {
                    port: published,
                    protocol,
                    owner: "tinydc itself".into(),
                });
            }
            let clash = owners.iter().find(|((protocol, taken, address), by)| {
                *protocol == port.protocol
                    && *taken == published
                    && (address.is_none() || port.host_address.is_none() || *address == port.host_address)
                    && **by != owner
            });
            if let Some((_, by)) = clash {
                let protocol = port.protocol.name().into();
                return Err(Rejection::PortTaken { port: published, protocol, owner: by.clone() });
            }
            owners.insert((port.protocol, published, port.host_address), owner);
        }
    }
    Ok(())
}

/// An app that publishes a port of the ingress and a service with a route exclude each other: only one can listen there.
fn check_routes(state: &State, spec: &AppSpec) -> Result<(), Rejection> {
    let others = state
        .services
        .rows()
        .filter(|service| service.app != spec.name && !service.is_removed)
        .map(|service| (format!("{}/{}", service.app, service.name), &service.spec));
    let own = spec.services.iter().map(|(name, service)| (format!("{}/{name}", spec.name), service));
    check_ingress(&state.cluster_settings(), &others.chain(own).collect::<Vec<_>>())
}

/// The same for what is deployed, under settings that are to come.
pub fn check_settings(state: &State, settings: &Settings) -> Result<(), Rejection> {
    let deployed = state.services.rows().filter(|service| !service.is_removed);
    let all: Vec<_> =
        deployed.map(|service| (format!("{}/{}", service.app, service.name), &service.spec)).collect();
    check_ingress(settings, &all)
}

fn check_ingress(settings: &Settings, all: &[(String, &ServiceSpec)]) -> Result<(), Rejection> {
    let routed = all.iter().find(|(_, service)| !read_ingress_labels(&service.labels).routes.is_empty());
    let Some((routed, _)) = routed else { return Ok(()) };
    let ingress = [settings.ingress_http_port, settings.ingress_https_port];
    let is_in_the_way = |port: &PortSpec| {
        port.protocol == Protocol::Tcp && port.published.is_some_and(|published| ingress.contains(&published))
    };
    for (name, service) in all {
        if let Some(port) = service.ports.iter().find(|port| is_in_the_way(port)) {
            let port = port.published.unwrap_or_default();
            return Err(Rejection::Invalid(format!(
                "{name} publishes port {port}, where {routed} is served by its HTTP route; \
                 publish another port, or move the routes: tinydc settings ingress_http_port 8080"
            )));
        }
    }
    Ok(())
}

/// Whether anything about the service changed.
fn put_service(
    state: &mut State,
    app: &AppName,
    name: &str,
    spec: &ServiceSpec,
    now: Timestamp,
) -> Result<bool, Rejection> {
    let Some(before) = state.service_by_name(app, name) else {
        let vip = allocate_vip(state)?;
        let id = ServiceId(state.count(|counters| {
            counters.service += 1;
            counters.service
        }));
        let service = Service {
            id,
            app: app.clone(),
            name: name.into(),
            spec: spec.clone(),
            spec_version: 1,
            previous: None,
            superseded: Vec::new(),
            update: Update::Rolling { since: now },
            vip,
            was_started: false,
            was_healthy: false,
            was_completed: false,
            is_removed: false,
            version: 1,
        };
        state.services.put(id, service);
        return Ok(true);
    };
    let retried = matches!(before.update, Update::Failed { .. });
    if before.spec == *spec && !retried {
        return Ok(false);
    }
    let same_but_count = ServiceSpec { replicas: before.spec.replicas, ..spec.clone() } == before.spec;
    let id = before.id;
    state.services.update(&id, |service| {
        if !same_but_count {
            replace_spec(service, spec.clone(), now);
        } else if retried {
            service.update = Update::Rolling { since: now };
        }
        service.spec.replicas = spec.replicas;
        service.version += 1;
    });
    Ok(true)
}

fn replace_spec(service: &mut Service, spec: ServiceSpec, now: Timestamp) {
    let old = std::mem::replace(&mut service.spec, spec);
    // A deploy over a failed update goes on from what still serves, not from what never worked.
    let keeps_previous = !matches!(service.update, Update::Done) && service.previous.is_some();
    let old = PreviousSpec { spec: old, spec_version: service.spec_version };
    match keeps_previous {
        true => service.superseded.push(old),
        false => service.previous = Some(Box::new(old)),
    }
    service.spec_version += 1;
    service.update = Update::Rolling { since: now };
}

fn allocate_vip(state: &mut State) -> Result<Ipv4Addr, Rejection> {
    let range = state.cluster().map_or(Ipv4Addr::UNSPECIFIED, |cluster| cluster.vip_range);
    let taken: BTreeSet<Ipv4Addr> = state.services.rows().map(|service| service.vip).gather();
    let next = state.meta.find(&()).map_or(0, |meta| meta.counters.next_vip);
    // Hosts 1 to 65534 of the /16, going round so that a freed address rests before it serves again.
    let found = (0..65_534u32)
        .map(|step| (next + step) % 65_534 + 1)
        .find(|host| !taken.contains(&Ipv4Addr::from(u32::from(range) + host)));
    let host = found.ok_or_else(|| Rejection::NoAddress(format!("{range}/16")))?;
    state.count(|counters| counters.next_vip = host);
    Ok(Ipv4Addr::from(u32::from(range) + host))
}

fn put_volume(
    state: &mut State,
    app: &AppName,
    name: &str,
    spec: &VolumeSpec,
    now: Timestamp,
) -> Result<(), Rejection> {
    let key = VolumeKey::new(app, name);
    let before = state.volumes.find(&key);
    // A volume that is there is never seeded again, so that its seed stays as it was.
    if before.is_some_and(|volume| !volume.is_removed) {
        return Ok(());
    }
    if before.is_some_and(|volume| volume.node.is_some()) {
        return Err(Rejection::NotAllowed(format!(
            "volume {name} is being deleted; deploy again in a moment"
        )));
    }
    let volume = Volume {
        app: app.clone(),
        name: name.into(),
        seed: spec.seed.clone(),
        directory: spec.directory.clone(),
        node: None,
        created_at: now,
        is_removed: false,
    };
    state.volumes.put(key, volume);
    Ok(())
}

fn remove_service(state: &mut State, id: ServiceId) {
    state.services.update(&id, |service| {
        service.is_removed = true;
        service.version += 1;
    });
    let instances: Vec<InstanceId> = state.instances_of(id).map(|instance| instance.id).collect();
    for instance in instances {
        state.instances.update(&instance, |instance| {
            if instance.desired != Desired::Remove {
                instance.desired = Desired::Remove;
                instance.version += 1;
            }
        });
    }
}

pub fn remove(state: &mut State, app: &AppName, with_volumes: bool) -> Outcome {
    let known = state.apps.find(app).is_some_and(|row| !row.is_removed);
    let volumes: Vec<VolumeKey> = state
        .volumes
        .iter()
        .filter(|(key, volume)| &key.app == app && !volume.is_removed)
        .map(|(key, _)| key.clone())
        .collect();
    if !known && (!with_volumes || volumes.is_empty()) {
        return Err(not_found("app", app));
    }
    let services: Vec<ServiceId> = state.services_of(app).map(|service| service.id).collect();
    for id in services {
        remove_service(state, id);
    }
    let mut kept = Vec::new();
    for key in volumes {
        if with_volumes {
            state.volumes.update(&key, |volume| volume.is_removed = true);
        } else if let Some(volume) = state.volumes.find(&key) {
            let node = volume.node.map(|node| state.node_name(node));
            kept.push(KeptVolume { name: volume.name.clone(), node });
        }
    }
    secrets::forget_of_app(state, app);
    if known {
        state.apps.update(app, |row| row.is_removed = true);
        state.note("removed", app.to_string(), format!("{app} removed"));
    }
    sweep_removed(state);
    Ok(Reply::Removed { volumes: kept })
}

/// Lets go of what was asked to be removed and has nothing running any more.
pub fn sweep_removed(state: &mut State) {
    let unplaced: Vec<InstanceId> = state
        .instances
        .rows()
        .filter(|instance| instance.desired == Desired::Remove && instance.node.is_none())
        .map(|instance| instance.id)
        .collect();
    for id in unplaced {
        state.instances.remove(&id);
    }
    prune_specs(state);
    let services: Vec<ServiceId> = state
        .services
        .rows()
        .filter(|service| service.is_removed && state.instances_of(service.id).next().is_none())
        .map(|service| service.id)
        .collect();
    for id in services {
        state.services.remove(&id);
    }
    let apps: Vec<AppName> = state
        .apps
        .rows()
        .filter(|app| app.is_removed && state.services_of(&app.name).next().is_none())
        .map(|app| app.name.clone())
        .collect();
    for app in apps {
        state.apps.remove(&app);
    }
    // A volume that never got a node has no data to delete.
    let volumes: Vec<VolumeKey> = state
        .volumes
        .iter()
        .filter(|(_, volume)| volume.is_removed && volume.node.is_none())
        .map(|(key, _)| key.clone())
        .collect();
    for key in volumes {
        state.volumes.remove(&key);
    }
}

/// Lets go of specifications that no instance has any more.
fn prune_specs(state: &mut State) {
    let services: Vec<ServiceId> =
        state.services.rows().filter(|row| !row.superseded.is_empty()).map(|row| row.id).collect();
    for id in services {
        let versions: BTreeSet<u64> = state.instances_of(id).map(|instance| instance.spec_version).gather();
        state
            .services
            .update(&id, |row| row.superseded.retain(|older| versions.contains(&older.spec_version)));
    }
}

pub fn scale(state: &mut State, app: &AppName, replicas: &BTreeMap<String, u32>) -> Outcome {
    let mut changed = Vec::new();
    for (name, count) in replicas {
        let service =
            state.service_by_name(app, name).ok_or_else(|| not_found("service", format!("{app}/{name}")))?;
        if *count > REPLICAS_MAX {
            return Err(Rejection::Invalid(format!("at most {REPLICAS_MAX} replicas, not {count}")));
        }
        if service.spec.is_global {
            return Err(Rejection::Invalid(format!("{app}/{name} runs on each node (mode: global)")));
        }
        let (id, before) = (service.id, service.spec.replicas);
        if before != *count {
            changed.push(format!("{name}={count}"));
            state.services.update(&id, |service| {
                service.spec.replicas = *count;
                service.version += 1;
            });
        }
    }
    if !changed.is_empty() {
        state.note("scaled", app.to_string(), format!("{app} scaled: {}", changed.join(", ")));
    }
    let revision = state.apps.find(app).map_or(0, |app| app.revision);
    Ok(Reply::Deployed { revision, changed, removed: Vec::new() })
}

pub fn register(state: &mut State, artifact: &Artifact) -> Outcome {
    merge_artifact(state, artifact);
    Ok(Reply::Done)
}

/// Adds names, platforms and holders to what is known; a name moves to the digest that last claimed it.
fn merge_artifact(state: &mut State, artifact: &Artifact) {
    let holders: BTreeSet<NodeId> =
        artifact.holders.iter().copied().filter(|id| state.nodes.contains(id)).gather();
    if artifact.kind == ArtifactKind::LoadedImage {
        let others: Vec<Digest> = state
            .artifacts
            .iter()
            .filter(|(digest, other)| {
                **digest != artifact.digest && !other.names.is_disjoint(&artifact.names)
            })
            .map(|(digest, _)| digest.clone())
            .collect();
        for digest in others {
            state
                .artifacts
                .update(&digest, |other| other.names.retain(|name| !artifact.names.contains(name)));
        }
    }
    let mut merged = state.artifacts.find(&artifact.digest).cloned().unwrap_or_else(|| Artifact {
        holders: BTreeSet::new(),
        part_holders: BTreeSet::new(),
        names: BTreeSet::new(),
        ..artifact.clone()
    });
    merged.names.extend(artifact.names.iter().cloned());
    while merged.names.len() > NAMES_PER_ARTIFACT_MAX {
        merged.names.pop_first();
    }
    merged.bytes = merged.bytes.max(artifact.bytes);
    merge_parts(&mut merged, artifact, holders);
    state.artifacts.put(artifact.digest.clone(), merged);
}

/// Holders hold all of it: what one of them lacks makes it a holder of a part, until it has fetched the rest.
fn merge_parts(merged: &mut Artifact, artifact: &Artifact, newcomers: BTreeSet<NodeId>) {
    match (merged.kind, artifact.kind) {
        // A registry lists what it offers, an archive what lies on nodes: only that can be had without the registry.
        (ArtifactKind::LoadedImage, ArtifactKind::RegistryImage) => return,
        (ArtifactKind::RegistryImage, ArtifactKind::LoadedImage) => merged.platforms.clear(),
        _ => {}
    }
    merged.kind = artifact.kind;
    let before = merged.platforms.len();
    merged.platforms.extend(artifact.platforms.iter().map(|(name, digest)| (name.clone(), digest.clone())));
    if merged.platforms.len() > before {
        let lacking = std::mem::take(&mut merged.holders);
        merged.part_holders.extend(lacking);
    }
    let has_all = artifact.platforms.len() == merged.platforms.len();
    for node in newcomers {
        merged.forget_holder(node);
        if has_all {
            merged.holders.insert(node)
        } else {
            merged.part_holders.insert(node)
        };
    }
}

pub fn remove_artifact(state: &mut State, digest: &Digest) -> Outcome {
    let user = state
        .services
        .rows()
        .filter(|service| !service.is_removed)
        .find(|service| service.spec.image.digest.as_ref() == Some(digest));
    if let Some(service) = user {
        return Err(Rejection::NotAllowed(format!("{}/{} uses it", service.app, service.name)));
    }
    state.artifacts.remove(digest).ok_or_else(|| not_found("image", digest))?;
    Ok(Reply::Done)
}

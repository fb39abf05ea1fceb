//! Nodes, tokens and users: who belongs to the cluster.

use super::State;
use super::apply::not_found;
use super::command::{JoinNode, Outcome, Rejection, Reply};
use super::rows::{Cluster, Role, Token, TokenKind, User};
use crate::model::limits::{DISK_CHANGES_MAX, DISK_CHANGES_WITHIN_MS, NODES_MAX};
use crate::model::*;
use std::collections::{BTreeMap, BTreeSet};

/// Tokens and users are typed by people: far more than these are a mistake or an attack.
const TOKENS_MAX: usize = 256;
const USERS_MAX: usize = 256;
const KEYS_PER_USER_MAX: usize = 32;
const LABELS_MAX: usize = 64;
/// Far more boards than a cluster ever wears out.
const REMOVED_KEYS_MAX: usize = 4096;

pub fn found(state: &mut State, cluster: &Cluster, node: &JoinNode) -> Outcome {
    if state.cluster().is_some() {
        return Err(Rejection::AlreadyFounded);
    }
    let time = state.time();
    let mut cluster = cluster.clone();
    cluster.founded_at = time;
    state.identity.put((), cluster.clone());
    state.settings.put((), Settings::default());
    let (id, name) = add_node(state, node)?;
    state.nodes.update(&id, |node| node.has_cluster_key = true);
    state.note("founded", cluster.name.clone(), format!("cluster {} founded on {name}", cluster.name));
    let certificate = node.certificate.clone();
    Ok(Reply::Joined { node: id, name, certificate })
}

pub fn join(
    state: &mut State,
    token: TokenId,
    secret_hash: &[u8; 32],
    node: &JoinNode,
    replace: Option<&str>,
) -> Outcome {
    let known = state.nodes.rows().find(|member| member.public_key == node.public_key);
    let is_once = match check_token(state, token, secret_hash, Some(node.public_key))?.kind {
        TokenKind::Join { is_once } => is_once,
        TokenKind::User { .. } => {
            return Err(Rejection::TokenKind { expected: "a user; nodes join with a join token".into() });
        }
    };
    if let Some(member) = known {
        let (node, name, certificate) = (member.id, member.name.clone(), member.certificate.clone());
        return Ok(Reply::Joined { node, name, certificate });
    }
    if let Some(name) = replace {
        let old = state.node_by_name(name).ok_or_else(|| not_found("node", name))?;
        if old.condition == Condition::Up {
            return Err(Rejection::NotAllowed(format!(
                "{name} is up; only a node that is down can be replaced"
            )));
        }
        let old = old.id;
        forget_node(state, old);
    }
    let (id, name) = add_node(state, node)?;
    if is_once {
        state.tokens.update(&token, |token| token.used_by = Some(node.public_key));
    }
    state.note("node_joined", name.clone(), format!("{name} joined as {id}"));
    Ok(Reply::Joined { node: id, name, certificate: node.certificate.clone() })
}

fn add_node(state: &mut State, join: &JoinNode) -> Result<(NodeId, String), Rejection> {
    if state.nodes.len() >= NODES_MAX {
        return Err(Rejection::TooManyNodes(NODES_MAX));
    }
    let wanted = if is_label(&join.name) { join.name.as_str() } else { "node" };
    let name = free_name(state, wanted);
    let taken: BTreeSet<u8> = state.nodes.rows().map(|node| node.number).gather();
    let number = (1..=254).find(|number| !taken.contains(number));
    let number = number.ok_or(Rejection::TooManyNodes(254))?;
    let id = NodeId(state.count(|counters| {
        counters.node += 1;
        counters.node
    }));
    let node = Node {
        id,
        name: name.clone(),
        number,
        public_key: join.public_key,
        certificate: join.certificate.clone(),
        store_id: join.store_id,
        start_id: None,
        architecture: join.architecture,
        size: join.size,
        labels: BTreeMap::new(),
        condition: Condition::Up,
        is_drained: false,
        is_leaving: false,
        losses: Vec::new(),
        stopped_at: None,
        has_cluster_key: false,
        joined_at: state.time(),
        software: join.software.clone(),
        version: 1,
        troubles: Troubles::default(),
        disks: Vec::new(),
        disks_told_by: None,
        absent_disks: DiskSet::default(),
        disk_changes: Vec::new(),
        is_ending: false,
    };
    state.nodes.put(id, node);
    Ok((id, name))
}

use crate::model::ids::is_label;

/// `pi`, or `pi-2`, `pi-3` … when there is one already.
fn free_name(state: &State, wanted: &str) -> String {
    let stem: String = wanted.chars().take(36).collect();
    std::iter::once(stem.clone())
        .chain((2..).map(|count| format!("{stem}-{count}")))
        .find(|name| state.node_by_name(name).is_none())
        .unwrap_or(stem)
}

/// Asks a member to go: its instances move and it loses its vote; `forget` ends it.
pub fn remove(state: &mut State, id: NodeId, is_forced: bool) -> Outcome {
    let node = state.existing_node(id)?;
    let name = node.name.clone();
    if state.nodes.len() == 1 {
        return Err(Rejection::NotAllowed(format!("{name} is the only node; a cluster has at least one")));
    }
    let only_here = only_copies(state, id);
    if !only_here.is_empty() && !is_forced {
        return Err(Rejection::NotAllowed(format!(
            "{name} holds the only copy of {}; --force removes it all the same",
            only_here.join(", ")
        )));
    }
    state.nodes.update(&id, |node| {
        node.is_leaving = true;
        node.is_drained = true;
        node.version += 1;
    });
    state.note("node_leaving", name.clone(), format!("{name} leaves"));
    Ok(Reply::Done)
}

/// The end of a removal, once the node has no vote: a removed leader could not commit its own removal, and peers
/// refuse a key that is not in this table.
pub fn forget(state: &mut State, id: NodeId) -> Outcome {
    let node = state.existing_node(id)?;
    if !node.is_leaving {
        return Err(Rejection::Stale);
    }
    let name = node.name.clone();
    forget_node(state, id);
    state.note("node_removed", name.clone(), format!("{name} removed"));
    Ok(Reply::Done)
}

/// What exists on this node alone: volumes, and images that no registry gives again.
pub fn only_copies(state: &State, id: NodeId) -> Vec<String> {
    let volumes = state
        .volumes
        .rows()
        .filter(|volume| volume.node == Some(id) && !volume.is_removed)
        .map(|volume| format!("volume {}/{}", volume.app, volume.name));
    let images = state
        .artifacts
        .rows()
        .filter(|artifact| {
            let is_whole_elsewhere = artifact.holders.iter().any(|holder| *holder != id);
            let is_here = artifact.sources().any(|source| source == id);
            artifact.kind != ArtifactKind::RegistryImage && is_here && !is_whole_elsewhere
        })
        .map(|artifact| match artifact.names.first() {
            Some(name) => format!("image {name}"),
            None => format!("content {}", artifact.digest.short()),
        });
    volumes.chain(images).collect()
}

fn forget_node(state: &mut State, id: NodeId) {
    let instances: Vec<InstanceId> = state.instances_on(id).map(|instance| instance.id).collect();
    for instance in instances {
        state.instances.remove(&instance);
    }
    let volumes: Vec<_> = state
        .volumes
        .iter()
        .filter(|(_, volume)| volume.node == Some(id))
        .map(|(key, _)| key.clone())
        .collect();
    for key in volumes {
        state.volumes.update(&key, |volume| volume.node = None);
    }
    let artifacts: Vec<Digest> = state.artifacts.iter().map(|(digest, _)| digest.clone()).collect();
    for digest in artifacts {
        state.artifacts.update(&digest, |artifact| {
            artifact.forget_holder(id);
        });
    }
    if let Some(node) = state.nodes.remove(&id) {
        let now = state.time();
        state.removed_keys.put(node.public_key, now);
    }
    while state.removed_keys.len() > REMOVED_KEYS_MAX {
        let oldest = state.removed_keys.iter().min_by_key(|(_, at)| **at).map(|(key, _)| *key);
        oldest.map(|key| state.removed_keys.remove(&key));
    }
    super::deploy::sweep_removed(state);
}

pub struct Start {
    pub node: NodeId,
    pub start_id: StartId,
    pub architecture: Architecture,
    pub size: NodeSize,
}

pub fn started(state: &mut State, start: Start, software: &str) -> Outcome {
    let before = state.existing_node(start.node)?;
    let (name, was_down) = (before.name.clone(), before.condition == Condition::Down);
    let is_new_start = before.start_id != Some(start.start_id);
    state.nodes.update(&start.node, |node| {
        node.start_id = Some(start.start_id);
        node.architecture = start.architecture;
        node.size = start.size;
        node.software = software.into();
        node.condition = Condition::Up;
        node.stopped_at = None;
        node.is_ending = false;
        node.version += 1;
    });
    if was_down || is_new_start {
        state.note("node_up", name.clone(), format!("{name} is up"));
    }
    Ok(Reply::Done)
}

pub fn stopping(state: &mut State, id: NodeId, start_id: StartId) -> Outcome {
    let node = state.existing_node(id)?;
    if node.start_id != Some(start_id) {
        return Err(Rejection::Stale);
    }
    let (name, now) = (node.name.clone(), state.time());
    state.nodes.update(&id, |node| {
        node.stopped_at = Some(now);
        node.version += 1;
    });
    state.note("node_stopping", name.clone(), format!("{name} stops; nothing moves for 60 s"));
    Ok(Reply::Done)
}

/// New connections go elsewhere from now on; those that are open end with their containers.
pub fn ending(state: &mut State, id: NodeId, start_id: StartId) -> Outcome {
    let node = state.existing_node(id)?;
    if node.start_id != Some(start_id) || node.is_ending {
        return Err(Rejection::Stale);
    }
    let name = node.name.clone();
    state.nodes.update(&id, |node| {
        node.is_ending = true;
        node.version += 1;
    });
    state.note("node_ending", name.clone(), format!("{name} ends; its containers are stopped"));
    Ok(Reply::Done)
}

/// Only for the run of the daemon that was found silent: a later start makes it void.
pub fn mark_down(state: &mut State, id: NodeId, start_id: Option<StartId>) -> Outcome {
    let node = state.existing_node(id)?;
    if node.start_id != start_id || node.condition == Condition::Down {
        return Err(Rejection::Stale);
    }
    let (name, now) = (node.name.clone(), state.time());
    state.nodes.update(&id, |node| {
        node.condition = Condition::Down;
        node.losses.push(now);
        let excess = node.losses.len().saturating_sub(3);
        node.losses.drain(..excess);
        node.version += 1;
    });
    let pinned: Vec<InstanceId> = state
        .instances_on(id)
        .filter(|instance| {
            state.services.find(&instance.service).is_some_and(|service| state.data_node(service) == Some(id))
        })
        .map(|instance| instance.id)
        .collect();
    for instance in pinned {
        state.instances.update(&instance, |instance| {
            instance.observed.phase = Phase::Lost;
            instance.observed.since = now;
            instance.version += 1;
        });
    }
    state.note("node_down", name.clone(), format!("{name} is down"));
    Ok(Reply::Done)
}

pub fn mark_up(state: &mut State, id: NodeId, start_id: StartId) -> Outcome {
    let node = state.existing_node(id)?;
    if node.start_id != Some(start_id) || node.condition == Condition::Up {
        return Err(Rejection::Stale);
    }
    let name = node.name.clone();
    state.nodes.update(&id, |node| {
        node.condition = Condition::Up;
        node.stopped_at = None;
        node.version += 1;
    });
    state.note("node_up", name.clone(), format!("{name} is back"));
    Ok(Reply::Done)
}

pub fn note_troubles(state: &mut State, id: NodeId, troubles: Troubles) -> Outcome {
    let node = state.existing_node(id)?;
    let (name, old) = (node.name.clone(), node.troubles);
    if old == troubles {
        return Err(Rejection::Stale);
    }
    state.nodes.update(&id, |node| node.troubles = troubles);
    for trouble in troubles.iter().filter(|trouble| !old.has(*trouble)) {
        state.note("node_troubled", name.clone(), format!("{name}: {}", trouble.text()));
    }
    for trouble in old.iter().filter(|trouble| !troubles.has(*trouble)) {
        state.note("node_recovered", name.clone(), format!("{name}: {} is over", trouble.name()));
    }
    Ok(Reply::Done)
}

/// What a node's configuration names now: only by the run of its daemon that announced itself last.
pub fn note_disks(state: &mut State, id: NodeId, start_id: StartId, disks: &[NodeDisk]) -> Outcome {
    let node = state.existing_node(id)?;
    let is_known = node.disks == disks && node.disks_told_by == Some(start_id);
    if node.start_id != Some(start_id) || is_known {
        return Err(Rejection::Stale);
    }
    if let Some((_, why)) = NodeDisk::conflict(disks) {
        return Err(Rejection::Invalid(why));
    }
    state.nodes.update(&id, |node| {
        if node.disks != disks {
            node.disks = disks.to_vec();
            node.absent_disks = DiskSet::default();
        }
        node.disks_told_by = Some(start_id);
        node.version += 1;
    });
    Ok(Reply::Done)
}

/// Only by the run of the daemon that told the list.
pub fn note_absent_disks(state: &mut State, id: NodeId, start_id: StartId, absent: DiskSet) -> Outcome {
    let node = state.existing_node(id)?;
    let absent = absent.within(node.disks.len());
    if node.disks_told_by != Some(start_id) || node.absent_disks == absent {
        return Err(Rejection::Stale);
    }
    let (name, disks, before, now) = (node.name.clone(), node.disks.clone(), node.absent_disks, state.time());
    state.nodes.update(&id, |node| {
        node.absent_disks = absent;
        node.disk_changes.retain(|at| now.since_ms(*at) < DISK_CHANGES_WITHIN_MS);
        node.disk_changes.push(now);
        let excess = node.disk_changes.len().saturating_sub(DISK_CHANGES_MAX);
        node.disk_changes.drain(..excess);
        node.version += 1;
    });
    for (index, disk) in disks.iter().enumerate() {
        match (before.has(index), absent.has(index)) {
            (false, true) => {
                let text = format!("{name}: disk {disk} is absent: plug it in; what binds it waits");
                state.note("disk_absent", name.clone(), text);
            }
            (true, false) => state.note("disk_back", name.clone(), format!("{name}: disk {disk} is back")),
            _ => {}
        }
    }
    Ok(Reply::Done)
}

pub fn confirm_key(state: &mut State, id: NodeId, has_key: bool) -> Outcome {
    state.existing_node(id)?;
    state.nodes.update(&id, |node| node.has_cluster_key = has_key);
    Ok(Reply::Done)
}

pub fn drain(state: &mut State, id: NodeId, is_drained: bool) -> Outcome {
    let name = state.existing_node(id)?.name.clone();
    state.nodes.update(&id, |node| {
        if node.is_drained != is_drained {
            node.is_drained = is_drained;
            node.version += 1;
        }
    });
    let text = if is_drained { "drained: its instances move" } else { "takes instances again" };
    state.note("node_drained", name.clone(), format!("{name} {text}"));
    Ok(Reply::Done)
}

pub fn label(state: &mut State, id: NodeId, set: &BTreeMap<String, String>, remove: &[String]) -> Outcome {
    state.existing_node(id)?;
    let is_key =
        |key: &String| (1..=128).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
    if let Some(key) = set.keys().find(|key| !is_key(key)) {
        return Err(Rejection::Invalid(format!(
            "{key:?} is not a label: use 1 to 128 visible ASCII characters"
        )));
    }
    if let Some((key, _)) = set.iter().find(|(_, value)| value.len() > 256) {
        return Err(Rejection::Invalid(format!("the value of label {key} is over 256 bytes")));
    }
    let mut labels = state.existing_node(id)?.labels.clone();
    labels.extend(set.clone());
    labels.retain(|key, _| !remove.contains(key));
    if labels.len() > LABELS_MAX {
        return Err(Rejection::Invalid(format!("a node has at most {LABELS_MAX} labels")));
    }
    state.nodes.update(&id, |node| {
        if node.labels != labels {
            node.labels = labels;
            node.version += 1;
        }
    });
    Ok(Reply::Done)
}

/// A valid token: known by id and secret, not expired, and not used up by another key.
fn check_token(
    state: &State,
    token: TokenId,
    secret_hash: &[u8; 32],
    key: Option<PublicKey>,
) -> Result<Token, Rejection> {
    let token = state.tokens.find(&token).filter(|token| &token.secret_hash == secret_hash);
    let token = token.ok_or(Rejection::TokenUnknown)?;
    if token.used_by.is_some() && token.used_by != key {
        return Err(Rejection::TokenReplayed);
    }
    if state.time() > token.expires_at {
        return Err(Rejection::TokenExpired { at: token.expires_at });
    }
    Ok(token.clone())
}

pub fn create_token(
    state: &mut State,
    secret_hash: [u8; 32],
    kind: &TokenKind,
    expires_at: Timestamp,
) -> Outcome {
    let now = state.time();
    let expired: Vec<TokenId> = state
        .tokens
        .iter()
        .filter(|(_, token)| now.since_ms(token.expires_at) > 7 * 86_400_000)
        .map(|(id, _)| *id)
        .collect();
    for id in expired {
        state.tokens.remove(&id);
    }
    if state.tokens.len() >= TOKENS_MAX {
        return Err(Rejection::NotAllowed(format!(
            "there are {TOKENS_MAX} tokens; remove some: tinydc token rm"
        )));
    }
    if let TokenKind::User { name, .. } = kind
        && !is_label(name)
    {
        return Err(Rejection::Invalid(format!("{name:?} is not a user's name: use a–z, 0–9 and '-'")));
    }
    let id = TokenId(state.count(|counters| {
        counters.token += 1;
        counters.token
    }));
    let token = Token { id, secret_hash, kind: kind.clone(), expires_at, created_at: now, used_by: None };
    state.tokens.put(id, token);
    Ok(Reply::TokenCreated { token: id })
}

pub fn remove_token(state: &mut State, token: TokenId) -> Outcome {
    state.tokens.remove(&token).ok_or_else(|| not_found("token", token))?;
    Ok(Reply::Done)
}

/// Gives a user's key its place; a user token serves one key.
pub fn enrol(
    state: &mut State,
    token: TokenId,
    secret_hash: &[u8; 32],
    public_key: PublicKey,
    expires_at: Timestamp,
) -> Outcome {
    let TokenKind::User { name, role } = check_token(state, token, secret_hash, Some(public_key))?.kind
    else {
        return Err(Rejection::TokenKind {
            expected: "a node; make one for a user: tinydc token --user NAME".into(),
        });
    };
    let now = state.time();
    if !state.users.contains(&name) && state.users.len() >= USERS_MAX {
        return Err(Rejection::NotAllowed(format!("there are {USERS_MAX} users already")));
    }
    let new = User { name: name.clone(), role, keys: BTreeMap::new(), created_at: now };
    let mut user = state.users.find(&name).cloned().unwrap_or(new);
    user.role = role;
    user.keys.retain(|_, end| *end > now);
    user.keys.insert(public_key, expires_at);
    if user.keys.len() > KEYS_PER_USER_MAX {
        return Err(Rejection::NotAllowed(format!("{name} has {KEYS_PER_USER_MAX} contexts already")));
    }
    state.users.put(name.clone(), user);
    state.tokens.update(&token, |token| token.used_by = Some(public_key));
    state.note("user_enrolled", name.clone(), format!("{name} made a context as {}", role.name()));
    Ok(Reply::Enrolled { name, role })
}

pub fn remove_user(state: &mut State, name: &str) -> Outcome {
    state.users.remove(&name.to_string()).ok_or_else(|| not_found("user", name))?;
    let of_user = |token: &Token| matches!(&token.kind, TokenKind::User { name: of, .. } if of == name);
    let tokens: Vec<TokenId> =
        state.tokens.iter().filter(|(_, token)| of_user(token)).map(|(id, _)| *id).collect();
    for token in tokens {
        state.tokens.remove(&token);
    }
    state.note("user_removed", name.into(), format!("{name} can no longer reach the cluster"));
    Ok(Reply::Done)
}

impl State {
    /// The role of an operator's key at a cluster time; `None` if unknown, removed or past its end.
    pub fn role_of(&self, key: &PublicKey, now: Timestamp) -> Option<(&str, Role)> {
        self.users
            .rows()
            .find(|user| user.keys.get(key).is_some_and(|end| *end > now))
            .map(|user| (user.name.as_str(), user.role))
    }
}

//! Secrets: sealed bytes by name, and who needs which.
//!
//! Never opened here: who holds the cluster key seals before a command and opens after it, in memory.
//!
//! Invariant: a secret that a service uses is there (`a_secret_in_use_is_kept_and_a_missing_one_refuses_the_deploy`).

use super::apply::not_found;
use super::command::{Outcome, Rejection, Reply};
use super::rows::Secret;
use super::{Service, State};
use crate::compose::ingress_labels::{TlsSource, read_ingress_labels};
use crate::model::limits::SECRET_BYTES_MAX;
use crate::model::*;
use std::collections::BTreeSet;

/// The format's version, its nonce and its tag.
const SEAL_BYTES_MAX: usize = 64;

pub fn put(
    state: &mut State,
    name: &SecretName,
    sealed: &[u8],
    fingerprint: [u8; 32],
    bytes: u32,
) -> Outcome {
    if bytes as usize > SECRET_BYTES_MAX || sealed.len() > SECRET_BYTES_MAX + SEAL_BYTES_MAX {
        return Err(Rejection::Invalid(format!(
            "secret {name} takes {bytes} bytes; at most {SECRET_BYTES_MAX}"
        )));
    }
    let now = state.time();
    let before = state.secrets.find(name);
    // Sealing gives other bytes each time: only a change of what is sealed is one.
    if before.is_some_and(|before| before.fingerprint == fingerprint) {
        return Ok(Reply::Done);
    }
    let row = Secret {
        name: name.clone(),
        sealed: sealed.to_vec(),
        fingerprint,
        bytes,
        version: before.map_or(1, |before| before.version + 1),
        created_at: before.map_or(now, |before| before.created_at),
        changed_at: now,
    };
    let what = if before.is_some() { "changed" } else { "added" };
    state.secrets.put(name.clone(), row);
    state.note("secret", name.to_string(), format!("secret {name} {what}"));
    Ok(Reply::Done)
}

pub fn remove(state: &mut State, name: &SecretName) -> Outcome {
    let users = state.secret_users(name);
    if !users.is_empty() {
        return Err(Rejection::NotAllowed(format!(
            "secret {name} is used by {}; take it out there first",
            users.join(", ")
        )));
    }
    state.secrets.remove(name).ok_or_else(|| not_found("secret", name))?;
    state.note("secret", name.to_string(), format!("secret {name} removed"));
    Ok(Reply::Done)
}

/// Each use gets the version that is there now; one without a secret refuses the deploy.
pub fn note_versions(state: &State, spec: &mut AppSpec) -> Result<(), Rejection> {
    let app = spec.name.clone();
    for (service, spec) in &mut spec.services {
        for used in &mut spec.secrets {
            let row = state.secrets.find(&used.secret).ok_or_else(|| {
                Rejection::Invalid(format!(
                    "service {service} uses the secret {0}, which does not exist; \
                     set it: tinydc secret set {0} FILE",
                    used.secret
                ))
            })?;
            used.version = row.version;
        }
        for name in certificate_names(spec) {
            if !state.secrets.contains(&state.certificate_secret(&app, &name)) {
                return Err(Rejection::Invalid(format!(
                    "service {service} takes its certificate from the secret {name}, which does not exist; \
                     set it: tinydc secret set {name} FILE (chain and key as PEM)"
                )));
            }
        }
    }
    Ok(())
}

/// Secrets of the app that its file no longer names and nothing uses.
pub fn forget_unnamed(state: &mut State, spec: &AppSpec) {
    let is_old = |name: &&SecretName| {
        name.app() == Some(spec.name.as_str())
            && !spec.secrets.contains(name)
            && !state.services.rows().any(|service| uses(service, name))
            && !state.serves_with(name)
    };
    let old: Vec<SecretName> = state.secrets.iter().map(|(name, _)| name).filter(is_old).cloned().collect();
    for name in old {
        state.secrets.remove(&name);
    }
}

pub fn forget_of_app(state: &mut State, app: &AppName) {
    let is_own = |name: &&SecretName| name.app() == Some(app.as_str());
    let own: Vec<SecretName> = state.secrets.iter().map(|(name, _)| name).filter(is_own).cloned().collect();
    for name in own {
        state.secrets.remove(&name);
    }
}

fn mounts(spec: &ServiceSpec, name: &SecretName) -> bool {
    spec.secrets.iter().any(|used| used.secret == *name)
}

/// Secrets that labels name for certificates.
fn certificate_names(spec: &ServiceSpec) -> impl Iterator<Item = String> {
    read_ingress_labels(&spec.labels).routes.into_iter().filter_map(|route| match route.tls {
        Some(TlsSource::Secret(name)) => Some(name),
        _ => None,
    })
}

/// In any version of it that may still run.
fn uses(service: &Service, name: &SecretName) -> bool {
    mounts(&service.spec, name) || service.older_specs().any(|older| mounts(&older.spec, name))
}

impl State {
    /// For a copy of the state that is only to tell what a deploy would do: an empty secret where there is none.
    pub fn expect_secret(&mut self, name: &SecretName) {
        if !self.secrets.contains(name) {
            let now = self.time();
            let row = Secret {
                name: name.clone(),
                sealed: Vec::new(),
                fingerprint: [0; 32],
                bytes: 0,
                version: 0,
                created_at: now,
                changed_at: now,
            };
            self.secrets.put(name.clone(), row);
        }
    }

    /// `APP/SERVICE` of all that would lack the secret.
    pub fn secret_users(&self, name: &SecretName) -> Vec<String> {
        let users: BTreeSet<String> = self
            .services
            .rows()
            .filter(|service| !service.is_removed)
            .filter(|service| uses(service, name) || self.shows(service, name))
            .map(|service| format!("{}/{}", service.app, service.name))
            .chain((self.cluster_settings().acme_ca == name.as_str()).then(|| "the setting acme_ca".into()))
            .gather();
        users.into_iter().collect()
    }

    /// The secret that a service's label means: the app's own of that name, else the cluster's.
    pub fn certificate_secret(&self, app: &AppName, name: &str) -> SecretName {
        let own = SecretName::of_app(app, name).ok().filter(|own| self.secrets.contains(own));
        own.or_else(|| SecretName::new(name).ok()).expect("labels hold names that were checked")
    }

    fn shows(&self, service: &Service, name: &SecretName) -> bool {
        certificate_names(&service.spec).any(|label| self.certificate_secret(&service.app, &label) == *name)
    }

    /// Whether the ingress of every node shows a certificate from this secret.
    pub fn serves_with(&self, name: &SecretName) -> bool {
        self.services.rows().any(|service| !service.is_removed && self.shows(service, name))
    }

    /// The hosts for which it holds the certificate.
    pub fn hosts_served_with(&self, name: &SecretName) -> Vec<String> {
        let services = self.services.rows().filter(|service| !service.is_removed);
        let routes = services.flat_map(|service| {
            let routes = read_ingress_labels(&service.spec.labels).routes.into_iter();
            routes.map(|route| (&service.app, route))
        });
        routes
            .filter_map(|(app, route)| match route.tls {
                Some(TlsSource::Secret(label)) if self.certificate_secret(app, &label) == *name => route.host,
                _ => None,
            })
            .collect()
    }

    /// Whether a node has a use for what is sealed there: an instance that is assigned to it has the secret.
    pub fn needs_secret(&self, node: NodeId, name: &SecretName) -> bool {
        self.instances_on(node).any(|instance| {
            let service = self.services.find(&instance.service);
            service.is_some_and(|service| mounts(service.spec_of(instance.spec_version), name))
        })
    }
}

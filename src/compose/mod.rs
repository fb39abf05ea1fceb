//! Text of a Compose file to the services it asks for, and to all its problems, each with its line.
//!
//! Input: one file's text and what surrounds it, as values and look-ups. Output: a `Draft` if the file can be
//! deployed, and problems either way, all at once and sorted by line. Never reads a file, a clock or the network.
//!
//! Way of a file: `tree` (YAML with positions) → `interpolate` (variables) → `keys` (what each key means here) →
//! `service` and its parts → `draft` (relative files as wishes, packed by the caller with `archive`).
//!
//! Invariant: a file without an error gives a draft, a file with one gives none, and no key is passed over in silence
//! (`every_key_is_read_named_or_refused`).

pub mod archive;
mod depends;
mod deploy;
mod dotenv;
mod draft;
mod environment;
mod health;
pub mod ingress_labels;
mod interpolate;
mod keys;
mod mounts;
mod networks;
mod ports;
mod problem;
mod quantity;
mod secrets;
mod service;
#[cfg(test)]
mod tests;
mod tree;
mod values;
mod words;

pub use dotenv::{DotenvError, parse_dotenv};
pub use draft::{ContentKind, ContentWish, Draft, FinishError, SecretSource, SecretText, SecretWish};
pub use problem::{Problem, Severity};
pub use tree::FILE_BYTES_MAX;

use crate::model::limits::{ENTRY_BYTES_MAX, INSTANCES_MAX, SERVICES_PER_APP_MAX};
use crate::model::{AppName, AppSpec, Gather};
use keys::supported;
use mounts::{Mounts, read_declared};
use networks::Networks;
use problem::{Position, Problems, Spot, shortened};
use secrets::{Kind, Secrets};
use service::{Shared, read_service};
use std::collections::{BTreeMap, BTreeSet};

/// A Compose file.
pub struct Source<'a> {
    /// As problems name it.
    pub file: &'a str,
    pub text: &'a str,
}

/// What lies around a Compose file. All paths are as the file writes them: relative to its directory.
pub struct Surroundings<'a> {
    /// Variables: those of `.env` beside the file, and over them those of the process.
    pub environment: &'a BTreeMap<String, String>,
    /// Text of a file named by `env_file`, or why it can't be read.
    pub env_files: &'a dyn Fn(&str) -> Result<String, String>,
    /// What lies at the source of a relative bind, links followed.
    pub look: &'a dyn Fn(&str) -> PathKind,
    /// `--name`.
    pub name: Option<&'a str>,
    /// Last name of the directory of the file.
    pub directory_name: &'a str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathKind {
    Missing,
    File,
    Directory,
    /// With what it is, as in "a socket".
    Other(String),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// `None` exactly if a problem is an error.
    pub app: Option<Draft>,
    /// Sorted by line.
    pub problems: Vec<Problem>,
}

/// The file's text, or the place where it is not UTF-8.
pub fn read_text<'b>(file: &str, bytes: &'b [u8]) -> Result<&'b str, Problem> {
    std::str::from_utf8(bytes).map_err(|error| {
        let valid = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let line = valid.matches('\n').count() + 1;
        let column = valid.rsplit('\n').next().map_or(0, |last| last.chars().count()) + 1;
        let byte = bytes.get(error.valid_up_to()).copied().unwrap_or(0);
        Problem {
            severity: Severity::Error,
            file: file.to_owned(),
            line,
            column,
            message: format!("the byte 0x{byte:02x} is not UTF-8"),
            hint: Some("save the file as UTF-8".into()),
        }
    })
}

/// Reads a Compose file.
pub fn read(source: &Source<'_>, surroundings: &Surroundings<'_>) -> Outcome {
    let mut problems = Problems::new(source.file);
    let draft = read_file(source.text, surroundings, &mut problems);
    let app = if problems.has_errors() { None } else { draft };
    Outcome { app, problems: problems.into_sorted() }
}

fn read_file(text: &str, surroundings: &Surroundings<'_>, problems: &mut Problems) -> Option<Draft> {
    let written = tree::read_tree(text, problems)?;
    let root = interpolate::interpolate_tree(&written, surroundings.environment, problems);
    let root_spot = Spot::root(&root);
    if !matches!(root.value, tree::Value::Mapping(_)) {
        let message = format_args!("the file is {}, not a mapping", root.kind());
        problems.error_with(&root_spot, message, "a Compose file begins with `services:`");
        return None;
    }
    let is_old = root.entry("services").is_none()
        && root.entries().iter().any(|entry| entry.value.entry("image").is_some());
    if is_old {
        let hint = "indent the services below a line `services:`";
        problems.error_with(&root_spot, "there is no `services:`, as in the first Compose files", hint);
        return None;
    }
    let entries: BTreeMap<&str, Spot<'_>> = supported(&root_spot, keys::FILE, problems).into_iter().gather();
    let name = app_name(entries.get("name"), surroundings, problems);
    let declared = entries.get("volumes").map(|spot| {
        read_mapping(spot, problems);
        read_declared(spot, problems)
    });
    let mut networks = Networks::default();
    if let Some(spot) = entries.get("networks") {
        networks.read_declared(spot, problems);
    }
    let mut secrets = Secrets::default();
    for (key, kind) in [("secrets", Kind::Secret), ("configs", Kind::Config)] {
        if let Some(spot) = entries.get(key) {
            read_mapping(spot, problems);
            secrets.read_declared(kind, spot, surroundings.environment, problems);
        }
    }
    let Some(services_spot) = entries.get("services") else {
        problems.error_with(&root_spot, "there is no `services:`", "add the services to run");
        return None;
    };
    let mut shared = Shared {
        surroundings,
        mounts: Mounts::new(declared.unwrap_or_default()),
        published: ports::Published::default(),
        secrets,
    };
    let services = read_services(services_spot, &mut networks, &mut shared, problems);
    let draft = finish(name?, services, networks, (shared, services_spot), problems);
    check_size(&draft.app, services_spot, problems);
    Some(draft)
}

fn read_mapping(spot: &Spot<'_>, problems: &mut Problems) {
    if !spot.node.is_null() && spot.node.entries().is_empty() && !keys::is_neutral(spot.node) {
        problems.error_with(
            spot,
            format_args!("is {}, not a mapping", spot.node.kind()),
            "write `name:` lines",
        );
    }
}

fn read_services<'n>(
    spot: &Spot<'n>,
    networks: &mut Networks,
    shared: &mut Shared<'n, '_>,
    problems: &mut Problems,
) -> BTreeMap<String, crate::model::ServiceSpec> {
    read_mapping(spot, problems);
    let mut services = BTreeMap::new();
    let mut spots = BTreeMap::new();
    let mut left_out = BTreeSet::new();
    let count = spot.entries().filter(|(name, _)| !name.starts_with("x-")).count();
    if count > SERVICES_PER_APP_MAX {
        problems
            .error(spot, format_args!("has {count} services, at most {SERVICES_PER_APP_MAX} make an app"));
        return services;
    }
    if count == 0 {
        problems.error_with(spot, "has no service", "add one");
    }
    for (name, entry) in spot.entries().filter(|(name, _)| !name.starts_with("x-")) {
        if !is_service_name(name) {
            let message = format_args!("{:?} can't name a service", shortened(name));
            problems.error_with(&entry, message, "use letters, digits, `-`, `_` and `.`, at most 63");
        }
        networks.read_service(name, &entry, problems);
        if !is_profile_active(&entry, shared.surroundings, problems) {
            left_out.insert(name.to_owned());
            continue;
        }
        services.insert(name.to_owned(), read_service(name, &entry, shared, problems));
        spots.insert(name.to_owned(), entry);
    }
    depends::check_depends(&mut services, &spots, &left_out, problems);
    services
}

/// A service with profiles runs only if `COMPOSE_PROFILES` names one of them.
fn is_profile_active(service: &Spot<'_>, surroundings: &Surroundings<'_>, problems: &mut Problems) -> bool {
    let Some((_, spot)) = service.entries().find(|(key, _)| *key == "profiles") else { return true };
    let profiles = values::texts(&spot, problems).unwrap_or_default();
    let active = surroundings.environment.get("COMPOSE_PROFILES").map_or("", String::as_str);
    let is_active = |profile: &String| active.split(',').any(|name| name == "*" || name.trim() == profile);
    if profiles.is_empty() || profiles.iter().any(is_active) {
        return true;
    }
    let message = "this service is not deployed: none of its profiles is active";
    problems.warning_with(&spot, message, format!("set COMPOSE_PROFILES={}", shortened(&profiles[0])));
    false
}

fn is_service_name(name: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=63).contains(&name.len()) && name.bytes().all(is_inner) && !name.starts_with(['-', '.'])
}

fn finish(
    name: AppName,
    mut services: BTreeMap<String, crate::model::ServiceSpec>,
    networks: Networks,
    (mut shared, spot): (Shared<'_, '_>, &Spot<'_>),
    problems: &mut Problems,
) -> Draft {
    networks.finish(&name, &mut services);
    let (mounts, content) = shared.mounts.content(shared.surroundings.look, problems);
    for (service, mounts) in mounts {
        if let Some(service) = services.get_mut(&service) {
            service.mounts.extend(mounts);
        }
    }
    let wishes = shared.secrets.finish(&name, &mut services, spot, problems);
    let secrets = wishes.iter().map(|wish| wish.name.clone()).gather();
    Draft {
        app: AppSpec { name, services, volumes: shared.mounts.volumes, secrets },
        content,
        secrets: wishes,
    }
}

/// Whether the app fits into one entry of the log, and into the cluster.
fn check_size(app: &AppSpec, services: &Spot<'_>, problems: &mut Problems) {
    // Digests come in later, at most one per mount and service.
    const MARGIN_BYTES: usize = 64 << 10;
    let bytes = postcard::to_allocvec(app).map_or(usize::MAX, |encoded| encoded.len());
    if bytes > ENTRY_BYTES_MAX - MARGIN_BYTES {
        let message = format_args!(
            "together the services are larger than {} KiB",
            (ENTRY_BYTES_MAX - MARGIN_BYTES) >> 10
        );
        problems.error_with(services, message, "move long texts into files and mount them");
    }
    let instances: usize = app.services.values().map(|service| service.replicas as usize).sum();
    if instances > INSTANCES_MAX {
        let message =
            format_args!("together the services have {instances} instances, at most {INSTANCES_MAX} can run");
        problems.error(services, message);
    }
}

/// `--name`, else `name:`, else the directory's name made fit.
fn app_name(
    written: Option<&Spot<'_>>,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems,
) -> Option<AppName> {
    if let Some(name) = surroundings.name {
        return AppName::new(name)
            .map_err(|error| {
                problems.add(Severity::Error, Position::default(), format!("--name: {error}"), None);
            })
            .ok();
    }
    if let Some(spot) = written {
        let text = values::word(spot, problems)?;
        return match AppName::new(text) {
            Ok(name) => Some(name),
            Err(error) => {
                let hint = match fit_name(text) {
                    Some(fit) => format!("write `name: {fit}`"),
                    None => "choose another, or give --name".to_owned(),
                };
                problems.error_with(spot, error, hint);
                None
            }
        };
    }
    let fit = fit_name(surroundings.directory_name);
    if fit.is_none() {
        let message =
            format!("the directory {:?} can't name the app", shortened(surroundings.directory_name));
        let hint = "add `name:` to the file, or give --name".to_owned();
        problems.add(Severity::Error, Position::default(), message, Some(hint));
    }
    fit
}

/// The text as a DNS label: lower case, everything else a `-`, at most 40 bytes.
fn fit_name(text: &str) -> Option<AppName> {
    let plain: String = text
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' })
        .take(40)
        .collect();
    AppName::new(plain.trim_matches('-')).ok()
}

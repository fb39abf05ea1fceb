//! `secrets:` and `configs:`, of the file and of services.
//!
//! Input: the top-level mappings, then one service's items after another. Output: uses by services, and what the caller
//! sends along before the app: each belongs to the app. Configs travel and lie in the container as secrets do, so that
//! owner and mode hold for both; their names begin with `config.`.

use super::draft::{SecretSource, SecretText, SecretWish};
use super::ingress_labels::{TlsSource, read_ingress_labels};
use super::keys::{self, Table, supported};
use super::mounts::clean_target;
use super::problem::{Problems, Spot, shortened};
use super::values;
use crate::model::{AppName, Order, SecretName, SecretUse, ServiceSpec};
use std::collections::BTreeMap;

/// Readable for everyone in the container, as in Docker.
const MODE: u32 = 0o444;
const CONFIG_PREFIX: &str = "config.";
const NAME_HINT: &str = "use letters, digits, `-`, `_` and `.`, at most 63";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Secret,
    Config,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Secret => "secret",
            Kind::Config => "config",
        }
    }

    fn table(self) -> Table {
        match self {
            Kind::Secret => keys::SECRET,
            Kind::Config => keys::CONFIG,
        }
    }

    fn stored(self, name: &str) -> String {
        match self {
            Kind::Secret => name.to_owned(),
            Kind::Config => format!("{CONFIG_PREFIX}{name}"),
        }
    }

    fn target(self, name: &str) -> String {
        match self {
            Kind::Secret => format!("/run/secrets/{name}"),
            Kind::Config => format!("/{name}"),
        }
    }
}

enum Declared {
    Own(SecretSource),
    /// The cluster's, under this name.
    External(String),
}

/// One item of a service.
struct Use {
    service: String,
    kind: Kind,
    name: String,
    target: String,
    uid: u32,
    gid: u32,
    mode: u32,
}

#[derive(Default)]
pub struct Secrets {
    declared: BTreeMap<(Kind, String), Declared>,
    uses: Vec<Use>,
}

impl Secrets {
    pub fn read_declared(
        &mut self,
        kind: Kind,
        spot: &Spot<'_>,
        environment: &BTreeMap<String, String>,
        problems: &mut Problems,
    ) {
        for (name, entry) in spot.entries().filter(|(name, _)| !name.starts_with("x-")) {
            if SecretName::new(&kind.stored(name)).is_err() || name.contains('/') {
                let message = format_args!("{:?} can't name a {}", shortened(name), kind.word());
                problems.error_with(&entry, message, NAME_HINT);
            }
            if kind == Kind::Secret && name.starts_with(CONFIG_PREFIX) {
                let message = format_args!("names beginning with {CONFIG_PREFIX} are those of configs");
                problems.error_with(&entry, message, "rename it");
            }
            if let Some(declared) = read_declaration(kind, name, &entry, environment, problems) {
                self.declared.insert((kind, name.to_owned()), declared);
            }
        }
    }

    pub fn read_service(&mut self, kind: Kind, service: &str, spot: &Spot<'_>, problems: &mut Problems) {
        if !values::is_list(spot, problems) {
            return;
        }
        for item in spot.items() {
            let read = match item.node.entries().is_empty() {
                true => values::word(&item, problems).map(|name| (name.to_owned(), None, 0, 0, MODE)),
                false => read_long(&item, problems),
            };
            let Some((name, target, uid, gid, mode)) = read else { continue };
            if !self.declared.contains_key(&(kind, name.clone())) {
                let message = format_args!("the {} {:?} is not declared", kind.word(), shortened(&name));
                let hint = format!("add `{}:` under the top-level `{}s:`", shortened(&name), kind.word());
                problems.error_with(&item, message, hint);
                continue;
            }
            let target = match target {
                Some(target) if target.starts_with('/') => target,
                Some(target) => kind.target(&target),
                None => kind.target(&name),
            };
            let Some(target) = clean_target(&target) else {
                let message = format_args!("{:?} is not a path in the container", shortened(&target));
                problems.error_with(&item, message, "write a file's name, or an absolute path");
                continue;
            };
            let service = service.to_owned();
            self.uses.push(Use { service, kind, name, target, uid, gid, mode });
        }
    }

    /// Gives each service its secrets; returns what goes along with the app.
    pub fn finish(
        self,
        app: &AppName,
        services: &mut BTreeMap<String, ServiceSpec>,
        spot: &Spot<'_>,
        problems: &mut Problems,
    ) -> Vec<SecretWish> {
        let mut wishes = BTreeMap::new();
        for Use { service, kind, name, target, uid, gid, mode } in self.uses {
            let Some(declared) = self.declared.get(&(kind, name.clone())) else { continue };
            let secret = match declared {
                Declared::Own(_) => SecretName::of_app(app, &kind.stored(&name)),
                Declared::External(name) => SecretName::new(name),
            };
            // A name that can't be one has been named.
            let (Ok(secret), Some(spec)) = (secret, services.get_mut(&service)) else { continue };
            if let Declared::Own(source) = declared {
                wishes.insert(secret.clone(), SecretWish { name: secret.clone(), source: source.clone() });
            }
            let is_taken = spec.mounts.iter().any(|mount| mount.target == target)
                || spec.secrets.iter().any(|used| used.target == target);
            if is_taken {
                let message = format_args!("services.{service}: {target} is mounted twice");
                problems.error_with(spot, message, "keep one of them");
            }
            spec.secrets.push(SecretUse { secret, target, uid, gid, mode, version: 0 });
        }
        // A certificate that only the ingress needs is brought, too.
        for spec in services.values() {
            for route in read_ingress_labels(&spec.labels).routes {
                let Some(TlsSource::Secret(name)) = route.tls else { continue };
                let declared = self.declared.get(&(Kind::Secret, name.clone()));
                if let (Some(Declared::Own(source)), Ok(secret)) = (declared, SecretName::of_app(app, &name))
                {
                    wishes.insert(secret.clone(), SecretWish { name: secret, source: source.clone() });
                }
            }
        }
        services.values_mut().for_each(|spec| spec.secrets.order_by(|a, b| a.target.cmp(&b.target)));
        wishes.into_values().collect()
    }
}

fn read_declaration(
    kind: Kind,
    name: &str,
    spot: &Spot<'_>,
    environment: &BTreeMap<String, String>,
    problems: &mut Problems,
) -> Option<Declared> {
    let (mut source, mut own_name, mut is_external) = (None, None, false);
    for (key, entry) in supported(spot, kind.table(), problems) {
        match key {
            "file" => source = Some(SecretSource::File(values::word(&entry, problems)?.to_owned())),
            "content" => {
                source = Some(SecretSource::Text(SecretText(values::text(&entry, problems)?.to_owned())))
            }
            "environment" => {
                let variable = values::word(&entry, problems)?;
                let Some(value) = environment.get(variable) else {
                    let message = format_args!("the variable {:?} is not set", shortened(variable));
                    problems.error_with(&entry, message, "set it where you deploy, or in .env");
                    return None;
                };
                source = Some(SecretSource::Text(SecretText(value.clone())));
            }
            "name" => own_name = Some((values::word(&entry, problems)?.to_owned(), entry)),
            _ => is_external = values::boolean(&entry, problems)?,
        }
    }
    if is_external {
        if source.is_some() {
            problems.error_with(spot, "is external and has a source", "keep one of them");
        }
        let name = own_name.map_or_else(|| name.to_owned(), |(name, _)| name);
        if SecretName::new(&name).is_err() {
            let message = format_args!("{:?} can't name a secret", shortened(&name));
            problems.error_with(spot, message, NAME_HINT);
        }
        return Some(Declared::External(name));
    }
    if let Some((_, entry)) = own_name {
        problems.ignored(&entry, "it is named by the key, and belongs to the app");
    }
    if source.is_none() {
        let hint = "write `file: ./FILE`, `environment: VARIABLE` or `external: true`";
        problems.error_with(spot, "has no source", hint);
    }
    source.map(Declared::Own)
}

type Item = (String, Option<String>, u32, u32, u32);

fn read_long(spot: &Spot<'_>, problems: &mut Problems) -> Option<Item> {
    let (mut source, mut target, mut uid, mut gid, mut mode) = (None, None, 0, 0, MODE);
    for (key, entry) in supported(spot, keys::SECRET_USE, problems) {
        let id = |problems: &mut Problems| values::number(&entry, 0..=u64::from(u32::MAX - 1), problems);
        match key {
            "source" => source = Some(values::word(&entry, problems)?.to_owned()),
            "target" => target = Some(values::word(&entry, problems)?.to_owned()),
            "uid" => uid = id(problems)? as u32,
            "gid" => gid = id(problems)? as u32,
            _ => mode = read_mode(&entry, problems)?,
        }
    }
    if source.is_none() {
        problems.error_with(spot, "has no `source`", "name the secret or config");
    }
    Some((source?, target, uid, gid, mode))
}

/// Octal, as everyone writes it: `0440`, `0o440` or `440`.
fn read_mode(spot: &Spot<'_>, problems: &mut Problems) -> Option<u32> {
    let text = values::word(spot, problems)?;
    let mode = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).ok();
    let mode = mode.filter(|mode| *mode <= 0o777);
    if mode.is_none() {
        problems.error_with(spot, format_args!("{:?} is not a mode", shortened(text)), "such as 0440");
    }
    mode
}

//! `networks:` of a file and of its services: who can reach whom, and by which names.
//!
//! Input: the mappings. Output: for each service the networks it is in, by their keys in the cluster. A network that
//! has a name of its own (`name:` or `external: true`) belongs to all apps that name it; any other belongs to its app.

use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::values;
use crate::model::{AppName, NetworkUse, ServiceSpec};
use std::collections::{BTreeMap, BTreeSet};

const DEFAULT: &str = "default";
/// Of one service.
const NETWORKS_MAX: usize = 32;
/// Of one service in one network.
const ALIASES_MAX: usize = 32;

/// One entry under the top-level `networks:`.
#[derive(Clone, Debug, Default)]
struct Declared {
    /// Its name in the cluster, if it has one of its own.
    shared_name: Option<String>,
    is_internal: bool,
}

/// What the file says of networks; finished when the app's name is known.
#[derive(Default)]
pub struct Networks {
    declared: BTreeMap<String, Declared>,
    /// Service, network as the file names it, aliases there.
    uses: Vec<(String, String, BTreeSet<String>)>,
    /// Another service's name for a service: target, alias.
    links: Vec<(String, String)>,
}

impl Networks {
    pub fn read_declared(&mut self, spot: &Spot<'_>, problems: &mut Problems) {
        super::read_mapping(spot, problems);
        for (name, entry) in spot.entries().filter(|(name, _)| !name.starts_with("x-")) {
            let declared = read_network(name, &entry, problems);
            self.declared.insert(name.to_owned(), declared);
        }
    }

    /// The networks of one service.
    pub fn read_service(&mut self, service_name: &str, service: &Spot<'_>, problems: &mut Problems) {
        let entry = |key: &str| service.entries().find(|(name, _)| *name == key).map(|(_, spot)| spot);
        if let Some(spot) = entry("links").filter(|spot| !spot.node.is_null()) {
            self.read_links(&spot, problems);
        }
        let Some(spot) = entry("networks").filter(|spot| !keys::is_neutral(spot.node)) else {
            self.uses.push((service_name.into(), DEFAULT.into(), BTreeSet::new()));
            return;
        };
        let mut uses = Vec::new();
        if spot.node.entries().is_empty() {
            for item in values::one_or_more(&spot, problems) {
                uses.extend(values::word(&item, problems).map(|name| (name, item.clone(), BTreeSet::new())));
            }
        } else {
            for (name, entry) in spot.entries() {
                let aliases = read_aliases(&entry, problems);
                uses.push((name, entry, aliases));
            }
        }
        if uses.len() > NETWORKS_MAX {
            problems.error(&spot, format_args!("has more than {NETWORKS_MAX} networks"));
            return;
        }
        for (name, entry, aliases) in uses {
            if name != DEFAULT && !self.declared.contains_key(name) {
                let message = format_args!("the network {:?} is not declared", shortened(name));
                problems.error_with(&entry, message, "add it under the top-level `networks:`, or remove it");
            }
            self.uses.push((service_name.into(), name.into(), aliases));
        }
    }

    fn read_links(&mut self, entry: &Spot<'_>, problems: &mut Problems) {
        for item in values::one_or_more(entry, problems) {
            let Some(text) = values::word(&item, problems) else { continue };
            let (service, alias) = text.split_once(':').unwrap_or((text, text));
            if !is_dns_name(alias) {
                problems.error_with(&item, format_args!("{:?} is no name", shortened(alias)), NAME_HINT);
            } else if service != alias {
                self.links.push((service.to_owned(), alias.to_owned()));
            }
        }
    }

    /// Puts each service into its networks.
    pub fn finish(self, app: &AppName, services: &mut BTreeMap<String, ServiceSpec>) {
        for (service, network, mut aliases) in self.uses {
            let Some(spec) = services.get_mut(&service) else { continue };
            let declared = self.declared.get(&network).cloned().unwrap_or_default();
            let key = declared.shared_name.unwrap_or_else(|| format!("{app}/{network}"));
            let linked = self.links.iter().filter(|(target, _)| *target == service);
            aliases.extend(linked.map(|(_, alias)| alias.clone()));
            spec.networks.insert(key, NetworkUse { aliases, is_internal: declared.is_internal });
        }
    }
}

const NAME_HINT: &str = "use letters, digits, `-`, `_` and `.`, at most 63";

fn read_network(name: &str, spot: &Spot<'_>, problems: &mut Problems) -> Declared {
    let mut declared = Declared::default();
    let mut own_name = None;
    for (key, entry) in supported(spot, keys::NETWORK, problems) {
        match key {
            "name" => own_name = values::word(&entry, problems).map(str::to_owned),
            "internal" => declared.is_internal = values::boolean(&entry, problems).unwrap_or(false),
            // `external: { name: … }` is how older files say both.
            _ if !entry.node.entries().is_empty() => {
                let named = entry.entries().find(|(key, _)| *key == "name");
                let named = named.and_then(|(_, spot)| values::word(&spot, problems).map(str::to_owned));
                declared.shared_name = Some(named.unwrap_or_else(|| name.to_owned()));
            }
            _ => {
                if values::boolean(&entry, problems) == Some(true) {
                    declared.shared_name = Some(name.to_owned());
                }
            }
        }
    }
    declared.shared_name = own_name.or(declared.shared_name);
    if let Some(shared) = declared.shared_name.as_deref().filter(|shared| !is_dns_name(shared)) {
        problems.error_with(spot, format_args!("{:?} can't name a network", shortened(shared)), NAME_HINT);
    }
    declared
}

fn read_aliases(spot: &Spot<'_>, problems: &mut Problems) -> BTreeSet<String> {
    let mut aliases = BTreeSet::new();
    if spot.node.is_null() {
        return aliases;
    }
    for (_, entry) in supported(spot, keys::SERVICE_NETWORK, problems) {
        for item in values::one_or_more(&entry, problems) {
            let Some(alias) = values::word(&item, problems) else { continue };
            if is_dns_name(alias) {
                aliases.insert(alias.to_ascii_lowercase());
            } else {
                problems.error_with(&item, format_args!("{:?} is no name", shortened(alias)), NAME_HINT);
            }
        }
        if aliases.len() > ALIASES_MAX {
            problems.error(&entry, format_args!("has more than {ALIASES_MAX} names"));
        }
    }
    aliases
}

/// Names as containers ask for them; `_` is not of the DNS, but common in Compose files.
pub fn is_dns_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=63).contains(&text.len()) && text.bytes().all(is_inner) && !text.starts_with(['-', '.'])
}

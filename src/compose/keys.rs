//! What each key of the Compose specification means in tinydc: the one table.
//!
//! Input: a mapping and the table for its place. Output: the entries to read; everything else becomes a problem here.
//! A key is never passed over in silence unless the table says that nothing is lost by it.

use super::problem::{Problems, Spot, shortened};
use super::tree::{Node, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    Supported,
    /// Nothing is lost: not even named.
    Silent,
    /// Harmless, named with the reason, unless it asks for nothing.
    Ignored(&'static str),
    /// Without it the file would mean something else: reason, remedy. False, null and empty are always fine.
    Refused(&'static str, &'static str),
}

use Rule::{Ignored, Refused, Silent, Supported};

pub type Table = &'static [(&'static str, Rule)];

pub const FILE: Table = &[
    ("name", Supported),
    ("services", Supported),
    ("volumes", Supported),
    ("networks", Supported),
    ("version", Ignored("Compose files have no version any more; the line can go")),
    ("configs", Supported),
    ("secrets", Supported),
    ("include", Refused("other files are not included", "copy their services into this file")),
    ("models", Refused("AI models are not run", "remove it")),
    ("x-tinydc", Refused("stands in a service, not here", "move it into the services it is meant for")),
];

const CAPABILITIES: Rule = Refused(
    "an instance has Docker's default capabilities, no more and no fewer",
    "remove it; a service that needs it can't run here yet",
);
const NAMESPACES: Rule =
    Refused("an instance has namespaces of its own", "remove it; a service that needs it can't run here yet");
const DEVICES: Rule = Refused(
    "devices of a node are not given to containers",
    "remove it, or run this service outside of tinydc",
);
const KERNEL: Rule =
    Refused("this limit can't be set for a service", "remove it if the service runs without");
const NAME_SERVER: &str = "names are resolved by tinydc, and those it doesn't know by the node's servers";

pub const SERVICE: Table = &[
    ("annotations", Ignored("nothing reads them; write `labels`")),
    ("attach", Ignored("nothing is attached; use `tinydc logs -f`")),
    ("blkio_config", Ignored("disk bandwidth is not divided")),
    ("build", Supported),
    ("cap_add", CAPABILITIES),
    ("cap_drop", CAPABILITIES),
    ("cgroup", NAMESPACES),
    ("cgroup_parent", NAMESPACES),
    ("command", Supported),
    ("configs", Supported),
    ("container_name", Supported),
    ("cpu_count", KERNEL),
    ("cpu_percent", KERNEL),
    ("cpu_period", Refused("CPU time is limited as a number of CPUs", "write `cpus: 0.5`")),
    ("cpu_quota", Refused("CPU time is limited as a number of CPUs", "write `cpus: 0.5`")),
    ("cpu_rt_period", KERNEL),
    ("cpu_rt_runtime", KERNEL),
    ("cpu_shares", Ignored("CPU time is shared by reservations; write `deploy.resources.reservations.cpus`")),
    ("cpus", Supported),
    ("cpuset", KERNEL),
    ("credential_spec", Refused("Windows credentials are not supported", "remove it")),
    ("depends_on", Supported),
    ("deploy", Supported),
    ("develop", Ignored("files are not watched; deploy again")),
    ("device_cgroup_rules", DEVICES),
    ("devices", DEVICES),
    ("dns", Ignored(NAME_SERVER)),
    ("dns_opt", Ignored(NAME_SERVER)),
    ("dns_search", Ignored(NAME_SERVER)),
    ("domainname", Ignored("an instance's host name has no domain")),
    ("entrypoint", Supported),
    ("env_file", Supported),
    ("environment", Supported),
    ("expose", Silent),
    ("extends", Refused("services are not extended", "use a YAML anchor: `<<: *base`")),
    (
        "external_links",
        Refused("containers outside of the app are not linked", "use the name APP/SERVICE has"),
    ),
    (
        "extra_hosts",
        Refused("an instance's /etc/hosts gets no entries", "use the address itself in the settings"),
    ),
    ("gpus", DEVICES),
    ("group_add", Refused("extra groups can't be given yet", "name the group in `user: UID:GID`")),
    ("healthcheck", Supported),
    ("hostname", Supported),
    ("image", Supported),
    ("init", Supported),
    ("ipc", Supported),
    ("isolation", Silent),
    ("label_file", Refused("labels are not read from files", "write them under `labels`")),
    ("labels", Supported),
    ("links", Supported),
    ("logging", Ignored("tinydc keeps the logs itself, bounded; see `tinydc logs`")),
    ("mac_address", KERNEL),
    ("mem_limit", Supported),
    ("mem_reservation", Supported),
    ("mem_swappiness", Ignored("it is the node's")),
    ("memswap_limit", Ignored("memory limits count without swap")),
    ("models", Refused("AI models are not run", "remove it")),
    ("network_mode", Supported),
    ("networks", Supported),
    ("oom_kill_disable", KERNEL),
    ("oom_score_adj", Ignored("tinydc chooses it, so that its own daemon goes last")),
    ("pid", NAMESPACES),
    ("pids_limit", Supported),
    ("platform", Supported),
    ("ports", Supported),
    ("post_start", Refused("hooks are not run", "do it in the image's entrypoint")),
    ("pre_stop", Refused("hooks are not run", "do it when the stop signal comes")),
    (
        "privileged",
        Refused("no container gets the whole node", "remove it; a service that needs it can't run here yet"),
    ),
    ("profiles", Supported),
    ("provider", Refused("only containers are run", "remove this service")),
    ("pull_policy", Ignored("a tag becomes a digest at each deploy, and is pulled where it is missing")),
    ("pull_refresh_after", Ignored("a tag becomes a digest at each deploy")),
    ("read_only", Supported),
    ("restart", Supported),
    ("runtime", Refused("tinydc is the runtime", "remove it")),
    ("scale", Supported),
    ("secrets", Supported),
    ("security_opt", Supported),
    ("shm_size", Supported),
    ("stdin_open", Ignored("nothing is attached; use `tinydc exec -it`")),
    ("stop_grace_period", Supported),
    ("stop_signal", Supported),
    ("storage_opt", KERNEL),
    ("sysctls", KERNEL),
    ("tmpfs", Supported),
    ("tty", Supported),
    ("ulimits", KERNEL),
    ("use_api_socket", Refused("there is no Docker here", "remove it")),
    ("user", Supported),
    ("userns_mode", NAMESPACES),
    ("uts", NAMESPACES),
    ("volumes", Supported),
    ("volumes_from", Refused("volumes are not taken from other services", "name the volume in both")),
    ("working_dir", Supported),
    ("x-tinydc", Supported),
];

pub const TINYDC: Table = &[("exclusive", Supported), ("affinity", Supported)];

pub const HEALTHCHECK: Table = &[
    ("test", Supported),
    ("interval", Supported),
    ("timeout", Supported),
    ("retries", Supported),
    ("start_period", Supported),
    ("start_interval", Ignored("while it starts it is probed every `interval`")),
    ("disable", Supported),
];

pub const DEPLOY: Table = &[
    ("mode", Supported),
    ("replicas", Supported),
    ("resources", Supported),
    ("placement", Supported),
    ("restart_policy", Supported),
    ("endpoint_mode", Supported),
    ("labels", Ignored("write them under the service's `labels`")),
    ("update_config", Ignored("instances are replaced one at a time, the next when the last is healthy")),
    ("rollback_config", Ignored("a failed update stops and the old instances keep serving")),
];

pub const RESOURCES: Table = &[("limits", Supported), ("reservations", Supported)];

pub const AMOUNTS: Table = &[
    ("cpus", Supported),
    ("memory", Supported),
    ("pids", Supported),
    ("devices", DEVICES),
    (
        "generic_resources",
        Refused("nodes have no resources of other kinds", "label the nodes and constrain to them"),
    ),
];

pub const PLACEMENT: Table =
    &[("constraints", Supported), ("preferences", Supported), ("max_replicas_per_node", Supported)];

pub const RESTART_POLICY: Table = &[
    ("condition", Supported),
    ("max_attempts", Supported),
    ("delay", Ignored("the wait grows from restart to restart by itself")),
    ("window", Ignored("a container that ran for a while counts as started")),
];

pub const DEPENDENCY: Table = &[("condition", Supported), ("required", Supported), ("restart", Silent)];

pub const ENV_FILE: Table = &[("path", Supported), ("required", Supported), ("format", Silent)];

pub const PORT: Table = &[
    ("target", Supported),
    ("published", Supported),
    ("protocol", Supported),
    ("mode", Supported),
    ("host_ip", Supported),
    ("name", Silent),
    ("app_protocol", Silent),
];

pub const MOUNT: Table = &[
    ("type", Supported),
    ("source", Supported),
    ("target", Supported),
    ("read_only", Supported),
    ("tmpfs", Supported),
    ("bind", Supported),
    ("volume", Supported),
    ("consistency", Silent),
    ("image", Refused("images are not mounted", "copy the files into a volume")),
];

pub const MOUNT_TMPFS: Table =
    &[("size", Supported), ("mode", Ignored("a tmpfs is writable for everyone, as /tmp is"))];

pub const MOUNT_BIND: Table = &[
    ("create_host_path", Silent),
    ("propagation", Ignored("mounts are private")),
    ("recursive", Ignored("what is mounted below a path of a node comes along")),
    ("selinux", Silent),
];

pub const MOUNT_VOLUME: Table = &[
    ("nocopy", Silent),
    ("labels", Silent),
    ("subpath", Refused("a volume is mounted as a whole", "use a volume of its own")),
];

pub const VOLUME: Table = &[
    ("driver", Supported),
    ("driver_opts", Refused("volumes are directories on one node", "remove it")),
    (
        "external",
        Refused("an app has only volumes of its own", "remove it; to bring data along, mount `./DIRECTORY`"),
    ),
    ("labels", Silent),
    ("name", Ignored("volumes are named by the key, and belong to the app")),
];

const NO_DRIVER: Rule =
    Refused("secrets are kept by the cluster itself", "write `file`, `environment` or `external: true`");

pub const SECRET: Table = &[
    ("file", Supported),
    ("environment", Supported),
    ("external", Supported),
    ("name", Supported),
    ("labels", Silent),
    ("driver", NO_DRIVER),
    ("driver_opts", NO_DRIVER),
    ("template_driver", NO_DRIVER),
];

pub const CONFIG: Table = &[
    ("file", Supported),
    ("content", Supported),
    ("environment", Supported),
    ("external", Supported),
    ("name", Supported),
    ("labels", Silent),
    ("template_driver", NO_DRIVER),
];

pub const SECRET_USE: Table = &[
    ("source", Supported),
    ("target", Supported),
    ("uid", Supported),
    ("gid", Supported),
    ("mode", Supported),
];

const ONE_KIND: &str = "there is one kind of network, which spans all nodes";

pub const NETWORK: Table = &[
    ("attachable", Silent),
    ("driver", Ignored(ONE_KIND)),
    ("driver_opts", Ignored(ONE_KIND)),
    ("enable_ipv4", Silent),
    ("enable_ipv6", Ignored("containers have IPv4 addresses")),
    ("external", Supported),
    ("internal", Supported),
    ("ipam", Ignored("tinydc chooses the addresses")),
    ("labels", Silent),
    ("name", Supported),
];

pub const SERVICE_NETWORK: Table = &[
    ("aliases", Supported),
    ("driver_opts", Ignored(ONE_KIND)),
    ("gw_priority", Silent),
    ("interface_name", Silent),
    ("ipv4_address", Ignored("tinydc chooses the addresses; use the service's name")),
    ("ipv6_address", Ignored("containers have IPv4 addresses; use the service's name")),
    ("link_local_ips", Refused("tinydc chooses the addresses", "use the service's name")),
    ("mac_address", Ignored("tinydc chooses the addresses")),
    ("priority", Silent),
];

/// The supported entries of a mapping; what the table doesn't want is named. Null counts as an empty mapping.
pub fn supported<'n>(
    spot: &Spot<'n>,
    table: Table,
    problems: &mut Problems,
) -> Vec<(&'static str, Spot<'n>)> {
    if !matches!(spot.node.value, Value::Mapping(_) | Value::Null) {
        problems.error_with(
            spot,
            format_args!("is {}, not a mapping", spot.node.kind()),
            "write `key: value` lines",
        );
        return Vec::new();
    }
    let mut wanted = Vec::new();
    for (key, entry) in spot.entries() {
        match table.iter().find(|(name, _)| *name == key) {
            Some((name, Rule::Supported)) => wanted.push((*name, entry)),
            Some((_, Rule::Silent)) => {}
            Some((_, Rule::Ignored(_) | Rule::Refused(..))) if is_neutral(entry.node) => {}
            Some((_, Rule::Ignored(why))) => problems.ignored(&entry, why),
            Some((_, Rule::Refused(why, remedy))) => problems.error_with(&entry, why, *remedy),
            None if key.starts_with("x-") => {}
            None => unknown(&entry, key, table, problems),
        }
    }
    wanted
}

fn unknown(entry: &Spot<'_>, key: &str, table: Table, problems: &mut Problems) {
    let names = table.iter().map(|(name, _)| *name);
    let near = if problems.is_full() { None } else { nearest(key, names) };
    match near {
        Some(name) => {
            problems.error_with(entry, "is not a key of a Compose file", format!("did you mean `{name}`?"))
        }
        None => problems.error_with(
            entry,
            format_args!("`{}` is not a key of a Compose file", shortened(key)),
            "remove it, or begin it with `x-`",
        ),
    }
}

/// Whether a key with this value asks for nothing.
pub fn is_neutral(node: &Node) -> bool {
    match &node.value {
        Value::Null => true,
        Value::Scalar(text) => matches!(text.as_str(), "" | "false" | "no" | "off"),
        Value::Sequence(items) => items.is_empty(),
        Value::Mapping(entries) => entries.is_empty(),
    }
}

/// The name that was probably meant: at most two letters away, and for short words one.
pub fn nearest<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if text.len() > 40 {
        return None;
    }
    let simple = |word: &str| word.to_ascii_lowercase().replace('-', "_");
    let distance_max = if text.len() < 5 { 1 } else { 2 };
    names
        .map(|name| (distance(&simple(text), &simple(name)), name))
        .filter(|(distance, _)| *distance <= distance_max)
        .min()
        .map(|(_, name)| name)
}

/// Letters inserted, removed, replaced or swapped with their neighbour (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_key() {
        let names = || SERVICE.iter().map(|(name, _)| *name);
        let cases = [
            ("enviroment", Some("environment")),
            ("enviornment", Some("environment")),
            ("Image", Some("image")),
            ("depends-on", Some("depends_on")),
            ("port", Some("ports")),
            ("frobnicate", None),
        ];
        for (text, expected) in cases {
            assert_eq!(nearest(text, names()), expected, "{text}");
        }
    }

    #[test]
    fn the_service_table_is_sorted_and_has_no_key_twice() {
        assert!(SERVICE.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}

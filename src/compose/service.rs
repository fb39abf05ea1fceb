//! One entry under `services:` to a `ServiceSpec`.
//!
//! Input: the service's mapping. Output: the specification without its relative binds, which `mounts` keeps.
//! Every key is read even after a mistake, so that all mistakes are named at once.

use super::deploy::{self, Amounts};
use super::environment::read_environment;
use super::ingress_labels::read_ingress_labels;
use super::keys::{self, is_neutral, supported};
use super::mounts::{Mounts, read_tmpfs};
use super::networks::is_dns_name;
use super::ports::{Published, read_ports};
use super::problem::{Problems, Spot, shortened};
use super::secrets::{Kind, Secrets};
use super::{Surroundings, depends, health, values};
use crate::model::limits::{REPLICAS_MAX, SERVICE_SPEC_BYTES_MAX};
use std::collections::BTreeMap;

use crate::model::{
    Constraint, ConstraintSubject, Gather, ImageSpec, MountSource, MountSpec, Order, RestartPolicy,
    ServiceSpec,
};

/// What services share while a file is read.
pub struct Shared<'n, 's> {
    pub surroundings: &'s Surroundings<'s>,
    pub mounts: Mounts<'n>,
    pub published: Published,
    pub secrets: Secrets,
}

/// A service as it is read: what several keys may say is settled at the end.
pub struct ServiceReader {
    pub spec: ServiceSpec,
    pub replicas: Option<u32>,
    pub mode: Option<deploy::Mode>,
    pub amounts: Amounts,
}

/// The service's specification; without an image it is incomplete, and the problems say so.
pub fn read_service<'n>(
    name: &str,
    spot: &Spot<'n>,
    shared: &mut Shared<'n, '_>,
    problems: &mut Problems,
) -> ServiceSpec {
    let spec = ServiceSpec::new(ImageSpec { reference: String::new(), digest: None });
    let mut reader = ServiceReader { spec, replicas: None, mode: None, amounts: Amounts::default() };
    let entries = supported(spot, keys::SERVICE, problems);
    if spot.node.entries().is_empty() {
        if is_neutral(spot.node) {
            problems.error_with(spot, "is empty", "name its image");
        }
        return reader.spec;
    }
    reader.read_image(spot, problems);
    reader.spec.environment = read_environment(&entries, shared.surroundings, problems);
    for (key, entry) in &entries {
        if entry.node.is_null() {
            continue;
        }
        let is_read = reader.read_process_key(key, entry, problems)
            || reader.read_cluster_key(key, entry, problems)
            || reader.read_network_key(key, entry, &mut shared.published, problems);
        match *key {
            _ if is_read => {}
            "volumes" => {
                let mounts = shared.mounts.read_service(name, entry, problems);
                reader.spec.mounts.extend(mounts);
            }
            "secrets" => shared.secrets.read_service(Kind::Secret, name, entry, problems),
            "configs" => shared.secrets.read_service(Kind::Config, name, entry, problems),
            "tmpfs" => reader.spec.mounts.extend(read_tmpfs(entry, problems)),
            "shm_size" => reader.read_shared_memory(entry, problems),
            // The remaining ones were read above, or before the loop.
            _ => {}
        }
    }
    reader.finish(spot, problems)
}

impl ServiceReader {
    fn read_image(&mut self, service: &Spot<'_>, problems: &mut Problems) {
        let entry = |key: &str| service.entries().find(|(name, _)| *name == key).map(|(_, spot)| spot);
        let build = entry("build").filter(|build| !is_neutral(build.node));
        let Some(image) = entry("image").filter(|image| !image.node.is_null()) else {
            match build {
                Some(build) => problems.error_with(
                    &build,
                    "images are not built here",
                    "build it, then `tinydc image load` it and name it under `image`",
                ),
                None => problems.error_with(service, "has no `image`", "name the image to run"),
            }
            return;
        };
        if let Some(build) = build {
            problems.ignored(&build, "the image is taken as `image` names it; build it elsewhere");
        }
        let Some(text) = values::word(&image, problems) else { return };
        if let Some(why) = not_an_image(text) {
            let hint = "write NAME:TAG, such as nginx:1.27";
            problems.error_with(&image, format_args!("{:?} is not an image: {why}", shortened(text)), hint);
        }
        self.spec.image.reference = text.to_owned();
    }

    /// What a container runs and how it stops.
    fn read_process_key(&mut self, key: &str, entry: &Spot<'_>, problems: &mut Problems) -> bool {
        let spec = &mut self.spec;
        let word = |problems: &mut Problems| values::word(entry, problems).map(str::to_owned);
        match key {
            "command" => spec.command = values::command(entry, problems),
            "entrypoint" => spec.entrypoint = values::command(entry, problems),
            "user" => spec.user = word(problems),
            "working_dir" => {
                spec.working_dir = word(problems);
                if spec.working_dir.as_ref().is_some_and(|path| !path.starts_with('/')) {
                    problems.error_with(entry, "is not an absolute path", "begin it with `/`");
                }
            }
            "hostname" => {
                spec.hostname = word(problems);
                if spec.hostname.as_ref().is_some_and(|name| !is_host_name(name)) {
                    problems.error_with(
                        entry,
                        "is not a host name",
                        "use letters, digits, `-` and `.`, at most 63",
                    );
                }
            }
            "labels" => {
                let pairs = values::pairs(entry, problems).into_iter();
                spec.labels = pairs.map(|(key, value)| (key, value.unwrap_or_default())).gather();
                name_label_problems(&spec.labels, entry, problems);
            }
            "healthcheck" => spec.health = health::read_health(entry, problems),
            "stop_signal" => {
                spec.stop_signal = word(problems);
                if spec.stop_signal.as_ref().is_some_and(|signal| !is_signal(signal)) {
                    problems.error_with(entry, "is not a signal", "write a name such as SIGINT or a number");
                }
            }
            "stop_grace_period" => {
                if let Some(grace_ms) = values::duration_ms(entry, problems) {
                    spec.stop_grace_ms = grace_ms;
                }
            }
            "read_only" => spec.is_read_only = values::boolean(entry, problems).unwrap_or(false),
            "init" => spec.has_init = values::boolean(entry, problems).unwrap_or(false),
            "tty" => spec.has_tty = values::boolean(entry, problems).unwrap_or(false),
            _ => return false,
        }
        true
    }

    /// Where instances run, how many, and with how much.
    fn read_cluster_key(&mut self, key: &str, entry: &Spot<'_>, problems: &mut Problems) -> bool {
        match key {
            "restart" => {
                // `deploy.restart_policy` was read before if it stands before: it wins either way.
                let policy = read_restart(entry, problems);
                self.amounts.restart = self.amounts.restart.take().or(policy);
            }
            "depends_on" => self.spec.depends_on = depends::read_depends(entry, problems),
            "deploy" => deploy::read_deploy(self, entry, problems),
            "scale" => {
                if let Some(count) = values::number(entry, 0..=u64::from(REPLICAS_MAX), problems) {
                    values::settle(&mut self.replicas, count as u32, entry, problems);
                }
            }
            "cpus" => self.amounts.limit_cpus(entry, problems),
            "mem_limit" => self.amounts.limit_memory(entry, problems),
            "mem_reservation" => self.amounts.reserve_memory(entry, problems),
            "pids_limit" => self.amounts.limit_pids(entry, problems),
            "platform" => self.read_platform(entry, problems),
            "x-tinydc" => self.read_tinydc(entry, problems),
            _ => return false,
        }
        true
    }

    fn read_network_key(
        &mut self,
        key: &str,
        entry: &Spot<'_>,
        published: &mut Published,
        problems: &mut Problems,
    ) -> bool {
        match key {
            "ports" => self.spec.ports = read_ports(entry, published, problems),
            "network_mode" => read_network_mode(entry, problems),
            "container_name" => self.read_container_name(entry, problems),
            "security_opt" => read_security(entry, problems),
            "ipc" => match values::text(entry, problems) {
                None | Some("" | "private" | "none" | "shareable") => {}
                Some(other) => {
                    let message =
                        format_args!("an instance has its own IPC namespace, not {:?}", shortened(other));
                    problems.error_with(entry, message, "remove it");
                }
            },
            _ => return false,
        }
        true
    }

    fn read_container_name(&mut self, entry: &Spot<'_>, problems: &mut Problems) {
        let Some(name) = values::word(entry, problems) else { return };
        if is_dns_name(name) {
            self.spec.container_name = Some(name.to_ascii_lowercase());
        } else {
            problems.error_with(
                entry,
                format_args!("{:?} is no name", shortened(name)),
                "use letters, digits, `-`, `_` and `.`, at most 63",
            );
        }
    }

    /// `/dev/shm` of another size than the runtime's is a tmpfs mounted there.
    fn read_shared_memory(&mut self, entry: &Spot<'_>, problems: &mut Problems) {
        if let Some(bytes) = values::bytes(entry, problems).filter(|bytes| *bytes > 0) {
            let source = MountSource::Tmpfs { bytes_max: Some(bytes) };
            self.spec.mounts.push(MountSpec { target: "/dev/shm".into(), is_read_only: false, source });
        }
    }

    fn read_platform(&mut self, entry: &Spot<'_>, problems: &mut Problems) {
        let Some(text) = values::word(entry, problems) else { return };
        let architecture = match text {
            "linux/amd64" | "linux/x86_64" | "amd64" => "amd64",
            "linux/arm64" | "linux/arm64/v8" | "linux/aarch64" | "arm64" => "arm64",
            _ => {
                problems.ignored(entry, "the image's own list of platforms decides");
                return;
            }
        };
        self.spec.placement.constraints.push(Constraint {
            subject: ConstraintSubject::Architecture,
            must_equal: true,
            value: architecture.to_owned(),
        });
    }

    fn read_tinydc(&mut self, entry: &Spot<'_>, problems: &mut Problems) {
        for (key, inner) in supported(entry, keys::TINYDC, problems) {
            if key == "exclusive" {
                self.spec.is_exclusive = values::boolean(&inner, problems).unwrap_or(false);
            } else {
                match values::text(&inner, problems) {
                    None | Some("" | "none") => {}
                    Some("client") => self.spec.has_client_affinity = true,
                    Some(other) => problems.error_with(
                        &inner,
                        format_args!("{:?} is no affinity", shortened(other)),
                        "write `client`: each client stays with one endpoint",
                    ),
                }
            }
        }
    }

    fn finish(mut self, spot: &Spot<'_>, problems: &mut Problems) -> ServiceSpec {
        let is_global = self.mode == Some(deploy::Mode::Global);
        if is_global && self.replicas.is_some() {
            let hint = "remove `replicas` or `mode: global`";
            problems.error_with(spot, "runs once on each node and can't have a number of replicas", hint);
        }
        self.spec.is_global = is_global;
        self.spec.replicas = self.replicas.unwrap_or(1);
        self.spec.resources = self.amounts.settled(spot, problems);
        self.spec.restart = self.amounts.restart.unwrap_or_default();
        let mut targets: Vec<&str> = self.spec.mounts.iter().map(|mount| mount.target.as_str()).collect();
        targets.order();
        if let Some(pair) = targets.windows(2).find(|pair| pair[0] == pair[1]) {
            problems.error_with(spot, format_args!("{} is mounted twice", pair[0]), "keep one of them");
        }
        let bytes = postcard::to_allocvec(&self.spec).map_or(usize::MAX, |encoded| encoded.len());
        if bytes > SERVICE_SPEC_BYTES_MAX {
            let message = format_args!("is larger than {} KiB", SERVICE_SPEC_BYTES_MAX >> 10);
            problems.error_with(spot, message, "move long texts into files and mount them");
        }
        self.spec
    }
}

/// What of the labels that make HTTP routes can't be kept, at the label's own line.
fn name_label_problems(labels: &BTreeMap<String, String>, entry: &Spot<'_>, problems: &mut Problems) {
    for problem in read_ingress_labels(labels).problems {
        let at_key = entry.entries().find(|(key, _)| *key == problem.label).map(|(_, spot)| spot);
        let at_item = || {
            entry.items().find(|item| {
                let text = item.node.scalar().unwrap_or_default();
                text.split_once('=').map_or(text, |(key, _)| key).trim() == problem.label
            })
        };
        let place = at_key.or_else(at_item).unwrap_or_else(|| entry.clone());
        problems.add(problem.severity, place.position(), place.say(&problem.message), problem.hint);
    }
}

/// Why `text` can't name an image; what the registry thinks of it comes later.
fn not_an_image(text: &str) -> Option<&'static str> {
    if text.len() > 512 {
        return Some("it is too long");
    }
    if text.chars().any(|letter| letter.is_whitespace() || !letter.is_ascii_graphic()) {
        return Some("it contains a blank or a special letter");
    }
    if text.contains("://") {
        return Some("it is an address of the web");
    }
    let (name, digest) = text.split_once('@').map_or((text, None), |(name, digest)| (name, Some(digest)));
    if digest.is_some_and(|digest| crate::model::Digest::new(digest).is_err()) {
        return Some("what follows the `@` is no digest");
    }
    let slash = name.rfind('/').map_or(0, |slash| slash + 1);
    let (path, tag) = match name[slash..].split_once(':') {
        Some((last, tag)) => (&name[..slash + last.len()], Some(tag)),
        None => (name, None),
    };
    let is_tag = |tag: &str| {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !tag.is_empty() && tag.len() <= 128 && tag.bytes().all(is_inner) && !tag.starts_with(['-', '.'])
    };
    if !tag.is_none_or(is_tag) {
        return Some("what follows the `:` is no tag");
    }
    let repository = match path.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => rest,
        _ => path,
    };
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    if repository.split('/').any(|part| part.is_empty() || !part.bytes().all(is_inner)) {
        return Some("its name must be of lower-case letters, digits, `-`, `_` and `.`");
    }
    None
}

fn is_host_name(text: &str) -> bool {
    text.len() <= 63
        && text.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        })
}

fn is_signal(text: &str) -> bool {
    const NAMES: &[&str] = &[
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = name.strip_prefix("RTMIN").or_else(|| name.strip_prefix("RTMAX"));
    NAMES.contains(&name) || realtime.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '-']))
}

fn read_restart(entry: &Spot<'_>, problems: &mut Problems) -> Option<RestartPolicy> {
    let text = values::text(entry, problems)?;
    let attempts = text.strip_prefix("on-failure").map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    match (text, attempts) {
        // YAML 1.1 readers take a bare `no` for false, and people write that.
        ("no" | "false" | "", _) => Some(RestartPolicy::No),
        ("always", _) => Some(RestartPolicy::Always),
        ("unless-stopped", _) => Some(RestartPolicy::UnlessStopped),
        ("on-failure", _) => Some(RestartPolicy::OnFailure { attempts_max: None }),
        (_, Some(attempts)) if attempts.parse::<u32>().is_ok() => {
            // 0 is Docker's "without end".
            let attempts_max = attempts.parse().ok().filter(|attempts| *attempts > 0);
            Some(RestartPolicy::OnFailure { attempts_max })
        }
        _ => {
            let message = format_args!("{:?} is not a restart policy", shortened(text));
            problems.error_with(
                entry,
                message,
                "write no, always, unless-stopped, on-failure or on-failure:3",
            );
            None
        }
    }
}

fn read_network_mode(entry: &Spot<'_>, problems: &mut Problems) {
    match values::text(entry, problems) {
        None | Some("" | "bridge" | "default") => {}
        Some("none") => {
            problems.error_with(entry, "an instance always has a network", "remove it; publish no ports");
        }
        Some("host") => problems.error_with(
            entry,
            "an instance has a network of its own, not the node's",
            "remove it and publish the ports the service needs; `mode: host` keeps them on its node",
        ),
        Some(_) => problems.error_with(
            entry,
            "networks are not shared with other containers",
            "remove it: services of an app reach one another by name",
        ),
    }
}

/// `no-new-privileges` is how every container runs.
fn read_security(entry: &Spot<'_>, problems: &mut Problems) {
    for item in values::one_or_more(entry, problems) {
        let Some(text) = values::text(&item, problems) else { continue };
        let simple = text.replace('=', ":");
        if !matches!(simple.as_str(), "no-new-privileges" | "no-new-privileges:true") {
            let message = format_args!("{:?} can't be set", shortened(text));
            problems.error_with(
                &item,
                message,
                "remove it: Docker's default profile and no-new-privileges always hold",
            );
        }
    }
}

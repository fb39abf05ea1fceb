//! `volumes:` and `tmpfs:` of services, and what becomes of directories beside the Compose file.
//!
//! Input: one service's items after another, then what lies at the paths they name. Output: mounts, volumes and
//! wishes for content. A directory that any service writes to is a volume for all that mount it; a volume's name
//! follows from the path alone, so that it never changes (`the_name_of_a_directory_is_its_own`).

use super::PathKind;
use super::draft::{ContentKind, ContentWish};
use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::values;
use crate::model::{Gather, MountSource, MountSpec, VolumeSpec};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};

const DIRECTORY_PREFIX: &str = "dir-";
const ANONYMOUS_PREFIX: &str = "anonymous-";
const VOLUME_NAME_BYTES_MAX: usize = 128;
/// PATH_MAX of Linux.
const PATH_BYTES_MAX: usize = 4096;

/// All mounts of the app while it is read.
pub struct Mounts<'n> {
    declared: BTreeSet<String>,
    pub volumes: BTreeMap<String, VolumeSpec>,
    binds: Vec<Bind<'n>>,
}

/// A relative bind; what it becomes depends on the other services.
struct Bind<'n> {
    spot: Spot<'n>,
    service: String,
    path: String,
    target: String,
    is_read_only: bool,
}

/// One item as written.
#[derive(Debug, Default, PartialEq, Eq)]
struct Item {
    source: Option<String>,
    target: String,
    is_read_only: bool,
    /// Long form only: what the source is, whatever it looks like.
    kind: Option<ItemKind>,
    tmpfs_bytes_max: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ItemKind {
    Bind,
    Volume,
    Tmpfs,
}

impl<'n> Mounts<'n> {
    pub fn new(declared: BTreeSet<String>) -> Mounts<'n> {
        Mounts { declared, volumes: BTreeMap::new(), binds: Vec::new() }
    }

    /// The mounts of one service that need nothing from beside the file; the others are kept for `content`.
    pub fn read_service(
        &mut self,
        service: &str,
        spot: &Spot<'n>,
        problems: &mut Problems,
    ) -> Vec<MountSpec> {
        let mut mounts = Vec::new();
        if !values::is_list(spot, problems) {
            return mounts;
        }
        let mut targets = BTreeSet::new();
        for item_spot in spot.items() {
            let item = if item_spot.node.entries().is_empty() {
                read_short(&item_spot, problems)
            } else {
                read_long(&item_spot, problems)
            };
            let Some(mut item) = item else { continue };
            let Some(target) = clean_target(&item.target) else {
                let message = format_args!("{:?} is not a path in the container", shortened(&item.target));
                problems.error_with(&item_spot, message, "write it absolute: it begins with `/`");
                continue;
            };
            if !targets.insert(target.clone()) {
                problems.error_with(
                    &item_spot,
                    format_args!("{target} is mounted twice"),
                    "keep one of them",
                );
                continue;
            }
            item.target = target;
            mounts.extend(self.place(service, item, &item_spot, problems));
        }
        mounts
    }

    fn place(
        &mut self,
        service: &str,
        item: Item,
        spot: &Spot<'n>,
        problems: &mut Problems,
    ) -> Option<MountSpec> {
        let Item { source, target, is_read_only, kind, tmpfs_bytes_max } = item;
        let mount = |source| Some(MountSpec { target: target.clone(), is_read_only, source });
        if kind == Some(ItemKind::Tmpfs) {
            return mount(MountSource::Tmpfs { bytes_max: tmpfs_bytes_max });
        }
        let Some(source) = source else {
            let name = format!("{ANONYMOUS_PREFIX}{service}-{}", short_hash(&target));
            self.volumes.insert(name.clone(), VolumeSpec::default());
            return mount(MountSource::Volume { name });
        };
        let is_path = match kind {
            Some(kind) => kind == ItemKind::Bind,
            None => source.starts_with(['/', '~', '.']),
        };
        if !is_path {
            return self
                .named_volume(&source, spot, problems)
                .and_then(|name| mount(MountSource::Volume { name }));
        }
        if source.starts_with('~') {
            let hint = "put it beside the Compose file and write `./…`, or use a named volume";
            problems.error_with(spot, format_args!("{source} is your home, and nodes don't have it"), hint);
            return None;
        }
        if source.starts_with('/') {
            return host_path(&source, spot, problems).and_then(mount);
        }
        if source.len() >= PATH_BYTES_MAX || source.contains('\0') {
            problems.error(spot, format_args!("{:?} is not a path", shortened(&source)));
            return None;
        }
        let path = clean_relative(&source);
        self.binds.push(Bind { spot: spot.clone(), service: service.to_owned(), path, target, is_read_only });
        None
    }

    fn named_volume(&mut self, name: &str, spot: &Spot<'_>, problems: &mut Problems) -> Option<String> {
        if name.contains('/') {
            let message = format_args!("{:?} is neither a volume nor a path", shortened(name));
            problems.error_with(spot, message, format!("write `./{}` for a path", shortened(name)));
            return None;
        }
        if !self.declared.contains(name) {
            let message = format_args!("the volume {:?} is not declared", shortened(name));
            let names = self.declared.iter().map(String::as_str);
            let near = if problems.is_full() { None } else { keys::nearest(name, names) };
            let hint = match near {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("add `{}:` under the top-level `volumes:`", shortened(name)),
            };
            problems.error_with(spot, message, hint);
            return None;
        }
        self.volumes.entry(name.to_owned()).or_default();
        Some(name.to_owned())
    }

    /// What the relative binds become: mounts by service, and what the caller packs.
    pub fn content(
        &mut self,
        look: &dyn Fn(&str) -> PathKind,
        problems: &mut Problems,
    ) -> (BTreeMap<String, Vec<MountSpec>>, Vec<ContentWish>) {
        let binds = std::mem::take(&mut self.binds);
        let kinds: BTreeMap<&str, PathKind> =
            binds.iter().map(|bind| (bind.path.as_str(), look(&bind.path))).gather();
        let written: BTreeSet<&str> =
            binds.iter().filter(|bind| !bind.is_read_only).map(|bind| bind.path.as_str()).gather();
        let mut mounts: BTreeMap<String, Vec<MountSpec>> = BTreeMap::new();
        let mut wishes = Vec::new();
        for bind in &binds {
            let is_written = written.contains(bind.path.as_str());
            let wish = |kind| ContentWish {
                service: bind.service.clone(),
                target: bind.target.clone(),
                path: bind.path.clone(),
                kind,
                is_read_only: bind.is_read_only,
            };
            match kinds.get(bind.path.as_str()).unwrap_or(&PathKind::Missing) {
                PathKind::File => {
                    if !bind.is_read_only {
                        let message = "is a file sent along: what the container writes to it is gone when it is replaced";
                        problems.warning_with(&bind.spot, message, "add `:ro`, or mount its directory");
                    }
                    wishes.push(wish(ContentKind::File));
                }
                PathKind::Directory if !is_written => wishes.push(wish(ContentKind::ReadOnlyDirectory)),
                PathKind::Missing if !is_written || looks_like_a_file(&bind.path) => missing(bind, problems),
                kind @ (PathKind::Directory | PathKind::Missing) => {
                    let name = directory_volume(&bind.path);
                    let volume = VolumeSpec { seed: None, directory: Some(bind.path.clone()) };
                    let is_new = self.volumes.insert(name.clone(), volume).is_none();
                    if is_new && *kind == PathKind::Directory {
                        wishes.push(wish(ContentKind::SeedOfVolume { volume: name.clone() }));
                    }
                    let source = MountSource::Volume { name };
                    let (target, is_read_only) = (bind.target.clone(), bind.is_read_only);
                    mounts.entry(bind.service.clone()).or_default().push(MountSpec {
                        target,
                        is_read_only,
                        source,
                    });
                }
                PathKind::Other(what) => {
                    problems.error_with(
                        &bind.spot,
                        format_args!("{} is {what}, neither a file nor a directory", bind.path),
                        "only files and directories are sent along",
                    );
                }
            }
        }
        nested(&binds, &kinds, &written, problems);
        (mounts, wishes)
    }
}

fn missing(bind: &Bind<'_>, problems: &mut Problems) {
    let message = format_args!("{} does not exist", bind.path);
    problems.error_with(&bind.spot, message, "create it beside the Compose file, or correct the path");
}

/// A directory inside one that is written is data of its own here: Compose would show it at both places.
fn nested(
    binds: &[Bind<'_>],
    kinds: &BTreeMap<&str, PathKind>,
    written: &BTreeSet<&str>,
    problems: &mut Problems,
) {
    for bind in binds {
        let parents = bind.path.match_indices('/').map(|(end, _)| &bind.path[..end]);
        let is_directory = kinds.get(bind.path.as_str()) != Some(&PathKind::File);
        for parent in parents.filter(|parent| written.contains(*parent)) {
            if is_directory {
                let message =
                    format_args!("{} lies inside {parent}, which is a volume of its own", bind.path);
                problems.warning_with(&bind.spot, message, "changes at one place don't show at the other");
            }
        }
    }
}

fn host_path(path: &str, spot: &Spot<'_>, problems: &mut Problems) -> Option<MountSource> {
    let Some(path) = clean_host_path(path) else {
        problems.error_with(
            spot,
            format_args!("{:?} is not a path of a node", shortened(path)),
            "write it without `..`",
        );
        return None;
    };
    if path.ends_with("/docker.sock") {
        let hint = "there is no Docker on the nodes: remove the service or the mount";
        problems.error_with(spot, format_args!("{path} does not exist here"), hint);
        return None;
    }
    if matches!(path.as_str(), "/etc/localtime" | "/etc/timezone") {
        problems.ignored(spot, "a node has no time zone; set `TZ` under `environment`");
        return None;
    }
    let message = format_args!("{path} is a path of whichever node runs the instance");
    problems.warning_with(spot, message, "constrain the service to a node, or use a named volume");
    Some(MountSource::HostPath { path })
}

/// `[SOURCE:]TARGET[:OPTIONS]`.
fn read_short(spot: &Spot<'_>, problems: &mut Problems) -> Option<Item> {
    let text = values::word(spot, problems)?;
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => {
            let message = format_args!("{:?} has too many parts", shortened(text));
            problems.error_with(spot, message, "write [SOURCE:]TARGET[:ro]");
            return None;
        }
    };
    if source == Some("") {
        problems.error_with(spot, "has no source before the `:`", "write [SOURCE:]TARGET[:ro]");
        return None;
    }
    let mut is_read_only = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => is_read_only = true,
            "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "nocopy" | "private" | "rprivate" => {}
            "shared" | "rshared" | "slave" | "rslave" => {
                problems.ignored(spot, format_args!("mounts are private, not `{option}`"));
            }
            _ => {
                let message = format_args!("{:?} is not an option of a mount", shortened(option));
                problems.error_with(spot, message, "write `ro` or `rw`");
                return None;
            }
        }
    }
    let (source, target) = (source.map(str::to_owned), target.to_owned());
    Some(Item { source, target, is_read_only, ..Item::default() })
}

fn read_long(spot: &Spot<'_>, problems: &mut Problems) -> Option<Item> {
    let mut item = Item::default();
    for (key, entry) in supported(spot, keys::MOUNT, problems) {
        match key {
            "type" => item.kind = Some(item_kind(&entry, problems)?),
            "source" => item.source = Some(values::word(&entry, problems)?.to_owned()),
            "target" => item.target = values::word(&entry, problems)?.to_owned(),
            "read_only" => item.is_read_only = values::boolean(&entry, problems)?,
            "tmpfs" => {
                for (_, size) in supported(&entry, keys::MOUNT_TMPFS, problems) {
                    item.tmpfs_bytes_max = values::bytes(&size, problems).filter(|size| *size > 0);
                }
            }
            "bind" => drop(supported(&entry, keys::MOUNT_BIND, problems)),
            _ => drop(supported(&entry, keys::MOUNT_VOLUME, problems)),
        }
    }
    if spot.node.entry("type").is_none() {
        problems.error_with(spot, "has no `type`", "write `type: bind`, `volume` or `tmpfs`");
        return None;
    }
    if item.kind == Some(ItemKind::Bind) && item.source.is_none() {
        problems.error_with(spot, "has no `source`", "name the file or directory");
        return None;
    }
    Some(item)
}

fn item_kind(spot: &Spot<'_>, problems: &mut Problems) -> Option<ItemKind> {
    match values::text(spot, problems)? {
        "bind" => Some(ItemKind::Bind),
        "volume" => Some(ItemKind::Volume),
        "tmpfs" => Some(ItemKind::Tmpfs),
        other => {
            let message = format_args!("{:?} is not a type of mount here", shortened(other));
            problems.error_with(spot, message, "write bind, volume or tmpfs");
            None
        }
    }
}

/// `tmpfs:` of a service: `/PATH` or `/PATH:size=64m,mode=1777`.
pub fn read_tmpfs(spot: &Spot<'_>, problems: &mut Problems) -> Vec<MountSpec> {
    let mut mounts = Vec::new();
    for item in values::one_or_more(spot, problems) {
        let Some(text) = values::word(&item, problems) else { continue };
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        let Some(target) = clean_target(path) else {
            let message = format_args!("{:?} is not a path in the container", shortened(path));
            problems.error_with(&item, message, "write it absolute: it begins with `/`");
            continue;
        };
        let mut bytes_max = None;
        let mut is_read_only = false;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("size", size)) => match super::quantity::parse_bytes(&shortened(size)) {
                    Ok(bytes) => bytes_max = Some(bytes).filter(|bytes| *bytes > 0),
                    Err(error) => problems.error(&item, error),
                },
                None if option == "ro" => is_read_only = true,
                None if matches!(option, "rw" | "noexec" | "nosuid" | "nodev" | "exec" | "dev" | "suid") => {}
                _ => problems.ignored(
                    &item,
                    format_args!("of a tmpfs only `size` is read, not `{}`", shortened(option)),
                ),
            }
        }
        mounts.push(MountSpec { target, is_read_only, source: MountSource::Tmpfs { bytes_max } });
    }
    mounts
}

/// The names under the top-level `volumes:`.
pub fn read_declared(spot: &Spot<'_>, problems: &mut Problems) -> BTreeSet<String> {
    let mut declared = BTreeSet::new();
    for (name, entry) in spot.entries().filter(|(name, _)| !name.starts_with("x-")) {
        if !is_volume_name(name) {
            let message = format_args!("{:?} can't name a volume", shortened(name));
            problems.error_with(&entry, message, "use letters, digits, `-`, `_` and `.`");
        } else if name.starts_with(DIRECTORY_PREFIX) || name.starts_with(ANONYMOUS_PREFIX) {
            let message =
                format_args!("names beginning with {DIRECTORY_PREFIX} and {ANONYMOUS_PREFIX} are tinydc's");
            problems.error_with(&entry, message, "rename it");
        }
        declared.insert(name.to_owned());
        for (_, driver) in supported(&entry, keys::VOLUME, problems) {
            let text = values::text(&driver, problems).unwrap_or("");
            if !matches!(text, "local" | "default" | "") {
                let message = format_args!("there is no volume driver {:?}", shortened(text));
                problems.error_with(&driver, message, "remove it: volumes are directories on one node");
            }
        }
    }
    declared
}

fn is_volume_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=VOLUME_NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(is_inner)
        && !text.starts_with(['-', '.', '_'])
}

/// An absolute path without `.`, `..`, `//` or a slash at the end; `None` if it is none, or `/` itself.
pub fn clean_target(text: &str) -> Option<String> {
    let parts: Vec<&str> =
        text.strip_prefix('/')?.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let is_fine =
        text.len() < PATH_BYTES_MAX && !parts.is_empty() && !parts.contains(&"..") && !text.contains('\0');
    is_fine.then(|| format!("/{}", parts.join("/")))
}

/// An absolute path of a node, which may be `/`.
fn clean_host_path(text: &str) -> Option<String> {
    let is_root = text.split('/').all(|part| matches!(part, "" | "."));
    if is_root { Some("/".to_owned()) } else { clean_target(text) }
}

/// A relative path beginning with `./` or `../`, or `.`; two ways to write the same path become one.
fn clean_relative(text: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." && parts.last().is_some_and(|last| *last != "..") {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    match parts.first() {
        None => ".".to_owned(),
        Some(&"..") => parts.join("/"),
        Some(_) => format!("./{}", parts.join("/")),
    }
}

/// Docker would make a directory there, which no one ever wants in place of `nginx.conf`.
fn looks_like_a_file(path: &str) -> bool {
    const ENDINGS: &[&str] = &[
        "cfg",
        "conf",
        "crt",
        "env",
        "htpasswd",
        "ini",
        "js",
        "json",
        "key",
        "pem",
        "properties",
        "py",
        "sh",
        "sql",
        "toml",
        "txt",
        "xml",
        "yaml",
        "yml",
    ];
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit_once('.').is_some_and(|(stem, ending)| !stem.is_empty() && ENDINGS.contains(&ending))
}

/// A path of one plain name keeps it; any other gets a hash, so that `./a/b` and `./a-b` differ.
fn directory_volume(path: &str) -> String {
    let inner = path.strip_prefix("./").unwrap_or(path);
    let plain: String = inner
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '-' })
        .collect();
    let short = plain.trim_matches(['.', '-']);
    if short == inner && inner.len() <= 60 && !inner.is_empty() {
        return format!("{DIRECTORY_PREFIX}{inner}");
    }
    let short: String = short.chars().take(40).collect();
    format!("{DIRECTORY_PREFIX}{}-{}", if short.is_empty() { "here" } else { &short }, short_hash(path))
}

/// Eight hex digits.
fn short_hash(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_directory_is_its_own() {
        assert_eq!(directory_volume("./data"), "dir-data");
        assert_eq!(directory_volume("./my-data_2"), "dir-my-data_2");
        let paths = ["./a/b", "./a-b", "./a_b", ".", "..", "../a", "./a b", "./a--b", "./.a", "./ä", "./A/b"];
        let names: BTreeSet<String> = paths.iter().map(|path| directory_volume(path)).collect();
        assert_eq!(names.len(), paths.len());
        assert!(names.iter().all(|name| is_volume_name(name)), "{names:?}");
    }

    #[test]
    fn paths_have_one_spelling() {
        let cases = [
            ("./a/", "./a"),
            ("a", "./a"),
            (".", "."),
            ("./", "."),
            ("./a/../b", "./b"),
            ("../x//y", "../x/y"),
        ];
        for (text, expected) in cases {
            assert_eq!(clean_relative(text), expected, "{text}");
        }
        assert_eq!(clean_target("/a//b/./c/").as_deref(), Some("/a/b/c"));
        for text in ["", "/", "a", "/a/../b", "//"] {
            assert_eq!(clean_target(text), None, "{text}");
        }
    }
}

//! What a scenario left behind: namespaces, mounts, cgroups, processes, nft tables, links. There must be nothing.

use super::stage::{dir, until};
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The machine's own links and tables before a scenario.
pub struct Before {
    links: BTreeSet<String>,
    tables: BTreeSet<String>,
}

impl Before {
    pub fn now() -> Before {
        Before { links: links(), tables: tables() }
    }

    /// `tags`: of the nodes that the scenario had, which name everything of theirs.
    pub fn nothing_new(&self, tags: &[String]) -> Result<()> {
        // A killed process is gone a moment after its cgroup.
        let mut found = Vec::new();
        let outcome = until("nothing is left", Duration::from_secs(3), || {
            found = self.found(tags);
            Ok(found.is_empty())
        });
        if outcome.is_err() {
            bail!("left behind: {}", found.join(", "));
        }
        Ok(())
    }

    fn found(&self, tags: &[String]) -> Vec<String> {
        let mut found = Vec::new();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        found.extend(mounted.filter(|path| is_below(path)).map(|path| format!("mount {path}")));
        for path in cgroups(Path::new("/sys/fs/cgroup"), 3) {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if tags.contains(&name) {
                found.push(format!("cgroup {}", path.display()));
            }
        }
        found.extend(processes());
        found.extend(links().difference(&self.links).map(|name| format!("link {name}")));
        let new_tables = tables().into_iter().filter(|table| !self.tables.contains(table));
        found.extend(new_tables.map(|table| format!("nft {table}")));
        if dir().exists() {
            found.push(format!("folder {}", dir().display()));
        }
        found
    }
}

fn is_below(path: &str) -> bool {
    path.strip_prefix(&*dir().to_string_lossy()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn cgroups(folder: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
            if depth > 1 {
                found.extend(cgroups(&entry.path(), depth - 1));
            }
        }
    }
    found
}

fn processes() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.parse::<u32>().is_err() || name == std::process::id().to_string() {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let root = fs::read_link(entry.path().join("root")).unwrap_or_default();
        if line.contains(&format!("{}/", dir().display())) || is_below(&root.to_string_lossy()) {
            found.push(format!("process {name} {line}"));
        }
    }
    found
}

fn links() -> BTreeSet<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn tables() -> BTreeSet<String> {
    let listed = Command::new("nft").args(["list", "tables"]).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(String::from).collect()
}

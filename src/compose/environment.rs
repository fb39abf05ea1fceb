//! `environment:` and `env_file:` of a service.
//!
//! Input: both places and the surroundings. Output: one map. `environment` wins over `env_file`, later files over
//! earlier ones; a name without a value takes it from the surroundings and is left out where they have none.

use super::Surroundings;
use super::dotenv::parse_dotenv;
use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::values;
use crate::model::Gather;
use std::collections::BTreeMap;
use std::error::Error;

/// More is a mistake, and each is read.
const FILES_MAX: usize = 50;

pub fn read_environment(
    entries: &[(&'static str, Spot<'_>)],
    surroundings: &Surroundings<'_>,
    problems: &mut Problems,
) -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, Option<String>> = BTreeMap::new();
    for (_, entry) in entries.iter().filter(|(key, _)| *key == "env_file") {
        let files = match entry.node.entries() {
            [] => values::one_or_more(entry, problems),
            _ => vec![entry.clone()],
        };
        if files.len() > FILES_MAX {
            problems.error(entry, format_args!("names more than {FILES_MAX} files"));
        }
        for file in files.iter().take(FILES_MAX) {
            found.extend(read_file(file, surroundings, problems));
        }
    }
    for (_, entry) in entries.iter().filter(|(key, _)| *key == "environment") {
        found.extend(values::pairs(entry, problems));
    }
    found
        .into_iter()
        .filter_map(|(name, value)| {
            let value = value.or_else(|| surroundings.environment.get(&name).cloned())?;
            Some((name, value))
        })
        .gather()
}

fn read_file(
    spot: &Spot<'_>,
    surroundings: &Surroundings<'_>,
    problems: &mut Problems,
) -> BTreeMap<String, Option<String>> {
    let mut path = None;
    let mut is_required = true;
    if spot.node.entries().is_empty() {
        path = values::word(spot, problems);
    } else {
        for (key, entry) in supported(spot, keys::ENV_FILE, problems) {
            match key {
                "path" => path = values::word(&entry, problems),
                _ => is_required = values::boolean(&entry, problems).unwrap_or(true),
            }
        }
        if spot.node.entry("path").is_none() {
            problems.error_with(spot, "has no `path`", "name the file");
        }
    }
    let Some(path) = path else { return BTreeMap::new() };
    let text = match (surroundings.env_files)(path) {
        Ok(text) => text,
        Err(_) if !is_required => return BTreeMap::new(),
        Err(reason) => {
            let message = format_args!("{:?} can't be read: {reason}", shortened(path));
            problems.error_with(spot, message, "create it, or write `required: false`");
            return BTreeMap::new();
        }
    };
    parse_dotenv(&text, surroundings.environment).unwrap_or_else(|error| {
        let source = error.source().map_or(String::new(), |source| format!(": {source}"));
        problems.error(spot, format_args!("{}: {error}{source}", shortened(path)));
        BTreeMap::new()
    })
}

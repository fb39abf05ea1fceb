//! Single values and lists, typed by the key that reads them.
//!
//! Input: a place in the tree. Output: the value, or `None` and a problem that names the place.

use super::keys::is_neutral;
use super::problem::{Problems, Spot, shortened};
use super::quantity::{QuantityError, parse_bytes, parse_cpu_millis, parse_duration_ms};
use super::tree::Value;
use super::words::split_words;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

pub fn text<'n>(spot: &Spot<'n>, problems: &mut Problems) -> Option<&'n str> {
    let found = spot.node.scalar();
    if found.is_none() {
        problems.error(spot, format_args!("is {}, not a single value", spot.node.kind()));
    }
    found
}

/// Text that is not empty.
pub fn word<'n>(spot: &Spot<'n>, problems: &mut Problems) -> Option<&'n str> {
    let found = text(spot, problems)?;
    if found.is_empty() {
        problems.error_with(spot, "is empty", "write a value, or remove the key");
        return None;
    }
    if found.contains('\0') {
        problems.error(spot, "contains a NUL byte");
        return None;
    }
    Some(found)
}

/// As Compose: the words of YAML 1.1, too.
pub fn boolean(spot: &Spot<'_>, problems: &mut Problems) -> Option<bool> {
    let found = text(spot, problems)?;
    match found.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" => Some(true),
        "false" | "no" | "off" | "n" => Some(false),
        _ => {
            problems.error(spot, format_args!("{:?} is neither true nor false", shortened(found)));
            None
        }
    }
}

pub fn number(spot: &Spot<'_>, range: RangeInclusive<u64>, problems: &mut Problems) -> Option<u64> {
    let found = text(spot, problems)?;
    let is_digits = !found.is_empty() && found.bytes().all(|byte| byte.is_ascii_digit());
    let value = if is_digits { found.parse().ok().filter(|value| range.contains(value)) } else { None };
    if value.is_none() {
        let (from, to) = (range.start(), range.end());
        let shown = shortened(found);
        if *to == u64::MAX {
            problems.error(spot, format_args!("{shown:?} is not a whole number of at least {from}"));
        } else {
            problems.error(spot, format_args!("{shown:?} is not a whole number from {from} to {to}"));
        }
    }
    value
}

fn quantity(
    spot: &Spot<'_>,
    parse: impl FnOnce(&str) -> Result<u64, QuantityError>,
    problems: &mut Problems,
) -> Option<u64> {
    match parse(&shortened(text(spot, problems)?)) {
        Ok(value) => Some(value),
        Err(error) => {
            problems.error(spot, error);
            None
        }
    }
}

pub fn bytes(spot: &Spot<'_>, problems: &mut Problems) -> Option<u64> {
    quantity(spot, parse_bytes, problems)
}

pub fn duration_ms(spot: &Spot<'_>, problems: &mut Problems) -> Option<u64> {
    quantity(spot, parse_duration_ms, problems)
}

pub fn cpu_millis(spot: &Spot<'_>, problems: &mut Problems) -> Option<u64> {
    quantity(spot, parse_cpu_millis, problems)
}

/// A list of single values; anything else is named.
pub fn texts(spot: &Spot<'_>, problems: &mut Problems) -> Option<Vec<String>> {
    if !is_list(spot, problems) {
        return None;
    }
    let items: Vec<_> = spot.items().map(|item| text(&item, problems).map(str::to_owned)).collect();
    items.into_iter().collect()
}

/// One value or a list of them.
pub fn one_or_more<'n>(spot: &Spot<'n>, problems: &mut Problems) -> Vec<Spot<'n>> {
    match spot.node.value {
        Value::Null => Vec::new(),
        Value::Scalar(_) => vec![spot.clone()],
        Value::Sequence(_) => spot.items().collect(),
        Value::Mapping(_) => {
            problems.error(spot, "is a mapping, not a list");
            Vec::new()
        }
    }
}

/// Whether it is a list or nothing; anything else is named.
pub fn is_list(spot: &Spot<'_>, problems: &mut Problems) -> bool {
    let is_list = matches!(spot.node.value, Value::Sequence(_) | Value::Null);
    if !is_list {
        let hint = "write each item on a line of its own, after `- `";
        problems.error_with(spot, format_args!("is {}, not a list", spot.node.kind()), hint);
    }
    is_list
}

/// A command: a list of words, or one text that is split as a shell would.
pub fn command(spot: &Spot<'_>, problems: &mut Problems) -> Option<Vec<String>> {
    let words = match &spot.node.value {
        Value::Null => return None,
        Value::Scalar(text) => match split_words(text) {
            Ok(words) => words,
            Err(error) => {
                problems.error(spot, error);
                return None;
            }
        },
        _ => texts(spot, problems)?,
    };
    if words.iter().any(|word| word.contains('\0')) {
        problems.error(spot, "contains a NUL byte");
        return None;
    }
    Some(words)
}

/// `KEY=VALUE` lines or a mapping, as for labels and environment; `None` where no value stands.
pub fn pairs(spot: &Spot<'_>, problems: &mut Problems) -> BTreeMap<String, Option<String>> {
    let mut pairs = BTreeMap::new();
    match &spot.node.value {
        Value::Mapping(_) => {
            for (key, entry) in spot.entries() {
                if entry.node.is_null() {
                    pairs.insert(key.to_owned(), None);
                } else if let Some(value) = text(&entry, problems) {
                    add_pair(&entry, key, Some(value), &mut pairs, problems);
                }
            }
        }
        _ if is_neutral(spot.node) => {}
        _ if !is_list(spot, problems) => {}
        _ => {
            for item in spot.items() {
                if let Some(line) = text(&item, problems) {
                    match line.split_once('=') {
                        Some((key, value)) => add_pair(&item, key, Some(value), &mut pairs, problems),
                        None => add_pair(&item, line, None, &mut pairs, problems),
                    }
                }
            }
        }
    }
    pairs
}

fn add_pair(
    spot: &Spot<'_>,
    key: &str,
    value: Option<&str>,
    pairs: &mut BTreeMap<String, Option<String>>,
    problems: &mut Problems,
) {
    if key.is_empty() || key.contains(['=', '\0']) {
        problems.error_with(spot, format_args!("{:?} is not a name", shortened(key)), "write NAME=VALUE");
    } else if value.is_some_and(|value| value.contains('\0')) {
        problems.error(spot, "contains a NUL byte");
    } else {
        // Of two, the last counts, as in Compose.
        pairs.insert(key.to_owned(), value.map(str::to_owned));
    }
}

/// Sets what two keys may say, if they don't contradict each other.
pub fn settle<T: PartialEq>(slot: &mut Option<T>, value: T, spot: &Spot<'_>, problems: &mut Problems) {
    match slot {
        Some(first) if *first != value => {
            problems.error_with(
                spot,
                "contradicts another key of this service that says the same",
                "keep one of them",
            );
        }
        _ => *slot = Some(value),
    }
}

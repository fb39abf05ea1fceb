//! `depends_on:` of a service, and whether all of them together can ever start.
//!
//! Input: the places, then the services. Output: conditions by service; unknown services and cycles become problems.

use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::tree::Value;
use super::values;
use crate::model::{DependencyCondition, Gather, ServiceSpec};
use std::collections::{BTreeMap, BTreeSet};

pub fn read_depends(spot: &Spot<'_>, problems: &mut Problems) -> BTreeMap<String, DependencyCondition> {
    let mut depends = BTreeMap::new();
    if !matches!(spot.node.value, Value::Mapping(_)) {
        for name in values::texts(spot, problems).unwrap_or_default() {
            depends.insert(name, DependencyCondition::Started);
        }
        return depends;
    }
    for (name, entry) in spot.entries() {
        let mut condition = DependencyCondition::Started;
        for (key, inner) in supported(&entry, keys::DEPENDENCY, problems) {
            if key == "condition" {
                condition = read_condition(&inner, problems).unwrap_or(condition);
            } else {
                // What it means is asked again when all services are known.
                values::boolean(&inner, problems);
            }
        }
        depends.insert(name.to_owned(), condition);
    }
    depends
}

fn read_condition(spot: &Spot<'_>, problems: &mut Problems) -> Option<DependencyCondition> {
    match values::text(spot, problems)? {
        "service_started" => Some(DependencyCondition::Started),
        "service_healthy" => Some(DependencyCondition::Healthy),
        "service_completed_successfully" => Some(DependencyCondition::Completed),
        other => {
            let message = format_args!("{:?} is not a condition", shortened(other));
            let hint = "write service_started, service_healthy or service_completed_successfully";
            problems.error_with(spot, message, hint);
            None
        }
    }
}

/// Removes dependencies on services that are not there and need not be; names the others and every cycle.
///
/// `left_out` are services that stand in the file, but are not deployed.
pub fn check_depends(
    services: &mut BTreeMap<String, ServiceSpec>,
    spots: &BTreeMap<String, Spot<'_>>,
    left_out: &BTreeSet<String>,
    problems: &mut Problems,
) {
    let names: BTreeSet<String> = services.keys().cloned().gather();
    for (name, service) in services.iter_mut() {
        let Some(spot) = spots.get(name) else { continue };
        service.depends_on.retain(|wanted, _| {
            let is_known = names.contains(wanted);
            if !is_known && is_required(spot, wanted) {
                unknown(&dependency_spot(spot, wanted), wanted, &names, left_out, problems);
            }
            is_known
        });
    }
    for cycle in find_cycles(services) {
        if let Some(spot) = cycle.first().and_then(|first| spots.get(*first)) {
            let spot = cycle.get(1).map_or_else(|| spot.clone(), |next| dependency_spot(spot, next));
            let message = format_args!("services wait for one another: {}", cycle.join(" → "));
            problems.error_with(&spot, message, "remove one of these dependencies");
        }
    }
}

fn unknown(
    spot: &Spot<'_>,
    wanted: &str,
    names: &BTreeSet<String>,
    left_out: &BTreeSet<String>,
    problems: &mut Problems,
) {
    let shown = shortened(wanted);
    if left_out.contains(wanted) {
        let message = format_args!("the service {shown:?} is not deployed: its profile is not active");
        problems.error_with(spot, message, "set COMPOSE_PROFILES, or write `required: false`");
        return;
    }
    let hint = match keys::nearest(wanted, names.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "add the service, or remove the dependency".to_owned(),
    };
    problems.error_with(spot, format_args!("there is no service {shown:?}"), hint);
}

fn depends_spot<'n>(service: &Spot<'n>) -> Option<Spot<'n>> {
    service.entries().find(|(key, _)| *key == "depends_on").map(|(_, spot)| spot)
}

/// Where the dependency stands; the service if it can't be told.
fn dependency_spot<'n>(service: &Spot<'n>, wanted: &str) -> Spot<'n> {
    let Some(depends) = depends_spot(service) else { return service.clone() };
    let item = depends.items().find(|item| item.node.scalar() == Some(wanted));
    let entry = || depends.entries().find(|(key, _)| *key == wanted).map(|(_, spot)| spot);
    item.or_else(entry).unwrap_or(depends.clone())
}

fn is_required(service: &Spot<'_>, wanted: &str) -> bool {
    let spot = dependency_spot(service, wanted);
    let required = spot.node.entry("required").and_then(|entry| entry.value.scalar());
    !required.is_some_and(|text| matches!(text.to_ascii_lowercase().as_str(), "false" | "no" | "off" | "n"))
}

/// Each cycle once, beginning and ending with its first name in order.
fn find_cycles(services: &BTreeMap<String, ServiceSpec>) -> Vec<Vec<&str>> {
    let mut done: BTreeSet<&str> = BTreeSet::new();
    let mut cycles = Vec::new();
    for start in services.keys() {
        let mut path: Vec<&str> = Vec::new();
        // A stack instead of recursion: what is still to do below each name of the path.
        let mut todo: Vec<Vec<&str>> = vec![vec![start]];
        while let Some(level) = todo.last_mut() {
            let Some(name) = level.pop() else {
                todo.pop();
                done.extend(path.pop());
                continue;
            };
            if let Some(from) = path.iter().position(|visited| *visited == name) {
                let mut cycle = path[from..].to_vec();
                let smallest = cycle.iter().enumerate().min_by_key(|(_, name)| **name).map_or(0, |(i, _)| i);
                cycle.rotate_left(smallest);
                cycle.push(cycle[0]);
                cycles.push(cycle);
            } else if !done.contains(name) {
                path.push(name);
                let wanted = services.get(name).map(|service| service.depends_on.keys().rev());
                todo.push(wanted.into_iter().flatten().map(String::as_str).collect());
            }
        }
    }
    cycles
}
